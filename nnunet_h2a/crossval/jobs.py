"""What is to be trained, and how far it is: read from nnU-Net's own files, so that any run can go on."""

from __future__ import annotations

import json
import re
import statistics
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from nnunet_h2a.command import CommandError, write_whole
from nnunet_h2a.evaluation import MEASURES_VERSION

#: What a fold's scores are called, for every convention, below its validation folder.
SCORES = "h2a_scores"
#: What was measured for them, which h2a_compare uses again; below a folder of predictions.
MEASURES = f"{SCORES}/measures.jsonl"
_DEFAULT_FOLDS = 5
WAITING, TRAINING, VALIDATING, SCORING, FINISHED, FAILED = (
    "waiting", "training", "validating", "scoring", "finished", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One fold of one trainer.

    Attributes:
        dataset: folder name, ``Dataset123_Name``.
        configuration: of the plans.
        trainer: name of the trainer's class.
        plans: name of the plans.
        fold: number, or ``all``.
        preprocessed: the dataset's folder below ``$nnUNet_preprocessed``.
        results: ``$nnUNet_results``.
        cases: cases that the fold validates on.
        after: model folder names whose folds must all be finished first: a cascade's first stage.
    """

    dataset: str
    configuration: str
    trainer: str
    plans: str
    fold: str
    preprocessed: Path
    results: Path
    cases: tuple[str, ...]
    after: str | None = None

    @property
    def model(self) -> str:
        """nnU-Net's name of the model's folder."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def model_folder(self) -> Path:
        return self.results / self.dataset / self.model

    @property
    def folder(self) -> Path:
        """Of the fold."""
        return self.model_folder / f"fold_{self.fold}"

    @property
    def validation(self) -> Path:
        return self.folder / "validation"

    @property
    def scores(self) -> Path:
        return self.validation / SCORES / "summary.json"

    @property
    def scored(self) -> Path:
        """Written when every convention's scores are."""
        return self.validation / SCORES / "finished"

    @property
    def summary(self) -> Path:
        """nnU-Net's scores, which it writes when it has validated."""
        return self.validation / "summary.json"

    @property
    def log(self) -> Path:
        """Output of the commands; nnU-Net deletes nothing beside the folds."""
        return self.model_folder / f"h2a_crossval_fold_{self.fold}.log"

    @property
    def lock(self) -> Path:
        """Held by whoever works on the fold."""
        return self.model_folder / f"h2a_crossval_fold_{self.fold}.lock"

    def is_trained(self) -> bool:
        """Whether nnU-Net has ended the training: a checkpoint that was cut off while it was written does not count."""
        return is_whole(self.folder / "checkpoint_final.pth")

    def is_validated(self, file_ending: str, probabilities: bool) -> bool:
        """Whether every validation case is predicted by the final network: nnU-Net writes its summary last.

        Args:
            file_ending: of the dataset.
            probabilities: whether their probabilities are wanted too, for ensembles.
        """
        final = self.folder / "checkpoint_final.pth"
        if not self.summary.is_file() or self.summary.stat().st_mtime < final.stat().st_mtime:
            return False
        endings = [file_ending, *([".npz"] if probabilities else [])]
        return all((self.validation / f"{case}{ending}").is_file() for case in self.cases for ending in endings)

    def is_scored(self) -> bool:
        """Whether our scores are there, of this version, of this validation and of these true labels."""
        return self.scored.is_file() and self.scored.read_text(encoding="utf-8") == self._what_is_scored()

    def note_scored(self) -> None:
        """To be called when every convention's scores are written."""
        self.scored.write_text(self._what_is_scored(), encoding="utf-8")

    def _what_is_scored(self) -> str:
        labels = self.preprocessed / "gt_segmentations"
        files = [self.summary, *(path for case in self.cases for path in sorted(labels.glob(f"{escape(case)}.*")))]
        # Equal times and not later ones: labels may come from a clock that is ahead.
        stamps = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files if path.is_file()]
        return "\n".join([f"measures of version {MEASURES_VERSION}", *stamps, ""])


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there to its end: PyTorch's files are zip archives, whose list of contents comes last."""
    return checkpoint.is_file() and zipfile.is_zipfile(checkpoint)


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        stage: WAITING, TRAINING, ….
        epoch: epochs that are done.
        epoch_seconds: median duration of the last epochs, or None.
    """

    stage: str
    epoch: int = 0
    epoch_seconds: float | None = None


_EPOCH = re.compile(r"Epoch (\d+)\s*$", re.MULTILINE)
_SECONDS = re.compile(r"Epoch time: ([\d.]+) s")


def progress_of(job: Job, file_ending: str, probabilities: bool) -> Progress:
    """How far a fold is, by the files that nnU-Net and we have written; WAITING where nothing works on it."""
    if job.is_trained():
        if not job.is_validated(file_ending, probabilities):
            return Progress(VALIDATING)
        return Progress(FINISHED if job.is_scored() else SCORING)
    logs = sorted(job.folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return Progress(WAITING)
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
    epochs = [int(number) for number in _EPOCH.findall(text)]
    seconds = [float(number) for number in _SECONDS.findall(text)]
    # The first epoch of a run is the longest: compilation, cold files.
    return Progress(TRAINING, epochs[-1] if epochs else 0, statistics.median(seconds[-10:]) if seconds else None)


def with_plans(trainers: Sequence[str], plans: Sequence[str]) -> list[tuple[str, str]]:
    """Each trainer with its plans, once: one name holds for all, else each trainer has its own.

    Raises:
        CommandError: where the numbers do not go together.
    """
    plans = list(plans) * len(trainers) if len(plans) == 1 else plans
    if len(plans) != len(trainers):
        raise CommandError(f"-p: give one name for all trainers or one for each: {len(plans)} for {len(trainers)}")
    return list(dict.fromkeys(zip(trainers, plans, strict=True)))


def read_folds(preprocessed: Path, folds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Validation cases of each fold.

    Args:
        preprocessed: the dataset's folder below ``$nnUNet_preprocessed``, with its splits.
        folds: numbers, or ``all``.

    Raises:
        CommandError: where the splits cannot be read, or do not have a fold.
    """
    wanted = list(dict.fromkeys(str(int(fold)) if _is_number(fold) else fold for fold in folds))
    if wanted == ["all"]:
        # nnU-Net needs no splits for it.
        return {"all": _all_cases(preprocessed)}
    path = preprocessed / "splits_final.json"
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        known = [tuple(str(case) for case in fold["val"]) for fold in splits]
        if not isinstance(splits, list) or not all(isinstance(fold["val"], list) for fold in splits):
            raise TypeError("no list of folds")
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"{path} is damaged ({type(error).__name__}: {error}): copy the raw dataset's here"
        ) from error
    found = {}
    for fold in wanted:
        if fold == "all":
            found[fold] = _all_cases(preprocessed)
        elif not _is_number(fold) or int(fold) >= len(known):
            raise CommandError(f"-f {fold}: {path} has the folds 0 to {len(known) - 1}")
        else:
            found[fold] = known[int(fold)]
        if not found[fold]:
            raise CommandError(f"-f {fold}: the fold validates on no case, see {path}")
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _all_cases(preprocessed: Path) -> tuple[str, ...]:
    """Every preprocessed case: nnU-Net validates fold ``all`` on its training cases."""
    return tuple(sorted({path.stem for path in preprocessed.glob("*/*.pkl")}))


def check_first_stages(jobs: Sequence[Job], file_ending: str, probabilities: bool) -> None:
    """A cascade's second stage needs its first stage's prediction of every case that it trains and validates on.

    The first stage predicts a case where that is validated: training one fold of the second stage takes all folds of
    the first.

    Args:
        jobs: all that will run.
        file_ending: of the dataset.
        probabilities: whether they are kept.

    Raises:
        CommandError: where a prediction would be missing.
    """
    to_do = [job for job in jobs if not (job.is_trained() and job.is_validated(file_ending, probabilities))]
    for job in to_do:
        if job.after is None:
            continue
        if job.fold == "all":
            needed = set(job.cases)
        else:
            splits = json.loads((job.preprocessed / "splits_final.json").read_text(encoding="utf-8"))
            needed = {str(case) for part in ("train", "val") for case in splits[int(job.fold)].get(part, [])}
        coming = {case for other in to_do if other.model == job.after for case in other.cases}
        predicted = job.results / job.dataset / job.after / "predicted_next_stage" / job.configuration
        # Arrays of NumPy or Blosc, as nnU-Net's version has it.
        there = {path.stem for path in predicted.glob("*") if path.suffix in (".npz", ".b2nd")}
        if missing := sorted(needed - coming - there):
            raise CommandError(
                f"{job.configuration} fold {job.fold}: of {len(needed)} cases {len(missing)} ({missing[0]}, …) have no "
                f"prediction of {job.after}, which it writes where it validates: add {job.after.rpartition('__')[2]} "
                "to -c, and all folds; folds of it that are finished need  nnUNetv2_train … --val  once more"
            )


def write_missing_splits(preprocessed: Path, configuration: str) -> None:
    """Write nnU-Net's default folds where there are none, as it would itself when the first fold trains.

    Two folds that begin at once would otherwise both write the file.

    Args:
        preprocessed: the dataset's folder below ``$nnUNet_preprocessed``.
        configuration: data identifier of a preprocessed configuration.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = sorted(path.stem for path in (preprocessed / configuration).glob("*.pkl"))
    if len(cases) < _DEFAULT_FOLDS:
        raise CommandError(
            f"{preprocessed} has {len(cases)} cases and no splits_final.json, and nnU-Net divides no fewer than "
            f"{_DEFAULT_FOLDS}: write the folds yourself, or  -f all"
        )
    splits = generate_crossval_split(cases, seed=12345, n_splits=_DEFAULT_FOLDS)
    write_whole({preprocessed / "splits_final.json": json.dumps(splits, indent=4)})
