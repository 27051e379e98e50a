"""Jobs on a Dask cluster that there is."""

from __future__ import annotations

import time

import pytest

from nnunet_h2a.crossval.command import main
from nnunet_h2a.crossval.jobs import FINISHED, progress_of
from nnunet_h2a.crossval.run_job import BUSY
from nnunet_h2a.crossval.schedule import run_all
from nnunet_h2a.crossval.slots import DaskPlaces
from tests.crossval.test_jobs import SETTINGS, jobs


def test_workers_score_what_is_not_scored(predicted, dataset, tmp_path, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    predicted("nnUNetTrainer", 0)
    arguments = ["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu"]
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        assert main([*arguments, "--dask", cluster.scheduler_address]) == 0
        workers = set(cluster.scheduler_info["workers"])
    printed = capsys.readouterr().out
    assert any(f"on {worker}" in printed for worker in workers)
    assert [progress_of(job, ".nii.gz", False).stage for job in jobs(dataset, tmp_path)] == [FINISHED, FINISHED]
    monkeypatch.setattr("nnunet_h2a.crossval.slots._DASK_TIMEOUT", 2)
    assert main([*arguments, "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler with a worker answers there" in capsys.readouterr().err


@pytest.mark.full
def test_workers_that_come_and_a_scheduler_that_goes(dataset, tmp_path, monkeypatch):
    """A job begins again where its cluster has gone, and nothing ends in a traceback."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    job = jobs(dataset, tmp_path)[0]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        places = DaskPlaces(cluster.scheduler_address, SETTINGS)
        (slot,) = places.newcomers([])
        cluster.scale(2)
        deadline = time.monotonic() + 30
        while not (others := places.newcomers([slot.name])) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(others) == 1
        monkeypatch.setattr("nnunet_h2a.crossval.slots.run_job", asleep)
        slot.start(job, 0)
        assert slot.poll() is None
        assert slot.is_there()
    deadline = time.monotonic() + 60
    while places.newcomers([]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not slot.is_there()
    assert slot.poll() == BUSY
    slot.stop()


def test_the_reason_of_a_worker_that_cannot_begin(dataset, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    job = jobs(dataset, tmp_path)[0]
    monkeypatch.setattr("nnunet_h2a.crossval.slots.run_job", broken)
    with distributed.LocalCluster(
        n_workers=1, processes=False, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        places = DaskPlaces(cluster.scheduler_address, SETTINGS)
        failed = run_all([job], places, SETTINGS, lambda *shown: None)
    assert list(failed) == [job]
    assert "ModuleNotFoundError" in failed[job]
    assert "no such package" in failed[job]


def asleep(*arguments):
    time.sleep(600)


def broken(*arguments):
    raise ModuleNotFoundError("no such package")
