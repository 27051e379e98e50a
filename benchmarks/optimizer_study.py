"""Which optimiser, learning rate and warm-up does a network learn with, within nnU-Net's schedule?

Trains one of our trainers on a preprocessed phantom with a shortened schedule (polynomial decay as always), one
setting and seed a run, and appends the held-out Dice to a file of JSON lines. Runs that are in the file are skipped,
so the study can be stopped and started again. docs/optimizer.md holds the table.

    h2a_demo -o demo_output                    # its dataset and plans serve; point the nnUNet_* variables below it
    python benchmarks/optimizer_study.py -d 901 -o study.jsonl --seeds 0 1 2
    python benchmarks/optimizer_study.py -o study.jsonl --table

``-tr nnUNetTrainerISANet -p …`` and ``-tr nnUNetTrainerCIPA -c 2d -p …`` study the others, each with its own file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_def_n_proc", "1")

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_h2a.trainers import TRAINERS
from nnunet_h2a.training.fusion_trainer import FusionTrainer
from nnunet_h2a.training.recipe import OptimizerRecipe

#: Name, and recipe with the warm-up in tenths of the training.
SETTINGS = {
    "SGD 1e-2 (nnU-Net)": OptimizerRecipe("SGD", 1e-2, 3e-5),
    "SGD 1e-2, warm-up": OptimizerRecipe("SGD", 1e-2, 3e-5, 1000),
    "SGD 1e-3": OptimizerRecipe("SGD", 1e-3, 3e-5),
    "AdamW 1e-4 (paper's rate)": OptimizerRecipe("AdamW", 1e-4, 1e-5),
    "AdamW 3e-4, warm-up": OptimizerRecipe("AdamW", 3e-4, 1e-5, 1000),
    "AdamW 1e-3": OptimizerRecipe("AdamW", 1e-3, 1e-5),
    "AdamW 1e-3, warm-up": OptimizerRecipe("AdamW", 1e-3, 1e-5, 1000),
    "AdamW 3e-3, warm-up": OptimizerRecipe("AdamW", 3e-3, 1e-5, 1000),
    "AdamW 6e-5, decay 1e-2 (CIPA's paper)": OptimizerRecipe("AdamW", 6e-5, 1e-2, 1000),
    "AdamW 3e-4, decay 1e-2, warm-up": OptimizerRecipe("AdamW", 3e-4, 1e-2, 1000),
    "AdamW 1e-3, decay 1e-2, warm-up": OptimizerRecipe("AdamW", 1e-3, 1e-2, 1000),
}


def held_out_dice(trainer: FusionTrainer) -> float:
    """Mean Dice of sliding-window predictions over the validation cases that hold a lesion."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, None,
    )  # fmt: skip
    _, keys = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, keys)
    scores = []
    for key in keys:
        data, segmentation, _, _ = dataset.load_case(key)
        truth = np.asarray(segmentation[:][0]) > 0
        if not truth.any():
            continue
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(data[:])))
        predicted = logits.argmax(0).numpy() > 0
        scores.append(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
    return float(np.mean(scores))


def run(arguments: argparse.Namespace, setting: str, seed: int) -> dict:
    """Train one setting with one seed."""
    folder = next(Path(str(nnUNet_preprocessed)).glob(f"Dataset{arguments.dataset:03d}_*"))
    plans = json.loads((folder / f"{arguments.plans}.json").read_text())
    dataset_json = json.loads((folder / "dataset.json").read_text())
    plans["continue_training"] = False
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    trainer_class = type("StudyTrainer", (TRAINERS[arguments.trainer],), {"recipe": SETTINGS[setting]})
    trainer = trainer_class(plans, arguments.configuration, 0, dataset_json, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch = arguments.epochs, arguments.iterations
    trainer.num_val_iterations_per_epoch = 5
    trainer.disable_checkpointing = True
    started = time.time()
    trainer.run_training()
    return {
        "setting": setting,
        "seed": seed,
        "steps": arguments.epochs * arguments.iterations,
        "dice": held_out_dice(trainer),
        "last_loss": float(trainer.logger.get_value("train_losses", step=-1)),
        "seconds": round(time.time() - started),
    }


def table(file: Path) -> str:
    """Markdown table of a file of results: one row a setting, one column a seed."""
    results = [json.loads(line) for line in file.read_text().splitlines()]
    seeds = sorted({r["seed"] for r in results})
    rows = ["| setting | " + " | ".join(f"seed {s}" for s in seeds) + " | mean | last training loss |"]
    rows.append("|---" * (len(seeds) + 3) + "|")
    for setting in SETTINGS:
        runs = {r["seed"]: r for r in results if r["setting"] == setting}
        if runs:
            scores = [f"{runs[s]['dice']:.2f}" if s in runs else "–" for s in seeds]
            mean, loss = (np.mean([r[key] for r in runs.values()]) for key in ("dice", "last_loss"))
            rows.append(f"| {setting} | {' | '.join(scores)} | {mean:.2f} | {loss:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", type=int, default=901)
    parser.add_argument("-p", "--plans", default="nnUNetH2ASegDemoPlans")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-tr", "--trainer", default="nnUNetTrainerH2ASeg", choices=TRAINERS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of what is in the file, train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.output))
        return
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        for setting in arguments.settings:
            lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
            done = {(r["setting"], r["seed"], r["steps"]) for r in map(json.loads, lines)}
            if (setting, seed, arguments.epochs * arguments.iterations) in done:
                continue
            result = run(arguments, setting, seed)
            with arguments.output.open("a") as handle:
                handle.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
