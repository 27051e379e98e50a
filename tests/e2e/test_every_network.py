"""Every network, in 2D and 3D, trained and predicted with nnU-Net's commands."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import WIDE, tiny
from tests.e2e.conftest import Model

#: Network, configuration, trainer. The plain run has each network elsewhere: H2ASeg in test_pipeline.py, ISANet in
#: test_crossval.py, both with the commands, and CIPA in tests/promises.
CASES = [
    ("CIPA", "2d", "nnUNetTrainerCIPAFewSteps", [pytest.mark.full]),
    ("ISANet", "3d_fullres", "nnUNetTrainerISANetFewSteps", [pytest.mark.full]),
    ("ISANet", "3d_fullres", "nnUNetTrainerISANetPaperFewSteps", [pytest.mark.full]),
    ("CIPA", "3d_fullres", "nnUNetTrainerCIPAFewSteps", [pytest.mark.full]),
    ("H2ASeg", "3d_fullres", "nnUNetTrainerH2ASegPaperFewSteps", [pytest.mark.full]),
    ("CIPA", "2d", "nnUNetTrainerCIPAPaperFewSteps", [pytest.mark.full]),
    ("ISANet", "2d", "nnUNetTrainerISANetFewSteps", [pytest.mark.full]),
    ("H2ASeg", "2d", "nnUNetTrainerH2ASegFewSteps", [pytest.mark.full]),
    ("CIPA", "2d", "nnUNetTrainerFewSteps", [pytest.mark.full]),
    ("ISANet", "3d_fullres", "nnUNetTrainerISANetPETFewSteps", [pytest.mark.full]),
]


@pytest.fixture(scope="module")
def slices(workspace):
    """The phantom preprocessed for 2D as well."""
    workspace.run("nnUNetv2_preprocess", "-d", "711", "-c", "2d", "-np", "1", nnUNet_n_proc_DA="1")
    return workspace


@pytest.mark.parametrize(
    ("network", "configuration", "trainer"),
    [pytest.param(*case, marks=marks, id=" ".join(case)) for *case, marks in CASES],
)
def test_trains_and_predicts(workspace, request, network, configuration, trainer):
    plans = f"nnUNet{network}{'' if network == 'CIPA' else 'Wide'}Plans"
    if configuration == "2d":
        request.getfixturevalue("slices")
        plans = f"nnUNet{network}SlicesPlans"
        workspace.run("h2a_plan", "-d", "711", *tiny(network, "2d"), "-o", plans)
    elif network != "CIPA":
        workspace.run("h2a_plan", "-d", "711", "--network", network, *WIDE, "-o", plans)
    model = Model(workspace, f"{trainer}_{configuration}", trainer, plans, configuration)
    model.train()
    log = "".join(p.read_text() for p in (model.results / "fold_0").glob("training_log*.txt"))
    assert (f"network: {network}, " in log) == (trainer != "nnUNetTrainerFewSteps")
    assert "nan" not in log.casefold()
    model.predict(model.predictions)
    cases = sorted(p.name for p in (workspace.raw / "labelsTs").iterdir())
    assert sorted(p.name for p in model.predictions.glob("*.nii.gz")) == cases
    for probabilities in model.probabilities().values():
        assert np.isfinite(probabilities).all()
        assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
        assert probabilities[1].std() > 0
    if trainer != "nnUNetTrainerFewSteps":
        settings = json.loads((model.results / "plans.json").read_text())["nnunet_h2a"]
        assert settings.get("modalities") == ("pet" if "PET" in trainer else None)
