"""A small dataset with regions, an ignore label and a cascade, and nnU-Net's commands called in this process.

A console command spends 12 s on imports; its entry point called here does the same without them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_h2a.planning.plan import main as h2a_plan
from tests.conftest import CPU_ENVIRONMENT, EXT_TRAINERS, FOLDERS, clean_environment

DATASET = "Dataset731_Promises"
CASES, HELD_OUT = 5, "case_005"
LABELS = {"background": 0, "tumor": [1, 2], "core": 2, "ignore": 3}
#: Smaller than the images, so that windows slide, and a quarter of them in the cascade's first stage.
PATCH = ("--patch-size", "16", "32", "32")
SIZES = {
    "H2ASeg": ("--n-stages", "3", "--features", "2", "4", "4"),
    "ISANet": ("--n-stages", "3", "--features", "2", "4", "4"),
    "CIPA": ("--features", "4", "4", "8", "8"),
}


@dataclass(frozen=True)
class Promises:
    """nnU-Net's folders with the dataset."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / DATASET

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / DATASET

    def results(self, trainer: str, plans: str, configuration: str = "3d_fullres") -> Path:
        return self.root / "nnUNet_results" / DATASET / f"{trainer}__{plans}__{configuration}"

    def environment(self) -> dict[str, str]:
        folders = {name: str(self.root / name) for name in FOLDERS}
        return clean_environment() | folders | CPU_ENVIRONMENT | {"nnUNet_extTrainer": str(EXT_TRAINERS)}

    def train(self, configuration: str, fold: str, trainer: str, plans: str, *more: str) -> None:
        """``nnUNetv2_train``."""
        from nnunetv2.run.run_training import run_training_entry

        _call(run_training_entry, "nnUNetv2_train", "731", configuration, fold, "-tr", trainer, "-p", plans, "-device",
              "cpu", *more)  # fmt: skip

    def predict(
        self, configuration: str, fold: str, trainer: str, plans: str, output: Path, *more: str
    ) -> dict[str, np.ndarray]:
        """``nnUNetv2_predict`` of the case that was not trained on; its probabilities and its labels."""
        from nnunetv2.inference.predict_from_raw_data import predict_entry_point

        _call(predict_entry_point, "nnUNetv2_predict", "-d", "731", "-i", str(self.raw / "imagesTs"), "-o", str(output),
              "-tr", trainer, "-p", plans, "-c", configuration, "-f", fold, "-device", "cpu", "-npp", "0", "-nps", "0",
              "--save_probabilities", *more)  # fmt: skip
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(output / f"{HELD_OUT}.nii.gz")))
        return {"probabilities": np.load(output / f"{HELD_OUT}.npz")["probabilities"], "labels": labels}


def _call(entry_point, *arguments: str) -> None:
    # The commands take as many threads as there are processors; the tests run in as many processes.
    with mock.patch.object(sys, "argv", list(arguments)), mock.patch("multiprocessing.cpu_count", return_value=1):
        entry_point()


def write_case(folder: Path, name: str, seed: int, kind: str) -> None:
    """A hot sphere of soft tissue with a core, beside a hot sphere of fat; a slab is marked to be ignored."""
    rng = np.random.default_rng(seed)
    shape, spacing = (24, 40, 40), (4.0, 4.0, 5.0)
    z, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
    ct, pet = np.full(shape, -100.0), np.full(shape, 0.5)
    label = np.zeros(shape, np.uint8)
    for tumour, centre in ((True, (12, 12, rng.integers(10, 30))), (False, (12, 28, rng.integers(10, 30)))):
        distance = np.sqrt(sum((a - c) ** 2 for a, c in zip((z, y, x), centre, strict=True)))
        pet[distance < 7] = 8
        if tumour:
            ct[distance < 7] = 60
            label[distance < 7], label[distance < 4] = 1, 2
    label[:2] = LABELS["ignore"]
    for number, (array, noise) in enumerate(((ct, 12), (pet, 0.3))):
        image = sitk.GetImageFromArray((gaussian_filter(array, 0.7) + rng.normal(0, noise, shape)).astype(np.float32))
        image.SetSpacing(spacing)
        sitk.WriteImage(image, str(folder / f"images{kind}" / f"{name}_{number:04d}.nii.gz"))
    image = sitk.GetImageFromArray(label)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(folder / f"labels{kind}" / f"{name}.nii.gz"))


@pytest.fixture(scope="package")
def dataset(tmp_path_factory) -> Iterator[Promises]:
    """Planned and preprocessed, with plans for every network that have a cascade."""
    promises = Promises(tmp_path_factory.mktemp("promises"))
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (promises.raw / folder).mkdir(parents=True)
    for number in range(CASES):
        write_case(promises.raw, f"case_{number:03d}", number, "Tr")
    write_case(promises.raw, HELD_OUT, CASES, "Ts")
    (promises.raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT", "1": "PET"}, "labels": LABELS, "regions_class_order": [1, 2],
        "numTraining": CASES, "file_ending": ".nii.gz",
    }))  # fmt: skip
    (promises.root / "nnUNet_results").mkdir()
    with mock.patch.dict(os.environ, promises.environment() | {"nnUNet_n_proc_DA": "1"}, clear=True):
        plan(promises)
        yield promises


def plan(promises: Promises) -> None:
    """Plan by nnU-Net's own planner, add a cascade, which it would leave out for images this small, and preprocess."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset, preprocess_dataset

    extractor = DatasetFingerprintExtractor(731, 1)
    extractor.num_foreground_voxels_for_intensitystats = 1e5
    extractor.run(overwrite_existing=True)
    plan_experiment_dataset(731)
    path = promises.preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    fullres = plans["configurations"]["3d_fullres"]
    lowres = deepcopy(fullres) | {"data_identifier": "nnUNetPlans_3d_lowres", "next_stage": ["3d_cascade_fullres"]}
    lowres["spacing"] = [1.3 * n for n in fullres["spacing"]]
    lowres["median_image_size_in_voxels"] = [n / 1.3 for n in fullres["median_image_size_in_voxels"]]
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["configurations"] |= {"3d_lowres": lowres, "3d_cascade_fullres": cascade}
    path.write_text(json.dumps(plans))
    preprocess_dataset(731, "nnUNetPlans", ("3d_fullres", "3d_lowres"), (1, 1))
    for network, sizes in SIZES.items():
        arguments = ["-d", "731", "-c", "3d_cascade_fullres", "--network", network, "--batch-size", "3"]
        assert h2a_plan([*arguments, *PATCH, *sizes]) == 0


@pytest.fixture
def promises(dataset, monkeypatch) -> Promises:
    """The dataset, with nnU-Net's variables set in this process."""
    for variable in [name for name in os.environ if name.lower().startswith("nnunet")]:
        monkeypatch.delenv(variable)
    for variable, value in dataset.environment().items():
        monkeypatch.setenv(variable, value)
    return dataset


def every_network(first: str | None) -> pytest.MarkDecorator:
    """All networks; ``make test`` takes one, or none where smaller tests hold the promise."""
    networks: Sequence[str] = ("H2ASeg", "ISANet", "CIPA")
    return pytest.mark.parametrize(
        "network", [pytest.param(n, marks=[] if n == first else pytest.mark.full) for n in networks]
    )
