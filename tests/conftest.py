"""Fixtures that several test modules share: nnU-Net's environment, and one small dataset made with its commands."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXT_TRAINERS = ROOT / "tests" / "ext_trainers"

#: Tests of a trained model or of a preprocessed dataset, which are made once.
SHARE_THE_WORKSPACE = ("tests/e2e/", "tests/training/", "tests/planning/test_plan.py", "tests/planning/test_sizing.py")

#: Long files whose tests share nothing.
INDEPENDENT = ("test_every_network.py", "test_every_network_deployment.py")

#: Usable CPU runs: docs/demo.md says what each is for.
CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests ``pytest -n 2`` keeps in one process: those that share what is dear to set up."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith(SHARE_THE_WORKSPACE):
                return "workspace"
            if file.startswith("tests/promises/"):
                return "promises"
            return nodeid if file.endswith(INDEPENDENT) and "two_processes" not in nodeid else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first, so that no process is left with one of them when the other has nothing more to do."""

    def rank(item: pytest.Item) -> int:
        return (
            0 if item.nodeid.startswith("tests/promises/") else 1 if item.nodeid.startswith(SHARE_THE_WORKSPACE) else 2
        )

    items.sort(key=rank)


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything of nnU-Net, so that only what a test sets is there."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().startswith(("nnunet", "pythonpath"))}
    return kept | extra


def run(
    *command: str | Path, environment: dict[str, str], check: bool = True, timeout: int = 600, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run a console command of this Python environment."""
    name, *arguments = (str(c) for c in command)
    executable = Path(sys.executable).parent / name
    finished = subprocess.run(
        [str(executable if executable.exists() else name), *arguments], env=environment, capture_output=True,
        text=True, timeout=timeout, check=False, cwd=cwd,
    )  # fmt: skip
    if check and finished.returncode:
        pytest.fail(f"{' '.join([name, *arguments])} ended with {finished.returncode}:\n"
                    f"{finished.stdout[-3000:]}\n{finished.stderr[-5000:]}")  # fmt: skip
    return finished


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders with a planned and preprocessed phantom dataset."""

    root: Path
    number: int
    name: str

    @property
    def dataset(self) -> str:
        return f"Dataset{self.number:03d}_{self.name}"

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset

    def environment(self, **extra: str) -> dict[str, str]:
        folders = {name: str(self.root / name) for name in FOLDERS}
        return clean_environment() | folders | CPU_ENVIRONMENT | extra

    def run(self, *command: str | Path, check: bool = True, **extra: str):
        return run(*command, environment=self.environment(**extra), check=check)


#: Sizes with which a step takes a fraction of a second: a patch, and channels for the network.
TINY = ("--patch-size", "16", "16", "16", "--n-stages", "3", "--features", "2", "4", "4")
TINY_2D = ("-c", "2d", "--patch-size", "48", "40", "--batch-size", "4", "--n-stages", "3", "--features", "2", "4", "4")
#: For whole trainings and predictions: a window that takes a case in 36 steps and not in 315.
WIDE = ("--patch-size", "32", "24", "32", "--n-stages", "3", "--features", "2", "4", "4")
#: One window holds a slice of the phantom: CIPA takes long for each.
TINY_CIPA_2D = ("-c", "2d", "--patch-size", "64", "64", "--batch-size", "4", "--features", "8", "8", "16", "16")
TINY_CIPA = ("--patch-size", "24", "24", "24", "--features", "8", "8", "16", "16")


def tiny(network: str, configuration: str = "3d_fullres") -> tuple[str, ...]:
    """Arguments of ``h2a_plan`` that make ``network`` tiny; CIPA has four stages of its own."""
    if network == "CIPA":
        return "--network", network, *(TINY_CIPA_2D if configuration == "2d" else TINY_CIPA)
    return "--network", network, *(TINY_2D if configuration == "2d" else TINY)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """Six phantom patients, converted, planned and preprocessed with the commands that a user types."""
    from nnunet_h2a.phantom import write_autopet

    root = tmp_path_factory.mktemp("nnunet")
    for folder in FOLDERS:
        (root / folder).mkdir()
    studies = write_autopet(root / "phantom", patients=6, seed=1, second_study_every=0)
    space = Workspace(root, 711, "Phantom")
    space.run("h2a_convert_autopet", "-i", root / "phantom", "-d", "711", "--name", "Phantom",
              "--test", studies[-1].parent.name)  # fmt: skip
    space.run("nnUNetv2_plan_and_preprocess", "-d", "711", "-c", "3d_fullres", "--verify_dataset_integrity",
              "-npfp", "1", "-np", "1", nnUNet_n_proc_DA="1")  # fmt: skip
    for network in ("H2ASeg", "ISANet", "CIPA"):
        space.run("h2a_plan", "-d", "711", *tiny(network))
    space.run("h2a_plan", "-d", "711", "--network", "stock", *TINY, "-o", "nnUNetTinyPlans")
    return space
