"""Plans whose patch and batch fit a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from nnunet_h2a.command import CommandError
from nnunet_h2a.patch_sizes import MIN_FEATURE_MAP_EDGE, patches, stages_of
from nnunet_h2a.planning.make_plans import has_regions, make_plans
from nnunet_h2a.planning.sizing import Size, choose_size, network_memory


def fit_plans(
    plans: dict[str, Any],
    base: dict[str, Any],
    dataset_json: dict[str, Any],
    gpu_memory: float,
    *,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Size]:
    """Give each configuration of ``plans`` the largest patch and then the largest batch that fit the GPU.

    Args:
        plans: from :func:`make_plans`; changed in place.
        base: nnU-Net's plans that they come from.
        dataset_json: content of dataset.json.
        gpu_memory: GiB.
        patch_size: if the user gave it; then the batch alone is chosen.
        batch_size: if the user gave it; then the patch alone is chosen.
        say: takes lines about what is tried.
        options: of :func:`make_plans`: network, n_stages, features, modalities.

    Returns:
        By configuration, what was chosen.

    Raises:
        CommandError: where nothing fits.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    if has_regions(dataset_json) and "regions_class_order" not in dataset_json:
        raise CommandError("dataset.json has regions and no regions_class_order, which nnU-Net needs: add it")
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    sizes = {}
    for key, configuration in plans["configurations"].items():
        if "architecture" not in configuration:
            continue
        lacking = [name for name in ("spacing", "median_image_size_in_voxels") if name not in configuration]
        if lacking:
            raise CommandError(f"{key}: the plans do not say {', '.join(lacking)}: start from plans of nnU-Net (-p)")
        _drop_own_sizes(plans["configurations"], key, say)
        # A cascade's second stage inherits the plan and has more channels.
        users = [key, *(k for k, v in plans["configurations"].items() if v.get("inherits_from") == key)]
        channels = max(determine_num_input_channels(manager, manager.get_configuration(k), dataset_json) for k in users)

        def planned(patch: Sequence[int], batch: int, key: str = key) -> dict[str, Any]:
            made = make_plans(
                base, dataset_json, plans_name=plans["plans_name"], configurations=[key], patch_size=patch,
                batch_size=batch, **options,
            )  # fmt: skip
            return made["configurations"][key]

        def count(
            patch: Sequence[int], batch: int, planned: Callable[..., dict[str, Any]] = planned, channels: int = channels
        ) -> Any:
            return network_memory(planned(patch, batch), channels, heads, patch, batch)

        if patch_size is not None:
            candidates = [configuration["patch_size"]]
        else:
            candidates = _candidates(configuration, options.get("n_stages"))
        if not candidates:
            stages = options.get("n_stages") or 3
            cure = "ask for fewer --n-stages or --features" if stages > 3 else "they are too small for this network"
            raise CommandError(
                f"{key}: no patch within the median image of {_shape(configuration)} voxels has {stages} stages; {cure}"
            )
        try:
            chosen = choose_size(
                candidates, _dataset_voxels(base, key, dataset_json), gpu_memory, count, batch_size,
                lambda line, key=key: say(f"  {key}: {line}"),
            )  # fmt: skip
        except ValueError as error:  # DoesNotFit, and what the network says to a size
            raise CommandError(f"{key}: {error}") from error
        made = planned(chosen.patch_size, chosen.batch_size)
        configuration.update({name: made[name] for name in ("patch_size", "batch_size", "architecture")})
        sizes[key] = chosen
    return sizes


def _shape(configuration: dict[str, Any]) -> str:
    return " x ".join(f"{n:g}" for n in configuration["median_image_size_in_voxels"])


def _drop_own_sizes(configurations: dict[str, Any], key: str, say: Callable[[str], None]) -> None:
    """What inherits from a configuration takes its patch and batch: sizes of its own would not fit."""
    for name, configuration in configurations.items():
        if configuration.get("inherits_from") == key:
            own = [size for size in ("patch_size", "batch_size") if size in configuration]
            for size in own:
                say(f"  {name}: its own {size.replace('_', ' ')} {configuration.pop(size)} gives way to that of {key}")


def _candidates(configuration: dict[str, Any], n_stages: int | None) -> list[list[int]]:
    """Patches to try, largest first; all of them can be pooled often enough."""
    spacing = configuration["spacing"]
    found = list(patches(spacing, configuration["median_image_size_in_voxels"], MIN_FEATURE_MAP_EDGE))
    return [patch for patch in found if stages_of(spacing, patch, MIN_FEATURE_MAP_EDGE) >= (n_stages or 3)]


def _dataset_voxels(base: dict[str, Any], key: str, dataset_json: dict[str, Any]) -> float:
    """Voxels of all training cases, as nnU-Net counts them: a 2D configuration sees the volumes of the 3D one."""
    configurations = base["configurations"]
    shapes = [configurations[key]["median_image_size_in_voxels"]]
    if len(shapes[0]) == 2:
        shapes = [
            v["median_image_size_in_voxels"] for v in configurations.values() if "median_image_size_in_voxels" in v
        ]
    return max(math.prod(shape) for shape in shapes) * dataset_json.get("numTraining", 10**9)
