"""Time and memory of the selective scan, forward and backward: `chunked` beside the plain loop under autograd.

Each measurement is a process of its own, so that its peak of memory is its own too; the two alternate, so that a
machine that slows down slows both. The floor is the exponentials, one per state number in forward and one again in
backward (the states are computed anew), at the speed of this machine on an array in its cache.

    python benchmarks/selective_scan.py [--size 1 1536 16 4096 4] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from nnunet_h2a.networks.selective_scan import selective_scan

BACKENDS = ("chunked", "reference")


def megabytes() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(backend: str, size: list[int]) -> dict[str, float]:
    """Seconds of forward and backward and the memory that they added to that of the inputs, in this process."""
    batch, d, n, length, groups = size
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, d, length),
        torch.randn(batch, d, length) / 2 - 3,
        -torch.arange(1, n + 1).float().repeat(d, 1),
        torch.randn(batch, groups, n, length),
        torch.randn(batch, groups, n, length),
        torch.ones(d),
        torch.randn(d),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    dy = torch.randn(batch, d, length)
    # Of its own tensors, small ones: gradients of the long ones would raise the peak before it is read.
    small = [(t[..., :8] if t.dim() > 2 else t).detach().clone().requires_grad_() for t in inputs]
    selective_scan(*small, True, backend=backend).sum().backward()
    before, started = megabytes(), time.perf_counter()
    y = selective_scan(*inputs, True, backend=backend)
    middle = time.perf_counter()
    y.backward(dy)
    return {
        "forward": middle - started,
        "backward": time.perf_counter() - middle,
        "megabytes": megabytes() - before,
    }


def exponentials_per_second() -> float:
    """How many exponentials a second this machine takes on an array in its cache."""
    x, out = torch.randn(2**19), torch.empty(2**19)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        torch.exp2(x, out=out)
        times.append(time.perf_counter() - started)
    return x.numel() / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=5, default=[1, 1536, 16, 4096, 4], metavar=tuple("BDNLG"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.size)))
        return
    results: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
    for _ in range(arguments.repeats):
        for backend in BACKENDS:
            command = [sys.executable, __file__, "--measure", backend, "--size", *map(str, arguments.size)]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            results[backend].append(json.loads(finished.stdout))
    medians = {
        backend: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for backend, runs in results.items()
    }
    batch, d, n, length, groups = arguments.size
    floor = 2 * batch * d * n * length / exponentials_per_second()
    print(
        f"batch {batch}, d {d}, N {n}, L {length}, G {groups}; {torch.get_num_threads()} threads; floor {floor:.2f} s"
    )
    print(
        f"{'':12}{'forward s':>11}{'backward s':>12}{'both s':>8}{'ratio':>7}{'x floor':>9}{'extra MB':>10}{'ratio':>7}"
    )
    loop = medians["reference"]
    for backend, values in medians.items():
        together = values["forward"] + values["backward"]
        print(
            f"{backend:12}{values['forward']:>11.2f}{values['backward']:>12.2f}{together:>8.2f}"
            f"{together / (loop['forward'] + loop['backward']):>7.2f}{together / floor:>9.1f}"
            f"{values['megabytes']:>10.0f}{values['megabytes'] / loop['megabytes']:>7.2f}"
        )


if __name__ == "__main__":
    main()
