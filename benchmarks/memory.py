"""Peak memory of a training step, measured, beside what h2a_plan counts for it.

On a GPU: steps under autocast, `torch.cuda.max_memory_allocated` and what the driver says is in use; the ratio of the
first sizes of a network calibrates nnunet_h2a/planning/memory.py (OVERHEAD, CUDA_CONTEXT), the others test it. Without
a GPU: float32 steps on the CPU and the process's peak resident memory; there the first sizes calibrate a difference:
what the CPU's libraries take for themselves. Each size has a process of its own.

    python benchmarks/memory.py [--device cpu|cuda] [--networks H2ASeg ISANet CIPA stock]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

GIB = 2**30

#: (patch, batch), to calibrate and to test.
SIZES = {
    "cpu": {
        3: [[(32, 64, 64), 2], [(48, 64, 96), 1], [(40, 80, 80), 1], [(64, 64, 64), 2]],
        2: [[(128, 128), 4], [(160, 192), 2], [(256, 192), 1], [(128, 160), 6]],
    },
    "cuda": {
        3: [[(64, 96, 96), 2], [(96, 128, 128), 2], [(80, 112, 112), 2], [(128, 128, 128), 2], [(48, 160, 160), 3]],
        2: [[(256, 256), 8], [(512, 512), 4], [(400, 400), 6], [(320, 256), 16]],
    },
}
NETWORKS = ["H2ASeg", "ISANet", "CIPA", "stock"]
#: How many of each list calibrate.
CALIBRATE = 2


def build(name: str, patch: tuple[int, ...]):
    """A network with its published widths, stages of half the size down to 4 voxels."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    from nnunet_h2a import networks
    from nnunet_h2a.widths import published_features

    stages, edge = 1, min(patch)
    while edge >= 8 and stages < 6:
        stages, edge = stages + 1, edge // 2
    dims = len(patch)
    common = {"input_channels": 2, "n_stages": stages, "conv_op": (nn.Conv2d, nn.Conv3d)[dims - 2], "kernel_sizes": 3,
              "strides": [1] + [2] * (stages - 1), "num_classes": 2, "deep_supervision": True}  # fmt: skip
    if name == "stock":
        return PlainConvUNet(
            features_per_stage=[min(32 * 2**k, (512, 320)[dims - 2]) for k in range(stages)], n_conv_per_stage=2,
            n_conv_per_stage_decoder=2, conv_bias=True, norm_op=(nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2],
            norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **common,
        )  # fmt: skip
    return getattr(networks, name)(
        features_per_stage=published_features(name, stages), patch_size=list(patch), **common
    )


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(name: str, patch: tuple[int, ...], batch: int, device: str) -> dict[str, float]:
    """Peak bytes of two optimiser steps."""
    import torch

    torch.manual_seed(0)
    # The libraries are loaded before the memory is looked at.
    torch.nn.Conv3d(1, 1, 3)(torch.zeros(1, 1, 4, 4, 4)).sum().backward()
    before = status("VmRSS") if device == "cpu" else 0
    network = build(name, patch).to(device)
    optimiser = torch.optim.AdamW(network.parameters())
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    images = torch.randn(batch, 2, *patch, device=device)
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, enabled=device == "cuda"):
            outputs = network(images)
            outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
            loss = sum(output.float().softmax(1).square().mean() for output in outputs)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        del outputs, loss
    if device == "cpu":
        return {"peak": status("VmHWM") - before, "context": 0}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "context": total - free - torch.cuda.memory_reserved(),
    }


def child(arguments: list[str]) -> dict[str, float]:
    # Freed blocks go back to the system at once, so that the peak is what was in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    output = subprocess.run(
        [sys.executable, __file__, "--one", *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def one(name: str, patch: tuple[int, ...], batch: int, device: str, counting: bool) -> dict[str, float]:
    if not counting:
        return measure(name, patch, batch, device)
    from nnunet_h2a.planning.memory import count_step

    step = count_step(lambda: build(name, patch), patch, batch, amp=device == "cuda")
    return {"tensors": step.tensors, "peak": step.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, patch, batch, what = arguments.one
        size = tuple(int(n) for n in patch.split("x"))
        print(json.dumps(one(name, size, int(batch), arguments.device, what == "count")))
        return
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here (h2a_doctor says why)")
    print("| network | patch | batch | tensors counted GiB | measured GiB | ratio | predicted by the first sizes |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        for sizes in SIZES[arguments.device].values():
            calibrating: list[float] = []
            for patch, batch in sizes:
                text = ["x".join(map(str, patch)), str(batch)]
                counted = child([name, *text, "count", "--device", arguments.device])
                found = child([name, *text, "measure", "--device", arguments.device])
                ratio, difference = found["peak"] / counted["tensors"], found["peak"] - counted["tensors"]
                by_ratio = arguments.device == "cuda"
                if len(calibrating) < CALIBRATE:
                    calibrating.append(ratio if by_ratio else difference)
                    verdict = "calibrates"
                else:
                    constant = sum(calibrating) / len(calibrating)
                    predicted = counted["tensors"] * constant if by_ratio else counted["tensors"] + constant
                    verdict = f"{100 * (predicted / found['peak'] - 1):+.1f} %"
                extra = "" if arguments.device == "cpu" else f", context {found['context'] / GIB:.2f}, reserved "
                extra += "" if arguments.device == "cpu" else f"{found['reserved'] / GIB:.2f}"
                print(
                    f"| {name} | {' x '.join(map(str, patch))} | {batch} | {counted['tensors'] / GIB:.2f} | "
                    f"{found['peak'] / GIB:.2f}{extra} | {ratio:.2f} | {verdict} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
