"""``h2a_doctor``: what is wrong with an installation or a dataset, one line each, with the fix."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnunet_h2a.command import run_command
from nnunet_h2a.doctor.finding import PROBLEM, WARNING

DEFAULT_TRAINER = "nnUNetTrainerH2ASeg"


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_doctor``."""
    parser = argparse.ArgumentParser(
        prog="h2a_doctor",
        description="Check this installation, and with -d a dataset: one line each, with the fix. Changes nothing. "
        "Exit code 0 if there is no problem, 1 if there is one, 2 if the dataset is not found.",
    )
    parser.add_argument("-d", "--dataset", help="dataset number or name [the installation alone]")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans to look at [%(default)s]")
    parser.add_argument("-tr", "--trainer", default=DEFAULT_TRAINER, help="trainer to look up [%(default)s]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_doctor``."""
    return run_command(lambda: _check(build_parser().parse_args(argv)))


def _check(arguments: argparse.Namespace) -> int:
    from nnunet_h2a.doctor.dataset import check_dataset
    from nnunet_h2a.doctor.installation import check_installation

    counts = {PROBLEM: 0, WARNING: 0}
    parts = [check_installation(arguments.trainer)]
    if arguments.dataset is not None:
        parts.append(check_dataset(arguments.dataset, arguments.plans, arguments.trainer))
    for part in parts:
        for finding in part:
            print(finding, flush=True)
            counts[finding.level] = counts.get(finding.level, 0) + 1
    verdict = [
        f"{n} {word}{'' if n == 1 else 's'}"
        for word, n in (("problem", counts[PROBLEM]), ("warning", counts[WARNING]))
        if n
    ]
    print(", ".join(verdict) or "no problem found")
    return 1 if counts[PROBLEM] else 0
