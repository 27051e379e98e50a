"""What converters and engine exchange: cases found, reasons of refusal, the recipe of a converter, its outcome."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion.errors import ConversionError
from dataset_conversion.raw_dataset import DatasetSpec
from dataset_conversion.splits import Fold

if TYPE_CHECKING:
    import numpy as np
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
        group: what it belongs to beside its patient (the centre), for folds by group.
        labelled: False for a test case whose label was not released.
    """

    case_id: str
    patient: str
    files: tuple[str, ...]
    payload: Any = None
    variant: str = ""
    group: str = ""
    labelled: bool = True

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
        fatal: True where no other case could be written either (a full disk).
    """

    subject: str
    what: str
    remedy: str | None = None
    file: str | None = None
    of_case: bool = True
    fatal: bool = False

    @classmethod
    def of(cls, case: Case, error: ConversionError, fatal: bool = False) -> Refusal:
        """Return the refusal of a case; an error that names no file gets the folder of the case's files."""
        return cls(case.case_id, error.what, error.remedy, error.file or case.folder, fatal=fatal)

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
        test: identifiers of cases that the data set's authors set apart for testing.
        folds: the folds that came with the data, of its cases' identifiers.
        spec: what dataset.json says, where that depends on what was found.
        notes: what the user should know of the data as a whole.
    """

    cases: list[Case] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    test: set[str] = field(default_factory=set)
    folds: list[Fold] | None = None
    spec: DatasetSpec | None = None
    notes: list[str] = field(default_factory=list)

    def add_faults(self, faults: Iterable[ConversionError]) -> None:
        """Add files and folders that cannot be read and belong to no known case."""
        for error in faults:
            name = os.path.basename(error.file or "file")
            self.refusals.append(Refusal(name, error.what, error.remedy, error.file, of_case=False))


class CaseWriter:
    """Writes the files of one case into its folder of the workspace under nnU-Net's names.

    Args:
        folder: where to.
        case: whose files.
        spec: for the file ending.
        link: how a file is taken over as it is: ``copy``, ``hard`` or ``soft`` link.
    """

    def __init__(self, folder: Path, case: Case, spec: DatasetSpec, link: str = "copy") -> None:
        self.folder = folder
        self._case_id = case.case_id
        self._spec = spec
        self._link = link

    def image(self, channel: int, image: sitk.Image) -> None:
        """Write one channel of a volume as float32."""
        import SimpleITK as sitk

        self._write(channel, image, sitk.sitkFloat32)

    def label(self, image: sitk.Image) -> None:
        """Write the label map of a volume as uint8."""
        import SimpleITK as sitk

        self._write(None, image, sitk.sitkUInt8)

    def grey_levels(self, channel: int | None, values: np.ndarray) -> None:
        """Write uint8 values (rows, columns) as a picture: one channel or (None) the label map."""
        from PIL import Image

        Image.fromarray(values).save(self._path(channel), format="PNG", compress_level=1)

    def take(self, source: str, channel: int | None) -> None:
        """Take a file over as it is, as a channel or (None) as the label map."""
        take_over(Path(source), self._path(channel), self._link)

    def _path(self, channel: int | None) -> Path:
        return self.folder / self._spec.image_name(self._case_id, channel)

    def _write(self, channel: int | None, image: sitk.Image, kind: int) -> None:
        from dataset_conversion.nifti import write_image
        from dataset_conversion.resampling import as_type

        write_image(as_type(image, kind), str(self._path(channel)))


def take_over(source: Path, target: Path, link: str) -> None:
    """Copy or link a file; where hard links cannot be made (another file system) it is copied."""
    if link == "soft":
        os.symlink(os.path.realpath(source), target)
        return
    if link == "hard":
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(source), target)
            return
    shutil.copyfile(source, target)


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
        splits: how cases are divided into folds, a key of ``engine.SPLITS``.
        link: how files are taken over that can be used as they are.
        keep_channel_names: keep channel names that a user changed in an earlier dataset.json.
    """

    command: str
    spec: DatasetSpec
    options: Mapping[str, Any]
    discover: Callable[[Path, Mapping[str, Any], Callable[[], None]], Discovery]
    convert: Callable[[Case, Mapping[str, Any], CaseWriter], dict[str, Any]]
    describe: Callable[[Case, Mapping[str, Any]], str]
    looks_for: str
    unit: str = "patients"
    splits: str = "patient"
    link: str = "copy"
    keep_channel_names: bool = True


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
    splits: list[Fold]
    test_cases: int
    edits: list[str] = field(default_factory=list)
