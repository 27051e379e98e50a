"""nnU-Net's own commands with our trainer and plans, from raw data to an ensemble."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.evaluation.dice import score_folder
from tests.conftest import EXT_TRAINERS


def train(space, trainer, plans, *more):
    space.run("nnUNetv2_train", "711", "3d_fullres", "0", "-tr", trainer, "-p", plans, "-device", "cpu", *more,
              nnUNet_extTrainer=str(EXT_TRAINERS))  # fmt: skip


def predict(space, trainer, plans, output, **environment):
    space.run("nnUNetv2_predict", "-d", "711", "-i", space.raw / "imagesTs", "-o", space.root / output, "-tr", trainer,
              "-p", plans, "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0",
              "--save_probabilities", nnUNet_extTrainer=str(EXT_TRAINERS), **environment)  # fmt: skip
    return space.root / output


@pytest.fixture(scope="module")
def predictions(workspace):
    """Our trainer, the stock trainer with plans that name our network, and stock nnU-Net: trained and predicted."""
    models = {
        "ours": ("nnUNetTrainerH2ASegFewSteps", "nnUNetH2ASegPlans"),
        "plans": ("nnUNetTrainerFewSteps", "nnUNetH2ASegPlans"),
        "stock": ("nnUNetTrainerFewSteps", "nnUNetTinyPlans"),
    }
    folders = {}
    for name, (trainer, plans) in models.items():
        train(workspace, trainer, plans)
        folders[name] = predict(workspace, trainer, plans, name)
    return folders


def results(space, trainer, plans):
    return space.root / "nnUNet_results" / space.dataset / f"{trainer}__{plans}__3d_fullres"


def test_trained_models_predict_the_held_out_cases(workspace, predictions):
    cases = sorted(p.name for p in (workspace.raw / "labelsTs").iterdir())
    assert cases
    for folder in predictions.values():
        assert sorted(p.name for p in folder.glob("*.nii.gz")) == cases
        for case in cases:
            truth, predicted = (sitk.ReadImage(str(f / case)) for f in (workspace.raw / "labelsTs", folder))
            assert predicted.GetSize() == truth.GetSize()
            assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1}
    plans = json.loads(
        (results(workspace, "nnUNetTrainerH2ASegFewSteps", "nnUNetH2ASegPlans") / "plans.json").read_text()
    )
    assert plans["nnunet_h2a"] == {"ct_channel": 0, "pet_channel": 1, "region_based": False}


def test_the_plans_alone_carry_the_network(workspace, predictions):
    """No trainer of ours is involved, so nothing has to be found by name."""
    again = predict(workspace, "nnUNetTrainerFewSteps", "nnUNetH2ASegPlans", "plans_again", NNUNET_H2A_AUTOREGISTER="0")
    for first in predictions["plans"].glob("*.npz"):
        assert np.array_equal(np.load(first)["probabilities"], np.load(again / first.name)["probabilities"])


def test_ensemble_with_stock_nnunet_is_the_mean_of_probabilities(workspace, predictions):
    target = workspace.root / "ensemble"
    workspace.run("nnUNetv2_ensemble", "-i", predictions["ours"], predictions["stock"], "-o", target, "-np", "1")
    for file in sorted(predictions["ours"].glob("*.npz")):
        mean = sum(np.load(predictions[n] / file.name)["probabilities"].astype(float) for n in ("ours", "stock"))
        # Where both classes are as good as equal, rounding decides.
        clear = np.abs(mean[0] - mean[1]) > 1e-3
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(target / f"{file.stem}.nii.gz")))
        assert clear.mean() > 0.5
        assert np.array_equal(label[clear], mean.argmax(0)[clear])
    assert set(score_folder(workspace.raw / "labelsTs", target)) == {p.stem for p in predictions["ours"].glob("*.npz")}


def test_pet_first_model_predicts_from_plans_and_checkpoint(workspace, predictions, tmp_path):
    """The same weights, with plans.json and images both PET first, give the same probabilities."""
    model = results(workspace, "nnUNetTrainerH2ASegFewSteps", "nnUNetH2ASegPlans")
    swapped = tmp_path / "model"
    swapped.mkdir()
    (swapped / "fold_0").symlink_to(model / "fold_0")
    plans = json.loads((model / "plans.json").read_text())
    dataset_json = json.loads((model / "dataset.json").read_text())
    plans["nnunet_h2a"] |= {"ct_channel": 1, "pet_channel": 0}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"] |= {"ct_channel": 1, "pet_channel": 0}
    configuration["normalization_schemes"].reverse()
    intensities = plans["foreground_intensity_properties_per_channel"]
    plans["foreground_intensity_properties_per_channel"] = {"0": intensities["1"], "1": intensities["0"]}
    dataset_json["channel_names"] = {"0": "PET", "1": "CT"}
    dataset_json.pop("h2a_modalities")
    (swapped / "plans.json").write_text(json.dumps(plans))
    (swapped / "dataset.json").write_text(json.dumps(dataset_json))
    images = tmp_path / "images"
    images.mkdir()
    for image in (workspace.raw / "imagesTs").iterdir():
        other = image.name.replace("_0000.", "_000X.").replace("_0001.", "_0000.").replace("_000X.", "_0001.")
        (images / other).symlink_to(image)
    workspace.run("nnUNetv2_predict_from_modelfolder", "-i", images, "-o", tmp_path / "out", "-m", swapped, "-f", "0",
                  "-device", "cpu", "-npp", "1", "-nps", "1", "--save_probabilities",
                  nnUNet_extTrainer=str(EXT_TRAINERS))  # fmt: skip
    for first in predictions["ours"].glob("*.npz"):
        expected, again = (np.load(f / first.name)["probabilities"] for f in (predictions["ours"], tmp_path / "out"))
        assert np.array_equal(expected, again)
