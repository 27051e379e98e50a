"""CIPA's released weights and VMamba's ImageNet weights: reading the files, and what their tensors are called here.

No weights are shipped. Files are read with PyTorch's weights-only loading, so that a file cannot run code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_h2a.networks.cipa import CIPA

#: Names in the authors' CIPA.pth and here, by their beginnings; # stands for a number. The first that fits counts.
RELEASED_NAMES = (
    ("backbone.vssm.", "encoder."),
    ("backbone.cross_mamba.#.channel_weights.mlp.", "crm.#.mlp."),
    ("backbone.region_patch.#.inner_convs.", "dcim.#.ct_convs."),
    ("backbone.region_patch.#.outer_convs.", "dcim.#.pet_convs."),
    ("backbone.channel_attn_mamba.#.inner_norm1.", "dcim.#.local_norm."),
    ("backbone.channel_attn_mamba.#.inner_attn.", "dcim.#.local_scan."),
    ("backbone.channel_attn_mamba.#.outer_norm1.", "dcim.#.region_norm."),
    ("backbone.channel_attn_mamba.#.outer_attn.", "dcim.#.region_scan."),
    ("decode_head.output.", "decoder.seg_layers.0."),
    ("decode_head.", "decoder."),
)

#: Names in VMamba's ImageNet files, older and newer, and here. What fits none of them is the classifier's.
VMAMBA_NAMES = (
    ("patch_embed.proj.", "encoder.patch_embed.0."),
    ("patch_embed.norm.", "encoder.patch_embed.2."),
    ("patch_embed.", "encoder.patch_embed."),
    ("layers.#.blocks.#.ln_1.", "encoder.layers.#.blocks.#.norm."),
    ("layers.#.blocks.#.self_attention.", "encoder.layers.#.blocks.#.op."),
    ("layers.", "encoder.layers."),
    ("outnorm", "encoder.outnorm"),
)
#: The classifier in VMamba's files, with its norm: ``classifier.norm``, ``classifier.head``, or without the first part.
VMAMBA_CLASSIFIER = ("classifier.", "norm.", "head.")

#: SS2D's depth-wise convolution, wherever it stands in a name.
SCAN_CONVOLUTION = ("conv2d", "conv")

#: The first tensor of the network, of shape [96, 3, 4, 4]; the released file has it under ``backbone.vssm.``.
FIRST_TENSOR = "patch_embed.0.weight"

#: Edge of the images that the released weights were trained on, in pixels.
RELEASED_EDGE = 512

#: How DistributedDataParallel's wrapper begins every name.
WRAPPER = "module."


class WeightsFileError(ValueError):
    """A weights file that cannot be used. The message is one line that names the file and what is wrong."""


def our_name(released: str) -> str | None:
    """What a tensor of the authors' CIPA.pth is called in :class:`CIPA`; None where it has no counterpart."""
    return _translate(released, RELEASED_NAMES, SCAN_CONVOLUTION)


def released_name(ours: str) -> str | None:
    """The inverse of :func:`our_name`."""
    return _translate(ours, [(here, there) for there, here in RELEASED_NAMES], SCAN_CONVOLUTION[::-1])


def vmamba_name(imagenet: str) -> str | None:
    """What a tensor of VMamba's ImageNet weights is called in :class:`CIPA`; None where it has no counterpart."""
    return _translate(imagenet, VMAMBA_NAMES, SCAN_CONVOLUTION)


def load_cipa_checkpoint(path: str | Path) -> CIPA:
    """CIPA with the authors' released weights.

    Mei et al., CVPR 2025 (arXiv 2503.17261): the file ``CIPA.pth``, ``{"model": state_dict}``. What the released
    training script saves beside it (optimiser, epoch, scaler, arguments) is ignored, as are the names' ``module.``
    beginnings of distributed training. Every tensor of the file is used, and none of the network's is missing.

    Args:
        path: the file.

    Returns:
        The network in eval mode, on the CPU, without deep supervision. Input (batch, 2, 512, 512), channel 0 CT and
        channel 1 PET, each scaled from 8 bit to [-1.6, 1.6] as in training; output (batch, 1, 512, 512), the logit of
        tumour.

    Raises:
        FileNotFoundError: where there is no such file.
        WeightsFileError: a ValueError, for a file that is not such a checkpoint. It names the first tensor that is
            missing, misshapen or unexpected.
    """
    path = Path(path)
    tensors = read_tensors(path, f"backbone.vssm.{FIRST_TENSOR}")
    network = CIPA(
        input_channels=2,
        n_stages=4,
        features_per_stage=[96, 192, 384, 768],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2],
        num_classes=1,
        patch_size=(RELEASED_EDGE, RELEASED_EDGE),
        ct_channel=0,
        pet_channel=1,
    )
    renamed = _rename(tensors, our_name, path)
    what = f"CIPA at {RELEASED_EDGE} x {RELEASED_EDGE} with one output class"
    check_tensors(tensors, renamed, network.state_dict(), released_name, f"{path}: not the weights of {what}")
    network.load_state_dict({name: tensors[there] for name, there in renamed.items()})
    return network.eval()


def load_vmamba_encoder(network: CIPA, path: str | Path) -> list[str]:
    """Load VMamba's ImageNet weights into the encoder of ``network``.

    Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166): ``vssmtiny_dp01_ckpt_epoch_292.pth``,
    ``{"model": state_dict}``, with the tensors' older or newer names. The classifier in it is dropped. The
    ``outnorm`` layers are not in such files and keep their values.

    Args:
        network: whose encoder gets the weights.
        path: the file.

    Returns:
        Names of the network's tensors that came from the file.

    Raises:
        FileNotFoundError: where there is no such file.
        WeightsFileError: a ValueError, for a file that does not hold this encoder.
    """
    path = Path(path)
    tensors = read_tensors(path, FIRST_TENSOR)
    encoder = {name: there for name, there in tensors.items() if not name.startswith(VMAMBA_CLASSIFIER)}
    renamed = _rename(encoder, vmamba_name, path)
    expected = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}
    absent = [name for name in expected if name.startswith("encoder.outnorm") and name not in renamed]
    wanted = {name: tensor for name, tensor in expected.items() if name not in absent}
    check_tensors(
        tensors,
        renamed,
        wanted,
        lambda name: released_name(name).removeprefix("backbone.vssm."),
        f"{path}: not the weights of VMamba-Tiny, CIPA's encoder",
    )
    network.load_state_dict({name: tensors[there] for name, there in renamed.items()}, strict=False)
    return list(renamed)


def read_tensors(path: Path, first: str) -> dict[str, Tensor]:
    """The state dict of a file: under ``model``, or the file's whole content.

    Args:
        path: the file.
        first: the first tensor that it must hold, for the errors.

    Raises:
        FileNotFoundError: where there is no such file.
        WeightsFileError: for anything else than a dictionary of tensors.
    """
    content = _load(path, first)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise WeightsFileError(
            f'{path}: holds a {type(content).__name__}, not a dictionary with "model"; {first} is missing'
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsFileError(
                f'{path}: has no state dict under "model", and its entry {name!r} is a {type(value).__name__}, not a '
                f"tensor; {first} is missing: is it another network's checkpoint?"
            )
    if not content:
        raise WeightsFileError(f"{path}: holds no tensors; {first} is missing")
    wrapped = all(name.startswith(WRAPPER) for name in content)
    return {name[len(WRAPPER) :] if wrapped else name: value for name, value in content.items()}


def check_tensors(
    tensors: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    expected: Mapping[str, Tensor],
    there: Callable[[str], str],
    complaint: str,
) -> None:
    """Refuse a file unless it holds exactly the expected tensors.

    Args:
        tensors: content of the file.
        renamed: name in the file of each of our names.
        expected: tensors of the network, by our names.
        there: what a file calls a tensor of ours.
        complaint: how the error begins, with the file's name.

    Raises:
        WeightsFileError: naming the first tensor that is missing or misshapen in the network's order, or else the
            first that is unexpected in the file's.
    """
    problems = []
    absent = sum(name not in renamed for name in expected)
    for name, wanted in expected.items():
        shape = list(wanted.shape)
        if name not in renamed:
            problems.append(f"{there(name)} of shape {shape} is missing")
        elif (found := tensors[renamed[name]]).shape != wanted.shape:
            problems.append(f"{renamed[name]} has shape {list(found.shape)} instead of {shape}")
        elif found.is_floating_point() != wanted.is_floating_point():
            problems.append(f"{renamed[name]} holds {found.dtype} instead of {wanted.dtype}")
        elif found.layout != torch.strided:
            problems.append(f"{renamed[name]} is a sparse tensor ({found.layout})")
        elif found.is_floating_point() and not torch.isfinite(found).all():
            problems.append(f"{renamed[name]} holds values that are not finite")
    for name, source in renamed.items():
        if name not in expected:
            problems.append(f"{source} of shape {list(tensors[source].shape)} is unexpected")
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        if absent == len(expected):
            others = f", as are all {absent} tensors: it is another network's file"
        raise WeightsFileError(f"{complaint}: {problems[0]}{others}")


def _load(path: Path, first: str) -> Any:
    """The content of a PyTorch file, without running anything that it may hold."""
    if path.is_dir():
        raise WeightsFileError(f"{path}: is a folder, not a file of weights")
    file = open(path, "rb")  # a file that cannot be opened is an OSError of its own, and names the file
    try:
        # The released training script saves its arguments beside the weights.
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way
        text = " ".join(str(error).split())
        if refused := re.search(r"GLOBAL (\S+)", text):
            raise WeightsFileError(
                f"{path}: holds a Python object ({refused.group(1).rstrip('.')}), and loading that could run any code; "
                "if you trust the file, save its tensors alone as {'model': state_dict}"
            ) from error
        raise WeightsFileError(
            f"{path}: is not a PyTorch checkpoint, or is cut short ({path.stat().st_size:,} bytes), so that {first} "
            "and all after it are missing; fetch it again"
        ) from error


def _rename(names: Mapping[str, Tensor], translate: Callable[[str], str | None], path: Path) -> dict[str, str]:
    """The file's name of each of our names. A name without a counterpart stands for itself, and so is unexpected."""
    renamed: dict[str, str] = {}
    for there in names:
        name = translate(there) or f"unknown {there}"
        if name in renamed:
            raise WeightsFileError(f"{path}: holds the same tensor twice, as {renamed[name]} and {there}")
        renamed[name] = there
    return renamed


def _translate(name: str, table: Any, convolution: tuple[str, str]) -> str | None:
    for source, target in table:
        pattern = r"(\d+)".join(re.escape(part) for part in source.split("#"))
        if found := re.match(pattern, name):
            numbers = iter(found.groups())
            beginning = re.sub("#", lambda _, rest=numbers: next(rest), target)
            parts = (beginning + name[found.end() :]).split(".")
            return ".".join(convolution[1] if part == convolution[0] else part for part in parts)
    return None
