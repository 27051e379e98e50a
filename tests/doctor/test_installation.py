"""h2a_doctor on the installation."""

from __future__ import annotations

import os
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from nnunet_h2a.doctor import installation
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING
from tests.conftest import clean_environment, run

FOLDERS = installation.FOLDERS


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for variable in [name for name in os.environ if name.lower().startswith("nnunet")]:
        monkeypatch.delenv(variable)
    for variable in FOLDERS:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def levels(findings, level):
    return [str(finding) for finding in findings if finding.level == level]


def test_a_sound_installation_by_the_command(tmp_path):
    """With the environment as a user has it; a machine without a GPU gets a note."""
    environment = clean_environment()
    for variable in FOLDERS:
        (tmp_path / variable).mkdir()
        environment[variable] = str(tmp_path / variable)
    finished = run("h2a_doctor", environment=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(f"ok       nnunet_h2a {metadata.version('nnunet-h2a')}, Python ")
    assert f"nnunetv2 {metadata.version('nnunetv2')}, torch {torch.__version__.partition('+')[0]}" in lines[0]
    assert "ok       nnU-Net finds nnUNetTrainerH2ASeg (nnunet_h2a.trainers.nnUNetTrainerH2ASeg)" in lines
    if not torch.cuda.is_available():
        assert any(line.startswith("note     no GPU") for line in lines)
    broken = run(
        "h2a_doctor", environment=environment | {"NNUNET_H2A_AUTOREGISTER": "0", "nnUNet_raw": ""}, check=False
    )
    assert broken.returncode == 1
    problems = [line for line in broken.stdout.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2
    assert "nnUNet_raw is not set; type: export nnUNet_raw=" in problems[0]
    assert "because NNUNET_H2A_AUTOREGISTER is 0; type: export nnUNet_extTrainer=$(python -m" in problems[1]
    assert "2 problems" in broken.stdout


def test_help_does_not_import_torch():
    program = "import sys; from nnunet_h2a.doctor import command; command.build_parser(); print('torch' in sys.modules)"
    assert run(sys.executable, "-c", program, environment=clean_environment()).stdout.strip() == "False"


def test_versions(monkeypatch):
    versions = {"nnunetv2": "2.9.0", "numpy": "1.20.0"}
    really = metadata.version

    def version(name):
        if name == "pydicom":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or really(name)

    monkeypatch.setattr(metadata, "version", version)
    found = list(installation.check_versions())
    problems = levels(found, PROBLEM)
    assert len(problems) == 2
    assert 'numpy is 1.20.0, and >=1.24 is needed; type: pip install "numpy>=1.24"' in problems[0]
    assert 'pydicom is not installed; type: pip install "pydicom>=3.0"' in problems[1]
    assert "nnunetv2 2.9.0 has not been tested" in levels(found, NOTE)[0]


def test_folders_that_are_fine(folders):
    found = list(installation.check_folders())
    assert [finding.level for finding in found] in ([OK] * 3, [OK, OK, WARNING])


@pytest.mark.parametrize(
    ("variable", "value", "level", "text"),
    [
        ("nnUNet_raw", None, PROBLEM, "nnUNet_raw is not set; type: export nnUNet_raw="),
        ("nnUNet_results", "{root}/nothing", PROBLEM, "which is no folder; type: mkdir -p"),
        ("nnUNet_results", "{root}/nnUNet_raw ", PROBLEM, "begins or ends with a blank"),
        ("nnUNet_results", "{root}/file", PROBLEM, "which is a file"),
        ("nnUNet_results", '"{root}/nnUNet_raw"', PROBLEM, "has quotes in its value"),
        ("nnUNet_raw", "~/data", PROBLEM, "~ is not a folder within quotes"),
        ("nnUNet_preprocessed", "{root}/nnUNet_raw", PROBLEM, "nnUNet_preprocessed and nnUNet_raw are the same folder"),
        ("nnUNet_raw", "nnUNet_raw", WARNING, "depends on where a command is typed"),
    ],
)
def test_folders_that_are_not(folders, monkeypatch, variable, value, level, text):
    monkeypatch.chdir(folders)
    (folders / "file").touch()
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value.format(root=folders))
    assert [line for line in levels(installation.check_folders(), level) if text in line]


def test_folders_of_nnunet_1(folders, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_raw_data_base", str(folders))
    assert "(nnUNet_raw_data_base is nnU-Net 1's)" in levels(installation.check_folders(), PROBLEM)[0]


def test_a_folder_that_cannot_be_written(folders, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(installation.tempfile, "TemporaryFile", refuse)
    found = list(installation.check_folders())
    assert [finding.level for finding in found] == [NOTE, PROBLEM, PROBLEM]
    assert "cannot be written to (Permission denied)" in str(found[1])


def test_a_full_disk(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 2**30, 2**30))
    assert "1.0 GiB free; a fold may take 3" in levels(installation.check_folders(), WARNING)[0]


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("nnunet_compile", "f", "nnunet_compile is set, but nnU-Net reads nnUNet_compile"),
        ("nnUNet_preprocesed", "/data", "nnUNet_preprocesed is set, but nnU-Net reads nnUNet_preprocessed"),
        ("nnUNet_exTrainer", "/mine", "nnU-Net reads nnUNet_extTrainer"),
        ("nnUNet_def_n_proc", "", "is no number above 0"),
        ("nnUNet_n_proc_DA", "-1", "is no number of processes"),
        ("nnUNet_n_proc_DA", "0", "nnU-Net's planning does not"),
        ("nnUNet_n_proc_DA", "many", "is no number"),
        ("nnUNet_def_n_proc", "0", "is no number above 0"),
        ("nnUNet_compile", "yes", "nnU-Net takes everything but true, 1 and t for no"),
        ("OMP_THREAD_LIMIT", "1", "training on a CPU then hangs"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="variables have no case there")
def test_settings(folders, monkeypatch, variable, value, text):
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    assert list(installation.check_settings()) == []
    monkeypatch.setenv(variable, value)
    (found,) = installation.check_settings()
    assert text in str(found)
    assert found.fix


def test_shared_memory(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda _: usage(64 * 2**20, 0, 64 * 2**20))
    (found,) = installation.check_shared_memory(folders)
    assert "has 64 MiB" in str(found)
    assert "--shm-size" in found.fix
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert not list(installation.check_shared_memory(folders))
    assert not list(installation.check_shared_memory(Path("/nowhere")))


def look_up(*arguments, **environment):
    program = (
        "import sys; from nnunet_h2a.doctor.installation import check_lookup\n"
        "for finding in check_lookup(sys.argv[1]): print(finding)"
    )
    done = run(sys.executable, "-c", program, *arguments, environment=clean_environment(**environment))
    return done.stdout.splitlines()


def test_lookup_of_a_name_that_is_none():
    (line,) = look_up("nnUNetTrainerH2AS")
    assert line.startswith("PROBLEM  nnU-Net finds no trainer nnUNetTrainerH2AS; compare")


def test_lookup_through_a_folder_that_raises(tmp_path):
    (tmp_path / "mine.py").write_text("import nothing_of_the_kind\n")
    lines = look_up("nnUNetTrainerH2ASeg", nnUNet_extTrainer=os.pathsep.join([str(tmp_path), str(tmp_path / "gone")]))
    assert [line.split()[0] for line in lines] == ["warning", "PROBLEM"]
    assert "which is no folder" in lines[0]
    assert "ModuleNotFoundError" in lines[1]


def test_lookup_of_somebody_elses_trainer(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerH2ASeg(nnUNetTrainer):\n    pass\n"
    )
    (line,) = look_up("nnUNetTrainerH2ASeg", nnUNet_extTrainer=str(tmp_path))
    assert line.startswith("note")
    assert "not of this package (mine)" in line


class Properties:
    name = "Testor 9000"


@pytest.mark.parametrize(
    ("smi", "cuda", "mps", "level", "text"),
    [
        (False, None, False, NOTE, "no GPU"),
        (False, None, True, NOTE, "PyTorch offers mps"),
        (True, None, False, PROBLEM, "is built for the CPU"),
        (True, "13.0", False, PROBLEM, "finds no GPU"),
    ],
)
def test_no_gpu(monkeypatch, smi, cuda, mps, level, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(installation.shutil, "which", lambda name: "/bin/nvidia-smi" if smi else None)
    (found,) = installation.check_gpu()
    assert found.level == level
    assert text in str(found)


def test_a_gpu_that_does_not_work(monkeypatch):
    """Told by the driver's error; there is no GPU here to see the other line with."""

    def broken(index):
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    (found,) = installation.check_gpu()
    assert found.level == PROBLEM
    assert "GPU 0: Testor 9000 cannot be used (CUDA error: out of memory Compile" in str(found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_a_gpu():
    first = next(iter(installation.check_gpu()))
    assert first.level == OK
    assert "--gpu-memory" in first.fix
