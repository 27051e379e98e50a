"""Who converts, and what comes of it when they are killed, run out of disk, or meet odd file names."""

from __future__ import annotations

import builtins
import errno
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
import SimpleITK as sitk

from dataset_conversion.autopet import main
from tests.conversion.test_autopet import HEXES, image, write_study
from tests.conversion.test_engine import environment, heed_ctrl_c, tree

DATASET = "Dataset630_AutoPET"


def convert(source: Path, *flags: str) -> int:
    return main(["-i", str(source), "-d", "630", *flags])


def command(source: Path, *flags: str) -> list[str]:
    code = "import sys; from dataset_conversion.autopet import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "-i", str(source), "-d", "630", *flags]


@pytest.fixture
def studies(source) -> Path:
    """Twelve studies; CT has to be resampled, so that every case is written and not only copied."""
    for index in range(12):
        write_study(source, f"{index:010d}", CTres=None)
    return source


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None) as made:
        yield made


def test_dask_writes_the_same_bytes(raw, studies, cluster, capfd):
    assert convert(studies, "-np", "1") == 0
    alone = tree(raw / DATASET)
    shutil.rmtree(raw / DATASET)
    path = studies / "FDG-PET-CT-Lesions" / "PETCT_0000000003"
    next(path.rglob("SEG.nii.gz")).write_bytes(b"")
    assert convert(studies, "--dask", cluster.scheduler_address) == 1
    error = capfd.readouterr().err
    assert "refused fdg_0000000003_20030323: " in error
    assert "SEG.nii.gz: is empty" in error
    assert "Traceback" not in error
    done = tree(raw / DATASET)
    different = {"conversion_report.json", "dataset.json", "splits_final.json"}
    assert len(done) == len(alone) - 3
    assert all(alone[name] == mark for name, mark in done.items() if name not in different)


def test_dask_without_a_scheduler(raw, studies, capfd, monkeypatch):
    import dataset_conversion.processes as module

    monkeypatch.setattr(module, "DASK_TIMEOUT", 2)
    assert convert(studies, "--dask", "tcp://127.0.0.1:9") == 2
    error = capfd.readouterr().err
    assert "--dask tcp://127.0.0.1:9: no scheduler answers there; start one: dask scheduler" in error
    assert "Traceback" not in error


def test_dask_workers_that_do_not_see_the_data(cluster, tmp_path):
    from distributed import Client

    from dataset_conversion.errors import UsageError
    from dataset_conversion.processes import _check_cluster

    with Client(cluster) as client, pytest.raises(UsageError, match="cannot use /nowhere/file"):
        _check_cluster(client, "tcp://x", tmp_path, "/nowhere/file")


def kill_at_every_change(folder: Path, source: Path) -> int:
    """Kill a conversion at each of its changes, as killed_runs.py says, and run it again; how many there are."""
    script = Path(__file__).with_name("killed_runs.py")
    killed = subprocess.run(
        [sys.executable, str(script), str(folder), "dataset_conversion.autopet", "-i", str(source), "-d", "630",
         "-np", "1"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr[-2000:]
    return int((folder / "count").read_text())


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_killed_at_every_change_of_the_folder(tmp_path, source):
    """Killed while it makes, writes, moves or removes any of its files, it goes on and ends with the same bytes."""
    for index in range(3):
        write_study(source, f"{index:010d}", CTres=None)
    folder = tmp_path / "runs"
    changes = kill_at_every_change(folder, source)
    assert changes > 20
    expected = tree(folder / "whole" / "nnUNet_raw" / DATASET)
    seen = 0
    for change in range(1, changes + 1):
        raw = folder / str(change) / "nnUNet_raw"
        assert [path.name for path in raw.iterdir()] == [DATASET], change
        assert tree(raw / DATASET) == expected, change
        between = folder / str(change) / "seen"
        if between.exists():
            seen += 1
            assert tree(between) == expected, f"half-written at change {change}"
    assert seen < changes


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_killed_at_every_change_over_an_earlier_dataset(raw, tmp_path, source):
    """Between two renames the folder may be away; what is there is the earlier dataset or the new one, whole."""
    write_study(source, HEXES[0], CTres=None)
    assert convert(source, "-np", "1") == 0
    folder = tmp_path / "runs"
    shutil.copytree(raw, folder / "before")
    old = tree(raw / DATASET)
    write_study(source, HEXES[1], CTres=None)
    changes = kill_at_every_change(folder, source)
    new = tree(folder / "whole" / "nnUNet_raw" / DATASET)
    assert len(new) == len(old) + 3
    for change in range(1, changes + 1):
        place = folder / str(change) / "nnUNet_raw"
        assert [path.name for path in place.iterdir()] == [DATASET], change
        assert tree(place / DATASET) == new, change
        between = folder / str(change) / "seen"
        if between.exists():
            assert tree(between) in (old, new), f"half-written at change {change}"


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX signal")
def test_killed_with_two_processes(raw, studies):
    """The first process is killed when the first file appears, and as more and more are there."""

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command(studies, "-np", "2"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    error = (run := start()).communicate()[1]
    assert run.returncode == 0, error
    expected = tree(raw)
    kills = 0
    for files in (1, 8, 25):
        shutil.rmtree(raw)
        run = start()
        # Unlike rglob, walk does not mind folders that go while it looks.
        while run.poll() is None and sum(len(names) for *_, names in os.walk(raw)) < files:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        kills += run.returncode == -signal.SIGKILL
        assert not (raw / DATASET).exists() or tree(raw / DATASET) == tree_of(expected), "half-written"
        error = (run := start()).communicate()[1]
        assert run.returncode == 0, error
        assert tree(raw) == expected
        assert [path.name for path in raw.iterdir()] == [DATASET]
    assert kills


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_ends_all_processes(raw, source):
    """One Ctrl-C, and an impatient second one: soon over, in one line, and the next run goes on."""
    for index in range(60):
        write_study(source, f"{index:010d}", CTres=None)
    run = subprocess.Popen(
        command(source, "-np", "2"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list(raw.glob(".h2a_*/cases/*")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    for _ in range(2):
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.1)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted; run the same command again to go on" in error
    done = len(list(raw.glob(".h2a_*/cases/*")))
    assert 0 < done < 60
    again = subprocess.run(command(source, "-np", "2"), env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{60 - done} cases converted, {done} kept" in again.stdout


def tree_of(expected: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(f"{DATASET}{os.sep}"): mark for name, mark in expected.items()}


def _limit_file_size() -> None:
    import resource

    # Beyond it writing fails as on a full disk ("File too large"); the signal that comes with it is ignored.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_no_room_stops_the_run(raw, studies, processes):
    """One line, exit code 2, nothing published; with room again, what was finished is kept."""
    noisy = np.random.default_rng(0).random((10, 14, 16), np.float32)
    for hexes in ("0000000005", "0000000006"):
        folder = next((studies / "FDG-PET-CT-Lesions" / f"PETCT_{hexes}").iterdir())
        sitk.WriteImage(image(noisy, (2.0, 2.0, 3.0)), str(folder / "SUV.nii.gz"), useCompression=True)
    run = subprocess.run(
        command(studies, "-np", processes), env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=_limit_file_size,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    lines = [line for line in run.stderr.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "File too large" in lines[0]
    assert "make room and run again: finished cases are kept" in lines[0]
    assert "Traceback" not in run.stderr
    assert not (raw / DATASET).exists()
    assert convert(studies, "-np", "1") == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_really_full_disk(tmp_path, monkeypatch, source, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setenv("nnUNet_raw", str(disk / "raw"))
        values = np.random.default_rng(0).random((10, 14, 16), np.float32)
        for index in range(8):
            write_study(source, f"{index:010d}", SUV=image(values, (2.0, 2.0, 3.0)))
        assert convert(source, "-np", "1") == 2
        error = capfd.readouterr().err
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert not (disk / "raw" / DATASET).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


ODD_NAMES = ["Daten 1", "zwei  Leerzeichen", "Süßwasser ä", "it's", 'a"b', "$HOME", "новый"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_folder_names(raw, tmp_path, name):
    write_study(tmp_path / name, HEXES[0])
    assert convert(tmp_path / name, "-np", "1") == 0
    report = json.loads((raw / DATASET / "conversion_report.json").read_text(encoding="utf-8"))
    assert report["source"].endswith(name)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_no_text(raw, source):
    """Latin-1 umlauts, as archives of other systems have them, on a terminal that knows ASCII only."""
    write_study(source / "x", HEXES[0])
    (source / "x").rename(source / os.fsdecode(b"Klinikum M\xfcnchen"))
    write_study(source, HEXES[1])
    ascii_only = {**environment(), "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command(source, "-np", "1"), env=ascii_only, capture_output=True, check=False)
    assert run.returncode == 1, run.stderr
    assert b"Traceback" not in run.stderr
    assert rb"Klinikum M\udcfcnchen" in run.stderr
    json.loads((raw / DATASET / "conversion_report.json").read_bytes())


def test_links_out_of_the_tree(raw, source, tmp_path):
    """A folder and a file that lie elsewhere are used; a link to nothing refuses its study only; loops end."""
    write_study(tmp_path / "disk2", HEXES[0])
    os.symlink(tmp_path / "disk2", source / "linked")
    study = write_study(source, HEXES[1])
    shutil.move(study / "SUV.nii.gz", tmp_path / "SUV.nii.gz")
    os.symlink(tmp_path / "SUV.nii.gz", study / "SUV.nii.gz")
    broken = write_study(source, HEXES[2])
    (broken / "SEG.nii.gz").unlink()
    os.symlink(tmp_path / "nowhere.nii.gz", broken / "SEG.nii.gz")
    os.symlink(source, source / "loop")
    assert convert(source, "-np", "1") == 1
    report = json.loads((raw / DATASET / "conversion_report.json").read_text())
    assert set(report["cases"]) == {f"fdg_{name}_20030323" for name in HEXES[:2]}
    (refused,) = report["refused"]
    assert refused["file"].endswith("SEG.nii.gz")


@pytest.mark.skipif(os.name == "nt", reason="pipes with names are POSIX")
def test_pipes_do_not_hang(raw, source):
    write_study(source, HEXES[0])
    os.mkfifo(source / "SUV.nii.gz")
    os.mkfifo(source / "x.dcm")
    run = subprocess.run(command(source, "-np", "1"), env=environment(), capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("cases", [None, [], {"X": {}}, "x"])
def test_a_damaged_report(raw, source, capsys, cases):
    write_study(source, HEXES[0])
    assert convert(source, "-np", "1") == 0
    path = raw / DATASET / "conversion_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cases": cases}))
    assert convert(source, "-np", "1") == 2
    assert "conversion_report.json: is damaged; restore it, or delete the dataset's folder" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_nobody_listens(raw, source, streams):
    """Output that cannot be written (a closed pipe, a full disk) changes neither result nor exit code."""
    write_study(source, HEXES[0])
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command(source, "-np", "1"), env=environment(), check=False,
            **{name: full if name in streams else subprocess.DEVNULL for name in ("stdout", "stderr")},
        )  # fmt: skip
    assert run.returncode == 0
    assert (raw / DATASET / "dataset.json").exists()


def test_the_dataset_below_the_source(tmp_path, monkeypatch, source):
    monkeypatch.setenv("nnUNet_raw", str(source / "nnUNet_raw"))
    write_study(source, HEXES[0])
    assert convert(source, "-np", "1") == 0
    assert convert(source, "-np", "1") == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(raw, source, capsys):
    write_study(source, HEXES[0])
    (write_study(source, HEXES[1]) / "SUV.nii.gz").chmod(0)
    assert convert(source, "-np", "1") == 1
    assert "SUV.nii.gz: cannot be opened (Permission denied)" in capsys.readouterr().err


def test_files_that_may_not_be_read(raw, source, capsys, monkeypatch):
    """The same for root, who may read everything: opening fails as it would for another user."""
    write_study(source, HEXES[0])
    path = str(write_study(source, HEXES[1]) / "SUV.nii.gz")
    real = builtins.open

    def guarded(file, *arguments, **options):
        if str(file) == path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    assert convert(source, "-np", "1") == 1
    assert "SUV.nii.gz: cannot be opened (Permission denied)" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own figures of memory")
def test_peak_memory_of_a_conversion(raw, source):
    """At most four times CT and PET as float32 and the label on the output grid, above what Python itself takes."""
    shape = (160, 200, 200)
    generator = np.random.default_rng(1)
    for name in HEXES[:2]:
        write_study(
            source, name, CTres=None, SUV=image(generator.random(shape, np.float32), (2.0, 2.0, 3.0)),
            SEG=image((generator.random(shape) > 0.999).astype(np.uint8), (2.0, 2.0, 3.0)),
        )  # fmt: skip
        folder = next(source.rglob(f"PETCT_{name}/*/SUV.nii.gz")).parent
        ct = image(generator.normal(0, 300, (300, 400, 400)).astype(np.int16), (1.02, 1.02, 1.6))
        sitk.WriteImage(ct, str(folder / "CT.nii.gz"), useCompression=True)
    code = (
        "import sys\n"
        "import dataset_conversion.autopet as a, nibabel, numpy, SimpleITK\n"
        "from dataset_conversion.autopet import main\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print('PEAK', peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "-i", str(source), "-d", "630", "-np", "1"], env=environment(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split("PEAK")[1])
    case = int(np.prod(shape)) * (4 + 4 + 1)
    assert 0.5 * case < peak <= 4 * case, f"{peak / case:.2f} times"


def test_progress_shows_rate_and_remaining_time(raw, studies):
    run = subprocess.run(command(studies, "-np", "1"), env=environment(), capture_output=True, text=True, check=False)
    bar = [part for part in run.stderr.splitlines() if part.startswith("converting")][-1]
    assert "100%" in bar
    assert "cases/s" in bar
    assert "<" in bar
