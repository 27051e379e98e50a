"""nnU-Net's own commands with our trainer and plans, from raw data to an ensemble."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.conftest import EXT_TRAINERS
from tests.e2e.conftest import Model, same


def test_trained_models_predict_the_held_out_case(workspace, models):
    cases = sorted(p.name for p in (workspace.raw / "labelsTs").iterdir())
    assert len(cases) == 1
    for model in models.values():
        assert sorted(p.name for p in model.predictions.glob("*.nii.gz")) == cases
        truth, predicted = (sitk.ReadImage(str(f / cases[0])) for f in (workspace.raw / "labelsTs", model.predictions))
        assert predicted.GetSize() == truth.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1}
    plans = json.loads((models["ours"].results / "plans.json").read_text())
    assert plans["nnunet_h2a"] == {"ct_channel": 0, "pet_channel": 1, "region_based": False}


def test_the_trainer_is_found_and_trains(workspace, models):
    """``nnUNetv2_train … -tr nnUNetTrainerH2ASeg`` with no variable set, until the first epoch's steps begin."""
    folder = workspace.root / "begun"
    command = [Path(sys.executable).parent / "nnUNetv2_train", "711", "3d_fullres", "0", "-tr", "nnUNetTrainerH2ASeg",
               "-p", "nnUNetH2ASegWidePlans", "-device", "cpu"]  # fmt: skip
    with (workspace.root / "begun.txt").open("w+") as output:
        training = subprocess.Popen(
            command, env=workspace.environment(nnUNet_results=str(folder)), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + 300
            log = ""
            while "Epoch 0" not in log and training.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                log = "".join(path.read_text() for path in folder.rglob("training_log*.txt"))
            time.sleep(1)
            assert training.poll() is None, output.seek(0) or output.read()
        finally:
            training.kill()
            training.wait()
    assert "network: H2ASeg, " in log
    assert "Epoch 0" in log


def test_a_loss_that_is_not_finite_ends_the_training(workspace, models):
    """With nnU-Net's command: the reason, no traceback, exit code 1, and the checkpoint of the epoch before."""
    ended = workspace.run(
        "nnUNetv2_train", "711", "3d_fullres", "0", "-tr", "nnUNetTrainerH2ASegPoisoned", "-p", "nnUNetH2ASegWidePlans",
        "-device", "cpu", check=False, nnUNet_extTrainer=str(EXT_TRAINERS),
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "training stopped: the loss is nan at epoch 1, step 2\n" in ended.stderr
    assert "the images hold values that are not finite (channel 1)" in ended.stderr
    assert "cases of this batch: fdg_" in ended.stderr
    model = Model(workspace, "poisoned", "nnUNetTrainerH2ASegPoisoned", "nnUNetH2ASegWidePlans")
    assert f"checkpoint_best.pth in {model.results / 'fold_0'} is as before" in ended.stderr
    weights = torch.load(model.results / "fold_0" / "checkpoint_best.pth", weights_only=False)["network_weights"]
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.full
def test_a_whole_epoch(workspace, models):
    model = Model(workspace, "epoch", "nnUNetTrainerH2ASeg_1epoch", "nnUNetH2ASegWidePlans")
    model.train(nnUNet_extTrainer="")
    log = "".join(p.read_text() for p in (model.results / "fold_0").glob("training_log*.txt"))
    assert "Validation complete" in log
    model.predict(model.predictions)
    assert all(np.isfinite(values).all() for values in model.probabilities().values())


def test_the_plans_alone_carry_the_network(workspace, models):
    """No trainer of ours is involved, so nothing has to be found by name."""
    model, again = models["plans"], workspace.root / "plans_again"
    model.predict(again, NNUNET_H2A_AUTOREGISTER="0")
    assert same(model.probabilities(), model.probabilities(again))


def test_ensemble_with_stock_nnunet_is_the_mean_of_probabilities(workspace, models, tmp_path):
    ours, stock, target = models["ours"], models["stock"], workspace.root / "ensemble"
    workspace.run("nnUNetv2_ensemble", "-i", ours.predictions, stock.predictions, "-o", target, "-np", "1")
    for case, probabilities in ours.probabilities().items():
        mean = probabilities.astype(float) + stock.probabilities()[case]
        # Where both classes are as good as equal, rounding decides.
        clear = np.abs(mean[0] - mean[1]) > 1e-3
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(target / f"{case}.nii.gz")))
        assert clear.mean() > 0.5
        assert np.array_equal(label[clear], mean.argmax(0)[clear])
    workspace.run("h2a_evaluate", "-ref", workspace.raw / "labelsTs", "-pred", target, "-o", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {entry["case"] for entry in scores["cases"]} == set(ours.probabilities())


def test_pet_first_model_predicts_from_plans_and_checkpoint(workspace, models, tmp_path):
    """The same weights, with plans.json and images both PET first, give the same probabilities."""
    model, swapped, images = models["ours"], tmp_path / "model", tmp_path / "images"
    swapped.mkdir(), images.mkdir()
    (swapped / "fold_0").symlink_to(model.results / "fold_0")
    plans = json.loads((model.results / "plans.json").read_text())
    dataset_json = json.loads((model.results / "dataset.json").read_text())
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
    for image in (workspace.raw / "imagesTs").iterdir():
        ending = image.name[-len("_0000.nii.gz") :]
        other = {"_0000.nii.gz": "_0001.nii.gz", "_0001.nii.gz": "_0000.nii.gz"}[ending]
        (images / image.name.replace(ending, other)).symlink_to(image)
    workspace.run("nnUNetv2_predict_from_modelfolder", "-i", images, "-o", tmp_path / "out", "-m", swapped, "-f", "0",
                  "-device", "cpu", "-npp", "1", "-nps", "1", "--save_probabilities", "--disable_tta",
                  nnUNet_extTrainer=str(EXT_TRAINERS))  # fmt: skip
    assert same(model.probabilities(), model.probabilities(tmp_path / "out"))
