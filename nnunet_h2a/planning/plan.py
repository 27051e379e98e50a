"""``h2a_plan``: plans that name one of our networks, so that nnU-Net's stock trainer trains and predicts with it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_h2a.command import (
    CommandError,
    dataset_folder,
    dataset_number,
    nnunet_folder,
    positive,
    read_plans,
    run_command,
    write_whole,
)
from nnunet_h2a.planning.fit import fit_plans
from nnunet_h2a.planning.make_plans import STOCK, make_plans
from nnunet_h2a.planning.sizing import PRESETS, USABLE, Size
from nnunet_h2a.training.modalities import ChannelError
from nnunet_h2a.widths import FIXED_STAGES, PUBLISHED_WIDTHS


def _gibibytes(text: str) -> float:
    """An argparse type: memory above 0, at most that of no GPU there is."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 10000:
        raise argparse.ArgumentTypeError(f"{text} is not a size in GiB, as in 24")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_plan``."""
    parser = argparse.ArgumentParser(
        prog="h2a_plan",
        description="Write nnU-Net plans whose architecture is one of our networks. They train with any trainer, "
        "the stock nnUNetTrainer included, and reuse what nnU-Net has preprocessed.",
    )
    parser.add_argument("-d", "--dataset", required=True, help="dataset number or name, planned by nnU-Net before")
    parser.add_argument(
        "-c", "--configurations", nargs="+", action="extend", metavar="C",
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
        "--patch-size", type=positive, nargs="+", metavar="N",
        help="patch in voxels, in the plans' axis order (lowest resolution first) [the base plans']",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, metavar="N", help="patches per step [the base plans']")
    parser.add_argument("--n-stages", type=positive, metavar="N", help="number of resolutions [as the patch allows]")
    parser.add_argument(
        "--features", type=positive, nargs="+", metavar="F",
        help="channels of each stage (per branch); four numbers for CIPA [the network's published widths]",
    )  # fmt: skip
    parser.add_argument(
        "--modalities", choices=["both", "pet", "ct"], default="both",
        help="ISANet only: one branch for PET or CT alone [%(default)s]",
    )  # fmt: skip
    fit = parser.add_mutually_exclusive_group()
    fit.add_argument(
        "--gpu-memory", type=_gibibytes, metavar="GB",
        help="choose patch and batch for a GPU with so much memory; --patch-size or --batch-size fixes one of them",
    )  # fmt: skip
    fit.add_argument(
        "--preset", choices=PRESETS,
        help="the same for a common size: " + ", ".join(f"{name} {size} GB" for name, size in PRESETS.items()),
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_plan``."""
    return run_command(lambda: _plan(build_parser().parse_args(argv)))


def _plan(arguments: argparse.Namespace) -> int:
    folder = dataset_folder(nnunet_folder("nnUNet_preprocessed"), arguments.dataset)
    base, dataset_json = read_plans(folder, arguments.plans)
    # Models of one modality and of both must not share a name: they would share the folder of their results.
    alone = "" if arguments.modalities == "both" else arguments.modalities.upper()
    name = arguments.plans_name or f"nnUNet{arguments.network}{alone}Plans"
    if "__" in name or not name.isidentifier():
        raise CommandError(f"--plans-name {name}: use letters, digits and single underscores, a letter first")
    if name == arguments.plans:
        raise CommandError(f"--plans-name {name} would overwrite the plans it starts from: choose another name")
    target = folder / f"{name}.json"
    if target.exists() and '"configurations"' not in target.read_text(errors="replace"):
        raise CommandError(f"--plans-name {name}: {target} is there and holds no plans; choose another name")
    memory = arguments.gpu_memory or PRESETS.get(arguments.preset)
    sizes: dict[str, Size] = {}
    options = {key: getattr(arguments, key) for key in ("network", "n_stages", "features", "modalities")}
    given = {"patch_size": arguments.patch_size, "batch_size": arguments.batch_size}
    first = dict(options)
    if memory is not None and arguments.features and arguments.network not in FIXED_STAGES:
        options["n_stages"] = arguments.n_stages or len(arguments.features)
        if options["n_stages"] != len(arguments.features):
            raise CommandError(f"--features: give {options['n_stages']} numbers for --n-stages {options['n_stages']}")
    if memory is not None and not arguments.patch_size:
        # The patch, and with it the number of stages, is yet to be chosen.
        first |= {"n_stages": None, "features": None}
    elif memory is not None:
        first["n_stages"] = options["n_stages"]
    try:
        plans = make_plans(
            base, dataset_json, plans_name=name, configurations=arguments.configurations, **given, **first
        )
        if memory is not None:
            print(
                f"memory of a training step with mixed precision, counted without a GPU, some seconds per size; "
                f"{100 * USABLE:.0f} % of {memory:g} GiB may be filled:"
            )
            sizes = fit_plans(plans, base, dataset_json, memory, **given, **options)
    except ChannelError as error:
        raise CommandError(f"{folder}: {error}") from error
    if target.exists():
        lost = sorted(set(json.loads(target.read_text())["configurations"]) - set(plans["configurations"]))
        without = f"; {', '.join(lost)} is not in the new plans" if lost else ""
        print(f"replacing {target}, which was there (-o gives another name){without}")
    write_whole({target: json.dumps(plans, indent=4) + "\n"})
    _report(plans, target, dataset_number(folder), arguments.network, alone, sizes)
    return 0


def _report(
    plans: dict[str, Any], target: Path, number: int, network: str, alone: str, sizes: Mapping[str, Size]
) -> None:
    print(f"wrote {target}")
    for key, configuration in plans["configurations"].items():
        if "architecture" not in configuration:
            own = "".join(
                f", {size.replace('_', ' ')} {configuration[size]}"
                for size in ("patch_size", "batch_size")
                if size in configuration
            )
            print(f"  {key}: as {configuration['inherits_from']}{own}")
            continue
        kwargs = configuration["architecture"]["arch_kwargs"]
        stages = f"{kwargs['n_stages']} stages of {kwargs['features_per_stage']} channels, strides {kwargs['strides']}"
        if network in FIXED_STAGES:
            stages = f"{FIXED_STAGES[network]} stages of {kwargs.get('widths', 'the published')} channels"
        if "modalities" in kwargs:
            stages += f", {kwargs['modalities'].upper()} alone"
        print(f"  {key}: patch {configuration['patch_size']}, batch {configuration['batch_size']}, {stages}")
        if key in sizes:
            print(f"    {sizes[key].memory.peak / 2**30:.1f} GiB predicted; {sizes[key].reason}")
    if sizes:
        print("  The prediction's constants are provisional: they have not been measured on a GPU yet.")
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
