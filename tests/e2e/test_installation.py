"""The wheel in a second environment: found there, and missing there."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment, run
from tests.e2e.conftest import Model, same

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

    This environment's site-packages (``make test-matrix`` has two) are on its path as plain folders, so neither the
    editable installation nor the lookup file of this environment takes effect there.
    """
    folder = tmp_path_factory.mktemp("second")
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(paths["purelib"]) / "dependencies.pth").write_text("".join(f"{path}\n" for path in folders))
    return Path(paths["scripts"]) / Path(sys.executable).name


def test_wheel_holds_packages_and_lookup_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("nnunet_h2a_lookup.pth", "nnunet_h2a_lookup.start", "nnunet_h2a/networks/h2aseg.py",
                 "nnunet_h2a/_nnunet_ext/nnunet_h2a_trainers_shim.py", "dataset_conversion/sts.py"):  # fmt: skip
        assert name in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks"))]


def registered(model: Model) -> Model:
    """The same weights as a model of the trainer that the package registers, from which the test's one descends."""
    named = replace(model, trainer="nnUNetTrainerH2ASeg")
    shutil.copytree(model.results, named.results)
    path = named.results / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    assert checkpoint["trainer_name"] == model.trainer
    torch.save(checkpoint | {"trainer_name": named.trainer}, path)
    return named


def test_exported_model_needs_the_package_and_then_predicts_the_same(models, wheel, second_python, tmp_path):
    model, archive, results = registered(models["ours"]), tmp_path / "model.zip", tmp_path / "results"
    model.space.run("nnUNetv2_export_model_to_zip", "-d", "711", "-o", archive, "-c", "3d_fullres", "-f", "0",
                    "-tr", model.trainer, "-p", model.plans)  # fmt: skip
    results.mkdir()
    environment = model.space.environment() | {"nnUNet_results": str(results)}
    run(second_python, "-c", INSTALL, archive, environment=environment)
    arguments = model.predict_arguments(tmp_path / "out")
    missing = run(second_python, "-c", PREDICT, *arguments, environment=environment, check=False, cwd=tmp_path)
    assert missing.returncode
    assert f"Could not find requested nnunet trainer {model.trainer}" in missing.stderr
    run(sys.executable, "-m", "pip", "--python", second_python, "install", "-q", "--no-deps", wheel,
        environment=clean_environment())  # fmt: skip
    run(second_python, "-c", PREDICT, *arguments, environment=environment, cwd=tmp_path)
    assert same(model.probabilities(), model.probabilities(tmp_path / "out"))
