"""``h2a_compare``: the papers' table for trained models of a dataset, with tests against a baseline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_h2a.command import (
    CommandError,
    add_model_arguments,
    check_targets,
    dataset_folder,
    nnunet_folder,
    positive,
    read_json,
    run_command,
    write_whole,
)
from nnunet_h2a.crossval.jobs import MEASURES, read_folds, with_plans

if TYPE_CHECKING:
    from nnunet_h2a.evaluation.conventions import Convention
    from nnunet_h2a.evaluation.masks import Labels, Pair


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``h2a_compare``."""
    parser = argparse.ArgumentParser(
        prog="h2a_compare",
        description="Compare finished models of a dataset on their cross-validation: every metric as mean ± SD, best "
        "bold, second underlined, paired tests against a baseline; Markdown, CSV, LaTeX and box plots. Ensembles that "
        "nnUNetv2_find_best_configuration has made of these models are included.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--predictions", nargs="+", default=[], metavar="NAME=DIR",
        help="further predictions of the same validation cases, of any program",
    )  # fmt: skip
    parser.add_argument("--convention", default="autopet", metavar="NAME", help="as in h2a_evaluate [%(default)s]")
    parser.add_argument("--baseline", metavar="NAME", help="row to test against, or its trainer [the first trainer's]")
    parser.add_argument(
        "--metrics", nargs="+", metavar="M", help="columns: dice, hd95, …, aggregated_dice, hd95_median [all]",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("h2a_compare"), help="folder [%(default)s]")
    parser.add_argument("-np", "--processes", type=positive, default=2, metavar="N", help="processes [%(default)s]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``h2a_compare``."""
    return run_command(lambda: _compare(build_parser().parse_args(argv)))


@dataclass(frozen=True)
class _Model:
    """A row of the table: where its predictions of each fold lie; ensembles have all in one folder.

    ``cure`` is what to do about a prediction that is missing.
    """

    name: str
    trainer: str
    folders: tuple[tuple[Path, tuple[str, ...]], ...]
    cure: str
    is_ours: bool = False


def _compare(arguments: argparse.Namespace) -> int:
    from nnunet_h2a.evaluation.comparison import compare, disagreements, set_metrics
    from nnunet_h2a.evaluation.comparison_tables import box_plots, latex, long_csv, markdown
    from nnunet_h2a.evaluation.conventions import COUNTS, by_name
    from nnunet_h2a.evaluation.masks import labels_of_dataset
    from nnunet_h2a.evaluation.measure import Measures

    try:
        (convention,) = by_name(arguments.convention)
    except KeyError as error:
        raise CommandError(f"--convention {error.args[0]}") from error
    except ValueError as error:
        raise CommandError("--convention: one at a time") from error
    preprocessed = dataset_folder(nnunet_folder("nnUNet_preprocessed"), arguments.dataset)
    models = _models(arguments, preprocessed, nnunet_folder("nnUNet_results") / preprocessed.name)
    if len(models) < 2:
        raise CommandError(f"there is one model only, {models[0].name}: name another trainer with -tr")
    baseline = _baseline(arguments.baseline, models)
    of_cases = [key for key in convention.row(Measures(1, 0, 0, 1, 1.0)) if key not in COUNTS]
    of_the_set = {name.replace(" ", "_"): name for name in set_metrics(convention)}
    wanted = arguments.metrics or [*of_cases, *of_the_set]
    if unknown := [name for name in wanted if name not in of_cases and name not in of_the_set]:
        raise CommandError(f"--metrics {' '.join(unknown)}: choose of {', '.join([*of_cases, *of_the_set])}")
    metrics = [name for name in dict.fromkeys(wanted) if name in of_cases]
    reported = [of_the_set[name] for name in dict.fromkeys(wanted) if name in of_the_set]
    dataset_json = read_json(preprocessed / "dataset.json", "nnU-Net's planning", ["labels", "file_ending"])
    # All at once, so that a missing prediction is said before hours of measuring.
    pairs = {model: _pairs(model, preprocessed / "gt_segmentations", dataset_json["file_ending"]) for model in models}
    labels = labels_of_dataset(dataset_json, preprocessed / "dataset.json")
    check_targets(arguments.output / f"comparison.{ending}" for ending in ("md", "csv", "tex", "png"))
    summaries = {
        model.name: _summary(model, pairs[model], labels, preprocessed, convention, arguments.processes)
        for model in models
    }
    table = compare(summaries, baseline, metrics, reported)
    text = markdown(table, convention, baseline, disagreements(summaries))
    contents = {"md": text, "csv": long_csv(table), "tex": latex(table, convention, baseline)}
    write_whole({arguments.output / f"comparison.{ending}": content for ending, content in contents.items()})
    plotted = arguments.output / "comparison.png"
    plotted.unlink(missing_ok=True)
    if metrics:
        box_plots(plotted, summaries, table, metrics, convention)
    print(text)
    print(f"written: {arguments.output}/comparison.md, .csv, .tex{' and .png' * bool(metrics)}")
    return 0


def _models(arguments: argparse.Namespace, preprocessed: Path, results: Path) -> list[_Model]:
    """Models, ensembles of them, and other predictions; every one with all folds."""
    folds = read_folds(preprocessed, arguments.folds)
    cases = tuple(case for some in folds.values() for case in some)
    if repeated := sorted({case for case in cases if cases.count(case) > 1}):
        of = [fold for fold, some in folds.items() if repeated[0] in some]
        raise CommandError(
            f"-f {' '.join(folds)}: the folds {' and '.join(of)} both validate on {repeated[0]}: choose folds that "
            "share no case"
        )
    found = []
    for trainer, name in with_plans(arguments.trainers, arguments.plans):
        for configuration in dict.fromkeys(arguments.configurations):
            model = f"{trainer}__{name}__{configuration}"
            folders = tuple((results / model / f"fold_{fold}" / "validation", some) for fold, some in folds.items())
            cure = "finish it with  h2a_crossval , or choose its folds with -f"
            found.append(_Model(model, trainer, folders, cure, is_ours=True))
    names = [model.name for model in found]
    for ensemble in sorted((results / "ensembles").glob("ensemble___*___*___*")):
        members = ensemble.name.split("___")
        if not all(member in names for member in members[1:3]) or members[3] != "_".join(folds):
            continue
        name, cure = f"ensemble of {members[1]} and {members[2]}", "run  nnUNetv2_find_best_configuration  again"
        if _made_before(ensemble, [folder for m in found if m.name in members[1:3] for folder, _ in m.folders]):
            print(f"left out: {name} is older than its members' predictions: {cure}", file=sys.stderr)
        else:
            found.append(_Model(name, "", ((ensemble, cases),), cure))
    for given in arguments.predictions:
        name, equals, folder = given.partition("=")
        if not equals or not name or not Path(folder).is_dir():
            raise CommandError(f"--predictions {given}: give NAME=DIR, and DIR must be a folder")
        if name in [model.name for model in found]:
            raise CommandError(f"--predictions {given}: there is a model {name} already: give it another name")
        found.append(_Model(name, name, ((Path(folder), cases),), "predict it"))
    return found


def _made_before(ensemble: Path, members: Sequence[Path]) -> bool:
    """Whether a member has validated after the ensemble was scored: nnU-Net writes its summary last in either."""
    mine, theirs = ensemble / "summary.json", [folder / "summary.json" for folder in members]
    return mine.is_file() and any(p.is_file() and p.stat().st_mtime > mine.stat().st_mtime for p in theirs)


def _baseline(wanted: str | None, models: Sequence[_Model]) -> str:
    if wanted is None:
        return models[0].name
    found = [model.name for model in models if wanted in (model.name, model.trainer)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(found or [model.name for model in models])
    raise CommandError(f"--baseline {wanted}: name one of {names}")


def _summary(
    model: _Model,
    pairs: Sequence[tuple[Path, list[Pair]]],
    labels: Labels,
    preprocessed: Path,
    convention: Convention,
    processes: int,
) -> dict[str, Any]:
    """Scores of a model over all of its folds; what h2a_crossval has measured is not measured again."""
    from nnunet_h2a.evaluation.conventions import by_name
    from nnunet_h2a.evaluation.run_cases import measure_all, patients_of, scored_cases
    from nnunet_h2a.evaluation.score_case import Job
    from nnunet_h2a.evaluation.summary import summarise

    common = by_name("all")
    wanted = {part for each in (common if convention in common else [convention]) for part in each.wanted}
    job = Job(labels, tuple(sorted(wanted)), resample=False)
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for folder, some in pairs:
        # Folders that are not of our trainings are not written to.
        cache = folder / MEASURES if model.is_ours and convention in common else None
        found |= measure_all(some, job, min(processes, len(some)), cache, refused.__setitem__)
    if refused:
        case, why = next(iter(refused.items()))
        raise CommandError(f"{model.name}: {len(refused)} cases cannot be scored, {case}: {why}")
    return summarise(convention, scored_cases(found, job, patients_of(preprocessed / "gt_segmentations")), {})


def _pairs(model: _Model, references: Path, ending: str) -> list[tuple[Path, list[Pair]]]:
    """Files of each of a model's folders."""
    from nnunet_h2a.evaluation.masks import Pair

    found = []
    for folder, cases in model.folders:
        if model.is_ours and not folder.parents[1].is_dir():
            there = sorted(path.name for path in folder.parents[2].glob("*__*__*") if path.is_dir())
            raise CommandError(
                f"there is no model {model.name} in {folder.parents[2]}; there is {', '.join(there) or 'none'}"
            )
        missing = [case for case in cases if not (folder / f"{case}{ending}").is_file()]
        if missing:
            raise CommandError(
                f"{model.name} has not predicted {len(missing)} of {len(cases)} validation cases in {folder} "
                f"({missing[0]}): {model.cure}"
            )
        # nnU-Net writes a summary when it has validated, and may have trained again since.
        summary, final = folder / "summary.json", folder.parent / "checkpoint_final.pth"
        if model.is_ours and not summary.is_file():
            raise CommandError(f"{model.name} has not ended its validation in {folder}: {model.cure}")
        if model.is_ours and final.is_file() and final.stat().st_mtime > summary.stat().st_mtime:
            raise CommandError(f"{model.name} has trained again since its validation in {folder}: {model.cure}")
        files = [Pair(case, references / f"{case}{ending}", folder / f"{case}{ending}") for case in cases]
        found.append((folder, files))
    return found
