"""Running ``h2a_convert_sts`` in tests and looking at what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from dataset_conversion.sts import main
from tests.conversion.synthetic_dicom import DELETE, DOSE_BQ

# SUV per Bq/ml of a synthetic patient, scanned an hour after injection.
ONE_HOUR = 70_000.0 / DOSE_BQ * 2 ** (3600 / 6586.2)


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "501", "-np", "1", *flags])


def load(raw: Path, case: str, folder: str = "Dataset501_STS", kind: str = "Tr") -> tuple[sitk.Image, ...]:
    base = raw / folder
    names = (f"images{kind}/{case}_0000", f"images{kind}/{case}_0001", f"labels{kind}/{case}")
    return tuple(sitk.ReadImage(str(base / f"{name}.nii.gz")) for name in names)


def report(raw: Path) -> dict:
    return json.loads((raw / "Dataset501_STS" / "conversion_report.json").read_text())


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def edit(path: Path, **tags: object) -> None:
    dataset = pydicom.dcmread(path)
    for keyword, value in tags.items():
        if value is DELETE:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(path)
