"""Jobs on a Dask cluster that there is."""

from __future__ import annotations

import pytest

from nnunet_h2a.crossval.command import main
from nnunet_h2a.crossval.jobs import FINISHED, progress_of
from tests.crossval.test_jobs import jobs


def test_workers_score_what_is_not_scored(predicted, dataset, tmp_path, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    predicted("nnUNetTrainer", 0)
    arguments = ["-d", "801", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu"]
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        assert main([*arguments, "--dask", cluster.scheduler_address]) == 0
        workers = set(cluster.scheduler_info["workers"])
    printed = capsys.readouterr().out
    assert any(f"on {worker}" in printed for worker in workers)
    assert [progress_of(job, ".nii.gz", False).stage for job in jobs(dataset, tmp_path)] == [FINISHED, FINISHED]
    monkeypatch.setattr("nnunet_h2a.crossval.slots._DASK_TIMEOUT", 2)
    assert main([*arguments, "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "no scheduler with a worker answers there" in capsys.readouterr().err
