"""The fusion benchmark: its cases need both modalities, and a run goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from scipy.stats import t as students_t

from tests.conftest import CPU_ENVIRONMENT, ROOT, clean_environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import fusion
import fusion_cases


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_one_modality_does_not_tell_lesions():
    cases = [fusion_cases.make_case(seed) for seed in range(12)]
    both, pet_alone, ct_alone = [], [], []
    for ct, pet, truth in cases:
        hot, dense, truth = gaussian_filter(pet, 0.5) > 1.6, gaussian_filter(ct, 0.7) > -50, truth > 0
        both.append(dice(hot & dense, truth))
        pet_alone.append(dice(hot, truth))
        ct_alone.append(dice(dense, truth))
        assert fusion_cases.LESIONS[0] - 1 <= label(truth, np.ones((3, 3, 3)))[1] <= fusion_cases.LESIONS[1]
    assert np.mean(both) > 0.75
    assert np.mean(pet_alone) < 0.35
    assert np.mean(ct_alone) < 0.5


def test_decoys_look_like_lesions():
    """Uptake within lesions and within what is hot elsewhere come from one distribution."""
    inside, outside = [], []
    for seed in range(30):
        _, pet, truth = fusion_cases.make_case(seed)
        blobs, count = label(gaussian_filter(pet, 0.5) > 2.3, np.ones((3, 3, 3)))
        for number in range(1, count + 1):
            blob = blobs == number
            if blob.sum() > 12:
                (inside if (blob & (truth > 0)).any() else outside).append(pet[blob].max())
    assert 1.7 < len(outside) / len(inside) < 2.3
    assert abs(np.mean(inside) - np.mean(outside)) < 0.3


def test_a_case_is_always_the_same():
    for one, other in zip(fusion_cases.make_case(3), fusion_cases.make_case(3), strict=True):
        assert np.array_equal(one, other)


def test_interval_is_students():
    values = [0.5, 0.6, 0.65]
    low, high = students_t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / np.sqrt(3))
    assert fusion.interval(values) == f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"
    assert fusion.interval([0.5]) == "0.500 (1 seed)"


PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import fusion
fusion.SIZES["small"] = fusion.Size(3, 1, (16, 16, 16), 2, 1, 2, (2, 4, 4), (4, 4, 4, 4))
fusion.main()
"""


def run_benchmark(tmp_path, *arguments, timeout=None):
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "benchmarks"), "--size", "small", "--work",
               str(tmp_path / "work"), "--results", str(tmp_path / "results"), *arguments]  # fmt: skip
    environment = clean_environment() | CPU_ENVIRONMENT | {"nnUNet_n_proc_DA": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.full
@pytest.mark.parametrize("rows", [("H2ASeg/PET",), fusion.ROWS])
def test_it_trains_tells_what_is_done_and_goes_on(tmp_path, rows):
    document = tmp_path / "fusion.md"
    document.write_text("before\n<!-- fusion small: begin -->\nold\n<!-- fusion small: end -->\nafter\n")
    first = run_benchmark(tmp_path, "--seeds", "0", "--only", *rows, "--table", str(document))
    assert first.returncode == 0, first.stderr[-3000:]
    results = sorted((tmp_path / "results" / "small").glob("*.json"))
    assert len(results) == len(list(fusion.jobs([0], list(rows))))
    for path in results:
        content = json.loads(path.read_text())
        assert list(content["dice"]) == ["case_003"]
        assert 0 <= content["dice"]["case_003"] <= 1
        assert content["parameters"] > 100
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert ("not done" in text) == (rows != fusion.ROWS)
    # What is finished stays, what is half written is done again.
    before = {path: path.stat().st_mtime_ns for path in results}
    os.replace(results[0], results[0].with_suffix(".part"))
    again = run_benchmark(tmp_path, "--seeds", "0", "--only", *rows)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("seed 0\n") == 1
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path != results[0])
    assert results[0].exists()


def test_a_document_without_a_place_for_the_table(tmp_path):
    (tmp_path / "x.md").write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        fusion.write_table(tmp_path / "x.md", "small", "table")
