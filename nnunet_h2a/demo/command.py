"""Command line of ``h2a_demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_h2a.command import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_demo``."""
    parser = argparse.ArgumentParser(
        prog="h2a_demo",
        description="Train stock nnU-Net and H2ASeg on small PET/CT cases, predict, ensemble and score, with nnU-Net's "
        "own commands. Without --sts the cases are phantoms. It shows that everything works; it is no benchmark.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument(
        "--sts", type=Path, metavar="DIR", help="DICOM of Soft-tissue-Sarcoma patients to use in place of phantoms"
    )
    parser.add_argument("-device", choices=["cuda", "cpu", "mps"], help="[cuda where there is one, else cpu]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_demo``."""
    arguments = build_parser().parse_args(argv)

    def action() -> int:
        from nnunet_h2a.demo.pipeline import run_demo

        return run_demo(arguments.output, arguments.sts, arguments.device)

    return run_command(action)
