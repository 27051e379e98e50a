"""What only nnU-Net knows of trainers and GPUs, asked once in a process of its own: it loads PyTorch."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def ask(preprocessed: Path, models: list[list[str]]) -> dict[str, Any]:
    """Number of GPUs, and epochs of each trainer.

    Args:
        preprocessed: the dataset's folder.
        models: trainer, plans and configuration of each.

    Returns:
        ``gpus``; ``epochs``, one number per model, None where the trainer cannot be made; ``missing``, trainers that
        nnU-Net does not find.
    """
    import torch
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    epochs: list[int | None] = []
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        # A trainer makes its results folder and a log when it is made.
        module.nnUNet_results = folder
        for trainer, plans, configuration in models:
            try:
                found = recursive_find_trainer_class_by_name(trainer)
            except RuntimeError:
                missing.append(trainer)
                epochs.append(None)
                continue
            content = json.loads((preprocessed / f"{plans}.json").read_text(encoding="utf-8"))
            dataset_json = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
            try:
                made = found(content, configuration, 0, dataset_json, device=torch.device("cpu"))
                epochs.append(int(made.num_epochs))
            except Exception:  # the training will say it better than this probe can
                epochs.append(None)
    return {"gpus": torch.cuda.device_count(), "epochs": epochs, "missing": sorted(set(missing))}


def main() -> None:
    """Answer the question on stdin, on the last line of stdout."""
    question = json.loads(sys.stdin.read())
    with contextlib.redirect_stdout(io.StringIO()):
        answer = ask(Path(question["preprocessed"]), question["models"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
