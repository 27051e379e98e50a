"""Which network makes the most of two modalities: phantom cases, equal budgets, several seeds, one table.

H2ASeg, ISANet, CIPA and nnU-Net's U-Net are trained with both modalities, with PET alone and with CT alone (the other
channel is one number everywhere, so that the network is the same), by nnU-Net's own pipeline, with the same number of
steps, patches and batches. nnU-Net's U-Net is trained twice: by nnU-Net's recipe, and by the optimiser that the fusion
networks use. A killed run goes on where it was: every finished training is a JSON file.

    python benchmarks/fusion.py [--size small|full] [--seeds 0 1 2] [--only H2ASeg/both …] [--table docs/fusion.md]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fusion_cases import INPUTS, write_dataset
from scipy.stats import t as students_t

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ROWS = ("H2ASeg", "ISANet", "CIPA", "U-Net", "U-Net, AdamW")
#: Where each table begins and ends in the document.
MARK = "<!-- fusion {size}: {end} -->"


@dataclass(frozen=True)
class Size:
    """How much is trained; the same for every row.

    Attributes:
        features: of the U-Net, H2ASeg and ISANet; None for those that each is published with.
        widths: of CIPA.
    """

    training: int
    validation: int
    patch: tuple[int, ...]
    batch: int
    epochs: int
    steps_per_epoch: int
    features: tuple[int, ...] | None
    widths: tuple[int, ...] | None


SIZES = {
    "small": Size(24, 16, (24, 24, 24), 2, 12, 20, (6, 12, 24), (8, 8, 16, 16)),
    "full": Size(200, 100, (32, 32, 32), 8, 100, 250, None, None),
}


#: To be raised when a change to a network, a recipe or this file makes earlier results incomparable.
VERSION = 1


def made_with(size: Size) -> str:
    """What results depend on besides row, inputs and seed; results of anything else are made again."""
    cases = Path(__file__).with_name("fusion_cases.py").read_bytes()
    return hashlib.sha256(f"{VERSION} {size}".encode() + cases).hexdigest()[:16]


def prepare(root: Path, size: Size, inputs: str) -> tuple[Path, dict[str, Any]]:
    """Raw dataset, nnU-Net's plans and preprocessed files for one kind of input; what is there is kept.

    Returns:
        The preprocessed folder, and dataset.json.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset, preprocess_dataset

    number = 751 + INPUTS.index(inputs)
    name = f"Dataset{number}_Fusion{inputs}"
    raw, done = root / "nnUNet_raw" / name, root / "nnUNet_preprocessed" / name
    ready = done / "ready"
    if not ready.exists() or ready.read_text() != made_with(size):
        shutil.rmtree(raw, ignore_errors=True)
        shutil.rmtree(done, ignore_errors=True)
        write_dataset(raw, size.training, size.validation, inputs)
        extractor = DatasetFingerprintExtractor(number, 1)
        extractor.num_foreground_voxels_for_intensitystats = 1e6
        extractor.run(overwrite_existing=True)
        plan_experiment_dataset(number)
        preprocess_dataset(number, "nnUNetPlans", ("3d_fullres",), (1,))
        ready.write_text(made_with(size))
    return done, json.loads((done / "dataset.json").read_text())


def plans_for(folder: Path, dataset_json: dict[str, Any], size: Size, row: str) -> dict[str, Any]:
    """nnU-Net's plans with the network of a row and the patch and batch of all."""
    from nnunet_h2a.planning.make_plans import STOCK, make_plans

    network = STOCK if row.startswith("U-Net") else row
    features = size.widths if row == "CIPA" else size.features
    stages = None if row == "CIPA" or size.features is None else len(size.features)
    return make_plans(
        json.loads((folder / "nnUNetPlans.json").read_text()), dataset_json, network=network, plans_name="Fusion",
        configurations=["3d_fullres"], patch_size=size.patch, batch_size=size.batch, n_stages=stages, features=features,
    )  # fmt: skip


def trainer_for(row: str, size: Size, seed: int) -> type:
    """The row's trainer, cut to the benchmark's length."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_h2a.trainers import TRAINERS, nnUNetTrainerH2ASeg

    base = nnUNetTrainer if row.startswith("U-Net") else TRAINERS[f"nnUNetTrainer{row}"]

    class Trainer(base):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch = size.epochs, size.steps_per_epoch
            self.num_val_iterations_per_epoch, self.disable_checkpointing = 2, True
            if row.endswith("AdamW"):
                self.initial_lr = nnUNetTrainerH2ASeg.recipe.learning_rate

        def configure_optimizers(self):
            if row.endswith("AdamW"):
                return nnUNetTrainerH2ASeg.recipe.build(self.network.parameters(), self.num_epochs)
            return super().configure_optimizers()

        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
            rotation, dummy, initial, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            # Mirrored in training, not in prediction, which would take eight times as long.
            self.inference_allowed_mirroring_axes = None
            return rotation, dummy, initial, axes

        def plot_network_architecture(self):
            pass

    Trainer.__name__ = f"nnUNetTrainer{''.join(c for c in row if c.isalnum())}Seed{seed}"
    return Trainer


def train(root: Path, size: Size, row: str, inputs: str, seed: int, log: Path) -> dict[str, Any]:
    """Train one network and validate it; Dice of every validation case."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with log.open("w") as file, redirect_stdout(file):
        folder, dataset_json = prepare(root, size, inputs)
        # A worker process would draw its random numbers from the system.
        os.environ["nnUNet_n_proc_DA"] = "0"
        plans = plans_for(folder, dataset_json, size, row)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        trainer = trainer_for(row, size, seed)(
            plans | {"continue_training": False}, "3d_fullres", 0, dataset_json, device
        )
        started = time.monotonic()
        trainer.run_training()
        os.environ["nnUNet_n_proc_DA"] = "1"
        seconds = time.monotonic() - started
        trainer.perform_actual_validation()
        parameters = sum(p.numel() for p in trainer.network.parameters())
        results = Path(trainer.output_folder)
    summary = json.loads((results / "validation" / "summary.json").read_text())
    scores = {
        Path(c["prediction_file"]).name.split(".")[0]: c["metrics"]["1"]["Dice"] for c in summary["metric_per_case"]
    }
    shutil.rmtree(results)
    return {
        "made_with": made_with(size), "dice": scores, "seconds": seconds, "parameters": parameters,
        "device": device.type,
    }  # fmt: skip


def jobs(seeds: list[int], only: list[str] | None) -> Iterator[tuple[str, str, int]]:
    """Row, inputs and seed, seed by seed, so that a run that is cut short has every row."""
    for seed in seeds:
        for inputs in INPUTS:
            for row in ROWS:
                if not only or f"{row}/{inputs}" in only or row in only:
                    yield row, inputs, seed


def result_path(folder: Path, row: str, inputs: str, seed: int) -> Path:
    return folder / f"{''.join(c for c in row if c.isalnum())}_{inputs}_{seed}.json"


def finished(path: Path, size: Size) -> bool:
    """Whether a result is there and belongs to the benchmark as it is."""
    return path.exists() and json.loads(path.read_text()).get("made_with") == made_with(size)


def interval(values: list[float]) -> str:
    """Mean and 95 % confidence interval of the mean over seeds, by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 3:
        return f"{mean:.3f} ({len(values)} seed{'s' * (len(values) > 1)})"
    half = students_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} [{max(0, mean - half):.3f}, {min(1, mean + half):.3f}]"


def table(folder: Path, size: Size) -> str:
    """All rows in Markdown, those that are not done yet included."""
    heads = ["PET and CT" if inputs == "both" else f"{inputs} alone" for inputs in INPUTS]
    lines = [f"| network | {' | '.join(heads)} | parameters |", "|---|" + "---|" * (len(INPUTS) + 1)]
    for row in ROWS:
        cells, parameters = [], 0
        for inputs in INPUTS:
            stem = result_path(folder, row, inputs, 0).stem.removesuffix("0")
            paths = [path for path in sorted(folder.glob(f"{stem}[0-9]*.json")) if finished(path, size)]
            found = [json.loads(path.read_text()) for path in paths]
            means = [statistics.fmean(item["dice"].values()) for item in found]
            cells.append(interval(means) if means else "not done")
            parameters = found[0]["parameters"] if found else parameters
        lines.append(f"| {row} | {' | '.join(cells)} | {f'{parameters:,}' if parameters else ''} |")
    return "\n".join(lines)


def write_table(document: Path, size_name: str, text: str | None) -> None:
    """Put a table between its marks in a document; None only looks for them."""
    begin, end = (MARK.format(size=size_name, end=word) for word in ("begin", "end"))
    content = document.read_text()
    before, _, rest = content.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document} has no lines {begin} and {end} to put the table between")
    if text is not None:
        document.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="small on a CPU, full on a GPU [what there is]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="ROW[/INPUT]", help="rows, as in 'H2ASeg' or 'U-Net/PET'")
    parser.add_argument("--work", type=Path, default=Path("fusion_benchmark"), help="folder of images [%(default)s]")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "fusion_results", help="[%(default)s]")
    parser.add_argument("--table", type=Path, help="Markdown document to put the table into")
    parser.add_argument("--table-only", action="store_true", help="write the table of what is done, and train nothing")
    arguments = parser.parse_args()
    known = {*ROWS, *(f"{row}/{inputs}" for row in ROWS for inputs in INPUTS)}
    if unknown := sorted(set(arguments.only or []) - known):
        parser.error(f"--only {', '.join(unknown)}: rows are {', '.join(ROWS)}, inputs {', '.join(INPUTS)}")
    if min(arguments.seeds) < 0:
        parser.error("--seeds: give numbers from 0 on")
    if arguments.table and not arguments.table.is_file():
        parser.error(f"--table {arguments.table}: no such file")

    os.environ["nnUNet_def_n_proc"] = "1"
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    import torch

    size_name = arguments.size or ("full" if torch.cuda.is_available() else "small")
    if arguments.table:
        # Now, and not after hours.
        write_table(arguments.table, size_name, None)
    results = arguments.results / size_name
    results.mkdir(parents=True, exist_ok=True)
    work = arguments.work / size_name
    os.environ |= {name: str((work / name).resolve()) for name in FOLDERS}
    for name in FOLDERS:
        (work / name).mkdir(parents=True, exist_ok=True)
    size = SIZES[size_name]
    todo = list(jobs(arguments.seeds, arguments.only))
    for number, (row, inputs, seed) in enumerate(todo, 1):
        path = result_path(results, row, inputs, seed)
        if not finished(path, size) and not arguments.table_only:
            print(f"{number}/{len(todo)}  {row}, {inputs}, seed {seed}", flush=True)
            result = train(work, size, row, inputs, seed, work / f"{path.stem}.log")
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(part, path)
            print(f"    Dice {statistics.fmean(result['dice'].values()):.3f}, {result['seconds']:.0f} s", flush=True)
            if arguments.table:
                write_table(arguments.table, size_name, table(results, size))
    text = table(results, size)
    print(text)
    if arguments.table:
        write_table(arguments.table, size_name, text)


if __name__ == "__main__":
    main()
