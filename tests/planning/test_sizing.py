"""Patch and batch for a GPU's memory."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_h2a.patch_sizes import patches
from nnunet_h2a.planning.memory import GIB, StepMemory
from nnunet_h2a.planning.plan import main
from nnunet_h2a.planning.sizing import PRESETS, USABLE, DoesNotFit, choose_size

SHAPES = {
    "isotropic": ([1.5, 1.5, 1.5], [300, 280, 280]),
    "whole body": ([3.0, 2.04, 2.04], [326, 400, 400]),
    "anisotropic": ([5.0, 0.98, 0.98], [91, 512, 512]),
    "small": ([4.0, 4.0, 4.0], [40, 64, 64]),
    "2D": ([0.98, 0.98], [512, 512]),
}


def planners_way(spacing, shape, smallest):
    """The patches that nnU-Net's own planner tries, for a network that needs memory for its patch alone."""
    tried = []

    class Planner(ExperimentPlanner):
        def __init__(self):
            self.dataset_json = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "tumor": 1}}
            self.UNet_class = type("U", (), {})
            self.UNet_base_num_features, self.UNet_featuremap_min_edge_length = 32, 4
            self.UNet_max_features_2d = self.UNet_max_features_3d = 320
            self.UNet_blocks_per_stage_encoder = self.UNet_blocks_per_stage_decoder = (2,) * 14
            self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB = 8
            self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = 2
            self.UNet_reference_val_2d = self.UNet_reference_val_3d = smallest
            self.UNet_min_batch_size, self.max_dataset_covered, self.preprocessor_name = 2, 0.05, ""

        @staticmethod
        def static_estimate_VRAM_usage(patch_size, *_):
            tried.append([int(n) for n in patch_size])
            return math.prod(tried[-1])

        def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self):
            return [], []

    Planner().get_plans_for_configuration(np.array(spacing), np.array(shape), "", 1e9, {})
    return tried


@pytest.mark.parametrize(("spacing", "shape"), SHAPES.values(), ids=SHAPES)
def test_patches_are_those_of_nnunets_planner(spacing, shape):
    ours = list(patches(spacing, shape, 4))
    theirs = planners_way(spacing, shape, math.prod(ours[-1]))
    assert ours == theirs
    assert len(ours) > 3


def linear(weights, per_voxel):
    """A network whose memory is its weights and so many bytes per voxel."""

    def count(patch, batch):
        activations = round(per_voxel * math.prod(patch) * batch)
        return StepMemory(weights // 4, weights, weights + activations, weights + activations // 10)

    return count


@pytest.mark.parametrize("seed", range(20))
def test_the_first_patch_that_fits_and_few_are_counted(seed):
    rng = random.Random(seed)
    spacing, shape = rng.choice(list(SHAPES.values()))
    candidates = list(patches(spacing, shape, 4))
    exact, memory = linear(rng.randint(10**6, 10**9), rng.uniform(200, 5000)), rng.uniform(4, 80)
    wiggle = {tuple(patch): rng.uniform(0.95, 1.05) for patch in candidates}
    counted = []

    def count(patch, batch):
        counted.append((tuple(patch), batch))
        return exact(patch, batch).scaled(wiggle[tuple(patch)])

    fits = [patch for patch in candidates if count(patch, 2).peak <= memory * USABLE * GIB]
    counted.clear()
    if not fits:
        with pytest.raises(DoesNotFit, match="take a GPU with more memory"):
            choose_size(candidates, 1e12, memory, count)
        return
    chosen = choose_size(candidates, 1e12, memory, count)
    assert len(counted) <= 8
    # A step from one patch to the next is larger than the wiggle, or both are as good.
    assert chosen.patch_size == next(p for p in candidates if count(p, 2).peak <= memory * USABLE * GIB) or (
        math.prod(chosen.patch_size) > 0.85 * math.prod(fits[0])
    )
    assert chosen.memory == count(chosen.patch_size, chosen.batch_size)
    assert chosen.memory.peak <= memory * USABLE * GIB
    assert count(chosen.patch_size, chosen.batch_size + 1).peak > memory * USABLE * GIB


def test_a_step_sees_5_percent_of_the_dataset_at_most():
    count = linear(10**8, 1000)
    chosen = choose_size([[32, 32, 32], [16, 16, 16]], 32**3 * 100, 24, count)
    assert (chosen.patch_size, chosen.batch_size) == ([32, 32, 32], 5)
    assert "5 % of the dataset" in chosen.reason
    assert choose_size([[32, 32, 32]], 32**3, 24, count).batch_size == 2


def test_a_batch_that_is_given_stays():
    count = linear(10**8, 1000)
    chosen = choose_size([[64, 64, 64], [32, 32, 32], [16, 16, 16]], 1e12, 3, count, batch_size=12)
    assert chosen.batch_size == 12
    assert chosen.patch_size == [32, 32, 32]


def test_the_command_fits_the_plan_and_says_why(preprocessed, capsys):
    base = json.loads((preprocessed / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    arguments = ["-d", "711", "-c", "3d_fullres", "--gpu-memory", "1.4", "--features", "4", "8", "16",
                 "--batch-size", "2"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    ours = json.loads((preprocessed / "nnUNetH2ASegPlans.json").read_text())["configurations"]["3d_fullres"]
    kwargs = ours["architecture"]["arch_kwargs"]
    assert (kwargs["n_stages"], kwargs["patch_size"]) == (3, ours["patch_size"])
    assert ours["data_identifier"] == base["data_identifier"]
    patch = " x ".join(map(str, ours["patch_size"]))
    assert f"3d_fullres: patch {patch}, batch {ours['batch_size']}: " in printed
    assert "GiB predicted; " in printed
    assert "provisional" in printed
    peaks = [float(line.split()[-2]) for line in printed.splitlines() if line.endswith("GiB")]
    assert min(peaks) <= 1.4 * USABLE < max(peaks)


def test_the_preset_is_a_memory(preprocessed, capsys):
    arguments = ["-d", "711", "-c", "3d_fullres", "--network", "stock", "--patch-size", "32", "32", "32",
                 "--batch-size", "2", "-o", "Small"]  # fmt: skip
    assert main([*arguments, "--preset", "S"]) == 0
    assert f"of {PRESETS['S']} GiB" in capsys.readouterr().out
    plan = json.loads((preprocessed / "Small.json").read_text())["configurations"]["3d_fullres"]
    assert (plan["patch_size"], plan["batch_size"]) == ([32, 32, 32], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "0.9", "--network", "stock", "-o", "Mine"], "take a GPU with more memory"),
        (["--gpu-memory", "8", "--n-stages", "9"], "has 9 stages; ask for fewer --n-stages or --features"),
        (
            ["--gpu-memory", "1", "--network", "stock", "-o", "M", "--patch-size", "40", "64", "64"],
            "more memory, a smaller --patch-size, fewer",
        ),
        (["--gpu-memory", "8", "--n-stages", "3", "--features", "4", "8"], "give 3 numbers for --n-stages 3"),
        (["--gpu-memory", "8", "--network", "CIPA", "--n-stages", "3"], "CIPA always has 4 stages"),
    ],
)
def test_what_cannot_be_is_one_line(preprocessed, capsys, arguments, message):
    before = sorted(preprocessed.iterdir())
    assert main(["-d", "711", "-c", "3d_fullres", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(preprocessed.iterdir()) == before


def test_what_inherits_takes_the_sizes_that_fit(preprocessed, capsys):
    """nnU-Net's documented way to another batch is a configuration that inherits and has its own."""
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres_bs40"] = {"inherits_from": "3d_fullres", "batch_size": 40}
    path.write_text(json.dumps(plans))
    arguments = ["-d", "711", "-c", "3d_fullres_bs40", "--gpu-memory", "1.2", "--network", "stock", "-o", "Mine"]
    assert main(arguments) == 0
    assert "3d_fullres_bs40: its own batch size 40 gives way to that of 3d_fullres" in capsys.readouterr().out
    ours = json.loads((preprocessed / "Mine.json").read_text())["configurations"]
    assert ours["3d_fullres_bs40"] == {"inherits_from": "3d_fullres"}
    assert ours["3d_fullres"]["batch_size"] < 40


def test_regions_without_their_order(preprocessed, capsys):
    path = preprocessed / "dataset.json"
    content = json.loads(path.read_text()) | {"labels": {"background": 0, "whole": [1, 2], "core": 2}}
    path.write_text(json.dumps(content))
    assert main(["-d", "711", "-c", "3d_fullres", "--gpu-memory", "4"]) == 2
    assert "regions_class_order" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "nan", "much"])
def test_memory_is_a_number(preprocessed, capsys, text):
    with pytest.raises(SystemExit):
        main(["-d", "711", "--gpu-memory", text])
    assert "is not a size in GiB" in capsys.readouterr().err
