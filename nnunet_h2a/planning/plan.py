"""``h2a_plan``: plans that name one of our networks, so that nnU-Net's stock trainer trains and predicts with it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunet_h2a.command import (
    CommandError,
    dataset_folder,
    dataset_number,
    nnunet_folder,
    read_plans,
    run_command,
)
from nnunet_h2a.training.modalities import ChannelError, channel_roles
from nnunet_h2a.widths import FIXED_STAGES, PUBLISHED_WIDTHS, published_features

#: ``--network`` value that keeps the base plan's own network and changes its sizes only.
STOCK = "stock"

#: Smallest edge of the deepest feature map; nnU-Net's own planner uses it too.
MIN_FEATURE_MAP_EDGE = 4


def _positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_plan``."""
    parser = argparse.ArgumentParser(
        prog="h2a_plan",
        description="Write nnU-Net plans whose architecture is one of our networks. They train with any trainer, "
        "the stock nnUNetTrainer included, and reuse what nnU-Net has preprocessed.",
    )
    parser.add_argument("-d", "--dataset", required=True, help="dataset number or name, planned by nnU-Net before")
    parser.add_argument(
        "-c", "--configurations", nargs="+", metavar="C",
        help="2d, 3d_fullres, … [all in the plans that --patch-size fits]",
    )  # fmt: skip
    parser.add_argument(
        "--network", choices=[*PUBLISHED_WIDTHS, STOCK], default="H2ASeg",
        help=f"network to plan for; '{STOCK}' keeps the base plans' network and sets its sizes [%(default)s]",
    )  # fmt: skip
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans to start from [%(default)s]")
    parser.add_argument(
        "-o", "--plans-name", help="name of the new plans [nnUNet<network>Plans, nnUNet<network>PETPlans or …CTPlans]",
    )  # fmt: skip
    parser.add_argument(
        "--patch-size", type=_positive, nargs="+", metavar="N",
        help="patch in voxels, in the plans' axis order (lowest resolution first) [the base plans']",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="patches per step [the base plans']")
    parser.add_argument("--n-stages", type=_positive, metavar="N", help="number of resolutions [as the patch allows]")
    parser.add_argument(
        "--features", type=_positive, nargs="+", metavar="F",
        help="channels of each stage (per branch); four numbers for CIPA [the network's published widths]",
    )  # fmt: skip
    parser.add_argument(
        "--modalities", choices=["both", "pet", "ct"], default="both",
        help="ISANet only: one branch for PET or CT alone [%(default)s]",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_plan``."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _plan(arguments))


def _plan(arguments: argparse.Namespace) -> int:
    folder = dataset_folder(nnunet_folder("nnUNet_preprocessed"), arguments.dataset)
    base, dataset_json = read_plans(folder, arguments.plans)
    # Models of one modality and of both must not share a name: they would share the folder of their results.
    alone = "" if arguments.modalities == "both" else arguments.modalities.upper()
    name = arguments.plans_name or f"nnUNet{arguments.network}{alone}Plans"
    if "__" in name or not name.isidentifier():
        raise CommandError(f"--plans-name {name}: use letters, digits and single underscores")
    if name == arguments.plans:
        raise CommandError(f"--plans-name {name} would overwrite the plans it starts from: choose another name")
    try:
        plans = make_plans(
            base, dataset_json, network=arguments.network, plans_name=name, configurations=arguments.configurations,
            patch_size=arguments.patch_size, batch_size=arguments.batch_size, n_stages=arguments.n_stages,
            features=arguments.features, modalities=arguments.modalities,
        )  # fmt: skip
    except ChannelError as error:
        raise CommandError(f"{folder}: {error}") from error
    target = folder / f"{name}.json"
    if target.exists():
        print(f"replacing {target}, which was there (-o gives another name)")
    temporary = target.with_suffix(".json.part")
    temporary.write_text(json.dumps(plans, indent=4) + "\n", encoding="utf-8")
    os.replace(temporary, target)
    _report(plans, target, dataset_number(folder), arguments.network, alone)
    return 0


def make_plans(
    base: dict[str, Any],
    dataset_json: dict[str, Any],
    *,
    network: str,
    plans_name: str,
    configurations: Sequence[str] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    n_stages: int | None = None,
    features: Sequence[int] | None = None,
    modalities: str = "both",
) -> dict[str, Any]:
    """Plans for ``network`` from plans of nnU-Net.

    Args:
        base: content of a plans file.
        dataset_json: content of dataset.json, for the order of the channels and the kind of labels.
        network: key of :data:`PUBLISHED_WIDTHS`, or :data:`STOCK`.
        plans_name: name of the new plans.
        configurations: configurations to keep; None keeps all that ``patch_size`` fits. What they inherit from
            stays as well.
        patch_size: voxels, in the plans' axis order. Strides and kernels then follow by nnU-Net's own rules.
        batch_size: patches per step.
        n_stages: number of resolutions; not more than the patch allows.
        features: channels of each stage; four for CIPA, whose stages do not follow the plan.
        modalities: ``"both"``, ``"pet"`` or ``"ct"``: ISANet's branches.

    Returns:
        Content of the new plans file. Data identifiers are unchanged, so nothing is preprocessed again.

    Raises:
        CommandError: for sizes that do not go together.
        ChannelError: where the dataset is not CT and PET and ``network`` is one of ours.
    """
    if n_stages is not None and n_stages != FIXED_STAGES.get(network, n_stages):
        raise CommandError(f"--n-stages {n_stages}: {network} always has {FIXED_STAGES[network]} stages; leave it out")
    if modalities != "both" and network != "ISANet":
        raise CommandError(f"--modalities {modalities}: only ISANet has a form for one modality, not {network}")
    plans = deepcopy(base)
    plans["plans_name"] = plans_name
    if configurations is None and patch_size is not None:
        configurations = [
            key for key, value in plans["configurations"].items() if len(value.get("spacing", [])) == len(patch_size)
        ]
        if not configurations:
            raise CommandError(f"--patch-size: no configuration of the plans has {len(patch_size)} axes")
    wanted = _with_dependencies(plans["configurations"], configurations)
    plans["configurations"] = {key: value for key, value in plans["configurations"].items() if key in wanted}
    for key, configuration in plans["configurations"].items():
        _drop_missing_next_stages(configuration, wanted)
        if batch_size is not None and "batch_size" in configuration:
            configuration["batch_size"] = batch_size
        if "architecture" not in configuration:
            continue
        old = configuration["architecture"]["arch_kwargs"]
        geometry = _geometry(key, configuration, old, patch_size, n_stages)
        configuration["patch_size"] = geometry.pop("patch_size")
        stages = geometry["n_stages"]
        wanted_widths = FIXED_STAGES.get(network, stages)
        if features is not None and len(features) != wanted_widths:
            whose = f"{network}" if network in FIXED_STAGES else f"configuration {key}"
            cure = "" if network in FIXED_STAGES or len(features) > stages else f" or --n-stages {len(features)}"
            raise CommandError(
                f"--features: {whose} has {wanted_widths} stages, got {len(features)} numbers: give {wanted_widths} "
                f"numbers{cure}"
            )
        if network == STOCK:
            old.update(geometry)
            old["features_per_stage"] = list(features or _resize(old["features_per_stage"], stages))
            for setting, length in _PER_STAGE.items():
                if isinstance(old.get(setting), list):
                    old[setting] = _resize(old[setting], length(stages))
        else:
            configuration["architecture"] = _architecture(
                network, geometry, old["conv_op"], features, configuration["patch_size"], dataset_json, modalities
            )
    return plans


#: Settings of nnU-Net's U-Nets with one entry per stage, or per stage of the decoder.
_PER_STAGE = {
    "n_conv_per_stage": lambda stages: stages,
    "n_blocks_per_stage": lambda stages: stages,
    "n_conv_per_stage_decoder": lambda stages: stages - 1,
}


def _resize(values: list[Any], length: int) -> list[Any]:
    return [*values[:length], *[values[-1]] * (length - len(values))]


def _with_dependencies(available: dict[str, Any], wanted: Sequence[str] | None) -> set[str]:
    pending, result = list(available if wanted is None else wanted), set()
    while pending:
        key = pending.pop()
        if key not in available:
            raise CommandError(f"the plans have no configuration {key}; they have {', '.join(available)}")
        result.add(key)
        links = [available[key].get("inherits_from"), available[key].get("previous_stage")]
        pending += [link for link in links if link is not None and link not in result]
    return result


def _drop_missing_next_stages(configuration: dict[str, Any], kept: set[str]) -> None:
    """Forget cascade stages that are not in the plans: nnU-Net would look for them when training has ended."""
    following = configuration.get("next_stage")
    if following is None:
        return
    stages = [stage for stage in ([following] if isinstance(following, str) else following) if stage in kept]
    if stages:
        configuration["next_stage"] = stages
    else:
        del configuration["next_stage"]


def _geometry(
    key: str,
    configuration: dict[str, Any],
    old: dict[str, Any],
    patch_size: Sequence[int] | None,
    n_stages: int | None,
) -> dict[str, Any]:
    """Patch, stages, strides and kernels of a configuration."""
    if patch_size is None:
        patch, strides, kernels = configuration["patch_size"], old["strides"], old["kernel_sizes"]
    else:
        # No torch behind this import: the planner's topology is arithmetic on lists.
        from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

        spacing = configuration["spacing"]
        if len(patch_size) != len(spacing):
            raise CommandError(
                f"--patch-size: configuration {key} has {len(spacing)} axes, got {list(patch_size)}; choose "
                "configurations with -c"
            )
        _, strides, kernels, patch, _ = get_pool_and_conv_props(spacing, patch_size, MIN_FEATURE_MAP_EDGE, 999999)
        patch = [int(n) for n in patch]
        if patch != list(patch_size):
            print(f"{key}: patch {list(patch_size)} becomes {patch}, divisible by its total stride")
    stages = len(strides) if n_stages is None else n_stages
    # With two stages nnU-Net's deep supervision weights are 0 / 0.
    if len(strides) < 3:
        raise CommandError(
            f"--patch-size: configuration {key} gets {len(strides)} stages for patch {list(patch)}, and nnU-Net needs "
            f"3: take a patch of at least {4 * MIN_FEATURE_MAP_EDGE} voxels along its finely sampled axes"
        )
    if not 3 <= stages <= len(strides):
        raise CommandError(
            f"--n-stages: configuration {key} allows 3 to {len(strides)} stages for patch {list(patch)}, got {stages}"
        )
    return {
        "patch_size": [int(n) for n in patch],
        "n_stages": stages,
        "strides": [[int(n) for n in stage] for stage in strides[:stages]],
        "kernel_sizes": [[int(n) for n in stage] for stage in kernels[:stages]],
    }


def _architecture(
    network: str,
    geometry: dict[str, Any],
    conv_op: str,
    features: Sequence[int] | None,
    patch_size: Sequence[int],
    dataset_json: dict[str, Any],
    modalities: str,
) -> dict[str, Any]:
    ct_channel, pet_channel = channel_roles(dataset_json, modalities)
    options: dict[str, Any] = {} if modalities == "both" else {"modalities": modalities}
    if network in FIXED_STAGES:
        options |= {} if features is None else {"widths": [int(n) for n in features]}
        features = None
    widths = features or published_features(network, geometry["n_stages"])
    return {
        "network_class_name": f"nnunet_h2a.networks.{network}",
        "arch_kwargs": {
            **geometry,
            "features_per_stage": [int(n) for n in widths],
            "conv_op": conv_op,
            "patch_size": list(patch_size),
            "ct_channel": ct_channel,
            "pet_channel": pet_channel,
            "region_based": any(
                isinstance(label, list | tuple) and len(label) > 1 for label in dataset_json["labels"].values()
            ),
            **options,
        },
        "_kw_requires_import": ["conv_op"],
    }


def _report(plans: dict[str, Any], target: Path, number: int, network: str, alone: str) -> None:
    print(f"wrote {target}")
    for key, configuration in plans["configurations"].items():
        if "architecture" not in configuration:
            print(f"  {key}: as {configuration['inherits_from']}")
            continue
        kwargs = configuration["architecture"]["arch_kwargs"]
        stages = f"{kwargs['n_stages']} stages of {kwargs['features_per_stage']} channels, strides {kwargs['strides']}"
        if network in FIXED_STAGES:
            stages = f"{FIXED_STAGES[network]} stages of {kwargs.get('widths', 'the published')} channels"
        if "modalities" in kwargs:
            stages += f", {kwargs['modalities'].upper()} alone"
        print(f"  {key}: patch {configuration['patch_size']}, batch {configuration['batch_size']}, {stages}")
    ready = [
        key
        for key, configuration in plans["configurations"].items()
        if (identifier := configuration.get("data_identifier")) and (target.parent / identifier).is_dir()
    ]
    configuration = (ready or list(plans["configurations"]))[-1]
    print("next:")
    if not ready:
        print(f"  nnUNetv2_preprocess -d {number} -c {configuration} -plans_name {plans['plans_name']}")
    train = f"  nnUNetv2_train {number} {configuration} 0 -p {plans['plans_name']}"
    if network not in PUBLISHED_WIDTHS:
        print(train)
        return
    print(f"{train} -tr nnUNetTrainer{network}{alone}    # with the optimiser that the network learns with")
    print(f"{train}    # with nnU-Net's own optimiser and loss")
