"""Channels are found by name, never by position."""

from __future__ import annotations

import pytest

from nnunet_h2a.training.modalities import ChannelError, channel_roles


def dataset(*names, **extra):
    return {"channel_names": {str(i): n for i, n in enumerate(names)}, **extra}


@pytest.mark.parametrize(
    ("dataset_json", "roles"),
    [
        (dataset("CT", "PET"), (0, 1)),
        (dataset("PET", "CT"), (1, 0)),
        (dataset("suv", "CTres"), (1, 0)),
        (dataset(" pt ", "ct"), (1, 0)),
        (dataset("CT", "CT", h2a_modalities=["CT", "PET"]), (0, 1)),
        (dataset("CT", "CT", h2a_modalities=["PET", "CT"]), (1, 0)),
        # h2a_modalities decides even against names that would do.
        (dataset("CT", "PET", h2a_modalities=["PET", "CT"]), (1, 0)),
        (dataset("noNorm", "zscore", h2a_modalities=["PT", "CTres"]), (1, 0)),
        # Keys are numbers, not strings to be sorted.
        ({"channel_names": {"1": "PET", "0": "CT"}}, (0, 1)),
        ({"modality": {"0": "CT", "1": "PET"}}, (0, 1)),
    ],
)
def test_roles(dataset_json, roles):
    assert channel_roles(dataset_json) == roles


@pytest.mark.parametrize("kind", ["CT", "PET"])
def test_one_modality_is_told_of_the_trainer_that_takes_it(kind):
    with pytest.raises(ChannelError, match=rf"is \['{kind}'\].* needs CT and PET.* nnUNetTrainerISANet{kind}$"):
        channel_roles(dataset(kind))


@pytest.mark.parametrize(
    ("dataset_json", "found"),
    [
        (dataset("CT", "PET", "MR"), r"\['CT', 'PET', 'MR'\]"),
        (dataset("CT", "CT"), r"\['CT', 'CT'\]"),
        (dataset("PET", "SUV"), r"\['PET', 'SUV'\]"),
        (dataset("CT", "T1"), r"\['CT', 'T1'\]"),
        (dataset(), r"\[\]"),
        ({"channel_names": {"CT": 0, "PET": 1}}, "name for each channel number"),
        ({"channel_names": ["CT", "PET"]}, "name for each channel number"),
        (dataset("CT", "PET", h2a_modalities=["CT", "CT"]), r"h2a_modalities is \['CT', 'CT'\]"),
        (dataset("CT", "PET", h2a_modalities=["CT"]), "one modality for each of the 2 channels"),
        (dataset("CT", "PET", h2a_modalities="CT,PET"), "'CT,PET'"),
    ],
)
def test_anything_else_says_what_was_found(dataset_json, found):
    with pytest.raises(ChannelError, match=found):
        channel_roles(dataset_json)
    if "h2a_modalities" not in dataset_json and "number" not in found:
        with pytest.raises(ChannelError, match="exactly two image channels, one CT"):
            channel_roles(dataset_json)
