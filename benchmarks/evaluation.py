"""How long evaluating a whole-body case takes, beside the published autoPET loop for its two volumes alone.

    python benchmarks/evaluation.py [--lesions 100] [--shape 326 400 400] [--repeats 3]
    python benchmarks/evaluation.py --command

Times are medians of interleaved runs. Memory is what the process's peak rises above its size with the two masks
loaded, in a process of its own per way to measure. With ``--command`` the whole ``h2a_evaluate`` is measured, on
files: with one label and with two, of bytes and of float64, without and with a PET image; its memory is the peak of the
process, start and libraries included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cc3d
import numpy as np
import SimpleITK as sitk

from nnunet_h2a.evaluation.conventions import by_name
from nnunet_h2a.evaluation.measure import measure

SPACING = (3.0, 2.04, 2.04)


def masks(shape: Sequence[int], lesions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted ellipsoids of 3 to 12 voxels' radius all over the body: most found and moved, some missed."""
    rng = np.random.default_rng(seed)
    truth, predicted = np.zeros(shape, bool), np.zeros(shape, bool)
    for number in range(lesions):
        radius = rng.uniform(3, 12)
        centre = rng.uniform(radius + 3, np.array(shape) - radius - 3)
        if number % 10 != 0:
            _ball(truth, centre, radius)
        if number % 10 != 1:
            _ball(predicted, centre + rng.normal(0, 1, 3), radius * rng.uniform(0.8, 1.2))
    return truth, predicted


def _ball(mask: np.ndarray, centre: np.ndarray, radius: float) -> None:
    low = np.maximum(np.floor(centre - radius).astype(int), 0)
    box = tuple(slice(a, b + 1) for a, b in zip(low, np.ceil(centre + radius).astype(int), strict=True))
    part = mask[box]
    grid = np.stack(np.meshgrid(*(np.arange(a, a + n) for a, n in zip(low, part.shape, strict=True)), indexing="ij"))
    part |= ((grid - centre[:, None, None, None]) ** 2).sum(0) <= radius**2


def every_metric(truth: np.ndarray, predicted: np.ndarray, workers: int) -> tuple[float, float]:
    """All that the five conventions need; the two volumes are returned."""
    wanted = {part for convention in by_name("all") for part in convention.wanted}
    m = measure(truth, predicted, SPACING, wanted, workers=workers)
    return m.false_voxels * m.voxel_ml, m.missed_voxels * m.voxel_ml


def published_loop(truth: np.ndarray, predicted: np.ndarray, workers: int) -> tuple[float, float]:
    """The two volumes as the challenge's script finds them: a pass over the volume for every component."""
    found = []
    # The script reads files as float64 and labels int64.
    truth, predicted = truth.astype(float), predicted.astype(float)
    for mask, other in ((predicted, truth), (truth, predicted)):
        components = cc3d.connected_components(mask.astype(int), connectivity=18)
        alone = 0
        for number in range(1, components.max() + 1):
            component = np.isin(components, number)
            if (component * other).sum() == 0:
                alone += component.sum()
        found.append(float(alone) * float(np.prod(SPACING)) / 1000)
    return found[0], found[1]


WAYS = {"every metric": every_metric, "published loop": published_loop}


def _once(way: str, shape: Sequence[int], lesions: int, workers: int) -> None:
    truth, predicted = masks(shape, lesions)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    volumes = WAYS[way](truth, predicted, workers)
    seconds = time.perf_counter() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / truth.size
    print(seconds, more, *volumes)


#: Number of labels, type of the files, whether there is a PET image.
KINDS = ((1, np.uint8, False), (1, np.uint8, True), (1, np.float64, False), (2, np.uint8, False), (2, np.uint8, True))


def _write(folder: Path, shape: Sequence[int], lesions: int) -> None:
    """Folders of each kind of files, with one case: two sets of lesions, of one label or of one each."""
    one, other = masks(shape, lesions), masks(shape, lesions, seed=1)
    for labels, dtype, _ in KINDS:
        for name, first, second in zip(("truth", "predicted"), one, other, strict=True):
            array = np.where(second, labels, 0).astype(dtype)
            array[first] = 1
            _save(folder / f"{name}_{labels}_{np.dtype(dtype).name}" / "case.nii.gz", array)
    pet = np.random.default_rng(2).gamma(2, 1, shape).astype(np.float32)
    _save(folder / "images" / "case.nii.gz", pet)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path), True)


def _commands(shape: Sequence[int], lesions: int, repeats: int, workers: int) -> None:
    """Print a line per kind of files."""
    voxels = int(np.prod(shape))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A command begins with its parent's peak: this process must stay small.
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(folder, shape, lesions))
        writer.start()
        writer.join()
        for labels, dtype, with_pet in KINDS:
            kind = f"{labels}_{np.dtype(dtype).name}"
            command = [Path(sys.executable).parent / "h2a_evaluate", "-ref", folder / f"truth_{kind}", "-pred",
                       folder / f"predicted_{kind}", "-o", folder / "scores" / "summary.json", "--convention", "all",
                       "-np", str(workers), *(["-img", folder / "images"] if with_pet else [])]  # fmt: skip
            seconds, memory = [], 0
            for _ in range(repeats):
                start = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                seconds.append(time.perf_counter() - start)
                assert status == 0, f"h2a_evaluate ended with {status}"
                memory = max(memory, usage.ru_maxrss * 1024)
            pet = ", PET" if with_pet else ""
            print(f"{labels} labels, {np.dtype(dtype).name}{pet}: {statistics.median(seconds):.2f} s, "
                  f"{memory / voxels:.1f} bytes per voxel ({memory / 2**20:.0f} MiB) at the peak")  # fmt: skip


def main() -> None:
    """Print one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(326, 400, 400))
    parser.add_argument("--lesions", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="threads [%(default)s]")
    parser.add_argument("--command", action="store_true", help="measure h2a_evaluate on files")
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        _once(arguments.once, arguments.shape, arguments.lesions, arguments.workers)
        return
    if arguments.command:
        _commands(arguments.shape, arguments.lesions, arguments.repeats, arguments.workers)
        return
    outcomes: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, found in outcomes.items():
            finished = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--once", way], capture_output=True, text=True, check=True
            )
            found.append([float(word) for word in finished.stdout.split()])
    volumes = {tuple(round(volume, 6) for volume in run[2:]) for found in outcomes.values() for run in found}
    assert len(volumes) == 1, f"the ways disagree: {volumes}"
    medians = {way: statistics.median(run[0] for run in found) for way, found in outcomes.items()}
    for way, found in outcomes.items():
        memory = max(run[1] for run in found)
        print(f"{way}: {medians[way]:.2f} s, {memory:.1f} bytes per voxel above the masks")
    print(f"ratio: {medians['published loop'] / medians['every metric']:.1f}")


if __name__ == "__main__":
    main()
