"""The demo: images -> nnU-Net dataset -> two trainings -> predictions -> ensemble -> scores and pictures."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_h2a.command import CommandError
from nnunet_h2a.demo.runner import CommandRunner
from nnunet_h2a.phantom import write_autopet
from nnunet_h2a.reporting.mip import write_mip_png

PHANTOM_PATIENTS, PHANTOM_TEST_PATIENTS, PHANTOM_SEED = 16, 4, 5
DATASET = {"phantom": (901, "Phantom"), "sts": (902, "STSDemo")}

#: A network small enough for a CPU: four stages from 4 channels, patches of 32 voxels a side.
DEMO_SIZES = ("--patch-size", "32", "32", "32", "--n-stages", "4", "--features", "4", "8", "16", "32")
CONFIGURATION = "3d_fullres"
ENSEMBLE = "ensemble"
#: Exit code of a converter that has converted some patients and refused others.
SOME_REFUSED = 1
#: Marks a folder as a demo's, which the next demo may empty.
MARKER = ".h2a_demo"


@dataclass(frozen=True)
class DemoModel:
    """One of the two networks that the demo trains."""

    name: str
    network: str
    trainer: str
    plans: str


MODELS = (
    DemoModel("nnUNet", "stock", "nnUNetTrainerDemo", "nnUNetDemoPlans"),
    DemoModel("H2ASeg", "H2ASeg", "nnUNetTrainerH2ASegDemo", "nnUNetH2ASegDemoPlans"),
)


def run_demo(output: Path, sts: Path | None = None, device: str | None = None) -> int:
    """Run the demo.

    Args:
        output: folder for everything: data, nnU-Net's folders, predictions, ``summary.json``, ``commands.txt``,
            pictures. What an earlier demo left there is removed.
        sts: folder with DICOM of Soft-tissue-Sarcoma patients; None makes phantoms.
        device: ``cuda``, ``cpu`` or ``mps``; None takes a GPU where there is one.

    Returns:
        Exit code 0.

    Raises:
        CommandError: where a step fails, or ``output`` holds something else.
    """
    started = time.monotonic()
    if sts is not None and not sts.is_dir():
        raise CommandError(f"--sts {sts} is not a folder")
    output = output.resolve()
    _clear(output)
    runner = CommandRunner(output)
    (output / MARKER).touch()
    device = device or _default_device()
    number, name = DATASET["phantom" if sts is None else "sts"]
    dataset = runner.folders["nnUNet_raw"] / f"Dataset{number:03d}_{name}"
    if sts is None:
        _phantom_dataset(runner, number, name)
    else:
        _sts_dataset(runner, sts, number, name, dataset)
    predictions = _train_and_predict(runner, number, dataset, device)
    summary = _score(runner, dataset / "labelsTs", predictions)
    _draw(dataset, predictions, runner.output / "pictures")
    summary["seconds"] = round(time.monotonic() - started, 1)
    (runner.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(summary, runner, is_phantom=sts is None)
    return 0


def _clear(output: Path) -> None:
    """Empty the folder of an earlier demo; leave a folder of anything else alone."""
    if output.exists() and not output.is_dir():
        raise CommandError(f"-o {output} is a file: name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / MARKER).is_file():
        raise CommandError(f"-o {output} is not empty and not from a demo: name another folder")
    shutil.rmtree(output)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _phantom_dataset(runner: CommandRunner, number: int, name: str) -> None:
    source = runner.output / "phantom"
    runner.note(f"{PHANTOM_PATIENTS} phantom patients, written as the autoPET NIfTI release is, into {source}")
    studies = write_autopet(source, PHANTOM_PATIENTS, seed=PHANTOM_SEED)
    patients = list(dict.fromkeys(study.parent.name for study in studies))
    held_out = patients[-PHANTOM_TEST_PATIENTS:]
    runner.run("h2a_convert_autopet", "-i", source, "-d", str(number), "--name", name, "-np", "1", "--test", *held_out)


def _sts_dataset(runner: CommandRunner, sts: Path, number: int, name: str, dataset: Path) -> None:
    runner.note(
        "real patients: trained and tested on what is given, a few hundred steps of a tiny network. "
        "This shows the pipeline, not accuracy."
    )
    runner.run(
        "h2a_convert_sts", "-i", sts.resolve(), "-d", str(number), "--name", name, "--grid", "pet", "-np", "1",
        accepted=(0, SOME_REFUSED),
    )  # fmt: skip
    runner.note("the same patients are tested on: images and labels are linked to imagesTs and labelsTs")
    for kind in ("images", "labels"):
        target = dataset / f"{kind}Ts"
        target.mkdir(exist_ok=True)
        for source in sorted((dataset / f"{kind}Tr").iterdir()):
            try:
                os.link(source, target / source.name)
            except OSError:
                shutil.copy2(source, target / source.name)


def _train_and_predict(runner: CommandRunner, number: int, dataset: Path, device: str) -> dict[str, Path]:
    """Plan, train and predict both models and their ensemble; the folder of each one's predictions by name."""
    runner.run(
        "nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", CONFIGURATION, "--verify_dataset_integrity",
        "-npfp", "1", "-np", "1", environment={"nnUNet_n_proc_DA": "1"},
    )  # fmt: skip
    predictions = {model.name: runner.output / "predictions" / model.name for model in MODELS}
    for model in MODELS:
        runner.run("h2a_plan", "-d", str(number), "--network", model.network, *DEMO_SIZES, "-o", model.plans)
    for model in MODELS:
        runner.run(
            "nnUNetv2_train", str(number), CONFIGURATION, "0", "-tr", model.trainer, "-p", model.plans,
            "-device", device, environment={"nnUNet_n_proc_DA": "0"},
        )  # fmt: skip
    for model in MODELS:
        runner.run(
            "nnUNetv2_predict", "-i", dataset / "imagesTs", "-o", predictions[model.name], "-d", str(number),
            "-c", CONFIGURATION, "-f", "0", "-tr", model.trainer, "-p", model.plans, "-device", device,
            "-npp", "0", "-nps", "0", "--save_probabilities",
        )  # fmt: skip
    members = list(predictions.values())
    predictions[ENSEMBLE] = runner.output / "predictions" / ENSEMBLE
    runner.run("nnUNetv2_ensemble", "-i", *members, "-o", predictions[ENSEMBLE], "-np", "1")
    return predictions


def _score(runner: CommandRunner, truth: Path, predictions: dict[str, Path]) -> dict:
    models = {}
    for name, folder in predictions.items():
        scores = runner.output / "scores" / f"{name}.json"
        runner.run("h2a_evaluate", "-ref", truth, "-pred", folder, "-o", scores, "-np", "1")
        content = json.loads(scores.read_text(encoding="utf-8"))
        cases = {entry["case"]: entry["dice"] for entry in content["cases"]}
        models[name] = {"cases": cases, "mean_dice": content["mean"]["dice"]}
    return {"models": models}


def _draw(dataset: Path, predictions: dict[str, Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for truth in sorted((dataset / "labelsTs").glob("*.nii.gz")):
        case = truth.name.removesuffix(".nii.gz")
        write_mip_png(
            dataset / "imagesTs" / f"{case}_0001.nii.gz", truth,
            {name: folder / truth.name for name, folder in predictions.items()}, target / f"{case}.png", title=case,
        )  # fmt: skip


def _report(summary: dict, runner: CommandRunner, is_phantom: bool) -> None:
    names = list(summary["models"])
    cases = list(summary["models"][names[0]]["cases"])
    width = max(len(case) for case in [*cases, "mean of cases with lesions"])
    print(
        "\nDice on "
        + ("held-out phantom cases" if is_phantom else "the patients given: this shows the pipeline, not accuracy")
    )
    _row("case", names, width)
    for case in cases:
        _row(case, [_number(summary["models"][name]["cases"][case]) for name in names], width)
    _row("mean of cases with lesions", [_number(summary["models"][name]["mean_dice"]) for name in names], width)
    print(f"\n{summary['seconds']:.0f} s in all; scores: {runner.output / 'scores'}")
    print(f"pictures: {runner.output / 'pictures'}; commands: {runner.script}; logs: {runner.logs}")


def _row(first: str, rest: Sequence[str], width: int) -> None:
    print(f"{first:<{width}}" + "".join(f"{text:>12}" for text in rest))


def _number(score: float | None) -> str:
    return "no lesion" if score is None else f"{score:.3f}"
