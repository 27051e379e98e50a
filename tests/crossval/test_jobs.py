"""What is still to be done, as it is read from nnU-Net's files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_h2a.command import CommandError
from nnunet_h2a.crossval.command import _jobs as jobs_of
from nnunet_h2a.crossval.command import build_parser, main
from nnunet_h2a.crossval.jobs import FINISHED, SCORING, TRAINING, VALIDATING, WAITING, check_first_stages, progress_of
from nnunet_h2a.crossval.run_job import BUSY, Settings, _held, is_busy, next_command, reason, run_job
from nnunet_h2a.crossval.schedule import Table, duration, run_all, seconds_left
from tests.crossval.conftest import CASES, DATASET, write_checkpoint

SETTINGS = Settings("cpu", False, ".nii.gz")


def jobs(dataset, tmp_path, *more):
    arguments = build_parser().parse_args(["-d", "801", "-c", "3d_fullres", "-f", "0", "1", *more])
    return jobs_of(arguments, dataset, tmp_path / "nnUNet_results")[1]


def test_jobs_of_all_folds_trainers_and_plans(dataset, tmp_path):
    found = jobs(dataset, tmp_path, "-tr", "nnUNetTrainer", "nnUNetTrainerH2ASeg")
    assert [(job.trainer, job.fold) for job in found] == [
        ("nnUNetTrainer", "0"), ("nnUNetTrainerH2ASeg", "0"), ("nnUNetTrainer", "1"), ("nnUNetTrainerH2ASeg", "1")
    ]  # fmt: skip
    assert (
        found[0].folder == tmp_path / "nnUNet_results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    )
    assert found[2].cases == ("case_2", "case_3")
    (dataset / "Other.json").write_text((dataset / "nnUNetPlans.json").read_text())
    found = jobs(dataset, tmp_path, "-tr", "A", "B", "-p", "nnUNetPlans", "Other")
    assert {(job.trainer, job.plans) for job in found} == {("A", "nnUNetPlans"), ("B", "Other")}
    assert jobs(dataset, tmp_path, "-f", "all")[0].cases == tuple(CASES)


def test_the_first_stage_of_a_cascade_comes_first(dataset, tmp_path):
    found = jobs(dataset, tmp_path, "-c", "3d_cascade_fullres", "3d_lowres")
    assert {job.after for job in found} == {None, "nnUNetTrainer__nnUNetPlans__3d_lowres"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["-f", "5"], "-f 5: "),
        (["-f", "x"], "-f x: "),
        (["-c", "3d_x"], "no configuration 3d_x; they have 3d_fullres"),
        (["-c", "2d"], "holds no cases: run  nnUNetv2_preprocess -d 801"),
        (["-p", "A", "B", "C", "-tr", "X", "Y"], "3 for 2"),
        (["-p", "A"], "has no plans A"),
    ],
)
def test_bad_arguments(dataset, tmp_path, more, text):
    with pytest.raises(CommandError, match=text):
        jobs(dataset, tmp_path, *more)


def test_missing_folds_are_those_that_nnunet_would_make(dataset, tmp_path):
    (dataset / "splits_final.json").unlink()
    for number in range(4, 7):
        (dataset / "nnUNetPlans_3d_fullres" / f"case_{number}.pkl").touch()
    jobs(dataset, tmp_path)
    expected = generate_crossval_split(sorted(np.array([f"case_{n}" for n in range(7)])))
    assert json.loads((dataset / "splits_final.json").read_text()) == json.loads(json.dumps(expected))


def test_few_cases_without_folds(dataset, tmp_path):
    """nnU-Net divides no fewer than five; for all of them it needs no folds."""
    (dataset / "splits_final.json").unlink()
    with pytest.raises(CommandError, match=r"has 4 cases and no splits_final\.json"):
        jobs(dataset, tmp_path)
    assert [job.fold for job in jobs(dataset, tmp_path, "-f", "all")] == ["all"]
    assert not (dataset / "splits_final.json").exists()


def test_a_fold_has_one_name(dataset, tmp_path):
    assert [job.fold for job in jobs(dataset, tmp_path, "-f", "01", "1", "00")] == ["1", "0"]
    with pytest.raises(CommandError, match="-f ²: "):
        jobs(dataset, tmp_path, "-f", "²")


def test_a_cascade_needs_its_first_stage_of_every_case(dataset, tmp_path):
    def check(*arguments):
        check_first_stages(jobs(dataset, tmp_path, *arguments), ".nii.gz", False)

    cascade, alone = ["-c", "3d_lowres", "3d_cascade_fullres"], ["-c", "3d_cascade_fullres", "-f", "0"]
    check(*cascade)
    check(*cascade, "-f", "all")
    with pytest.raises(CommandError, match=r"fold 0: of 4 cases 2 \(case_2, …\) have no prediction of .*and all folds"):
        check(*cascade, "-f", "0")
    with pytest.raises(CommandError, match=r"fold 0: of 4 cases 4 .*add 3d_lowres to -c"):
        check(*alone)
    # A fold that has validated before, without a prediction for the second stage, will not write one.
    (job,) = jobs(dataset, tmp_path, "-c", "3d_lowres", "-f", "1")
    finish(job)
    with pytest.raises(CommandError, match=r"fold 0: of 4 cases 2 \(case_2, …\).* finished need .*--val  once more"):
        check(*cascade)
    predicted = job.model_folder / "predicted_next_stage" / "3d_cascade_fullres"
    predicted.mkdir(parents=True)
    for case, ending in zip(CASES[2:], ("npz", "b2nd"), strict=True):
        (predicted / f"{case}.{ending}").touch()
    check(*cascade)
    # What is finished needs nothing more.
    shutil.rmtree(predicted)
    (job,) = jobs(dataset, tmp_path, *alone)
    finish(job)
    check(*alone)


def test_a_script_for_a_second_stage_before_its_first_has_run(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_h2a.crossval.command._ask", lambda *asked: {"missing": []})
    command = ["-d", "801", "-device", "cpu", "-c", "3d_cascade_fullres"]
    assert main([*command, "-f", "0", "1", "--slurm", str(tmp_path / "x.sh")]) == 0
    assert main([*command, "3d_lowres", "-f", "0", "1", "--slurm", str(tmp_path / "y.sh")]) == 2
    assert "write a script for each configuration" in capsys.readouterr().err
    assert main([*command, "-f", "0", "1", "--job", "0"]) == 2
    assert "have no prediction of nnUNetTrainer__nnUNetPlans__3d_lowres" in capsys.readouterr().err


def finish(job):
    """A fold that has trained and validated."""
    job.validation.mkdir(parents=True)
    write_checkpoint(job.folder / "checkpoint_final.pth")
    for case in job.cases:
        (job.validation / f"{case}.nii.gz").touch()
    job.summary.write_text("{}")


def test_what_comes_next(dataset, tmp_path):
    job = jobs(dataset, tmp_path)[0]
    assert progress_of(job, ".nii.gz", False).stage == WAITING
    step = next_command(job, SETTINGS)
    assert step[1:4] == [DATASET, "3d_fullres", "0"]
    assert step[-1] == "--c"
    job.folder.mkdir(parents=True)
    (job.folder / "training_log_1.txt").write_text(
        "2026-01-01 10:00:00: Epoch 0\nEpoch time: 9.0 s\nEpoch 1\nEpoch time: 2.5 s\nEpoch 2 \nEpoch time: 2.0 s\n"
        "Epoch 3\n"
    )
    progress = progress_of(job, ".nii.gz", False)
    assert (progress.stage, progress.epoch, progress.epoch_seconds) == (TRAINING, 3, 2.5)
    write_checkpoint(job.folder / "checkpoint_final.pth")
    assert progress_of(job, ".nii.gz", False).stage == VALIDATING
    assert next_command(job, SETTINGS)[-1] == "--val"
    job.validation.mkdir()
    for case in job.cases:
        (job.validation / f"{case}.nii.gz").touch()
    assert next_command(job, SETTINGS)[-1] == "--val"
    (job.validation / "summary.json").write_text("{}")
    assert progress_of(job, ".nii.gz", False).stage == SCORING
    # Probabilities that were not kept are made again where they are wanted.
    assert next_command(job, Settings("cpu", True, ".nii.gz"))[-2:] == ["--npz", "--val"]
    step = next_command(job, SETTINGS)
    assert step[0].endswith("h2a_evaluate")
    job.scores.parent.mkdir()
    # Scores of one convention are not those of all.
    job.scores.with_name("summary_autopet.json").touch()
    assert progress_of(job, ".nii.gz", False).stage == SCORING
    job.scored.write_text("measures of version 0\n")
    assert progress_of(job, ".nii.gz", False).stage == SCORING
    job.note_scored()
    assert progress_of(job, ".nii.gz", False).stage == FINISHED
    # True labels that were corrected since; those of another fold do not matter.
    os.utime(dataset / "gt_segmentations" / "case_3.nii.gz", (1e9, 1e9))
    assert progress_of(job, ".nii.gz", False).stage == FINISHED
    os.utime(dataset / "gt_segmentations" / "case_0.nii.gz", (time.time() + 3600,) * 2)
    assert progress_of(job, ".nii.gz", False).stage == SCORING
    # Their clock was ahead.
    job.note_scored()
    assert progress_of(job, ".nii.gz", False).stage == FINISHED
    assert next_command(job, SETTINGS) is None
    # A validation that was repeated since is scored anew.
    later = time.time() + 10
    os.utime(job.summary, (later, later))
    assert progress_of(job, ".nii.gz", False).stage == SCORING
    # One of a network that was trained again since does not count.
    os.utime(job.folder / "checkpoint_final.pth", (later + 10, later + 10))
    assert progress_of(job, ".nii.gz", False).stage == VALIDATING


def test_checkpoints_that_were_cut_off(dataset, tmp_path, monkeypatch):
    """A kill while nnU-Net saves: the last whole checkpoint is what --c must find."""
    job = jobs(dataset, tmp_path)[0]
    job.folder.mkdir(parents=True)
    for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):
        write_checkpoint(job.folder / name)
    final = job.folder / "checkpoint_final.pth"
    final.write_bytes(final.read_bytes()[:500])
    assert not job.is_trained()
    steps = iter([[sys.executable, "-c", "", "--c"], None])
    monkeypatch.setattr("nnunet_h2a.crossval.run_job.next_command", lambda job, settings: next(steps))
    assert run_job(job, SETTINGS, {}) == 0
    assert sorted(path.name for path in job.folder.iterdir()) == [
        "checkpoint_best.pth", "checkpoint_final.pth.damaged", "checkpoint_latest.pth",
    ]  # fmt: skip
    assert "was cut off while it was written" in job.log.read_text()


def test_a_repeated_validation_leaves_no_summary_of_the_earlier_one(dataset, tmp_path, monkeypatch):
    job = jobs(dataset, tmp_path)[0]
    job.validation.mkdir(parents=True)
    job.summary.touch()
    steps = iter([[sys.executable, "-c", "", "--val"], None])
    monkeypatch.setattr("nnunet_h2a.crossval.run_job.next_command", lambda job, settings: next(steps))
    assert run_job(job, SETTINGS, {}) == 0
    assert not job.summary.exists()


def test_cases_without_a_score_are_a_failure_every_time(predicted, dataset, tmp_path):
    predicted("nnUNetTrainer", 0)
    job = jobs(dataset, tmp_path)[0]
    (job.validation / "case_0.nii.gz").write_bytes(b"no image")
    for _ in range(2):
        assert run_job(job, SETTINGS, {}) == 1
        assert progress_of(job, ".nii.gz", False).stage == SCORING
    assert "case_0.nii.gz" in reason(job)


def test_scores_of_a_finished_fold(predicted, dataset, tmp_path):
    predicted("nnUNetTrainer", 0)
    assert main(["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu", "--job", "1"]) == 0
    job = jobs(dataset, tmp_path)[1]
    found = json.loads(job.scores.with_name("summary_hecktor.json").read_text())
    assert found["aggregated_dice"] == {"1": 1.0}
    assert {entry["case"] for entry in found["cases"]} == {"case_2", "case_3"}
    assert run_job(job, SETTINGS, {}) == 0


def test_a_command_that_fails_or_does_nothing(dataset, tmp_path, monkeypatch):
    job = jobs(dataset, tmp_path)[0]
    program = [sys.executable, "-c", "print('ValueError: no such thing'); raise SystemExit(3)"]
    monkeypatch.setattr("nnunet_h2a.crossval.run_job.next_command", lambda job, settings: program)
    assert run_job(job, SETTINGS, {}) == 3
    assert "ValueError: no such thing" in job.log.read_text()
    monkeypatch.setattr("nnunet_h2a.crossval.run_job.next_command", lambda job, settings: [sys.executable, "-c", ""])
    assert run_job(job, SETTINGS, {}) == 1
    assert "is not there" in job.log.read_text()
    # The reason is what the last command said, and no earlier one.
    monkeypatch.setattr(
        "nnunet_h2a.crossval.run_job.next_command",
        lambda job, settings: [sys.executable, "-c", f"print('Killed'); raise SystemExit({BUSY})"],
    )
    assert run_job(job, SETTINGS, {}) == 1
    assert reason(job) == "Killed"


def test_children_that_a_killed_command_leaves_behind_are_ended(dataset, tmp_path, monkeypatch):
    """As nnU-Net's augmentation workers, which wait for ever and hold the lock."""
    job = jobs(dataset, tmp_path)[0]
    note = tmp_path / "worker"
    program = (
        "import os, signal, time\n"
        "if os.fork() == 0:\n"
        f"    open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(
        "nnunet_h2a.crossval.run_job.next_command", lambda job, settings: [sys.executable, "-c", program]
    )
    assert run_job(job, SETTINGS, {}) == -signal.SIGKILL
    wait_for(lambda: not alive(int(note.read_text())))
    assert not is_busy(job)


def test_orphans_of_a_run_that_was_killed_with_its_command(dataset, tmp_path):
    job = jobs(dataset, tmp_path)[0]
    note = tmp_path / "worker"
    command = (
        f"import os, time\nif os.fork() == 0:\n    open({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", runner(job, command)]) as process:
        wait_for(lambda: note.is_file() and note.read_text())
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        process.kill()
        process.wait()
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    worker = int(note.read_text())
    assert alive(worker)
    assert is_busy(job)
    with _held(job.lock, patience=5) as lock:
        assert lock is not None
    wait_for(lambda: not alive(worker))


def alive(process):
    """Whether a process lives; what is dead and not yet collected does not."""
    try:
        return open(f"/proc/{process}/stat").read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runner(job, command):
    """A program that runs one command for a job."""
    return (
        "from nnunet_h2a.crossval import run_job as r; from pathlib import Path; import sys\n"
        f"r.next_command = lambda job, settings: [sys.executable, '-c', {command!r}]\n"
        f"class J: lock = Path({str(job.lock)!r}); log = Path({str(job.log)!r})\n"
        "r.run_job(J, None, {})"
    )


def test_two_runs_do_not_work_on_one_job(dataset, tmp_path):
    """The lock is held by what was started, also after the process that started it was killed."""
    job = jobs(dataset, tmp_path)[0]
    assert not is_busy(job)
    with subprocess.Popen([sys.executable, "-c", runner(job, "import time; time.sleep(60)")]) as process:
        for _ in range(300):
            if job.log.is_file() and is_busy(job):
                break
            time.sleep(0.1)
        assert is_busy(job)
        assert run_job(job, SETTINGS, {}) == BUSY
        child = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        process.kill()
        process.wait()
        assert is_busy(job)
        subprocess.run(["kill", "-9", *child], check=True)
        for _ in range(100):
            if not is_busy(job):
                break
            time.sleep(0.1)
    assert not is_busy(job)


class FakeSlot:
    """A place whose jobs take a few looks; it notes what ran when."""

    def __init__(self, name, codes, finish, notes):
        self.name, self.codes, self.finish, self.notes = name, codes, finish, notes
        self.left = 0

    def start(self, job, number):
        self.job, self.left = job, 2
        self.notes.append((self.name, job.model, job.fold))

    def poll(self):
        self.left -= 1
        if self.left:
            return None
        code = self.codes.get((self.job.trainer, self.job.fold), 0)
        if code == 0:
            self.finish(self.job)
        return code.pop() if isinstance(code, list) else code

    def is_there(self):
        return True

    def stop(self):
        self.notes.append((self.name, "stopped"))

    def join(self):
        self.notes.append((self.name, "ended"))


class FakePlaces:
    """Slots that come one after the other, one at each look."""

    def __init__(self, *slots):
        self.slots = slots

    def newcomers(self, known):
        return [slot for slot in self.slots if slot.name not in known][:1]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("nnunet_h2a.crossval.schedule.LOOK", 0.0)
    monkeypatch.setattr("nnunet_h2a.crossval.schedule.ASK_AGAIN", 0.0)


@pytest.mark.usefixtures("quick")
def test_all_jobs_run_once_on_two_places_and_a_failure_stops_nothing_else(dataset, tmp_path):
    found = jobs(dataset, tmp_path, "-tr", "A", "B", "C")
    notes, shown = [], []
    codes = {("B", "0"): 1, ("C", "0"): [0, BUSY]}
    slots = [FakeSlot(name, codes, lambda job: None, notes) for name in ("one", "two")]
    failed = run_all(found, FakePlaces(*slots), SETTINGS, lambda progress, where, number: shown.append(dict(progress)))
    assert [(job.trainer, job.fold) for job in failed] == [("B", "0")]
    started = [note[1:] for note in notes]
    assert len(started) == 7
    assert started.count(("C__nnUNetPlans__3d_fullres", "0")) == 2
    assert {name for name, *_ in notes} == {"one", "two"}
    assert [state.stage for state in shown[-1].values()] == [
        "finished", "failed", "finished", "finished", "finished", "finished",
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_cascade_waits_for_all_folds_of_its_first_stage(dataset, tmp_path):
    found = jobs(dataset, tmp_path, "-c", "3d_cascade_fullres", "3d_lowres")
    notes = []
    slots = [FakeSlot(name, {}, lambda job: None, notes) for name in ("one", "two", "three")]
    assert run_all(found, FakePlaces(*slots), SETTINGS, lambda *shown: None) == {}
    assert [model.rpartition("__")[2] for _, model, _ in notes] == ["3d_lowres"] * 2 + ["3d_cascade_fullres"] * 2
    slots = [FakeSlot("one", {("nnUNetTrainer", "0"): 1}, lambda job: None, notes)]
    failed = run_all(found, FakePlaces(*slots), SETTINGS, lambda *shown: None)
    assert len(failed) == 3
    assert any("waits for nnUNetTrainer__nnUNetPlans__3d_lowres, which failed" in why for why in failed.values())


@pytest.mark.usefixtures("quick")
def test_what_runs_is_stopped_with_us(dataset, tmp_path):
    notes = []

    def interrupted(progress, where, number):
        if number == 2 and len(where) == 2:
            raise KeyboardInterrupt

    places = FakePlaces(*(FakeSlot(name, {}, None, notes) for name in ("one", "two")))
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs(dataset, tmp_path), places, SETTINGS, interrupted)
    # All are asked before one is waited for.
    assert notes[-4:] == [(name, what) for what in ("stopped", "ended") for name in ("one", "two")]


@pytest.mark.usefixtures("quick")
def test_without_any_place_it_ends_after_a_while(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_h2a.crossval.schedule.ALONE", 0.2)
    with pytest.raises(CommandError, match="no worker is left"):
        run_all(jobs(dataset, tmp_path), FakePlaces(), SETTINGS, lambda *shown: None)


def test_a_job_says_why_it_does_nothing(dataset, tmp_path, capsys, monkeypatch):
    """What a SLURM task leaves in its output."""
    monkeypatch.setattr(
        "nnunet_h2a.crossval.run_job.next_command",
        lambda job, settings: [sys.executable, "-c", "raise SystemExit('Error: no luck')"],
    )
    arguments = ["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu", "--job", "1"]
    assert main(arguments) == 1
    assert "failed: nnUNetTrainer__nnUNetPlans__3d_fullres fold 1: Error: no luck" in capsys.readouterr().err
    job = jobs(dataset, tmp_path)[1]
    with _held(job.lock) as held:
        assert held is not None
        assert main(arguments) == BUSY
    assert "nnUNetTrainer__nnUNetPlans__3d_fullres fold 1: another run works on it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.full) for name in ("SIGHUP", "SIGINT"))]
)
def test_a_signal_ends_the_command_and_its_children(dataset, tmp_path, name):
    script = (
        "import sys; from nnunet_h2a.crossval import command, run_job, slots\n"
        "command._ask = lambda *a: {'missing': [], 'gpus': 0, 'epochs': [None]}\n"
        "run_job.next_command = lambda job, settings: [sys.executable, '-c', 'import time; time.sleep(97)']\n"
        "if '--job' not in sys.argv: command.command = lambda name: __file__\n"
        "sys.exit(command.main())\n"
    )
    program = tmp_path / "h2a_crossval"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    job = jobs(dataset, tmp_path)[0]
    command = [program, "-d", "801", "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (job.log.is_file() and "time.sleep(97)" in job.log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        assert is_busy(job)
        process.send_signal(getattr(signal, name))
        assert process.wait(30) == 130
    assert not is_busy(job)


def test_the_table(dataset, tmp_path):
    from nnunet_h2a.crossval.jobs import Progress

    first, second = jobs(dataset, tmp_path)
    table = Table({first.model: 100})
    lines = table.lines({first: Progress(TRAINING, 40, 90.0), second: Progress(WAITING)}, {first: "GPU 0"}, 1)
    assert lines[1].split("  ")[-1] == "90 min"
    assert "training on GPU 0" in lines[1]
    assert "40/100" in lines[1]
    # What has not begun takes as long per epoch as what runs.
    assert lines[2].endswith("2 h 30 min")
    assert lines[3] == "0 of 2 finished; training left: 4 h 00 min"
    assert seconds_left(Progress(TRAINING, 3, None), 10, None) is None
    assert seconds_left(Progress(FINISHED), 10, None) == 0
    assert [duration(s) for s in (None, 5, 120, 3600 * 30)] == ["?", "5 s", "2 min", "30 h 00 min"]


def test_a_trainer_that_nnunet_does_not_find(dataset, tmp_path, capsys):
    assert main(["-d", "801", "-c", "3d_fullres", "-device", "cpu", "-f", "0", "-tr", "nnUNetTrainer", "Nope"]) == 2
    assert "nnU-Net finds no trainer Nope: see  h2a_doctor -tr NAME" in capsys.readouterr().err


def test_slurm_script_with_relative_folders(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, name)
    monkeypatch.setenv("nnUNet_def_n_proc", "4")
    script = tmp_path / "new folder" / "jobs.sh"
    assert main(["-d", "801", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "--slurm", str(script)]) == 0
    text = script.read_text()
    assert f"export nnUNet_results={tmp_path / 'nnUNet_results'}\n" in text
    assert "export nnUNet_def_n_proc=4\n" in text
    assert os.access(script, os.X_OK)


def test_slurm_script_runs_each_job(predicted, dataset, tmp_path):
    predicted("nnUNetTrainer", 0)
    script = tmp_path / "folder with blanks" / "jobs.sh"
    script.parent.mkdir()
    arguments = ["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu"]
    assert main([*arguments, "--slurm", str(script)]) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text
    assert "gpu" not in text
    assert f"export nnUNet_results={tmp_path / 'nnUNet_results'}\n" in text
    subprocess.run(["bash", str(script)], env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "0"}, check=True)
    assert [progress_of(job, ".nii.gz", False).stage for job in jobs(dataset, tmp_path)] == [FINISHED, SCORING]
    with pytest.raises(SystemExit):
        main([*arguments, "--slurm", str(script), "--dask", "tcp://x"])
