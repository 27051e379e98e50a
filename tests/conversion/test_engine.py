"""Settings, resuming, killed runs, folds and the other things all converters share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset_conversion.splits import make_splits
from dataset_conversion.sts import main
from tests.conversion.synthetic_dicom import Patient, write_series


def heed_ctrl_c() -> None:
    """For a child process: a test run in the background of a shell passes on that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


REPOSITORY = Path(__file__).resolve().parents[2]
DATASET = "Dataset501_STS"


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "501", "-np", "1", *flags])


def write_patients(source: Path, *numbers: int) -> None:
    for number in numbers:
        Patient(source / f"p{number:03d}", f"STS_{number:03d}").write()


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(source: Path, *flags: str) -> list[str]:
    code = "import sys; from dataset_conversion.sts import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "-i", str(source), "-d", "501", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "Traceback" not in text
    return lines[0]


def test_nnunet_raw_unset(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert convert(source) == 2
    assert "export nnUNet_raw=" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_id_taken_by_another_name(
    raw: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    folder = tmp_path / variable
    monkeypatch.setenv(variable, str(folder))
    (folder / "Dataset501_Other").mkdir(parents=True)
    write_patients(source, 1)
    assert convert(source) == 2
    line = one_line(capsys.readouterr().err)
    assert "Dataset501_Other" in line
    assert "-d 502" in line
    assert "--name Other" in line
    assert not (raw / DATASET).exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["-d", "0"], "1 to 999"),
        (["-d", "1000"], "1 to 999"),
        (["--name", "a b"], "--name"),
        (["--test", "STS_777"], "STS_777"),
        (["--test", "STS_001", "STS_002"], "training"),
    ],
)
def test_unusable_settings(
    raw: Path, source: Path, capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    write_patients(source, 1, 2)
    assert convert(source, *flags) == 2
    assert word in one_line(capsys.readouterr().err)
    assert not (raw / DATASET).exists()


def test_source_missing_or_empty(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source / "nowhere") == 2
    assert "nowhere" in one_line(capsys.readouterr().err)
    (source / "readme.txt").write_text("nothing here")
    assert convert(source) == 2
    assert "nothing" in one_line(capsys.readouterr().err)


def test_a_dataset_not_of_this_converter_is_left_alone(
    raw: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / DATASET / "imagesTr").mkdir(parents=True)
    (raw / DATASET / "dataset.json").write_text("{}")
    write_patients(source, 1)
    before = tree(raw)
    assert convert(source) == 2
    assert DATASET in one_line(capsys.readouterr().err)
    assert tree(raw) == before


def test_next_commands_and_report(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_plan_and_preprocess -d 501 --verify_dataset_integrity" in printed
    assert "nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerH2ASeg" in printed
    case = json.loads((raw / DATASET / "conversion_report.json").read_text())["cases"]["STS_001"]
    assert case["sources"]["RTSTRUCT"]["rois"] == ["GTV_Mass"]
    assert case["geometry_before"]["PET"]["size"] == [20, 18, 12]
    assert case["geometry_after"]["size"] == [40, 36, 12]
    assert case["suv"]["uptake_minutes"] == 60.0


def test_running_again_keeps_and_adds(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    first = tree(raw)
    kept = (raw / DATASET / "imagesTr" / "STS_001_0000.nii.gz").stat().st_mtime_ns
    assert convert(source) == 0
    assert tree(raw) == first
    assert "0 cases converted, 2 kept" in capsys.readouterr().out
    write_patients(source, 3)
    assert convert(source) == 0
    assert "1 cases converted, 2 kept" in capsys.readouterr().out
    assert (raw / DATASET / "imagesTr" / "STS_001_0000.nii.gz").stat().st_mtime_ns == kept
    assert json.loads((raw / DATASET / "dataset.json").read_text())["numTraining"] == 3
    assert convert(source, "--grid", "pet") == 0
    assert "3 cases converted, 0 kept" in capsys.readouterr().out
    assert sorted(path.name for path in raw.iterdir()) == [DATASET]


@pytest.mark.parametrize("what", ["nnunet_h2a.__version__", "dataset_conversion.workspace.RULES_VERSION"])
def test_cases_of_another_version_are_converted_again(
    raw: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    capsys.readouterr()
    monkeypatch.setattr(what, "0.0.0.other")
    assert convert(source) == 0
    assert "2 cases converted, 0 kept" in capsys.readouterr().out


def test_mr_files_count_for_resuming(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which contours were drawn on MR decides which RTSTRUCT is taken."""
    patient = Patient(source / "p001", "STS_001").write()
    assert convert(source) == 0
    mr = write_series(patient.folder / "mr", patient.study, "MR", np.zeros((2, 8, 8)), (4.0, 4.0, 4.0))
    assert convert(source) == 0
    mr[0].unlink()
    assert convert(source) == 0
    assert capsys.readouterr().out.count("1 cases converted, 0 kept") == 3


def test_channel_names_a_user_changed_are_kept(raw: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    path = raw / DATASET / "dataset.json"
    content = json.loads(path.read_text())
    content["channel_names"]["1"] = "CT"
    path.write_text(json.dumps(content))
    write_patients(source, 2)
    assert convert(source) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "were kept" in warnings[0]
    assert json.loads(path.read_text()) == {**content, "numTraining": 2}


@pytest.mark.parametrize(
    "edit", [{"regions_class_order": [1]}, {"description": "mine"}, {"channel_names": {"0": "CT"}}]
)
def test_other_edits_of_dataset_json_are_told_of(
    raw: Path, source: Path, capsys: pytest.CaptureFixture[str], edit: dict
) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    path = raw / DATASET / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **edit}))
    assert convert(source) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert next(iter(edit)) in warnings[0]
    assert json.loads(path.read_text()) == content
    assert convert(source) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_patient_whose_files_changed_is_converted_again(raw: Path, source: Path) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    before = tree(raw / DATASET)
    shutil.rmtree(source / "p002")
    Patient(source / "p002", "STS_002").write_ct()
    patient = Patient(source / "p002", "STS_002")
    shutil.rmtree(source / "p002")
    patient.pet_values = lambda: Patient.pet_values(patient) * 2
    patient.write()
    assert convert(source) == 0
    after = tree(raw / DATASET)
    assert {name for name in before if before[name] != after[name]} == {
        "imagesTr/STS_002_0001.nii.gz",
        "conversion_report.json",
    }


def test_cases_of_another_source_are_not_thrown_away(
    raw: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_patients(source / "a", 1, 2)
    write_patients(source / "b", 3)
    assert convert(source / "a") == 0
    before = tree(raw)
    assert convert(source / "b") == 2
    assert "STS_001" in one_line(capsys.readouterr().err)
    assert tree(raw) == before


def test_test_patients(raw: Path, source: Path) -> None:
    write_patients(source, 1, 2, 3)
    assert convert(source, "--test", "STS_002") == 0
    folder = raw / DATASET
    assert sorted(path.name for path in (folder / "imagesTs").iterdir()) == [
        "STS_002_0000.nii.gz",
        "STS_002_0001.nii.gz",
    ]
    assert [path.name for path in (folder / "labelsTs").iterdir()] == ["STS_002.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert "STS_002" not in (folder / "splits_final.json").read_text()
    assert convert(source) == 0
    assert not (folder / "imagesTs").exists()
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 3


def test_worker_processes_write_the_same_bytes(raw: Path, source: Path, tmp_path: Path) -> None:
    write_patients(source, 1, 2, 3)
    assert convert(source) == 0
    alone = tree(raw / DATASET)
    shutil.rmtree(raw / DATASET)
    result = subprocess.run(command(source, "-np", "2"), env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert tree(raw / DATASET) == alone


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
@pytest.mark.parametrize(("processes", "existing"), [("1", True), ("2", False)])
def test_killed_run_leaves_nothing_and_resumes(raw: Path, source: Path, processes: str, existing: bool) -> None:
    write_patients(source, 1)
    if existing:
        assert convert(source) == 0
    published = tree(raw / DATASET) if existing else {}
    write_patients(source, *range(2, 13))
    run = subprocess.Popen(
        command(source, "-np", processes), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    cases = raw / f".h2a_{DATASET}" / "cases"
    deadline = time.monotonic() + 60
    while run.poll() is None and not (cases.is_dir() and any(cases.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert (tree(raw / DATASET) if existing else {}) == published
    assert (raw / DATASET).exists() == existing
    finished = len(list(cases.iterdir()))
    assert finished >= 1
    time.sleep(0.5)  # orphaned workers, if any, must not write on
    again = subprocess.run(command(source, "-np", "1"), env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "12 cases converted" not in again.stdout
    resumed = tree(raw / DATASET)
    assert sorted(path.name for path in raw.iterdir()) == [DATASET]
    shutil.rmtree(raw)
    assert convert(source) == 0
    assert resumed == tree(raw / DATASET)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and ps")
def test_a_killed_worker_costs_no_case(raw: Path, source: Path, tmp_path: Path) -> None:
    """The work of a dead worker is done again; the dataset is the same as ever."""
    write_patients(source, *range(1, 11))
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stream:
        run = subprocess.Popen(
            command(source, "-np", "2"), env=environment(), stdout=subprocess.PIPE, stderr=stream, text=True
        )
        workers: list[str] = []
        while run.poll() is None and not workers:
            listing = [
                "ps",
                "-ww",
                "-o",
                "pid=,args=",
                "--ppid",
                str(run.pid),
            ]  # -ww: whole lines whatever COLUMNS says
            listed = subprocess.run(listing, capture_output=True, text=True, check=False)
            workers = [line.split()[0] for line in listed.stdout.splitlines() if "spawn_main" in line]
        while run.poll() is None and not (raw / f".h2a_{DATASET}" / "cases").is_dir():
            time.sleep(0.002)
        assert run.poll() is None, "the run was over before a worker could be killed"
        os.kill(int(workers[0]), signal.SIGKILL)
        printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0, errors.read_text()
    assert "10 cases converted, 0 kept from an earlier run, 0 refused" in printed
    assert "Traceback" not in errors.read_text()


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to a process group is POSIX")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_is_one_line_and_resumes(raw: Path, source: Path, processes: str) -> None:
    write_patients(source, *range(1, 11))
    run = subprocess.Popen(
        command(source, "-np", processes),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
        start_new_session=True,
    )
    while run.poll() is None and not (raw / f".h2a_{DATASET}" / "cases").is_dir():
        time.sleep(0.002)
    os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not (raw / DATASET).exists()
    assert convert(source) == 0
    assert json.loads((raw / DATASET / "dataset.json").read_text())["numTraining"] == 10


def test_killed_between_the_two_renames(raw: Path, source: Path) -> None:
    write_patients(source, 1, 2)
    assert convert(source) == 0
    before = tree(raw / DATASET)
    workspace = raw / f".h2a_{DATASET}"
    workspace.mkdir()
    shutil.copytree(raw / DATASET, workspace / "dataset")
    (raw / DATASET).rename(workspace / "old")
    assert convert(source) == 0
    assert tree(raw / DATASET) == before
    assert not workspace.exists()


def test_files_a_user_put_beside_are_kept(raw: Path, source: Path) -> None:
    write_patients(source, 1)
    assert convert(source) == 0
    (raw / DATASET / "notes.txt").write_text("mine")
    write_patients(source, 2)
    assert convert(source) == 0
    assert (raw / DATASET / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("same", [True, False])
def test_older_preprocessed_splits(
    raw: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    same: bool,
) -> None:
    folder = tmp_path / "pre"
    monkeypatch.setenv("nnUNet_preprocessed", str(folder))
    write_patients(source, 1, 2, 3)
    assert convert(source) == 0
    capsys.readouterr()
    splits = json.loads((raw / DATASET / "splits_final.json").read_text())
    (folder / DATASET).mkdir(parents=True)
    old = folder / DATASET / "splits_final.json"
    old.write_text(json.dumps(splits if same else splits[:1]))
    assert convert(source) == 0
    error = capsys.readouterr().err
    assert (f"rm {old}" in error) == (not same)


def test_a_changed_dataset_asks_for_a_new_fingerprint(
    raw: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --clean nnU-Net would plan the new images by the fingerprint of the old ones."""
    folder = tmp_path / "pre"
    monkeypatch.setenv("nnUNet_preprocessed", str(folder))
    write_patients(source, 1, 2)
    assert convert(source) == 0
    assert "--clean" not in capsys.readouterr().out
    (folder / DATASET).mkdir(parents=True)
    (folder / DATASET / "dataset_fingerprint.json").write_text("{}")
    assert convert(source) == 0
    printed = capsys.readouterr()
    assert "--clean" not in printed.out + printed.err
    assert convert(source, "--grid", "pet") == 0
    printed = capsys.readouterr()
    assert "--verify_dataset_integrity --clean\n" in printed.out
    assert "dataset_fingerprint.json was made of an earlier state" in printed.err
    # Until nnU-Net has planned again, also by runs that change nothing or only who is tested on.
    for flags in (("--grid", "pet"), ("--grid", "pet", "--test", "STS_001"), ("--grid", "pet", "--test", "STS_001")):
        assert convert(source, *flags) == 0
        assert "--clean" in capsys.readouterr().out
    (folder / DATASET / "dataset_fingerprint.json").write_text("{}")
    assert convert(source, "--grid", "pet", "--test", "STS_001") == 0
    assert "--clean" not in capsys.readouterr().out
    assert convert(source, "--grid", "pet") == 0
    assert "--clean" in capsys.readouterr().out


def test_a_file_in_place_of_a_folder(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "readme.txt").write_text("no image")
    assert convert(tmp_path / "readme.txt") == 2
    error = capsys.readouterr().err
    assert "is a file and holds nothing that can be converted" in error
    assert "CT, PET and RTSTRUCT" in error


@pytest.mark.parametrize(("patients", "folds"), [(1, 1), (2, 2), (4, 4), (5, 5), (12, 5)])
def test_folds(patients: int, folds: int) -> None:
    cases = {}
    for number in range(patients):
        for study in range(1 + number % 3):
            cases[f"case_{number:02d}_{study}"] = f"patient {number}"
    splits = make_splits(cases)
    assert splits == make_splits(dict(reversed(cases.items())))
    assert len(splits) == folds
    for fold in splits:
        assert fold["train"]
        assert fold["val"]
        if patients > 1:
            assert not {cases[name] for name in fold["train"]} & {cases[name] for name in fold["val"]}
            assert sorted(fold["train"] + fold["val"]) == sorted(cases)
    assert sorted(name for fold in splits for name in fold["val"]) == sorted(cases)
    sizes = [len(fold["val"]) for fold in splits]
    if patients == 12:
        assert max(sizes) - min(sizes) <= 1
    if patients == 1:
        assert splits[0]["train"] == splits[0]["val"] == sorted(cases)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    for module in ("sts", "autopet"):
        code = (
            f"import sys, dataset_conversion.{module} as m\n"
            "try:\n    m.main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'nnunetv2', 'SimpleITK', 'pydicom', 'skimage', 'scipy'} & set(sys.modules)\n"
            "sys.exit(str(heavy) if heavy else 0)"
        )
        begin = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=False)
        assert result.returncode == 0, result.stderr
        assert b"--grid" in result.stdout
        assert time.monotonic() - begin < 5


def test_nothing_imports_torch_or_nnunet() -> None:
    code = (
        "import sys, pkgutil, importlib, dataset_conversion\n"
        "for item in pkgutil.iter_modules(dataset_conversion.__path__):\n"
        "    importlib.import_module('dataset_conversion.' + item.name)\n"
        "sys.exit(1 if {'torch', 'nnunetv2'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
