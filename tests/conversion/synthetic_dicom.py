"""Small synthetic DICOM series and RTSTRUCTs for the converter tests, written with pydicom only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
RTSTRUCT_STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
_STORAGE = {"PT": PET_STORAGE, "CT": CT_STORAGE, "MR": MR_STORAGE}
DELETE = object()

WEIGHT_KG = 70.0
DOSE_BQ = 370e6
HALF_LIFE_S = 6586.2


def set_tags(dataset: Dataset, tags: Mapping[str, Any]) -> None:
    """Set elements by keyword; ``DELETE`` takes an element out."""
    for keyword, value in tags.items():
        if value is DELETE:
            if keyword in dataset:
                del dataset[keyword]
        else:
            setattr(dataset, keyword, value)


def pet_header(injection: Mapping[str, Any] | None = None, **tags: Any) -> Dataset:
    """Return the header of one PET slice: BQML, START, injected at 10:00, scanned at 11:00.

    Args:
        injection: changes to the item of the radiopharmaceutical sequence.
        tags: changes to the header.
    """
    header = Dataset()
    set_tags(
        header,
        {
            "SOPClassUID": PET_STORAGE,
            "Modality": "PT",
            "Manufacturer": "SIEMENS",
            "SeriesInstanceUID": "1.2.3.4",
            "Units": "BQML",
            "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"],
            "DecayCorrection": "START",
            "PatientWeight": WEIGHT_KG,
            "PatientSize": 1.75,
            "PatientSex": "M",
            "SeriesDate": "20200310",
            "SeriesTime": "110000.000000",
            "AcquisitionDate": "20200310",
            "AcquisitionTime": "110000.000000",
            "ActualFrameDuration": 120000,
            "RescaleSlope": 1.0,
            "RescaleIntercept": 0.0,
        },
    )
    code = Dataset()
    set_tags(code, {"CodeValue": "C-111A1", "CodingSchemeDesignator": "SRT", "CodeMeaning": "^18^Fluorine"})
    item = Dataset()
    set_tags(
        item,
        {
            "Radiopharmaceutical": "FDG",
            "RadionuclideTotalDose": DOSE_BQ,
            "RadionuclideHalfLife": HALF_LIFE_S,
            "RadiopharmaceuticalStartTime": "100000.00",
            "RadiopharmaceuticalStartDateTime": "20200310100000.00",
            "RadionuclideCodeSequence": [code],
        },
    )
    set_tags(item, injection or {})
    header.RadiopharmaceuticalInformationSequence = [item]
    set_tags(header, tags)
    return header


def add_private(header: Dataset, group: int, creator: str | None, element: int, vr: str, value: Any) -> None:
    """Add a private element in block 10; without ``creator`` as de-identification leaves it: number only."""
    if creator is not None:
        header.add_new((group, 0x0010), "LO", creator)
    header.add_new((group, 0x1000 | element), vr, value)


class Study:
    """UIDs that the series of one patient share."""

    def __init__(self, patient: str) -> None:
        self.patient = patient
        self.study_uid = generate_uid()
        self.frame_of_reference = generate_uid()


def write_file(path: Path, dataset: Dataset, sop_class: str) -> None:
    """Write a dataset as a DICOM file."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), dataset, file_meta=meta, preamble=b"\0" * 128)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def write_series(
    folder: Path,
    study: Study,
    modality: str,
    values: np.ndarray,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    *,
    heights: Sequence[float] | None = None,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    slopes: Sequence[float] | None = None,
    prefix: str = "",
    description: str = "",
    **tags: Any,
) -> list[Path]:
    """Write one image series, one file per slice, in shuffled file order.

    Args:
        folder: where to.
        study: shared UIDs.
        modality: CT, PT or MR.
        values: rescaled values, shape (z, y, x).
        spacing: mm, x, y, z.
        origin: mm, centre of the first voxel.
        heights: offsets of the slices along the normal in mm instead of multiples of the z spacing.
        orientation: ImageOrientationPatient.
        slopes: RescaleSlope per slice; values are stored as round(value / slope).
        prefix: of file names, for series that share a folder.
        description: SeriesDescription.
        tags: further elements of every slice.

    Returns:
        Files in slice order.
    """
    series_uid = generate_uid()
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    heights = [index * spacing[2] for index in range(len(values))] if heights is None else list(heights)
    slopes = [1.0] * len(values) if slopes is None else list(slopes)
    names = np.random.default_rng(len(values)).permutation(len(values))
    paths = []
    for index, plane in enumerate(values):
        header = pet_header() if modality == "PT" else Dataset()
        position = np.array(origin) + heights[index] * normal
        set_tags(
            header,
            {
                "SOPClassUID": _STORAGE[modality],
                "SOPInstanceUID": generate_uid(),
                "Modality": modality,
                "PatientID": study.patient,
                "PatientName": study.patient,
                "StudyInstanceUID": study.study_uid,
                "SeriesInstanceUID": series_uid,
                "SeriesDescription": description,
                "FrameOfReferenceUID": study.frame_of_reference,
                "ImageType": ["ORIGINAL", "PRIMARY"],
                "ImageOrientationPatient": [float(value) for value in orientation],
                "ImagePositionPatient": [round(float(value), 5) for value in position],
                "PixelSpacing": [spacing[1], spacing[0]],
                "SliceThickness": 99.0,
                "Rows": plane.shape[0],
                "Columns": plane.shape[1],
                "SamplesPerPixel": 1,
                "PhotometricInterpretation": "MONOCHROME2",
                "BitsAllocated": 16,
                "BitsStored": 16,
                "HighBit": 15,
                "PixelRepresentation": 1,
                "RescaleSlope": slopes[index],
                "RescaleIntercept": -1024.0 if modality == "CT" else 0.0,
            },
        )
        set_tags(header, tags)
        stored = np.round((plane - float(header.get("RescaleIntercept", 0))) / slopes[index])
        header.PixelData = stored.astype("<i2").tobytes()
        path = folder / f"{prefix}{names[index]:04d}.dcm"
        write_file(path, header, header.SOPClassUID)
        paths.append(path)
    return paths


def circle(centre: tuple[float, float], radius: float, height: float, points: int = 60) -> list[float]:
    """Return ContourData of a circle in an axial plane, mm."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return [
        round(float(value), 4)
        for angle in angles
        for value in (centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle), height)
    ]


def write_rtstruct(
    path: Path,
    study: Study,
    drawn_on: Sequence[Path],
    rois: Mapping[str, Mapping[int, Sequence[Sequence[float]]]],
    *,
    description: str = "RTstruct",
    reference: str = "real",
    kind: str = "CLOSED_PLANAR",
    reverse_contours: bool = False,
    **tags: Any,
) -> Path:
    """Write an RTSTRUCT.

    Args:
        path: file to write.
        study: shared UIDs.
        drawn_on: files of the image series, in slice order.
        rois: ROI name -> slice index -> contours (ContourData).
        description: SeriesDescription.
        reference: ``real`` UIDs of the series and slices, ``foreign`` ones that are nowhere, or ``none``.
        kind: ContourGeometricType.
        reverse_contours: write ROIContourSequence in another order than StructureSetROISequence.
        tags: further elements.
    """
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in drawn_on]
    sops = [h.SOPInstanceUID if reference == "real" else generate_uid() for h in headers]
    dataset = Dataset()
    set_tags(
        dataset,
        {
            "SOPClassUID": RTSTRUCT_STORAGE,
            "SOPInstanceUID": generate_uid(),
            "Modality": "RTSTRUCT",
            "PatientID": study.patient,
            "PatientName": study.patient,
            "StudyInstanceUID": study.study_uid,
            "SeriesInstanceUID": generate_uid(),
            "SeriesDescription": description,
            "StructureSetLabel": "RTstruct",
        },
    )
    if reference != "none":
        series = Dataset()
        series.SeriesInstanceUID = headers[0].SeriesInstanceUID if reference == "real" else generate_uid()
        series.ContourImageSequence = [_image_reference(uid, headers[0].SOPClassUID) for uid in sops]
        in_study = Dataset()
        in_study.RTReferencedSeriesSequence = [series]
        frame = Dataset()
        frame.FrameOfReferenceUID = study.frame_of_reference
        frame.RTReferencedStudySequence = [in_study]
        dataset.ReferencedFrameOfReferenceSequence = [frame]
    names, contours = [], []
    for number, (name, slices) in enumerate(rois.items(), start=11):
        item = Dataset()
        set_tags(
            item,
            {"ROINumber": number, "ROIName": name, "ReferencedFrameOfReferenceUID": study.frame_of_reference},
        )
        names.append(item)
        roi = Dataset()
        roi.ReferencedROINumber = number
        sequence = []
        for index, polygons in slices.items():
            for data in polygons:
                contour = Dataset()
                contour.ContourGeometricType = kind
                contour.NumberOfContourPoints = len(data) // 3
                contour.ContourData = list(data)
                if reference != "none":
                    contour.ContourImageSequence = [_image_reference(sops[index], headers[0].SOPClassUID)]
                sequence.append(contour)
        if sequence:
            roi.ContourSequence = sequence
        contours.append(roi)
    dataset.StructureSetROISequence = names
    dataset.ROIContourSequence = contours[::-1] if reverse_contours else contours
    set_tags(dataset, tags)
    write_file(path, dataset, RTSTRUCT_STORAGE)
    return path


def _image_reference(uid: str, sop_class: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = uid
    return item


class Patient:
    """A small PET/CT patient: a ball of 12 mm radius as tumour, with an oedema ROI around it.

    CT 40 x 36 x 12 voxels of 2 x 2 x 4 mm, PET 20 x 18 x 12 of 4 x 4 x 4 mm, centred alike.
    """

    centre = (38.0, 34.0, 22.0)
    radius = 12.0
    slices = 12

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.study = Study(name)

    def ct_values(self) -> np.ndarray:
        """HU, shape (12, 36, 40)."""
        z, y, x = np.mgrid[0:12, 0:36, 0:40]
        return (np.float64(x) * 3 + y * 2 + z - 100).round()

    def pet_values(self) -> np.ndarray:
        """Bq/ml, shape (12, 18, 20), smooth in x, y, z so that linear resampling is exact."""
        z, y, x = np.mgrid[0:12, 0:18, 0:20]
        return np.float64(1000 + 40 * x + 30 * y + 20 * z)

    def write_ct(self, **kwargs: Any) -> list[Path]:
        """Write the CT series."""
        options = {"description": "CT IMAGES - RESEARCH", "folder": self.folder / "ct", **kwargs}
        return write_series(
            options.pop("folder"), self.study, "CT", options.pop("values", self.ct_values()), (2.0, 2.0, 4.0), **options
        )

    def write_pet(self, **kwargs: Any) -> list[Path]:
        """Write the PET series."""
        options = {"description": "PET AC", "folder": self.folder / "pet", "origin": (1.0, 1.0, 0.0), **kwargs}
        return write_series(
            options.pop("folder"),
            self.study,
            "PT",
            options.pop("values", self.pet_values()),
            (4.0, 4.0, 4.0),
            **options,
        )

    def ball(self, scale: float = 1.0, shift: float = 0.0) -> dict[int, list[list[float]]]:
        """Return the tumour's contours by slice index."""
        contours = {}
        for index in range(self.slices):
            height = 4.0 * index
            square = (scale * self.radius) ** 2 - (height - self.centre[2]) ** 2
            if square > 4.0:
                centre = (self.centre[0] + shift, self.centre[1])
                contours[index] = [circle(centre, float(np.sqrt(square)), height)]
        return contours

    def expected(self, size: tuple[int, int, int], spacing: float, origin: float, scale: float = 1.0) -> np.ndarray:
        """Return the ball's mask by the analytic inequality, shape (z, y, x), independent of any polygon code."""
        z, y, x = np.mgrid[0 : size[2], 0 : size[1], 0 : size[0]]
        square = (scale * self.radius) ** 2 - (4.0 * z - self.centre[2]) ** 2
        distance = (origin + spacing * x - self.centre[0]) ** 2 + (origin + spacing * y - self.centre[1]) ** 2
        return (square > 4.0) & (distance < square)

    def write(self) -> Patient:
        """Write CT, PET and an RTSTRUCT on each, as in the collection."""
        ct, pet = self.write_ct(), self.write_pet()
        rois = {"GTV_Mass": self.ball(), "GTV_Edema": self.ball(1.5)}
        write_rtstruct(self.folder / "rt" / "ct.dcm", self.study, ct, rois, description="RTstructCT")
        write_rtstruct(self.folder / "rt" / "pet.dcm", self.study, pet, rois, description="RTstruct_PET")
        return self
