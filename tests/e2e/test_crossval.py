"""Cross-validation of stock nnU-Net and a fusion network with the commands: killed, continued, ensembled, compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.evaluation.comparison import cases_of
from tests.conftest import EXT_TRAINERS, WIDE

STOCK = "nnUNetTrainerFewSteps"
PLANS = "nnUNetCrossPlans"


@pytest.fixture(scope="module")
def space(workspace):
    workspace.run("h2a_plan", "-d", "711", "-c", "3d_fullres", "--network", "stock", *WIDE, "-o", PLANS)
    return workspace


def results(space, trainer: str) -> Path:
    return space.root / "nnUNet_results" / space.dataset / f"{trainer}__{PLANS}__3d_fullres"


@pytest.mark.parametrize(
    ("ours", "folds"), [("H2ASeg", ("0",)), pytest.param("ISANet", ("0", "1"), marks=pytest.mark.full)]
)
def test_killed_continued_ensembled_and_compared(space, tmp_path, ours, folds):
    trainers = (STOCK, f"nnUNetTrainer{ours}FewSteps")
    # Of an earlier network.
    shutil.rmtree(results(space, STOCK), ignore_errors=True)
    environment = space.environment(nnUNet_extTrainer=str(EXT_TRAINERS))
    models = ["-c", "3d_fullres", "-tr", *trainers, "-p", PLANS, "-f", *folds]
    crossval = ["h2a_crossval", "-d", "711", *models, "-device", "cpu", "--npz"]
    program = [str(Path(sys.executable).parent / crossval[0]), *crossval[1:]]
    first = results(space, STOCK) / "fold_0"
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 300
        while not first.is_dir() and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    # The training lives on; it is killed with its workers, at a moment of its own.
    lock = first.parent / "h2a_crossval_fold_0.lock"
    os.killpg(json.loads(lock.read_text())["process"], signal.SIGKILL)
    printed = space.run(*crossval, nnUNet_extTrainer=str(EXT_TRAINERS)).stdout
    for trainer in trainers:
        for fold in folds:
            folder = results(space, trainer) / f"fold_{fold}"
            assert f"{folder.parent.name} fold {fold}: finished" in printed
            log = (folder.parent / f"h2a_crossval_fold_{fold}.log").read_text()
            assert log.count("nnUNetv2_train ") == log.count("--c\n") == (2 if folder == first else 1)
            scores = json.loads((folder / "validation" / "h2a_scores" / "summary_autopet.json").read_text())
            nnunets = json.loads((folder / "validation" / "summary.json").read_text())
            theirs = {Path(e["prediction_file"]).name: e["metrics"]["1"] for e in nnunets["metric_per_case"]}
            for (case, _), ours in cases_of(scores).items():
                counts = theirs[f"{case}.nii.gz"]
                assert (ours["tp"], ours["fp"], ours["fn"]) == (counts["TP"], counts["FP"], counts["FN"])

    # Neither command looks a trainer up; the ensemble's probabilities are the mean of both models'.
    space.run("nnUNetv2_find_best_configuration", "711", *models, "-np", "1")
    names = [results(space, trainer).name for trainer in trainers]
    folder = f"ensemble___{names[0]}___{names[1]}___{'_'.join(folds)}"
    ensemble = space.root / "nnUNet_results" / space.dataset / "ensembles" / folder
    cases = {path.name.removesuffix(".nii.gz") for path in ensemble.glob("*.nii.gz")}
    validated = {path.stem for trainer in trainers for path in results(space, trainer).glob("fold_*/validation/*.npz")}
    assert cases == validated
    case = sorted(cases)[0]
    (one, other) = (next(results(space, trainer).glob(f"fold_*/validation/{case}.npz")) for trainer in trainers)
    expected = np.mean([np.load(path)["probabilities"] for path in (one, other)], axis=0).argmax(0)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(ensemble / f"{case}.nii.gz")))
    assert (found == expected).mean() > 0.999

    printed = space.run("h2a_compare", "-d", "711", *models, "-o", tmp_path / "table", "-np", "1").stdout
    for name in (*names, f"ensemble of {names[0]} and {names[1]}"):
        assert f"| {name} | " in printed
