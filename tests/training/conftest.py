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

    def make(
        trainer_class=nnUNetTrainerH2ASeg,
        plans="nnUNetTinyPlans",
        labels=LABELS,
        initialize=True,
        folder=None,
        **dataset,
    ):
        folder = folder or workspace.preprocessed
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(workspace.root / variable))
        content = json.loads((folder / f"{plans}.json").read_text())
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


@pytest.fixture
def preprocessed_copy(workspace, tmp_path):
    """A copy of the phantom's plans that a test may add to; trainers still find the phantom's own folder."""
    folder = tmp_path / "nnUNet_preprocessed" / workspace.dataset
    folder.mkdir(parents=True)
    for name in ("nnUNetPlans.json", "dataset.json"):
        (folder / name).write_bytes((workspace.preprocessed / name).read_bytes())
    return folder
