"""A trainer in this process, on the phantom's tiny plans."""

from __future__ import annotations

import json

import pytest
import torch

from nnunet_h2a.trainers import nnUNetTrainerH2ASeg
from tests.training.losses import LABELS, REGIONS


@pytest.fixture
def make_trainer(workspace, monkeypatch):
    """A trainer on the phantom's tiny plans, with another dataset.json where a test wants one."""

    def make(trainer_class=nnUNetTrainerH2ASeg, plans="nnUNetTinyPlans", labels=LABELS, initialize=True, **dataset):
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(workspace.root / variable))
        content = json.loads((workspace.preprocessed / f"{plans}.json").read_text())
        dataset_json = json.loads((workspace.preprocessed / "dataset.json").read_text()) | {"labels": labels} | dataset
        if labels is REGIONS:
            dataset_json["regions_class_order"] = [1, 2]
        trainer = trainer_class(
            content | {"continue_training": False}, "3d_fullres", 0, dataset_json, torch.device("cpu")
        )
        if initialize:
            trainer.initialize()
        return trainer

    return make
