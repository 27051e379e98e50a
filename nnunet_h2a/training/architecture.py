"""From an nnU-Net plan to one of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_h2a.training.modalities import ChannelError, channel_roles
from nnunet_h2a.widths import published_features

#: Key of a plans file under which our trainers keep what inference cannot read from anywhere else.
PLANS_KEY = "nnunet_h2a"

#: What a network takes from any plan.
GEOMETRY_KEYS = ("n_stages", "conv_op", "kernel_sizes", "strides")


def fusion_settings(dataset_json: Mapping[str, Any], region_based: bool, modalities: str = "both") -> dict[str, Any]:
    """What a fusion network must know of a dataset and nnU-Net does not hand to it.

    Args:
        dataset_json: content of dataset.json.
        region_based: whether classes are regions, one sigmoid each.
        modalities: ``"both"``, or the one that the network uses (``"pet"``, ``"ct"``).

    Returns:
        Keyword arguments for the network, ready for JSON.

    Raises:
        ChannelError: where the dataset does not have one channel for each modality that is used.
    """
    ct_channel, pet_channel = channel_roles(dataset_json, modalities)
    return {"ct_channel": ct_channel, "pet_channel": pet_channel, "region_based": region_based}


def check_same_channels(arch_kwargs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse plans that were made when the dataset had its channels in another order.

    Raises:
        ChannelError: naming both orders.
    """
    for key in ("ct_channel", "pet_channel"):
        if arch_kwargs.get(key, settings[key]) != settings[key]:
            raise ChannelError(
                f"the plans say {key} {arch_kwargs[key]}, dataset.json says {settings[key]}: "
                "write the plans anew with h2a_plan"
            )


def names_network(class_name: str, network: type[nn.Module]) -> bool:
    """Whether a plan's ``network_class_name`` means ``network``, by its public or its defining module."""
    return class_name in (f"nnunet_h2a.networks.{network.__name__}", f"{network.__module__}.{network.__name__}")


def fusion_architecture(
    network: type[nn.Module], class_name: str, arch_kwargs: Mapping[str, Any], patch_size: list[int]
) -> dict[str, Any]:
    """``arch_kwargs`` for ``network`` from the architecture of any plan.

    A plan that names ``network`` is taken at its word. Of any other plan the stages, kernels and strides are taken;
    the widths are the published ones, because a stock plan's 32 to 320 would make a two-branch network many times
    larger than what it is compared with.

    Args:
        network: the class to build.
        class_name: the plan's ``network_class_name``.
        arch_kwargs: the plan's ``arch_kwargs``.
        patch_size: the plan's patch.

    Raises:
        ValueError: where the plan names another of our networks, or has no stages to take.
    """
    if names_network(class_name, network):
        return {"patch_size": list(patch_size), **arch_kwargs}
    if class_name.startswith("nnunet_h2a."):
        raise ValueError(
            f"this plan is made for {class_name}, the trainer builds {network.__name__}: use the trainer of that "
            "network, a stock trainer, or other plans (-p)"
        )
    missing = [key for key in GEOMETRY_KEYS if key not in arch_kwargs]
    if missing:
        raise ValueError(f"a plan for {class_name} does not say {', '.join(missing)}: use plans of a U-Net (-p)")
    return {
        **{key: arch_kwargs[key] for key in GEOMETRY_KEYS},
        "features_per_stage": published_features(network.__name__, arch_kwargs["n_stages"]),
        "patch_size": list(patch_size),
    }


def build_fusion_network(
    network: type[nn.Module],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
) -> nn.Module:
    """Build and initialise ``network`` for a configuration, in training and at inference alike.

    The order of the channels and the kind of labels stand in the plans, where the trainer put them.

    Raises:
        ValueError: where the plans are not ours, or do not fit the network.
    """
    settings = plans_manager.plans.get(PLANS_KEY)
    if settings is None:
        raise ValueError(
            f'these plans have no "{PLANS_KEY}" entry, which the trainer writes: was plans.json of the model replaced?'
        )
    kwargs = fusion_architecture(
        network,
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        list(configuration_manager.patch_size),
    )
    return get_network_from_plans(
        f"{network.__module__}.{network.__name__}",
        {**settings, **kwargs},
        ["conv_op"],
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=enable_deep_supervision,
    )
