"""Time and memory of a training step: our networks beside nnU-Net's own U-Net on one plan, and beside the machine.

Steps of the networks alternate, so that a machine that slows down slows both; the ratio is of medians. The floor of a
step is its arithmetic (counted by PyTorch) at the speed of this machine's matrix product.

    python benchmarks/networks.py [--patch 32 64 64] [--repeats 5] [--networks H2ASeg ISANet CIPA]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_h2a.networks import CIPA, H2ASeg, ISANet
from nnunet_h2a.widths import published_features

OURS = {"H2ASeg": H2ASeg, "ISANet": ISANet, "CIPA": CIPA}
STOCK = "nnU-Net's U-Net"


def networks(names: list[str], patch: list[int], device: torch.device) -> dict[str, nn.Module]:
    """Networks with their published widths and nnU-Net's default U-Net, five stages each (CIPA has its own four)."""
    conv_op = nn.Conv3d if len(patch) == 3 else nn.Conv2d
    norm_op = nn.InstanceNorm3d if len(patch) == 3 else nn.InstanceNorm2d
    common = {"input_channels": 2, "n_stages": 5, "conv_op": conv_op, "kernel_sizes": 3, "strides": [1, 2, 2, 2, 2],
              "num_classes": 2, "deep_supervision": True}  # fmt: skip
    models = {
        name: OURS[name](features_per_stage=published_features(name, 5), patch_size=patch, **common) for name in names
    }
    models[STOCK] = PlainConvUNet(
        features_per_stage=(32, 64, 128, 256, 320), n_conv_per_stage=2, n_conv_per_stage_decoder=2, conv_bias=True,
        norm_op=norm_op, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        **common,
    )  # fmt: skip
    return {name: model.to(device) for name, model in models.items()}


def training_step(network: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward through all levels."""
    for parameter in network.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
        loss = sum(output.float().square().mean() for output in network(x))
    loss.backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def machine_speed(device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(n, n, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)

    def product() -> None:
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()

    product()
    return 2 * n**3 / min(seconds(product) for _ in range(5))


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, parameters not counted."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(x)
    total = sum(storages.values())
    del outputs
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=OURS, default=list(OURS))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = networks(arguments.networks, arguments.patch, device)
    x = torch.randn(arguments.batch, 2, *arguments.patch, device=device)
    speed = machine_speed(device)
    print(f"{device.type}, patch {arguments.patch}, batch {arguments.batch}; matrix product {speed / 1e9:.0f} GFLOP/s")
    times: dict[str, list[float]] = {name: [] for name in models}
    for network in models.values():
        training_step(network, x)
    for _ in range(arguments.repeats):
        for name, network in models.items():
            times[name].append(seconds(lambda network=network: training_step(network, x)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians[STOCK]
    print(f"{'':18}{'parameters':>12}{'GFLOP/step':>12}{'saved MB':>10}{'s/step':>9}{'ratio':>7}{'x floor':>9}")
    for name, network in models.items():
        with FlopCounterMode(display=False) as counter:
            training_step(network, x)
        flops = counter.get_total_flops()
        parameters = sum(p.numel() for p in network.parameters())
        print(
            f"{name:18}{parameters:>12,}{flops / 1e9:>12.1f}{saved_bytes(network, x) / 1e6:>10.0f}{medians[name]:>9.2f}"
            f"{medians[name] / baseline:>7.2f}{medians[name] / (flops / speed):>9.1f}"
        )


if __name__ == "__main__":
    main()
