"""The wheel in a second environment: found there, and missing there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, clean_environment, run

PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as main; main()"
INSTALL = "from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point as main; main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source tree."""
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", target, "-q",
        environment=clean_environment())  # fmt: skip
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def second_python(tmp_path_factory) -> Path:
    """A new environment with this one's dependencies and without our package.

    This environment's site-packages is on its path as a plain folder, so neither the editable installation nor the
    lookup file of this environment takes effect there.
    """
    folder = tmp_path_factory.mktemp("second")
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Path(paths["scripts"]) / Path(sys.executable).name


def test_wheel_holds_packages_and_lookup_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("nnunet_h2a_lookup.pth", "nnunet_h2a_lookup.start", "nnunet_h2a/networks/h2aseg.py",
                 "nnunet_h2a/_nnunet_ext/nnunet_h2a_trainers_shim.py", "dataset_conversion/sts.py"):  # fmt: skip
        assert name in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks"))]


def test_exported_model_needs_the_package_and_then_predicts_the_same(workspace, wheel, second_python, tmp_path):
    """Needs a network of few steps only: one training of our registered trainer, cut short by the test trainer."""
    from tests.e2e.test_pipeline import predict, train

    # A model of a trainer that the package itself registers: the demo trainer, stopped after its first checkpoint.
    trainer, plans = "nnUNetTrainerH2ASegFewSteps", "nnUNetH2ASegPlans"
    if not (workspace.root / "ours").exists():
        train(workspace, trainer, plans)
        predict(workspace, trainer, plans, "ours")
    archive = tmp_path / "model.zip"
    _as_registered_trainer(workspace, trainer, plans)
    workspace.run("nnUNetv2_export_model_to_zip", "-d", "711", "-o", archive, "-c", "3d_fullres", "-f", "0", "-tr",
                  "nnUNetTrainerH2ASeg", "-p", plans)  # fmt: skip
    results = tmp_path / "results"
    results.mkdir()
    environment = workspace.environment() | {"nnUNet_results": str(results)}
    run(second_python, "-c", INSTALL, archive, environment=environment)
    arguments = ["-d", workspace.dataset, "-i", workspace.raw / "imagesTs", "-o", tmp_path / "out", "-tr",
                 "nnUNetTrainerH2ASeg", "-p", plans, "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", "0",
                 "-nps", "0", "--save_probabilities"]  # fmt: skip
    missing = run(second_python, "-c", PREDICT, *arguments, environment=environment, check=False, cwd=tmp_path)
    assert missing.returncode
    assert "Could not find requested nnunet trainer nnUNetTrainerH2ASeg" in missing.stderr
    subprocess.run([sys.executable, "-m", "pip", "--python", str(second_python), "install", "-q", "--no-deps",
                    str(wheel)], check=True)  # fmt: skip
    run(second_python, "-c", PREDICT, *arguments, environment=environment, cwd=tmp_path)
    for first in (workspace.root / "ours").glob("*.npz"):
        again = np.load(tmp_path / "out" / first.name)["probabilities"]
        assert np.array_equal(np.load(first)["probabilities"], again)


def _as_registered_trainer(workspace, trainer: str, plans: str) -> None:
    """Put the few-steps model where one of nnUNetTrainerH2ASeg itself would be, which takes days to train."""
    import shutil

    import torch

    parent = workspace.root / "nnUNet_results" / workspace.dataset
    source, target = (parent / f"{name}__{plans}__3d_fullres" for name in (trainer, "nnUNetTrainerH2ASeg"))
    shutil.copytree(source, target, dirs_exist_ok=True)
    for file in target.glob("fold_0/*.pth"):
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"trainer_name": "nnUNetTrainerH2ASeg"}, file)
