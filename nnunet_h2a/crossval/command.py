"""``h2a_crossval``: train, validate and score several trainers on all folds, on every GPU, and go on when stopped."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import (
    CommandError,
    add_model_arguments,
    check_targets,
    dataset_folder,
    nnunet_folder,
    read_plans,
    run_command,
    write_whole,
)
from nnunet_h2a.crossval.jobs import Job, check_first_stages, read_folds, with_plans, write_missing_splits
from nnunet_h2a.crossval.run_job import BUSY, Settings, command, reason, run_job

SOME_FAILED = 1


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_crossval``."""
    parser = argparse.ArgumentParser(
        prog="h2a_crossval",
        # An abbreviated flag would not be found again in what the SLURM script repeats.
        allow_abbrev=False,
        description="Train, validate and score every (trainer, fold) that is not finished yet with nnU-Net's own "
        "commands, one at a time on every GPU. Started again it goes on, also after it was killed. Exit code 1 if a "
        "job failed, 2 if nothing could be done; with --job also 75 if another run works on it.",
    )
    add_model_arguments(parser)
    parser.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), default="cuda", help="[%(default)s]")
    parser.add_argument(
        "--npz", action="store_true", help="keep probabilities: nnUNetv2_find_best_configuration needs them"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dask", metavar="tcp://HOST:PORT", help="run on the workers of this cluster, a job on each")
    where.add_argument("--slurm", type=Path, metavar="OUT.sh",
                       help="run nothing: write an array script for sbatch, a task per job")  # fmt: skip
    where.add_argument("--job", type=int, metavar="N", help="run the N-th job alone: what the SLURM script calls")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_crossval``."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _crossval(build_parser().parse_args(given), given))


def _crossval(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    preprocessed = dataset_folder(nnunet_folder("nnUNet_preprocessed"), arguments.dataset)
    results = nnunet_folder("nnUNet_results")
    dataset_json, jobs = _jobs(arguments, preprocessed, results)
    if not isinstance(dataset_json.get("file_ending"), str):
        raise CommandError(f"{preprocessed / 'dataset.json'} has no file_ending: copy the raw dataset's here")
    settings = Settings(arguments.device, arguments.npz, dataset_json["file_ending"])
    # A script for a cascade's second stage may be written before its first has run.
    if arguments.slurm is None:
        check_first_stages(jobs, settings.file_ending, settings.probabilities)
    if arguments.job is not None:
        if not 0 <= arguments.job < len(jobs):
            raise CommandError(f"--job {arguments.job}: there are the jobs 0 to {len(jobs) - 1}")
        # Ctrl-C also where a shell has it ignored: it comes from the process that has started this one.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _end_when_asked()
        job = jobs[arguments.job]
        code = run_job(job, settings, {})
        if code == BUSY:
            print(f"{job.model} fold {job.fold}: another run works on it", file=sys.stderr)
        elif code:
            print(f"failed: {job.model} fold {job.fold}: {reason(job)} ({job.log})", file=sys.stderr)
        return code if code in (0, BUSY) else SOME_FAILED
    models = list(dict.fromkeys((job.trainer, job.plans, job.configuration) for job in jobs))
    answer = _ask(preprocessed, models)
    if answer["missing"]:
        raise CommandError(f"nnU-Net finds no trainer {', '.join(answer['missing'])}: see  h2a_doctor -tr NAME")
    if arguments.slurm is not None:
        return _write_slurm(arguments.slurm, jobs, given, arguments.device)
    from nnunet_h2a.crossval.schedule import Table, run_all
    from nnunet_h2a.crossval.slots import DaskPlaces, LocalPlaces

    places = (
        DaskPlaces(arguments.dask, settings) if arguments.dask is not None
        else LocalPlaces(arguments.device, answer["gpus"], [command("h2a_crossval"), *given])
    )  # fmt: skip
    _end_when_asked()
    epochs = {"__".join(model): number for model, number in zip(models, answer["epochs"], strict=True)}
    failed = run_all(jobs, places, settings, Table(epochs))
    for job, why in failed.items():
        print(f"failed: {job.model} fold {job.fold}: {why} ({job.log})", file=sys.stderr)
    return SOME_FAILED if failed else 0


def _end_when_asked() -> None:
    """What batch systems, ``kill`` and a closed terminal send ends this command as Ctrl-C does: with its children."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup has the latter ignored, and means it.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _jobs(arguments: argparse.Namespace, preprocessed: Path, results: Path) -> tuple[dict[str, Any], list[Job]]:
    """All jobs, fold by fold, so that after each fold the trainers can be compared on it; and dataset.json."""
    models = []
    for trainer, name in with_plans(arguments.trainers, arguments.plans):
        content, dataset_json = read_plans(preprocessed, name)
        for configuration in dict.fromkeys(arguments.configurations):
            if configuration not in content["configurations"]:
                raise CommandError(
                    f"plans {name} have no configuration {configuration}; they have "
                    f"{', '.join(content['configurations'])} (-c)"
                )
            settled = _settled(content["configurations"], configuration)
            identifier = settled.get("data_identifier", "")
            if not any((preprocessed / identifier).glob("*.pkl")):
                raise CommandError(
                    f"{preprocessed / identifier} holds no cases: run  nnUNetv2_preprocess -d {arguments.dataset} "
                    f"-plans_name {name} -c {configuration}  first"
                )
            if arguments.folds != ["all"] and not (preprocessed / "splits_final.json").is_file():
                write_missing_splits(preprocessed, identifier)
            previous = settled.get("previous_stage")
            after = f"{trainer}__{name}__{previous}" if previous is not None else None
            models.append((configuration, trainer, name, after))
    folds = read_folds(preprocessed, arguments.folds)
    jobs = [
        Job(preprocessed.name, configuration, trainer, name, fold, preprocessed, results, cases, after)
        for fold, cases in folds.items()
        for configuration, trainer, name, after in models
    ]
    return dataset_json, jobs


def _settled(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    found: dict[str, Any] = {}
    seen: list[str] = []
    following: str | None = name
    while following is not None:
        if following not in configurations or following in seen:
            raise CommandError(f"plans: configuration {name} inherits from {following}, which is not there or itself")
        seen.append(following)
        found = configurations[following] | found
        following = configurations[following].get("inherits_from")
    return found


def _ask(preprocessed: Path, models: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "nnunet_h2a.crossval.probe"], capture_output=True, text=True, check=False,
        input=json.dumps({"preprocessed": str(preprocessed), "models": models}),
    )  # fmt: skip
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CommandError(f"nnU-Net cannot be loaded ({last}): look with  h2a_doctor")
    return json.loads(finished.stdout.splitlines()[-1])


def _everywhere(name: str, value: str) -> str:
    """An environment variable's value for another working directory: folders by their whole paths."""
    if name not in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        return value
    return os.pathsep.join(str(Path(part).absolute()) if part else part for part in value.split(os.pathsep))


def _write_slurm(path: Path, jobs: Sequence[Job], given: Sequence[str], device: str) -> int:
    """Write the array script: task N runs job N; what is finished by then ends at once."""
    models = {job.model for job in jobs}
    if any(job.after in models for job in jobs):
        raise CommandError(
            "--slurm: a cascade's second stage must wait for its first: write a script for each configuration, and "
            "give sbatch --dependency=afterok:FIRST for the second"
        )
    kept, skip = [], False
    for word in given:
        if word != "--slurm" and not word.startswith("--slurm=") and not skip:
            kept.append(word)
        skip = word == "--slurm"
    lines = [
        "#!/bin/bash",
        f"# {len(jobs)} jobs; run again, it does what is missing. Add partition, time and memory of your cluster.",
        "#SBATCH --job-name=h2a_crossval",
        f"#SBATCH --array=0-{len(jobs) - 1}",
        "#SBATCH --cpus-per-task=12",
        *(["#SBATCH --gres=gpu:1"] if device == "cuda" else []),
        "#SBATCH --output=h2a_crossval_%A_%a.out",
        "set -u",
        *(
            f"export {name}={shlex.quote(_everywhere(name, value))}"
            for name, value in sorted(os.environ.items()) if name.startswith("nnUNet")
        ),
        f'exec {shlex.join([command("h2a_crossval"), *kept])} --job "$SLURM_ARRAY_TASK_ID"',
    ]  # fmt: skip
    check_targets([path])
    write_whole({path: "\n".join(lines) + "\n"})
    path.chmod(0o755)
    print(f"written: {path}, tasks 0 to {len(jobs) - 1}; type: sbatch {shlex.quote(str(path))}")
    return 0
