"""``h2a_evaluate`` as a user types it: files, folders, errors, and going on."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.evaluation import run_cases
from nnunet_h2a.evaluation.evaluate import main
from nnunet_h2a.evaluation.score_case import score_case

SPACING = (1.5, 2.0, 3.0)


def write(path, array, spacing=SPACING, origin=(5.0, -3.0, 10.0), direction=None):
    image = sitk.GetImageFromArray(np.asarray(array))
    if image.GetDimension() == 3:
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(direction or np.eye(3).ravel())
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture
def folders(tmp_path):
    """Three cases of two labels; the last one has no lesion and no prediction."""
    rng = np.random.default_rng(0)
    truth = np.zeros((3, 6, 16, 20), np.uint8)
    truth[0, 1:4, 2:8, 3:9] = 1
    truth[0, 5, 12:15, 15:19] = 2
    truth[1, 2:5, 5:9, 6:16] = 2
    predicted = np.roll(truth, 1, axis=3)
    predicted[1, 0, 0, 0] = 1
    predicted[2] = 0
    for case in range(3):
        write(tmp_path / "labelsTr" / f"case_{case}.nii.gz", truth[case])
        write(tmp_path / "predicted" / f"case_{case}.nii.gz", predicted[case])
        write(tmp_path / "imagesTr" / f"case_{case}_0000.nii.gz", rng.normal(0, 100, truth[0].shape).astype(np.float32))
        write(tmp_path / "imagesTr" / f"case_{case}_0001.nii.gz", rng.gamma(2, 2, truth[0].shape).astype(np.float32))
    content = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "tumor": 1, "node": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def arguments(folders, *more):
    return [
        "-ref", str(folders / "labelsTr"), "-pred", str(folders / "predicted"), "-o", str(folders / "out" / "s.json"),
        "-np", "1", *map(str, more),
    ]  # fmt: skip


def result(folders, name="s.json"):
    return json.loads((folders / "out" / name).read_text())


def cases(folders):
    return {(entry["case"], entry["label"]): entry for entry in result(folders)["cases"]}


def test_one_convention(folders, capsys):
    assert main(arguments(folders)) == 0
    found = cases(folders)
    assert set(found) == {(f"case_{case}", label) for case in range(3) for label in (1, 2)}
    # Blocks of 3 x 6 x 6 voxels, moved by one.
    assert found["case_0", 1]["dice"] == pytest.approx(2 * 90 / 216)
    assert found["case_0", 1]["hd"] == pytest.approx(1.5)
    # Voxels of 1.5 x 2 x 3 mm; one lesion of the other label is missed and none of this one.
    assert (
        found["case_1", 1] | {"dice": None, "fp_volume_ml": pytest.approx(0.009), "fn_volume_ml": None}
        == found["case_1", 1]
    )
    assert found["case_2", 2]["dice"] is None
    printed = capsys.readouterr().out
    assert "autopet: 3 cases" in printed
    assert printed.startswith((folders / "out" / "s.md").read_text())
    rows = list(csv.DictReader((folders / "out" / "s.csv").open()))
    assert len(rows) == 6
    assert float(rows[0]["dice"]) == found["case_0", 1]["dice"]
    assert rows[4]["dice"] == ""
    assert sorted(p.name for p in (folders / "out").iterdir()) == ["s.csv", "s.json", "s.md"]


def test_all_conventions_measure_once(folders, monkeypatch):
    read = []

    def noted(pair, job):
        read.append(pair.case)
        return score_case(pair, job)

    monkeypatch.setattr(run_cases, "score_case", noted)
    assert main(arguments(folders, "--convention", "all")) == 0
    assert len(read) == 3
    names = ("autopet", "hecktor", "cipa", "h2aseg", "isanet")
    assert [result(folders, f"s_{name}.json")["convention"] for name in names] == list(names)


@pytest.mark.parametrize("name", ["hecktor-as-published", "cipa-as-published", "h2aseg-as-published"])
def test_faults_are_named(folders, capsys, name):
    assert main(arguments(folders, "--convention", name)) == 0
    assert "reproduced" in capsys.readouterr().out


def test_pet(folders):
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 0
    found = cases(folders)["case_0", 1]["pet"]
    pet = sitk.GetArrayFromImage(sitk.ReadImage(str(folders / "imagesTr" / "case_0_0001.nii.gz")))
    assert found["true"]["patient"]["suv_max"] == pet[1:4, 2:8, 3:9].max()
    assert found["predicted"]["patient"]["tmtv_ml"] == pytest.approx(0.009 * 108)
    lesion = result(folders)["pet_agreement"]["1"]["lesion"]
    assert lesion["volume_ml"] | {"lower": 0, "upper": 0} == {"n": 1, "bias": 0, "lower": 0, "upper": 0}
    (one,), (other,) = found["true"]["lesions"], found["predicted"]["lesions"]
    assert (one["partner"], other["partner"]) == (1, 1)
    assert lesion["suv_mean"]["bias"] == pytest.approx(other["suv_mean"] - one["suv_mean"])
    agreement = result(folders)["pet_agreement"]["1"]["case"]
    assert agreement["tmtv_ml"]["n"] == 3
    assert agreement["tmtv_ml"]["bias"] == pytest.approx(0.009 / 3)
    lesions = list(csv.DictReader((folders / "out" / "s_lesions.csv").open()))
    assert [(row["case"], row["label"], row["mask"]) for row in lesions[:2]] == [
        ("case_0", "1", "true"), ("case_0", "1", "predicted")
    ]  # fmt: skip


def test_labels_without_a_dataset_json(folders):
    (folders / "dataset.json").unlink()
    assert main(arguments(folders)) == 0
    assert set(cases(folders)) == {(f"case_{case}", label) for case in range(3) for label in (1, 2)}
    assert main(arguments(folders, "-l", "2")) == 0
    assert {label for _, label in cases(folders)} == {2}


def test_an_absent_label_is_empty_and_not_left_out(folders):
    (folders / "dataset.json").unlink()
    assert main(arguments(folders, "--convention", "cipa")) == 0
    found = result(folders)
    assert cases(folders)["case_2", 1]["hd95"] == 0
    assert found["by_label"]["1"]["n"]["hd95"] == 17
    # All voxels of three cases and two labels.
    assert found["pooled"]["balanced_accuracy"] > 0.9


def test_regions_and_ignored_voxels(folders):
    content = {"labels": {"background": 0, "whole": [1, 2], "node": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    (folders / "predicted" / "dataset.json").write_text(json.dumps(content))
    truth = np.zeros((2, 4, 10), np.uint8)
    truth[:, :, :3], truth[:, :, 3] = 1, 2
    truth[:, :, 8:] = 3
    write(folders / "labelsTr" / "case_0.nii.gz", truth)
    predicted = np.zeros(truth.shape, np.uint8)
    predicted[:, :, 2:5] = 1
    predicted[:, :, 9] = 2
    write(folders / "predicted" / "case_0.nii.gz", predicted)
    assert main(arguments(folders)) == 0
    found = {str(entry["label"]): entry for entry in result(folders)["cases"] if entry["case"] == "case_0"}
    assert {key: found["[1, 2]"][key] for key in ("tp", "fp", "fn", "label_name")} == {
        "tp": 16, "fp": 8, "fn": 16, "label_name": "whole",
    }  # fmt: skip
    assert {key: found["2"][key] for key in ("tp", "fp", "fn")} == {"tp": 0, "fp": 0, "fn": 8}


@pytest.mark.parametrize("content", ['{"cases": []}', "{}"])
def test_a_damaged_conversion_report(folders, capsys, content):
    (folders / "conversion_report.json").write_text(content)
    assert main(arguments(folders)) == 2
    assert "conversion_report.json has no cases" in capsys.readouterr().err


def test_a_pet_value_beyond_all_bounds(folders, capsys):
    image = np.ones((6, 16, 20))
    image[0, 0, 0] = 1e300
    write(folders / "imagesTr" / "case_1_0001.nii.gz", image)
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 1
    assert "case_1_0001.nii.gz holds values that are no SUV" in capsys.readouterr().err


def test_patients_of_a_conversion_report(folders):
    report = {"cases": {f"case_{case}": {"patient": "one"} for case in range(3)}}
    (folders / "conversion_report.json").write_text(json.dumps(report))
    assert main(arguments(folders)) == 0
    assert result(folders)["ci95"]["fp_volume_ml"] is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "predicted" / "case_1.nii.gz").unlink(), "case_1: no prediction of case_1.nii.gz"),
        (lambda f: (f / "predicted" / "case_1.nii.gz").write_bytes(b"no image"), "case_1.nii.gz: cannot be read"),
        (lambda f: cut(f / "predicted" / "case_1.nii.gz"), "ended before the end-of-stream marker"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.zeros((6, 16, 19), np.uint8)),
         "differ in 20 x 16 x 6 and 19 x 16 x 6 voxels"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.zeros((6, 16, 20), np.uint8), (1.5, 2, 4)),
         "differ in spacings 1.5 x 2 x 3 and 1.5 x 2 x 4 mm"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.zeros((6, 16, 20), np.uint8), origin=(5, -3, 11)),
         "positions or orientations, by up to 1 mm"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.full((6, 16, 20), 0.5, np.float32)), "no labels"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.full((6, 16, 20), np.nan, np.float32)),
         "holds 1920 voxels that are no numbers"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.full((6, 16, 20), -1, np.int16)), "no labels"),
        (lambda f: write(f / "predicted" / "case_1.nii.gz", np.full((6, 16, 20), 255, np.uint8)),
         "holds the labels [255], which dataset.json does not have"),
    ],
)  # fmt: skip
def test_cases_that_are_refused(folders, capsys, change, text):
    change(folders)
    assert main(arguments(folders)) == 1
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1
    found = result(folders)
    assert list(found["refused"]) == ["case_1"]
    assert {entry["case"] for entry in found["cases"]} == {"case_0", "case_2"}
    assert "Not scored" in (folders / "out" / "s.md").read_text()


def test_chill(folders):
    (folders / "predicted" / "case_1.nii.gz").unlink()
    assert main(arguments(folders, "--chill")) == 0


def test_grids_are_brought_together_by_position(folders):
    """The same tumour on a grid of twice the resolution that is turned round, in a larger field of view."""
    mask = sitk.ReadImage(str(folders / "labelsTr" / "case_0.nii.gz"))
    fine = np.zeros((16, 40, 50), np.uint8)
    # Voxel centres of the finer grid: 0.25 voxels beside those of the coarser one.
    fine[2:14, 4:36, 5:45] = sitk.GetArrayFromImage(mask).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    spacing = np.array(SPACING) / 2
    origin = np.array([5.0, -3.0, 10.0]) - 0.5 * spacing - np.array([5, 4, 2]) * spacing
    flipped = origin + np.array([49, 39, 0]) * spacing
    flipped[2] = origin[2]
    write(folders / "predicted" / "case_0.nii.gz", fine[:, ::-1, ::-1], tuple(spacing), tuple(flipped),
          (-1, 0, 0, 0, -1, 0, 0, 0, 1))  # fmt: skip
    assert main(arguments(folders)) == 1
    assert main(arguments(folders, "--resample")) == 0
    assert cases(folders)["case_0", 1]["dice"] == cases(folders)["case_0", 2]["dice"] == 1


def test_a_hair_of_difference_in_headers_is_no_other_grid(folders):
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(folders / "labelsTr" / "case_0.nii.gz")))
    write(folders / "predicted" / "case_0.nii.gz", mask, (1.50001, 2, 3), (5.0001, -3, 10))
    assert main(arguments(folders)) == 0


def test_what_lies_outside_the_field_of_view(folders, capsys):
    """It counts for nothing, and that is said; a prediction that is nowhere near is refused."""
    mask = np.zeros((6, 16, 24), np.uint8)
    mask[1:3, 2:6, 16:24] = 1
    write(folders / "predicted" / "case_0.nii.gz", mask)
    write(folders / "predicted" / "case_1.nii.gz", mask, origin=(10000.0, -3.0, 10.0))
    assert main(arguments(folders, "--resample")) == 1
    assert "all of its foreground outside the reference's field of view" in capsys.readouterr().err
    (note,) = result(folders)["resampled"]["case_0"]
    assert "0.576 ml became 0.288 ml" in note
    assert note in (folders / "out" / "s.md").read_text()
    assert cases(folders)["case_0", 1]["fp"] == 2 * 4 * 4


def test_two_dimensions(folders):
    for name in ("labelsTr", "predicted"):
        mask = np.zeros((20, 30), np.uint8)
        mask[3:6, 4 : 9 if name == "labelsTr" else 10] = 1
        write(folders / name / "slice.png", mask)
    assert main(arguments(folders, "--convention", "cipa")) == 0
    assert cases(folders)["slice", 1]["hd95"] == 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--convention", "x"], "--convention x: choose one of autopet"),
        (["--convention", "isanet-as-published"], "no fault is known"),
        (["-ref", "nowhere"], "nowhere is no folder"),
        (["-img", "nowhere"], "nowhere is no folder"),
        (["-djfile", "nowhere.json"], "nowhere.json does not exist"),
        (["-o", "summary.txt"], "ends with .json"),
        (["-ref", "."], "holds no label file"),
        (["-djfile", "list.json"], '"labels" must give integers by name'),
        (["-djfile", "old.json"], '"labels" must give integers by name'),
        (["-djfile", "empty.json"], '"labels" must give integers by name'),
        (["-djfile", "none.json"], "no label beside the background"),
        (["-djfile", "latin.json"], "is not JSON"),
        (["-djfile", "twice.json"], "two names for the same label"),
        (["-l", "1", "7"], "-l 7: "),
        (["-o", "folder.json"], "folder.json is a folder"),
        (["-o", "list.json/s.json"], "list.json/s.json cannot be written"),
        (["-o", "s.json", "--cache", "folder.json"], "folder.json is a folder"),
    ],
)
def test_nothing_is_done(folders, capsys, monkeypatch, more, text):
    (folders / "empty").mkdir()
    monkeypatch.chdir(folders / "empty")
    for name, labels in (
        ("list", ["tumor"]), ("old", {"0": "background", "1": "tumor"}), ("empty", {"background": 0, "tumor": []}),
        ("none", {"background": 0}), ("twice", {"a": 1, "b": 2, "c": 1}),
    ):  # fmt: skip
        Path(f"{name}.json").write_text(json.dumps({"labels": labels}))
    Path("folder.json").mkdir()
    Path("latin.json").write_bytes('{"labels": {"Läsion": 1}}'.encode("latin-1"))
    assert main(arguments(folders, *more)) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not list((folders / "out").glob("*"))
    assert not Path("s.json").exists()


def test_two_files_of_one_case(folders, capsys):
    write(folders / "predicted" / "case_0.nii", np.zeros((6, 16, 20), np.uint8))
    assert main(arguments(folders)) == 2
    assert "are both case case_0" in capsys.readouterr().err


def test_which_channel_is_pet(folders, capsys):
    (folders / "dataset.json").unlink()
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 2
    assert "which channel is PET?" in capsys.readouterr().err
    assert main(arguments(folders, "-img", folders / "imagesTr", "--pet-channel", 1)) == 0
    (folders / "imagesTr" / "case_2_0001.nii.gz").unlink()
    assert main(arguments(folders, "-img", folders / "imagesTr", "--pet-channel", 1)) == 1
    assert "has no case_2_0001.*" in capsys.readouterr().err


def test_images_by_the_cases_own_names(folders, capsys):
    """One that is missing is refused, and the others are scored."""
    for case in range(3):
        (folders / "imagesTr" / f"case_{case}_0001.nii.gz").rename(folders / "imagesTr" / f"case_{case}.nii.gz")
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 0
    (folders / "imagesTr" / "case_0.nii.gz").unlink()
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 1
    assert "imagesTr has no case_0.*: give the folder" in capsys.readouterr().err
    assert {case for case, _ in cases(folders)} == {"case_1", "case_2"}


def test_a_case_that_is_called_like_another_ones_channel(folders, capsys):
    for folder in ("labelsTr", "predicted"):
        (folders / folder / "case_2.nii.gz").rename(folders / folder / "case_1_0001.nii.gz")
    for channel in (0, 1):
        old = folders / "imagesTr" / f"case_2_000{channel}.nii.gz"
        old.rename(folders / "imagesTr" / f"case_1_0001_000{channel}.nii.gz")
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 0
    assert {case for case, _ in cases(folders)} == {"case_0", "case_1", "case_1_0001"}


def test_without_a_standard_output(folders):
    program = (
        "import os, sys; os.close(1); sys.stdout = None\n"
        "from nnunet_h2a.evaluation.evaluate import main; sys.exit(main(sys.argv[1:]))"
    )
    finished = subprocess.run([sys.executable, "-c", program, *arguments(folders)], check=False, stderr=subprocess.PIPE)
    assert (finished.returncode, finished.stderr) == (0, b"")


@pytest.mark.parametrize("content", ["[]", "1", '"x"', "null"])
def test_a_dataset_json_that_is_no_object(folders, capsys, content):
    (folders / "dataset.json").write_text(content)
    assert main(arguments(folders, "-l", "1", "-img", folders / "imagesTr")) == 2
    assert "dataset.json holds no JSON object, but" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_knows_no_unicode(folders, encoding):
    program = "import sys; from nnunet_h2a.evaluation.evaluate import main; sys.exit(main(sys.argv[1:]))"
    for more in (["--help"], arguments(folders, "--convention", "all")):
        finished = subprocess.run(
            [sys.executable, "-c", program, *more], check=False, capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (finished.returncode, finished.stderr) == (0, b"")
    assert b"mean \xb1 SD" in finished.stdout or encoding == "ascii"
    assert len(list((folders / "out").glob("*.md"))) == 5


def test_goes_on_where_it_was_stopped(folders, monkeypatch):
    scored, allowed = [], [2]

    def stopped(pair, job):
        if len(scored) == allowed[0]:
            raise KeyboardInterrupt
        scored.append(pair.case)
        return score_case(pair, job)

    monkeypatch.setattr(run_cases, "score_case", stopped)
    assert main(arguments(folders)) == 130
    progress = folders / "out" / "s.json.progress"
    # As after a power failure: half a line.
    progress.write_text(progress.read_text() + '\n{"fingerprint": "12')
    # A prediction that has changed since is measured again.
    write(folders / "predicted" / "case_0.nii.gz", np.zeros((6, 16, 20), np.uint8))
    scored.clear()
    allowed[0] = 9
    assert main(arguments(folders)) == 0
    assert scored == ["case_0", "case_2"]
    assert cases(folders)["case_0", 1]["dice"] == 0
    assert not progress.exists()


def test_kept_measures_are_of_this_version_and_this_file_only(folders, capsys, monkeypatch):
    cache = folders / "cache"
    assert main(arguments(folders, "--cache", cache)) == 0
    before = result(folders)
    cache.write_text(cache.read_text().replace('"fn": 18', '"fn": 1'))
    assert main(arguments(folders, "--cache", cache)) == 0
    assert result(folders) != before
    monkeypatch.setattr(run_cases, "MEASURES_VERSION", 0)
    assert main(arguments(folders, "--cache", cache)) == 0
    assert result(folders) == before
    mine = folders / "mine.txt"
    for text in ("1\n2\n3\n", '{"channel_names": 1}', '{\n  "channel_names": 1\n}\n'):
        mine.write_text(text)
        capsys.readouterr()
        assert main(arguments(folders, "--cache", mine)) == 2
        assert "holds something else than measures" in capsys.readouterr().err
        assert mine.read_text() == text


def test_kept_measures_of_all_conventions_serve_each(folders, monkeypatch):
    cache = folders / "cache"
    assert main(arguments(folders, "--cache", cache, "--convention", "isanet")) == 0
    few = cache.read_text()
    assert main(arguments(folders, "--cache", cache, "--convention", "all")) == 0
    # More was wanted than there was.
    assert len(cache.read_text()) > 2 * len(few)
    monkeypatch.setattr(run_cases, "score_case", None)
    for name in ("hecktor", "cipa", "autopet"):
        kept = json.loads((folders / "out" / f"s_{name}.json").read_text())
        assert main(arguments(folders, "--cache", cache, "--convention", name)) == 0
        assert result(folders) == kept


def test_nobody_reads_to_the_end(folders):
    """``| head``: the files are whole, and there is no word of an error."""
    program = "import sys; from nnunet_h2a.evaluation.evaluate import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments(folders, "--convention", "all")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
    assert len(list((folders / "out").glob("*"))) == 15


def test_an_image_on_another_grid(folders, capsys):
    write(folders / "imagesTr" / "case_0_0001.nii.gz", np.ones((6, 16, 20), np.float32), origin=(9.0, 0.0, 0.0))
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 1
    assert "give the image that belongs to the labels, or --resample" in capsys.readouterr().err


def test_no_half_results(folders, capsys):
    """A table that cannot be written leaves the earlier ones as they were, and nothing beside them."""
    assert main(arguments(folders, "-img", folders / "imagesTr")) == 0
    (folders / "out" / "s.md").unlink()
    (folders / "out" / "s.md.part").mkdir()
    before = (folders / "out" / "s.json").read_bytes()
    write(folders / "predicted" / "case_0.nii.gz", np.zeros((6, 16, 20), np.uint8))
    assert main(arguments(folders)) == 2
    assert "s.md.part: Is a directory" in capsys.readouterr().err
    assert (folders / "out" / "s.json").read_bytes() == before
    assert not (folders / "out" / "s.json.part").exists()
    (folders / "out" / "s.md.part").rmdir()
    assert main(arguments(folders)) == 0
    # The lesions of the run with images are not those of this one.
    assert sorted(p.name for p in (folders / "out").iterdir()) == ["s.csv", "s.json", "s.md"]


def test_files_that_macos_leaves_are_no_cases(folders):
    (folders / "labelsTr" / "._case_0.nii.gz").write_bytes(b"x")
    assert main(arguments(folders)) == 0


def test_several_processes_give_the_same(folders):
    assert main(arguments(folders, "--convention", "all")) == 0
    one = {path.name: path.read_bytes() for path in (folders / "out").iterdir()}
    assert main([*arguments(folders, "--convention", "all"), "-np", "2"]) == 0
    assert one == {path.name: path.read_bytes() for path in (folders / "out").iterdir()}


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "hecktor-as-published" in "".join(capsys.readouterr().out.split())


def test_no_torch():
    program = (
        "import sys; from nnunet_h2a.evaluation.evaluate import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "-ref", ".", "-pred", "."]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert finished.stdout.strip() == "False"
