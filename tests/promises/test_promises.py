"""What nnU-Net's trainer promises holds for ours: each promise is kept by a training and a prediction."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.promises.conftest import CASES, HELD_OUT, every_network


def weights(folder: Path, name: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=False, map_location="cpu")["network_weights"]


def check_prediction(predicted: dict[str, np.ndarray]) -> None:
    """Two regions with a sigmoid each; the ignored label is never predicted."""
    assert predicted["probabilities"].shape[0] == 2
    assert np.isfinite(predicted["probabilities"]).all()
    assert predicted["probabilities"].std() > 0
    assert set(np.unique(predicted["labels"])) <= {0, 1, 2}


@every_network("ISANet")
def test_cascade_with_regions_and_an_ignored_label_on_all_cases(promises, network, tmp_path):
    """Fold ``all`` of the first stage predicts every case for the second; ``--npz`` keeps probabilities."""
    trainer, plans = f"nnUNetTrainer{network}FewSteps", f"nnUNet{network}Plans"
    promises.train("3d_lowres", "all", trainer, plans, "--npz")
    first = promises.results(trainer, plans, "3d_lowres")
    handed_on = sorted(p.stem for p in (first / "predicted_next_stage" / "3d_cascade_fullres").iterdir())
    assert handed_on == [f"case_{n:03d}" for n in range(CASES)]
    assert len(list((first / "fold_all" / "validation").glob("*.npz"))) == CASES
    promises.train("3d_cascade_fullres", "0", trainer, plans, "--npz")
    second = promises.results(trainer, plans, "3d_cascade_fullres")
    held_back = {p.stem.split(".")[0] for p in (second / "fold_0" / "validation").glob("*.nii.gz")}
    assert held_back == {p.stem for p in (second / "fold_0" / "validation").glob("*.npz")}
    check_prediction(promises.predict("3d_lowres", "all", trainer, plans, tmp_path / "low"))
    cascade = promises.predict(
        "3d_cascade_fullres", "0", trainer, plans, tmp_path / "high", "-prev_stage_predictions", str(tmp_path / "low")
    )
    check_prediction(cascade)


@every_network("H2ASeg")
def test_killed_and_continued_is_bit_for_bit_the_same(promises, network, tmp_path):
    """``--c`` after ``kill -9`` in the middle of an epoch. nnU-Net keeps no random state: the trainer reseeds."""
    trainer, plans = f"nnUNetTrainer{network}Reseeded", f"nnUNet{network}Plans"
    folder = promises.results(trainer, plans) / "fold_0"
    promises.train("3d_fullres", "0", trainer, plans)
    whole = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    predicted = promises.predict("3d_fullres", "0", trainer, plans, tmp_path / "whole")
    folder.rename(tmp_path / "straight")
    # One thread, as in this process: sums of more threads have other bits.
    program = (
        "import multiprocessing; multiprocessing.cpu_count = lambda: 1; "
        "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    )
    command = [sys.executable, "-c", program, "731", "3d_fullres", "0", "-tr", trainer, "-p", plans, "-device", "cpu"]
    killed = subprocess.run(command, env=promises.environment() | {"H2A_TEST_KILL": "1 2"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "checkpoint_final.pth").exists()
    assert torch.load(folder / "checkpoint_latest.pth", weights_only=False)["current_epoch"] == 1
    promises.train("3d_fullres", "0", trainer, plans, "--c")
    continued = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert whole["current_epoch"] == continued["current_epoch"] == 3
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, continued["network_weights"][key]), key
    states = [c["optimizer_state"]["state"] for c in (whole, continued)]
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key])), (number, key)
    for key in ("train_losses", "val_losses", "ema_fg_dice", "lrs"):
        assert [float(v) for v in whole["logging"][key]] == [float(v) for v in continued["logging"][key]], key
    again = promises.predict("3d_fullres", "0", trainer, plans, tmp_path / "continued")
    assert np.array_equal(predicted["probabilities"], again["probabilities"])


@every_network(None)
def test_pretrained_weights(promises, network, tmp_path):
    """All weights but those of the heads are taken over; a rate of 0 keeps them until the end."""
    trainer, plans = f"nnUNetTrainer{network}FewSteps", f"nnUNet{network}Plans"
    promises.train("3d_fullres", "1", trainer, plans)
    source = promises.results(trainer, plans) / "fold_1" / "checkpoint_final.pth"
    frozen = f"nnUNetTrainer{network}Frozen"
    promises.train("3d_fullres", "0", frozen, plans, "-pretrained_weights", str(source))
    before, after = weights(source.parent), weights(promises.results(frozen, plans) / "fold_0")
    parameters = torch.load(source, weights_only=False)["optimizer_state"]["state"]
    assert before.keys() == after.keys()
    heads = [key for key in before if ".seg_layers." in key]
    assert heads
    # What is measured and not learnt goes on changing.
    measured = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in before.items():
        if key not in heads and not key.endswith(measured):
            assert torch.equal(value, after[key]), key
    assert any(not torch.equal(before[key], after[key]) for key in heads)
    assert len(parameters) > len(heads)
    check_prediction(promises.predict("3d_fullres", "0", frozen, plans, tmp_path))


@every_network(None)
def test_compiled_and_not(promises, network, tmp_path, monkeypatch):
    """On a GPU nnU-Net compiles by default. Here the graph is captured and differentiated as there, and run eagerly.

    Code for the CPU is generated for every network in tests/networks.
    """
    trainer, plans = f"nnUNetTrainer{network}Compiled", f"nnUNet{network}Plans"
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    promises.train("3d_fullres", "0", trainer, plans)
    log = "".join(p.read_text() for p in (promises.results(trainer, plans) / "fold_0").glob("training_log*.txt"))
    assert "Using torch.compile..." in log
    assert not any("_orig_mod" in key for key in weights(promises.results(trainer, plans) / "fold_0"))
    plain = promises.predict("3d_fullres", "0", trainer, plans, tmp_path / "plain")
    monkeypatch.setenv("nnUNet_compile", "true")
    compiled = promises.predict("3d_fullres", "0", trainer, plans, tmp_path / "compiled")
    check_prediction(plain)
    assert np.allclose(plain["probabilities"], compiled["probabilities"], atol=1e-3)


@pytest.mark.parametrize(
    ("network", "suffix"),
    [
        pytest.param(n, s, marks=[] if (n, s) == ("CIPA", "NoMirroring") else pytest.mark.full)
        for n in ("H2ASeg", "ISANet", "CIPA")
        for s in ("DA5", "NoMirroring", "PETCT")
    ],
)
def test_variants(promises, network, suffix, tmp_path):
    trainer, plans = f"nnUNetTrainer{network}{suffix}FewSteps", f"nnUNet{network}Plans"
    promises.train("3d_fullres", "0", trainer, plans)
    checkpoint = torch.load(
        promises.results(trainer, plans) / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu"
    )
    mirrored = None if suffix == "NoMirroring" else (0, 1, 2)
    assert checkpoint["inference_allowed_mirroring_axes"] == mirrored
    check_prediction(promises.predict("3d_fullres", "0", trainer, plans, tmp_path))
    assert (tmp_path / f"{HELD_OUT}.nii.gz").exists()
