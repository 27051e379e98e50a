"""The phantom's plans."""

from __future__ import annotations

import pytest


@pytest.fixture
def preprocessed(workspace, tmp_path, monkeypatch):
    """A copy of the phantom's plans that a test may spoil."""
    folder = tmp_path / "nnUNet_preprocessed" / workspace.dataset
    folder.mkdir(parents=True)
    for name in ("nnUNetPlans.json", "dataset.json"):
        (folder / name).write_bytes((workspace.preprocessed / name).read_bytes())
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder
