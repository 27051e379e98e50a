"""h2a_demo: what it refuses, what it says when a step fails, and (in the full tests) what it reaches."""

from __future__ import annotations

import json
import sys

import pytest

from nnunet_h2a.command import CommandError
from nnunet_h2a.demo.command import main
from nnunet_h2a.demo.runner import CommandRunner
from tests.conftest import ROOT, clean_environment, run


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("draft 7")
    assert main(["-o", str(tmp_path)]) == 2
    assert "not empty and not from a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "draft 7"


def test_output_that_is_a_file_and_patients_that_are_not_there(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["-o", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["-o", str(tmp_path / "out"), "--sts", str(tmp_path / "missing")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_patients_without_dicom_end_with_the_converters_reason(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["-o", str(tmp_path / "out"), "--sts", str(tmp_path / "empty")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: h2a_convert_sts ended with code 2: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_commands_run_in_folders_of_their_own_and_are_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/the/users/own")
    runner = CommandRunner(tmp_path)
    python = sys.executable
    show = "import os; print(os.environ['nnUNet_raw'], os.environ['EXTRA'])"
    runner.run(python, "-c", show, environment={"EXTRA": "a b"})
    log = next(runner.logs.iterdir()).read_text()
    assert log.split() == [str(tmp_path / "nnUNet_raw"), "a", "b"]
    script = runner.script.read_text()
    assert f"export nnUNet_raw={tmp_path / 'nnUNet_raw'}" in script
    # What was written down does the same in a shell.
    again = run("bash", "-c", script, environment=clean_environment())
    assert again.stdout == log


def test_a_command_that_fails_is_named_with_its_last_words(tmp_path):
    runner = CommandRunner(tmp_path)
    with pytest.raises(CommandError, match=r"ended with code 3: the last word \(all it printed: "):
        runner.run(sys.executable, "-c", "print('first'); print('the last word'); raise SystemExit(3)")
    with pytest.raises(CommandError, match="ended with code 1: error: the reason"):
        runner.run(sys.executable, "-c", "print('error: the reason'); print('goodbye'); raise SystemExit(1)")
    with pytest.raises(CommandError, match="is not installed"):
        runner.run("no_such_command_here")


def test_refused_patients_are_shown_and_the_rest_goes_on(tmp_path, capsys):
    runner = CommandRunner(tmp_path)
    show = "print('refused STS_007: no weight'); print('next: train'); raise SystemExit(1)"
    runner.run(sys.executable, "-c", show, accepted=(0, 1))
    # The first line is the command itself.
    printed = capsys.readouterr().out.splitlines()[1:]
    assert "  refused STS_007: no weight" in printed
    assert not [line for line in printed if "next: train" in line]


def test_a_place_that_cannot_be_written(capsys):
    assert main(["-o", "/proc/h2a_demo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /proc/h2a_demo")
    assert error.count("\n") == 1


@pytest.mark.full
def test_the_demo_learns(tmp_path):
    run("h2a_demo", "-o", tmp_path / "out", "-device", "cpu", environment=clean_environment(), timeout=1800)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["models"]) == {"nnUNet", "H2ASeg", "ensemble"}
    for name, model in summary["models"].items():
        assert model["mean_dice"] >= 0.6, name
        assert None in model["cases"].values()


@pytest.mark.full
def test_the_demo_on_real_patients(tmp_path):
    patients = ROOT.parent / "shared" / "data" / "sts"
    if not patients.is_dir():
        pytest.skip(f"real patients are not at hand: {patients}")
    finished = run("h2a_demo", "--sts", patients, "-o", tmp_path / "out", "-device", "cpu",
                   environment=clean_environment(), timeout=1800)  # fmt: skip
    assert "not accuracy" in finished.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for model in summary["models"].values():
        assert set(model["cases"]) == {"STS_001", "STS_002"}
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2
