"""What converters and engine exchange: cases found, reasons of refusal, the recipe of a converter, its outcome."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.errors import ConversionError
from dataset_conversion.raw_dataset import FILE_ENDING, DatasetSpec

if TYPE_CHECKING:
    import SimpleITK as sitk


@dataclass(frozen=True)
class Case:
    """One case to convert.

    Attributes:
        case_id: identifier in the raw dataset.
        patient: patient it belongs to; cases of a patient stay in one fold.
        files: source files, whose path, size and time decide whether a finished case is still valid.
        payload: what the converter needs, picklable.
        variant: what else the result depends on, such as a choice made over all cases.
    """

    case_id: str
    patient: str
    files: tuple[str, ...]
    payload: Any = None
    variant: str = ""

    @property
    def folder(self) -> str | None:
        """The folder that holds all its files."""
        folders = {os.path.dirname(path) for path in self.files}
        return os.path.commonpath(folders) if folders else None


@dataclass(frozen=True)
class Refusal:
    """Why a patient or study is not in the dataset.

    Attributes:
        subject: the case, or the name of a file that belongs to no known one.
        what, remedy, file: as in ``ConversionError``.
        of_case: False where ``subject`` is a file.
    """

    subject: str
    what: str
    remedy: str | None = None
    file: str | None = None
    of_case: bool = True

    @classmethod
    def of(cls, case: Case, error: ConversionError) -> Refusal:
        """Return the refusal of a case; an error that names no file gets the folder of the case's files."""
        return cls(case.case_id, error.what, error.remedy, error.file or case.folder)

    def __str__(self) -> str:
        text = f"{self.subject}: {ConversionError(self.what, self.remedy, self.file)}"
        return text.replace("\r", " ").replace("\n", " ")


@dataclass
class Discovery:
    """What was found below the source folder.

    Attributes:
        cases: to be converted.
        refusals: what was found and cannot be converted.
        passed_over: left out on the user's wish (not a fault), identifier to reason.
    """

    cases: list[Case] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)


class CaseWriter:
    """Writes the images of one case into its folder of the workspace under nnU-Net's names."""

    def __init__(self, folder: Path, case_id: str) -> None:
        self.folder = folder
        self.case_id = case_id

    def image(self, channel: int, image: sitk.Image) -> None:
        """Write one channel as float32."""
        import SimpleITK as sitk

        self._write(f"{self.case_id}_{channel:04d}{FILE_ENDING}", sitk.Cast(image, sitk.sitkFloat32))

    def label(self, image: sitk.Image) -> None:
        """Write the label map as uint8."""
        import SimpleITK as sitk

        self._write(f"{self.case_id}{FILE_ENDING}", sitk.Cast(image, sitk.sitkUInt8))

    def copy(self, source: str, channel: int | None) -> None:
        """Take a file over as it is, as a channel or (None) as the label map."""
        name = f"{self.case_id}{FILE_ENDING}" if channel is None else f"{self.case_id}_{channel:04d}{FILE_ENDING}"
        shutil.copyfile(source, self.folder / name)

    def _write(self, name: str, image: sitk.Image) -> None:
        import SimpleITK as sitk

        sitk.WriteImage(image, str(self.folder / name), useCompression=True)


@dataclass(frozen=True)
class Recipe:
    """A converter: the functions must be module-level, for they are sent to worker processes.

    Attributes:
        command: console command, for messages.
        spec: what dataset.json says.
        options: settings that change the result, ready for JSON.
        discover: (source, options, progress) -> Discovery.
        convert: (case, options, writer) -> record for the report; raises ConversionError.
        describe: (case, options) -> one line for ``--dry-run``; raises ConversionError where convert would early on.
        looks_for: what it takes from a source folder, for messages.
        unit: what its cases are, for messages.
    """

    command: str
    spec: DatasetSpec
    options: Mapping[str, Any]
    discover: Callable[[Path, Mapping[str, Any], Callable[[], None]], Discovery]
    convert: Callable[[Case, Mapping[str, Any], CaseWriter], dict[str, Any]]
    describe: Callable[[Case, Mapping[str, Any]], str]
    looks_for: str
    unit: str = "patients"


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        dataset: the dataset's folder.
        converted: identifiers converted in this run.
        kept: identifiers finished by an earlier run.
        refusals: what could not be converted.
        notes: case to warnings.
        splits: the folds written.
        test_cases: how many cases went to imagesTs.
        edits: what became of a user's changes to an earlier dataset.json.
    """

    dataset: Path
    converted: list[str]
    kept: list[str]
    refusals: list[Refusal]
    notes: dict[str, list[str]]
    splits: list[dict[str, list[str]]]
    test_cases: int
    edits: list[str] = field(default_factory=list)
