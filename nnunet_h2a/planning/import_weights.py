"""``h2a_import_weights``: released weights of CIPA or of VMamba as a checkpoint for ``nnUNetv2_train``."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_h2a.command import (
    CommandError,
    dataset_folder,
    dataset_number,
    nnunet_folder,
    read_plans,
    run_command,
)

if TYPE_CHECKING:  # --help must not wait for torch
    from nnunet_h2a.networks import CIPA

#: CIPA's classifier.
HEAD = "decoder.seg_layers.0.weight"


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_import_weights``."""
    parser = argparse.ArgumentParser(
        prog="h2a_import_weights",
        description="Write released weights as a checkpoint that nnUNetv2_train starts from (-pretrained_weights). "
        "The weights are not part of this package: fetch them from their authors, and mind their licences.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cipa", metavar="FILE", help="CIPA.pth of CIPA's authors: the whole network")
    source.add_argument(
        "--vmamba", metavar="FILE",
        help="vssmtiny_dp01_ckpt_epoch_292.pth of VMamba's authors: the encoder, trained on ImageNet",
    )  # fmt: skip
    parser.add_argument("-d", "--dataset", required=True, help="dataset number or name, planned by nnU-Net before")
    parser.add_argument("-c", "--configuration", default="2d", help="a 2D configuration of the plans [%(default)s]")
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans to train with [%(default)s]")
    parser.add_argument("-tr", "--trainer", default="nnUNetTrainerCIPA", help="trainer to train with [%(default)s]")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.pth", help="checkpoint to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_import_weights``."""
    return run_command(lambda: _import(build_parser().parse_args(argv)))


def _import(arguments: argparse.Namespace) -> int:
    source, target = Path(arguments.cipa or arguments.vmamba), Path(arguments.output)
    if source.is_dir():
        raise CommandError(f"{source}: is a folder, not a file of weights")
    if not source.is_file():
        raise CommandError(f"{source}: no such file; give the file that the weights' authors offer")
    _check_target(target, source)
    folder = dataset_folder(nnunet_folder("nnUNet_preprocessed"), arguments.dataset)
    network, region_based = _network(folder, arguments)
    from nnunet_h2a.networks.cipa_weights import WeightsFileError, load_vmamba_encoder

    try:
        if arguments.vmamba:
            loaded = load_vmamba_encoder(network, source)
            notes = [f"{len(loaded)} tensors of the encoder from {source}; all others have fresh initial values"]
        else:
            notes = load_released(network, source, region_based)
    except WeightsFileError as error:
        raise CommandError(str(error)) from error
    _save({"network_weights": network.state_dict()}, target)
    print(f"wrote {target}")
    for note in notes:
        print(f"  {note}")
    print("next:")
    print(
        f"  nnUNetv2_train {dataset_number(folder)} {arguments.configuration} 0 -tr {arguments.trainer} "
        f"-p {arguments.plans} -pretrained_weights {shlex.quote(str(target))}"
    )
    return 0


def _check_target(target: Path, source: Path) -> None:
    if target.is_dir():
        raise CommandError(f"-o {target} is a folder: name the file to write in it, as in {target / 'weights.pth'}")
    if not target.parent.is_dir():
        raise CommandError(f"-o {target}: the folder {target.parent} does not exist; make it first")
    if target.exists() and target.samefile(source):
        raise CommandError(f"-o {target} would overwrite the file to read: choose another name")


def _network(folder: Path, arguments: argparse.Namespace) -> tuple[CIPA, bool]:
    """The network that the trainer builds, freshly initialised, and whether its classes are regions."""
    plans, dataset_json = read_plans(folder, arguments.plans)
    path = folder / f"{arguments.plans}.json"
    if arguments.configuration not in plans["configurations"]:
        raise CommandError(
            f"{path} has no configuration {arguments.configuration}; it has {', '.join(plans['configurations'])} (-c)"
        )

    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_h2a.networks import CIPA
    from nnunet_h2a.trainers import TRAINERS
    from nnunet_h2a.training.architecture import PLANS_KEY

    trainer = TRAINERS.get(arguments.trainer)
    if not hasattr(trainer, "network_settings"):
        ours = ", ".join(name for name in TRAINERS if "CIPA" in name and "_" not in name)
        raise CommandError(f"-tr {arguments.trainer}: no such trainer in this package; for CIPA there is {ours}")
    manager = PlansManager(plans)
    configuration = manager.get_configuration(arguments.configuration)
    if len(configuration.patch_size) != 2:
        raise CommandError(
            f"{path}: configuration {arguments.configuration} is {len(configuration.patch_size)}D and the released "
            "weights are 2D: choose a 2D configuration (-c 2d)"
        )
    labels = manager.get_label_manager(dataset_json)
    try:
        manager.plans[PLANS_KEY] = trainer.network_settings(
            configuration.network_arch_init_kwargs, dataset_json, labels.has_regions
        )
        with torch.random.fork_rng(devices=[]):
            # So that the same command writes the same file.
            torch.manual_seed(0)
            network = trainer.build_network_architecture(
                manager,
                configuration,
                determine_num_input_channels(manager, configuration, dataset_json),
                labels.num_segmentation_heads,
                False,
            )
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    if not isinstance(network, CIPA):
        raise CommandError(
            f"-tr {arguments.trainer} trains {type(network).__name__} and the weights are CIPA's: -tr nnUNetTrainerCIPA"
        )
    return network, labels.has_regions


def load_released(network: CIPA, path: Path, region_based: bool) -> list[str]:
    """Load the authors' CIPA.pth into a network of another patch size and number of classes.

    CRM's weights over the map are interpolated where the map is another one. The released network has one output o
    for tumour. For background and one class the heads become (0, o), whose softmax is the released sigmoid; for one
    output alone o is kept; otherwise the head keeps the values that it has.

    Args:
        network: freshly built.
        path: the file.
        region_based: whether the network's classes are regions, one sigmoid each.

    Returns:
        What was done, one line each.

    Raises:
        WeightsFileError: a ValueError, for a file that is not CIPA.pth, or a network that is not the published one.
        FileNotFoundError: where there is no such file.
    """
    import torch

    from nnunet_h2a.networks.cipa_weights import WeightsFileError, load_cipa_checkpoint
    from nnunet_h2a.networks.crm import CRM, resize_map_weights

    released = load_cipa_checkpoint(path)
    tensors, own = released.state_dict(), network.state_dict()
    notes = [f"{len(tensors)} tensors from {path}"]
    old_map = new_map = None
    for stage, (old, new) in enumerate(zip(released.crm, network.crm, strict=False)):
        if old.map_size != new.map_size:
            old_map, new_map = old_map or old.map_size, new_map or new.map_size
            for name in (f"crm.{stage}.{weight}" for weight in CRM.MAP_WEIGHTS):
                tensors[name] = resize_map_weights(tensors[name], old.map_size, new.map_size)
    if new_map is not None:
        notes.append(
            f"warning: CRM's weights belong to the released patch; they were interpolated to this one's (its first map "
            f"is {' x '.join(map(str, new_map))}, not {' x '.join(map(str, old_map))}) and have to adapt in training"
        )
    head, classes = tensors[HEAD], len(own[HEAD])
    if classes == 2 and not region_based:
        tensors[HEAD] = torch.cat([torch.zeros_like(head), head])
        notes.append("heads: 0 for background, the released output for the foreground class")
        notes.append("        (for use from code: -pretrained_weights of nnU-Net leaves heads alone)")
    elif classes != 1:
        tensors[HEAD] = own[HEAD]
        notes.append(f"heads: fresh initial values for {classes} classes, because the released network has one")
    for name in [*own, *tensors]:
        ours, theirs = (list(d[name].shape) if name in d else "not there" for d in (own, tensors))
        if ours != theirs:
            raise WeightsFileError(
                f"{path}: the plans' network is not the published CIPA: {name} is {ours} in it and {theirs} in the file"
            )
    network.load_state_dict(tensors)
    return notes


def _save(content: dict[str, Any], target: Path) -> None:
    """Write a PyTorch file in one go: all of it, or nothing."""
    import torch

    temporary = target.with_name(target.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, target)
    except OSError as error:  # a full disk's error does not name the file
        raise CommandError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
