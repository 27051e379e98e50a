"""``h2a_evaluate``: scores of predicted segmentations by the conventions of challenges and papers."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_h2a.command import CommandError, check_targets, positive, read_json, run_command

if TYPE_CHECKING:
    from nnunet_h2a.evaluation.masks import Labels, Pair

SOME_REFUSED = 1


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_evaluate``."""
    parser = argparse.ArgumentParser(
        prog="h2a_evaluate",
        description="Score predicted segmentations as a challenge or paper does: a JSON file with every case, a CSV "
        "file, and a Markdown table. Exit code 1 if a case could not be scored, 2 if none was.",
    )
    parser.add_argument("-ref", "--reference", required=True, type=Path, help="folder of true labels (labelsTr)")
    parser.add_argument("-pred", "--predicted", required=True, type=Path, help="folder of predicted labels")
    parser.add_argument(
        "-img", "--images", type=Path,
        help="folder of images (imagesTr): PET quantities as well; case_0001.nii.gz where the dataset's channel 1 is "
        "PET, or case.nii.gz",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path,
        help="JSON file; .csv and .md stand beside it [h2a_summary.json in the predicted folder]",
    )  # fmt: skip
    parser.add_argument(
        "--convention", default="autopet", metavar="NAME",
        help="autopet, hecktor, cipa, h2aseg, isanet; hecktor-as-published, cipa-as-published, h2aseg-as-published "
        "with the published scripts' faults; all: the first five, a file each [%(default)s]",
    )  # fmt: skip
    parser.add_argument("-np", "--processes", type=positive, default=min(8, os.cpu_count() or 1), metavar="N",
                        help="processes [%(default)s]")  # fmt: skip
    parser.add_argument(
        "-l", "--labels", type=positive, nargs="+", metavar="L",
        help="labels to score [those of dataset.json, else all that occur]",
    )  # fmt: skip
    parser.add_argument(
        "-djfile", "--dataset-json", type=Path,
        help="dataset.json with labels, regions and the ignore label [that of the predicted folder, else that beside "
        "the reference]",
    )  # fmt: skip
    parser.add_argument("--pet-channel", type=int, metavar="K", help="channel of PET [as dataset.json says]")
    parser.add_argument(
        "--resample", action="store_true",
        help="bring predictions and images on the reference's grid by their positions [refuse such cases]",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="keep what was measured, and measure only what has changed since"
    )
    parser.add_argument("--chill", action="store_true", help="score what is predicted; missing cases are no error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_evaluate``."""
    return run_command(lambda: _evaluate(build_parser().parse_args(argv)))


def _evaluate(arguments: argparse.Namespace) -> int:
    from nnunet_h2a.evaluation.conventions import by_name
    from nnunet_h2a.evaluation.masks import CaseError, label_files
    from nnunet_h2a.evaluation.run_cases import measure_all, patients_of, scored_cases
    from nnunet_h2a.evaluation.score_case import Job
    from nnunet_h2a.evaluation.summary import summarise
    from nnunet_h2a.evaluation.tables import FILES, write_summary

    try:
        conventions = by_name(arguments.convention)
    except KeyError as error:
        raise CommandError(f"--convention {error.args[0]}") from error
    for folder in (arguments.reference, arguments.predicted, arguments.images):
        if folder is not None and not folder.is_dir():
            raise CommandError(f"{folder} is no folder")
    output = arguments.output or arguments.predicted / "h2a_summary.json"
    if output.suffix != ".json":
        raise CommandError(f"-o {output}: give a name that ends with .json")
    dataset_json = _dataset_json(arguments)
    try:
        reference, predicted = label_files(arguments.reference), label_files(arguments.predicted)
    except CaseError as error:
        raise CommandError(str(error)) from error
    if not reference:
        raise CommandError(f"{arguments.reference} holds no label file")
    refused = {} if arguments.chill else {
        case: f"no prediction of {path.name} in {arguments.predicted}: predict it, or --chill"
        for case, path in reference.items() if case not in predicted
    }  # fmt: skip
    if extra := [case for case in predicted if case not in reference]:
        print(f"note: {len(extra)} predictions have no reference ({', '.join(extra[:3])}{', …' * (len(extra) > 3)})")
    pairs = _pairs(arguments, reference, predicted, dataset_json, refused)
    if not pairs:
        raise CommandError(
            f"nothing to score: no case of {arguments.reference} is in {arguments.predicted}"
            if not refused else f"nothing to score: {next(iter(refused.values()))}"
        )  # fmt: skip
    processes = min(arguments.processes, len(pairs))
    job = Job(
        _labels(arguments, dataset_json),
        tuple(sorted({part for convention in conventions for part in convention.wanted})),
        arguments.resample,
        max(1, arguments.processes // processes),
    )
    paths = {
        convention: output if len(conventions) == 1 else output.with_name(f"{output.stem}_{convention.name}.json")
        for convention in conventions
    }
    progress = arguments.cache or output.with_name(output.name + ".progress")
    check_targets([*(path.with_suffix(ending) for path in paths.values() for ending in FILES), progress])
    found = measure_all(pairs, job, processes, progress, refused.__setitem__)
    for case, why in refused.items():
        print(f"refused: {case}: {why}", file=sys.stderr)
    if not found:
        if arguments.cache is None:
            progress.unlink(missing_ok=True)
        raise CommandError("no case could be scored, see above")
    resampled = {case: content["resampled"] for case, content in found.items() if content["resampled"]}
    for case, what in resampled.items():
        print(f"resampled: {case}: {'; '.join(what)}")
    scored = scored_cases(found, job, patients_of(arguments.reference))
    if not scored:
        raise CommandError("no label occurs in any case: name those to score with -l, or give -djfile")
    written = [
        write_summary(path, summarise(convention, scored, refused, resampled), convention)
        for convention, path in paths.items()
    ]
    if arguments.cache is None:
        progress.unlink(missing_ok=True)
    for files in written:
        print(files[2].read_text(encoding="utf-8"))
        print(f"written: {', '.join(str(path) for path in files)}\n")
    return SOME_REFUSED if refused else 0


def _dataset_json(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path] | None:
    """Content and path of the dataset.json that says what the labels are."""
    if arguments.dataset_json is not None:
        return read_json(arguments.dataset_json, "the conversion", ["labels"]), arguments.dataset_json
    for folder in (arguments.predicted, arguments.reference, arguments.reference.resolve().parent):
        path = folder / "dataset.json"
        if path.is_file():
            return read_json(path, "the conversion", ["labels"]), path
    return None


def _labels(arguments: argparse.Namespace, dataset_json: tuple[dict[str, Any], Path] | None) -> Labels | None:
    from nnunet_h2a.evaluation.masks import Labels, labels_of_dataset

    described = labels_of_dataset(*dataset_json) if dataset_json is not None else None
    if arguments.labels is None:
        return described
    if described is not None and (unknown := sorted(set(arguments.labels) - described.known)):
        raise CommandError(
            f"-l {' '.join(map(str, unknown))}: {dataset_json[1]} has the labels "
            f"{', '.join(map(str, sorted(described.known - {0})))}"
        )
    names = {integers: name for name, integers in described.named.items()} if described else {}
    named = {names.get((n,), str(n)): (n,) for n in dict.fromkeys(arguments.labels)}
    return Labels(named, described.ignored if described else None)


def _pairs(
    arguments: argparse.Namespace,
    reference: Mapping[str, Path],
    predicted: Mapping[str, Path],
    dataset_json: tuple[dict[str, Any], Path] | None,
    refused: dict[str, str],
) -> list[Pair]:
    """The cases to score; those whose image is missing are refused."""
    from nnunet_h2a.evaluation.masks import CaseError, Pair, label_files

    cases = [case for case in reference if case in predicted]
    if arguments.images is None:
        return [Pair(case, reference[case], predicted[case]) for case in cases]
    try:
        images = label_files(arguments.images)
    except CaseError as error:
        raise CommandError(str(error)) from error
    ending = _ending(arguments, cases, images, dataset_json)
    for case in cases:
        if case + ending not in images:
            refused[case] = f"{arguments.images} has no {case}{ending}.*: give the folder with its PET image"
    return [
        Pair(case, reference[case], predicted[case], images[case + ending])
        for case in cases if case + ending in images
    ]  # fmt: skip


def _ending(
    arguments: argparse.Namespace,
    cases: Sequence[str],
    images: Mapping[str, Path],
    dataset_json: tuple[dict[str, Any], Path] | None,
) -> str:
    """What images' names have after the case's: nothing, or nnU-Net's channel; whichever more cases have."""
    own = [case in images for case in cases]
    with_channels = {name[:-5] for name in images if re.search(r"_\d{4}$", name)}
    if (all(own) and arguments.pet_channel is None) or (any(own) and not with_channels.intersection(cases)):
        return ""
    channel = f"_{_pet_channel(arguments, dataset_json):04d}"
    return max((channel, ""), key=lambda ending: sum(case + ending in images for case in cases))


def _pet_channel(arguments: argparse.Namespace, dataset_json: tuple[dict[str, Any], Path] | None) -> int:
    from nnunet_h2a.training.modalities import ChannelError, channel_roles

    if arguments.pet_channel is not None:
        return arguments.pet_channel
    for content in (dataset_json[0] if dataset_json else None, _json_beside(arguments.images)):
        if content is not None:
            try:
                channel = channel_roles(content, "pet")[1]
            except ChannelError:
                continue
            if channel is not None:
                return channel
    raise CommandError("which channel is PET? dataset.json does not say: give --pet-channel")


def _json_beside(folder: Path) -> dict[str, Any] | None:
    path = folder.resolve().parent / "dataset.json"
    return read_json(path, "the conversion", []) if path.is_file() else None
