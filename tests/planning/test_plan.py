"""h2a_plan: plans that nnU-Net's own builder turns into our network."""

from __future__ import annotations

import copy
import json

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_h2a.command import CommandError
from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.planning.make_plans import make_plans
from nnunet_h2a.planning.plan import main


def build(plans, configuration, num_classes=2):
    configuration = PlansManager(plans).get_configuration(configuration)
    return configuration, get_network_from_plans(
        configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import, 2, num_classes, deep_supervision=True,
    )  # fmt: skip


def test_defaults_keep_the_patch_and_take_the_papers_widths(preprocessed, capsys):
    assert main(["-d", "711"]) == 0
    plans = json.loads((preprocessed / "nnUNetH2ASegPlans.json").read_text())
    base = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    assert plans["plans_name"] == "nnUNetH2ASegPlans"
    for key in ("2d", "3d_fullres"):
        ours, theirs = plans["configurations"][key], base["configurations"][key]
        for same in ("patch_size", "batch_size", "data_identifier", "normalization_schemes", "spacing"):
            assert ours[same] == theirs[same]
        configuration, network = build(plans, key)
        assert isinstance(network, H2ASeg)
        stages = len(theirs["architecture"]["arch_kwargs"]["strides"])
        assert network.encoder.output_channels == [min(8 * 2**k, 128) for k in range(stages)]
        assert network.patch_size == tuple(theirs["patch_size"])
        network.compute_conv_feature_map_size(configuration.patch_size)
    printed = capsys.readouterr().out
    # Nothing is preprocessed in this copy of the dataset.
    assert "nnUNetv2_preprocess -d 711 -c 3d_fullres -plans_name nnUNetH2ASegPlans\n" in printed
    (preprocessed / base["configurations"]["2d"]["data_identifier"]).mkdir()
    assert main(["-d", "711"]) == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_preprocess" not in printed
    assert "nnUNetv2_train 711 2d 0 -p nnUNetH2ASegPlans -tr nnUNetTrainerH2ASeg " in printed


def test_sizes_by_hand(preprocessed):
    arguments = ["-d", preprocessed.name, "-c", "3d_fullres", "--patch-size", "40", "32", "48", "--batch-size", "3",
                 "--n-stages", "3", "--features", "2", "4", "6", "-o", "Mine"]  # fmt: skip
    assert main(arguments) == 0
    plans = json.loads((preprocessed / "Mine.json").read_text())
    assert list(plans["configurations"]) == ["3d_fullres"]
    configuration, network = build(plans, "3d_fullres")
    assert (configuration.patch_size, configuration.batch_size) == ([40, 32, 48], 3)
    assert network.encoder.output_channels == [2, 4, 6]
    assert len(network.decoder.seg_layers) == 3


def test_the_stock_network_can_be_sized_alike(preprocessed):
    arguments = ["-d", "711", "--network", "stock", "--patch-size", "32", "32", "32", "--n-stages", "3",
                 "--features", "4", "8", "16", "-o", "Small"]  # fmt: skip
    assert main(arguments) == 0
    _, network = build(json.loads((preprocessed / "Small.json").read_text()), "3d_fullres")
    assert type(network).__name__ == "PlainConvUNet"
    assert network.encoder.output_channels == [4, 8, 16]


def test_stock_from_plans_of_ours_sizes_their_network(preprocessed):
    arguments = ["-d", "711", "-c", "3d_fullres", "-o", "Ours"]
    assert main(arguments) == 0
    assert main([*arguments[:-1], "Again", "-p", "Ours", "--network", "stock", "--patch-size", "32", "32", "32"]) == 0
    configuration, network = build(json.loads((preprocessed / "Again.json").read_text()), "3d_fullres")
    assert configuration.patch_size == list(network.patch_size) == [32, 32, 32]


def test_a_patch_that_does_not_divide_is_raised_and_said_so(preprocessed, capsys):
    assert main(["-d", "711", "-c", "3d_fullres", "--patch-size", "30", "32", "32"]) == 0
    printed = capsys.readouterr().out
    plans = json.loads((preprocessed / "nnUNetH2ASegPlans.json").read_text())
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    assert patch != [30, 32, 32]
    assert f"[30, 32, 32] becomes {patch}" in printed


def test_channels_regions_and_cascade(preprocessed):
    base = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    lowres = copy.deepcopy(base["configurations"]["3d_fullres"]) | {"next_stage": "3d_cascade_fullres"}
    base["configurations"] |= {
        "3d_lowres": lowres,
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    dataset_json = {
        "channel_names": {"0": "CT", "1": "CT"}, "h2a_modalities": ["PET", "CT"],
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
    }  # fmt: skip
    plans = make_plans(base, dataset_json, network="H2ASeg", plans_name="P", configurations=["3d_cascade_fullres"])
    assert set(plans["configurations"]) == {"3d_cascade_fullres", "3d_fullres", "3d_lowres"}
    assert plans["configurations"]["3d_lowres"]["next_stage"] == ["3d_cascade_fullres"]
    _, network = build(plans, "3d_cascade_fullres")
    assert (network.ct_channel, network.pet_channel) == (1, 0)
    assert network.decoder.independent_classes


def test_one_modality_has_plans_of_its_own_name(preprocessed, capsys):
    for modalities, name in (
        ("both", "nnUNetISANetPlans"),
        ("pet", "nnUNetISANetPETPlans"),
        ("ct", "nnUNetISANetCTPlans"),
    ):
        assert main(["-d", "711", "--network", "ISANet", "--modalities", modalities]) == 0
        printed = capsys.readouterr().out
        assert f"-p {name}" in printed
        assert ("alone" in printed) == (modalities != "both")
        plans = json.loads((preprocessed / f"{name}.json").read_text())
        _, network = build(plans, "3d_fullres")
        assert network.modalities == modalities
        trainer = {"both": "nnUNetTrainerISANet", "pet": "nnUNetTrainerISANetPET", "ct": "nnUNetTrainerISANetCT"}
        assert f"-tr {trainer[modalities]} " in printed


def test_plans_that_are_replaced_are_said_to_be(preprocessed, capsys):
    assert main(["-d", "711"]) == 0
    assert "replacing" not in capsys.readouterr().out
    assert main(["-d", "711", "--batch-size", "3", "-c", "2d"]) == 0
    printed = capsys.readouterr().out
    assert "nnUNetH2ASegPlans.json, which was there" in printed
    assert "; 3d_fullres is not in the new plans" in printed
    assert main(["-d", "711", "-c", "2d", "-c", "3d_fullres"]) == 0
    plans = json.loads((preprocessed / "nnUNetH2ASegPlans.json").read_text())
    assert set(plans["configurations"]) == {"2d", "3d_fullres"}


def test_a_low_resolution_alone_has_no_next_stage(preprocessed):
    """nnU-Net predicts for the next stage when training has ended, and would not find it in the plans."""
    base = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    base["configurations"]["3d_fullres"]["next_stage"] = "3d_cascade_fullres"
    dataset_json = json.loads((preprocessed / "dataset.json").read_text())
    plans = make_plans(base, dataset_json, network="H2ASeg", plans_name="P", configurations=["3d_fullres"])
    assert PlansManager(plans).get_configuration("3d_fullres").next_stage_names is None


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "0"], ["--batch-size", "-3"], ["--features", "4", "0"], ["--patch-size", "x"]]
)
def test_sizes_are_positive_integers(preprocessed, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["-d", "711", *arguments])
    assert stopped.value.code == 2
    assert "is not a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", ""], "no dataset ''"),
        (["-d", "711", "-c", "3d_fullres", "--patch-size", "8", "8", "8"], "nnU-Net needs 3"),
        (["-d", "712"], "nnUNetv2_plan_and_preprocess -d 712"),
        (["-d", "711", "-p", "Missing"], "has no plans Missing; it has nnUNetPlans (-p)"),
        (["-d", "711", "-c", "3d_lowres"], "no configuration 3d_lowres; they have"),
        (["-d", "711", "-c", "2d", "--patch-size", "32", "32", "32"], "configuration 2d has 2 axes"),
        (["-d", "711", "--patch-size", "32"], "no configuration of the plans has 1 axes"),
        (["-d", "711", "-c", "3d_fullres", "--n-stages", "9"], "allows 3 to"),
        (["-d", "711", "-c", "3d_fullres", "--n-stages", "2"], "allows 3 to"),
        (["-d", "711", "-c", "3d_fullres", "--features", "4", "8"], "--features: configuration 3d_fullres has"),
        (["-d", "711", "--network", "CIPA", "--n-stages", "3"], "CIPA always has 4 stages"),
        (["-d", "711", "-o", "nnUNetPlans"], "would overwrite"),
        (["-d", "711", "-o", "a__b"], "single underscores"),
        (["-d", "711", "-o", "3dPlans"], "a letter first"),
        (["-d", "711", "-o", "dataset"], "dataset.json is there and holds no plans"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(preprocessed, capsys, arguments, message):
    before = sorted(preprocessed.iterdir())
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(preprocessed.iterdir()) == before


def test_folder_not_set(preprocessed, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["-d", "711"]) == 2
    assert "export nnUNet_preprocessed=" in capsys.readouterr().err


def test_a_dataset_that_is_not_pet_ct(preprocessed, capsys):
    dataset_json = json.loads((preprocessed / "dataset.json").read_text()) | {"h2a_modalities": ["CT", "CT"]}
    (preprocessed / "dataset.json").write_text(json.dumps(dataset_json))
    assert main(["-d", "711"]) == 2
    assert "h2a_modalities is ['CT', 'CT']" in capsys.readouterr().err


def test_plans_that_are_not_json(preprocessed, capsys):
    (preprocessed / "nnUNetPlans.json").write_text("{")
    assert main(["-d", "711"]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_plans_that_are_something_else(preprocessed, capsys):
    (preprocessed / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPlans"}')
    assert main(["-d", "711"]) == 2
    assert "has no configurations: write it anew" in capsys.readouterr().err


def test_command_error_is_for_bad_values_in_python_too(preprocessed):
    base = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    with pytest.raises(CommandError):
        make_plans(base, {}, network="H2ASeg", plans_name="P", configurations=["nothing"])
