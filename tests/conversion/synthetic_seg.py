"""DICOM SEGs as different writers make them, written with pydicom only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.uid import generate_uid

from tests.conversion.synthetic_dicom import Study, set_tags, write_file

SEG_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
#: In-plane orientations: name -> (transpose, flip rows, flip columns) of the frames.
ORIENTATIONS = {
    "as the PET": (False, False, False),
    "rows flipped": (False, True, False),
    "columns flipped": (False, False, True),
    "turned by 180 degrees": (False, True, True),
    "transposed": (True, False, False),
}


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    set_tags(item, tags)
    return item


def write_seg(
    path: Path,
    study: Study,
    drawn_on: Sequence[Path],
    segments: Sequence[np.ndarray],
    *,
    orientation: str = "as the PET",
    order: Callable[[int], Sequence[int]] = range,
    keep_empty: bool = False,
    kind: str = "BINARY",
    shared_orientation: bool = True,
    change: Callable[[Dataset], None] = lambda dataset: None,
    **tags: Any,
) -> Path:
    """Write a SEG of a series.

    Args:
        path: file to write.
        study: shared UIDs.
        drawn_on: files of the series in slice order (upwards).
        segments: one mask per segment, shape (slices, rows, columns) of the series; for FRACTIONAL 0 to 1.
        orientation: a key of ``ORIENTATIONS``: how frames lie in comparison to the series.
        order: given the number of slices, the order their frames are written in.
        keep_empty: write frames without segmented pixels too.
        kind: BINARY or FRACTIONAL.
        shared_orientation: orientation and spacing once for all frames, else per frame.
        change: last change to the dataset.
        tags: further elements.
    """
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in drawn_on]
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)
    transpose, flip_rows, flip_columns = ORIENTATIONS[orientation]
    row_axis, column_axis = np.split(np.array(headers[0].ImageOrientationPatient, float), 2)
    step_row, step_column = (float(value) for value in headers[0].PixelSpacing)
    frames, groups = [], []
    geometry: dict[str, Any] = {}
    for number, mask in enumerate(segments, start=1):
        for index in order(len(headers)):
            plane = np.asarray(mask[index], float)
            if not keep_empty and not plane.any():
                continue
            origin = np.array(headers[index].ImagePositionPatient, float)
            axes = [row_axis, column_axis]
            if flip_rows:
                plane, origin = plane[::-1], origin + (rows - 1) * step_row * column_axis
                axes[1] = -column_axis
            if flip_columns:
                plane, origin = plane[:, ::-1], origin + (columns - 1) * step_column * row_axis
                axes[0] = -row_axis
            spacing = [step_row, step_column]
            if transpose:
                plane, axes, spacing = plane.T, axes[::-1], spacing[::-1]
            geometry = {
                "PixelMeasuresSequence": [_item(PixelSpacing=spacing, SliceThickness=1.0)],
                "PlaneOrientationSequence": [_item(ImageOrientationPatient=[float(v) for v in np.concatenate(axes)])],
            }
            frames.append(plane)
            position = _item(ImagePositionPatient=[round(float(value), 5) for value in origin])
            group = _item(
                PlanePositionSequence=[position],
                SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=number)],
                FrameContentSequence=[_item(DimensionIndexValues=[number, len(frames)])],
            )
            if not shared_orientation:
                set_tags(group, geometry)
            groups.append(group)
    values = np.stack(frames) if frames else np.zeros((0, rows, columns))
    packed = pack_bits((values > 0).astype(np.uint8)) if kind == "BINARY" else np.uint8(values * 200).tobytes()
    dataset = Dataset()
    set_tags(
        dataset,
        {
            "SOPClassUID": SEG_STORAGE,
            "SOPInstanceUID": generate_uid(),
            "Modality": "SEG",
            "PatientID": study.patient,
            "PatientName": study.patient,
            "StudyInstanceUID": study.study_uid,
            "StudyDate": "20030323",
            "SeriesInstanceUID": generate_uid(),
            "FrameOfReferenceUID": study.frame_of_reference,
            "SegmentationType": kind,
            "Rows": values.shape[1],
            "Columns": values.shape[2],
            "NumberOfFrames": len(values),
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 1 if kind == "BINARY" else 8,
            "BitsStored": 1 if kind == "BINARY" else 8,
            "HighBit": 0 if kind == "BINARY" else 7,
            "PixelRepresentation": 0,
            "ReferencedSeriesSequence": [_item(SeriesInstanceUID=headers[0].SeriesInstanceUID)],
            "SegmentSequence": [
                _item(SegmentNumber=number, SegmentLabel=f"Tissue {number}") for number in range(1, len(segments) + 1)
            ],
            "PerFrameFunctionalGroupsSequence": groups,
            "PixelData": packed,
        },
    )
    if kind == "FRACTIONAL":
        dataset.SegmentationFractionalType, dataset.MaximumFractionalValue = "PROBABILITY", 200
    if shared_orientation:
        dataset.SharedFunctionalGroupsSequence = [_item(**geometry)]
    set_tags(dataset, tags)
    change(dataset)
    write_file(path, dataset, SEG_STORAGE)
    return path
