"""Plans that name one of our networks, made from plans of nnU-Net."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from nnunet_h2a.command import CommandError
from nnunet_h2a.patch_sizes import MIN_FEATURE_MAP_EDGE
from nnunet_h2a.training.modalities import channel_roles
from nnunet_h2a.widths import FIXED_STAGES, published_features

#: ``--network`` value that keeps the base plan's own network and changes its sizes only.
STOCK = "stock"


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
        network: key of :data:`nnunet_h2a.widths.PUBLISHED_WIDTHS`, or :data:`STOCK`.
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
            if patch_size is not None:
                # It takes the patch of what it inherits from, for which the network is built.
                configuration.pop("patch_size", None)
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
            if "patch_size" in old:
                old["patch_size"] = list(configuration["patch_size"])
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


def has_regions(dataset_json: dict[str, Any]) -> bool:
    """Whether a class of a dataset is made of several labels, as nnU-Net tells it."""
    return any(isinstance(label, list | tuple) and len(label) > 1 for label in dataset_json["labels"].values())


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
            "region_based": has_regions(dataset_json),
            **options,
        },
        "_kw_requires_import": ["conv_op"],
    }
