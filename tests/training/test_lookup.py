"""nnU-Net finds the trainers in a new process, whatever its environment."""

from __future__ import annotations

import os
import sys

import pytest

from nnunet_h2a._autoreg import shim_folder
from tests.conftest import EXT_TRAINERS, clean_environment, run

LOOKUP = """
import os, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    found = find(name)
    assert found.__name__ == name
    assert pickle.loads(pickle.dumps(found)) is found
print("VARIABLE", os.environ.get("nnUNet_extTrainer"))
"""


def lookup(*names, flags=(), check=True, **environment):
    """The variable as a new interpreter sees it, after looking ``names`` up."""
    finished = run(
        sys.executable, *flags, "-c", LOOKUP, *names, environment=clean_environment(**environment), check=check
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("VARIABLE")]
    return lines[0].removeprefix("VARIABLE ") if lines else finished.stderr


def test_with_no_variable_set_all_trainers_are_found_and_pickle():
    names = ("nnUNetTrainerH2ASeg", "nnUNetTrainerH2ASeg_5epochs", "nnUNetTrainerH2ASegDemo", "nnUNetTrainer")
    assert lookup(*names) == shim_folder()


def test_isolated_mode():
    assert lookup("nnUNetTrainerH2ASeg", flags=("-I",)) == shim_folder()


def test_the_users_own_folders_stay_and_stay_first():
    variable = lookup(nnUNet_extTrainer=str(EXT_TRAINERS))
    assert variable.split(os.pathsep) == [str(EXT_TRAINERS), shim_folder()]
    # The trainers of both are found, and our entry is not added twice in a child process.
    finished = run(
        sys.executable, "-c",
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f;"
        "f('nnUNetTrainerFewSteps'); f('nnUNetTrainerH2ASeg'); import os; print('V', os.environ['nnUNet_extTrainer'])",
        environment=clean_environment(nnUNet_extTrainer=variable),
    )  # fmt: skip
    assert f"V {variable}" in finished.stdout


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_it_can_be_switched_off(value):
    show = "import os; print(os.environ.get('nnUNet_extTrainer'))"
    for present in ({}, {"nnUNet_extTrainer": "/somewhere"}):
        environment = clean_environment(NNUNET_H2A_AUTOREGISTER=value, **present)
        shown = run(sys.executable, "-c", show, environment=environment).stdout.strip()
        assert shown == str(present.get("nnUNet_extTrainer"))


def test_nnunets_error_when_it_is_switched_off():
    error = lookup("nnUNetTrainerH2ASeg", NNUNET_H2A_AUTOREGISTER="0", check=False)
    assert "Could not find requested nnunet trainer nnUNetTrainerH2ASeg" in error


def test_the_folder_can_be_set_by_hand():
    folder = run(sys.executable, "-m", "nnunet_h2a.ext_path", environment=clean_environment()).stdout.strip()
    assert lookup("nnUNetTrainerH2ASeg", NNUNET_H2A_AUTOREGISTER="0", nnUNet_extTrainer=folder) == folder


def test_starting_python_does_not_import_torch_or_numpy():
    finished = run(
        sys.executable, "-c", "import sys; print([m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules])",
        environment=clean_environment(),
    )  # fmt: skip
    assert finished.stdout.strip() == "[]"


def test_the_shim_is_silent_where_the_package_is_missing(tmp_path):
    """The variable reaches other environments through child processes; -S stands for one without the package."""
    finished = run(
        sys.executable, "-S", "-c", "import nnunet_h2a_trainers_shim as shim; print(shim._TRAINERS)",
        environment=clean_environment(PYTHONPATH=shim_folder()), cwd=tmp_path,
    )  # fmt: skip
    assert finished.stdout.strip() == "{}"


@pytest.mark.parametrize("command", ["h2a_plan", "h2a_demo", "h2a_convert_sts", "h2a_convert_autopet"])
def test_help_does_not_import_torch(command):
    finished = run(command, "--help", environment=clean_environment(PYTHONPROFILEIMPORTTIME="1"))
    imported = {line.rsplit("|", 1)[-1].strip() for line in finished.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "nnunetv2", "matplotlib"}
