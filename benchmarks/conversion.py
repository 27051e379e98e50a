"""Cases per minute of `h2a_convert_autopet`, beside a plain copy and beside a straightforward SimpleITK loop.

Synthetic cases as large as autoPET's (PET of 400 x 400 x 326 voxels), in two forms: *released*, where CT is on the PET
grid already, and *own grid*, where the CT (512 x 512 x 391) has to be resampled. The loop reads, resamples where needed
and writes compressed files one case after the other, with SimpleITK's own threads; the copy copies the bytes of the
source files that a conversion uses. The three alternate, each in a process of its own, with files in the page cache.

    python benchmarks/conversion.py [--cases 10] [--repeats 3] [-np 2] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dataset_conversion.nifti import write_image

PET_SIZE, PET_SPACING = (400, 400, 326), (2.0364, 2.0364, 3.0)
CT_SIZE, CT_SPACING = (512, 512, 391), (1.5909, 1.5909, 2.5013)
LAS = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
FORMS = {"released": ("CTres", "SUV", "SEG"), "own grid": ("CT", "SUV", "SEG")}
LOOP = """
import sys
from pathlib import Path
import SimpleITK as sitk
source, target = map(Path, sys.argv[1:])
for number, suv in enumerate(sorted(source.rglob("SUV.nii.gz"))):
    pet, seg = sitk.ReadImage(str(suv)), sitk.ReadImage(str(suv.parent / "SEG.nii.gz"))
    if (suv.parent / "CTres.nii.gz").exists():
        ct = sitk.ReadImage(str(suv.parent / "CTres.nii.gz"))
    else:
        ct = sitk.Cast(sitk.ReadImage(str(suv.parent / "CT.nii.gz")), sitk.sitkFloat32)
        ct = sitk.Resample(ct, pet, sitk.Transform(), sitk.sitkLinear, -1024)
    for image, end in ((ct, "_0000"), (pet, "_0001"), (seg, "")):
        sitk.WriteImage(image, str(target / f"case_{number}{end}.nii.gz"), useCompression=True)
"""


def body(size: tuple[int, int, int], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an ellipse through all slices, shape (z, y, x), and noise of SD 1 in it, 0 outside."""
    x, y = (np.linspace(-1, 1, n, dtype=np.float32) for n in size[:2])
    inside = ((x[None, :] / 0.55) ** 2 + (y[:, None] / 0.4) ** 2) < 1
    noise = generator.standard_normal(size[::-1], np.float32)
    return np.broadcast_to(inside, noise.shape), noise * inside


def image(values: np.ndarray, spacing: tuple[float, float, float]) -> sitk.Image:
    """Return an image as autoPET's are: axes to the left, anterior and upwards."""
    result = sitk.GetImageFromArray(values)
    result.SetSpacing(spacing)
    result.SetOrigin((-407.0, 407.0, -1000.0))
    result.SetDirection(LAS)
    return result


def make_cases(folder: Path, form: str, cases: int) -> None:
    """Write one case and copy it; names as in the release."""
    generator = np.random.default_rng(0)
    inside, noise = body(PET_SIZE, generator)
    seg = np.zeros(noise.shape, np.uint8)
    seg[100:110, 180:195, 190:210] = 1
    volumes = {
        "SUV": image(np.abs(1.5 * inside + 0.3 * noise + 8 * seg), PET_SPACING),
        "SEG": image(seg, PET_SPACING),
    }
    if form == "released":
        volumes["CTres"] = image(np.where(inside, 40 + 15 * noise, -1000).astype(np.float32), PET_SPACING)
    else:
        inside, noise = body(CT_SIZE, generator)
        volumes["CT"] = image(np.where(inside, 40 + 15 * noise, -1000).astype(np.int16), CT_SPACING)
    first = folder / "PETCT_0000000000" / "03-23-2003-NA-PET-CT-10000"
    first.mkdir(parents=True)
    for name, volume in volumes.items():
        write_image(volume, str(first / f"{name}.nii.gz"))
    for number in range(1, cases):
        shutil.copytree(first, folder / f"PETCT_{number:010d}" / f"03-23-2003-NA-PET-CT-{10000 + number}")


def copy(source: Path, target: Path) -> None:
    """Copy all source files into one folder."""
    for number, path in enumerate(sorted(source.rglob("*.nii.gz"))):
        shutil.copyfile(path, target / f"{number}.nii.gz")


def run(what: str, source: Path, work: Path, processes: int) -> tuple[float, int]:
    """Return seconds of one way of converting, and the bytes it wrote."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    started = time.perf_counter()
    if what == "copy":
        copy(source, work)
    elif what == "loop":
        subprocess.run([sys.executable, "-c", LOOP, str(source), str(work)], check=True)
    else:
        command = Path(sys.executable).parent / "h2a_convert_autopet"
        subprocess.run(
            [str(command), "-i", str(source), "-d", "1", "-np", str(processes)],
            env={**os.environ, "nnUNet_raw": str(work)}, check=True, capture_output=True,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in work.rglob("*.nii.gz"))
    shutil.rmtree(work)
    return seconds, written


def main() -> None:
    """Print a table per form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-np", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work, 8 GB (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for form in FORMS:
            source = Path(name) / form.replace(" ", "_")
            make_cases(source, form, arguments.cases)
            size = sum(path.stat().st_size for path in source.rglob("*.nii.gz")) / 1e6
            print(f"{form}: {arguments.cases} cases, {size:.0f} MB of compressed files")
            seconds: dict[str, list[float]] = {"copy": [], "loop": [], "h2a_convert_autopet": []}
            written = {}
            for _ in range(arguments.repeats):
                for what, times in seconds.items():
                    taken, written[what] = run(what, source, Path(name) / "work", arguments.np)
                    times.append(taken)
            loop = statistics.median(seconds["loop"])
            for what, times in seconds.items():
                median = statistics.median(times)
                print(
                    f"  {what:20s} {median:7.1f} s  {60 * arguments.cases / median:7.1f} cases/min  "
                    f"{written[what] / 1e6 / median:6.0f} MB/s written  {loop / median:6.2f} times the loop's speed"
                )
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
