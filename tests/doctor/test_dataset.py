"""h2a_doctor on a dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_h2a.command import CommandError
from nnunet_h2a.doctor import preprocessed as checks
from nnunet_h2a.doctor.dataset import check_dataset
from nnunet_h2a.doctor.finding import NOTE, OK, PROBLEM, WARNING

NAME = "Dataset741_Doctor"
CASES = [f"case_{number}" for number in range(4)]
PATIENTS = {"case_0": "A", "case_1": "A", "case_2": "B", "case_3": "C"}
GOOD = [{"train": CASES[2:], "val": CASES[:2]}, {"train": CASES[:2], "val": CASES[2:]}]


def write_image(path: Path, seed: int, spacing: float = 2.0) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32))
    image.SetSpacing((spacing,) * 3)
    sitk.WriteImage(image, str(path))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A sound dataset: raw, planned and preprocessed."""
    raw, preprocessed = (tmp_path / variable / NAME for variable in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed / "data"):
        folder.mkdir(parents=True)
        monkeypatch.setenv(folder.parents[1].name, str(folder.parents[1]))
    for number, case in enumerate(CASES):
        write_image(raw / "imagesTr" / f"{case}_0000.nii.gz", number)
        write_image(raw / "imagesTr" / f"{case}_0001.nii.gz", 100 + number)
        write_image(raw / "labelsTr" / f"{case}.nii.gz", 200 + number)
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (preprocessed / "data" / f"{case}{ending}").write_bytes(b"voxels")
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    description = {
        "channel_names": {"0": "CT", "1": "noNorm"}, "h2a_modalities": ["CT", "PET"], "file_ending": ".nii.gz",
        "labels": {"background": 0, "tumor": 1}, "numTraining": len(CASES),
    }  # fmt: skip
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(description))
        (folder / "splits_final.json").write_text(json.dumps(GOOD))
    (raw / "conversion_report.json").write_text(
        json.dumps({"cases": {case: {"patient": patient} for case, patient in PATIENTS.items()}})
    )
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps({"shapes_after_crop": [[3, 4, 5]] * len(CASES)}))
    network = {"arch_kwargs": {"ct_channel": 0, "pet_channel": 1}}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps({"configurations": {
        "3d_fullres": {"data_identifier": "data", "architecture": network, "median_image_size_in_voxels": [3, 4, 5]},
    }}))  # fmt: skip
    return raw, preprocessed


def check(level=None, dataset="741", plans="nnUNetPlans", trainer="nnUNetTrainerH2ASeg"):
    return [str(f) for f in check_dataset(dataset, plans, trainer) if level is None or f.level == level]


def test_a_sound_dataset(folders):
    assert {finding.split()[0] for finding in check()} == {OK}
    assert check() == check(dataset=NAME)
    assert any("CT is channel 0 ('CT'), PET is channel 1 ('noNorm')" in line for line in check())
    assert any("2 folds, 3 patients, none on both sides (patients by conversion_report.json)" in x for x in check())


def test_a_dataset_of_another_make(folders):
    """Written by somebody else: cases without patients, every file listed, only nnU-Net's own channel names."""
    raw, _ = folders
    (raw / "conversion_report.json").unlink()
    listed = {
        case: {"images": [f"imagesTr/{case}_{n:04d}.nii.gz" for n in (0, 1)], "label": f"labelsTr/{case}.nii.gz"}
        for case in CASES
    }
    for folder in folders:
        edit(
            folder / "dataset.json", dataset=listed, channel_names={"0": "CT", "1": "PET"}, h2a_modalities=["CT", "PT"]
        )
    notes = check(NOTE)
    assert check(PROBLEM) == check(WARNING) == []
    assert any("whose cases these are is not known" in line for line in notes)
    assert any("PET is z-scored per image" in line for line in notes)


def test_no_such_dataset(folders):
    with pytest.raises(CommandError, match=f"no dataset '742' in nnUNet_raw .*; there are {NAME}"):
        check(dataset="742")
    assert check(dataset=f"{NAME}/") == check()


def test_no_such_dataset_because_nothing_is_set(folders, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    shutil.rmtree(folders[1])
    with pytest.raises(CommandError, match="nnUNet_raw not set, see above"):
        check()


def test_one_number_and_two_names(folders, tmp_path, monkeypatch):
    (tmp_path / "nnUNet_results" / "Dataset741_Old").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    (line,) = check(PROBLEM)
    assert f"number 741 is {NAME}, and " in line
    assert "Dataset741_Old has it too" in line
    (folders[0].parent / "Dataset741_Other").mkdir()
    with pytest.raises(CommandError, match="several datasets"):
        check()


def test_not_planned_yet(folders):
    shutil.rmtree(folders[1])
    assert any("is not planned yet; type: nnUNetv2_plan_and_preprocess -d 741" in line for line in check(NOTE))
    assert check(PROBLEM) == []


def test_preprocessed_alone(folders):
    shutil.rmtree(folders[0])
    assert check(PROBLEM) == []
    assert any("4 cases preprocessed" in line for line in check(OK))
    # Folds are looked at all the same, and leaks by name.
    (folders[1] / "splits_final.json").write_text(json.dumps([{"train": CASES, "val": ["case_3"]}]))
    assert any("fold 0 trains and validates on case_3" in line for line in check(PROBLEM))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "does not exist; run the conversion"),
        ("{", "is damaged"),
        ("{}", "is damaged"),
        ("[]", "is damaged"),
        ('{"labels": {}, "numTraining": "4", "file_ending": ".nii.gz", "channel_names": {}}', "numTraining is '4'"),
    ],
)
def test_description(folders, content, text):
    path = folders[0] / "dataset.json"
    path.unlink() if content is None else path.write_text(content)
    (line,) = check()
    assert text in line


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([], "dataset is a list, not cases by name"),
        ({"case_0": "imagesTr/case_0"}, "case case_0 must have a list 'images' and one 'label'"),
        ({"case_0": {"images": "imagesTr/case_0_0000.nii.gz", "label": "x"}}, "case case_0 must have"),
        ({"case_0": {"images": ["a", "b"]}}, "case case_0 must have"),
        ({"case_0": {"images": ["a"], "label": "x"}}, "case case_0 has 1 images, and there are 2 channels"),
    ],
)
def test_malformed_list_of_cases(folders, entries, text):
    edit(folders[0] / "dataset.json", dataset=entries)
    (line,) = check()
    assert "is damaged" in line
    assert text in line


def test_description_that_has_changed_since_planning(folders):
    edit(folders[0] / "dataset.json", labels={"background": 0, "tumor": 1, "node": 2})
    (line,) = check()
    assert (
        "differ in labels, and nnU-Net trains by the former; type: nnUNetv2_plan_and_preprocess -d 741 --clean" in line
    )


def test_a_damaged_copy_of_the_description(folders):
    (folders[1] / "dataset.json").write_text("[]")
    (line,) = check()
    assert "is damaged" in line


def test_no_copy_of_the_description(folders):
    (folders[1] / "dataset.json").unlink()
    (line,) = check()
    assert "dataset.json does not exist, and training needs it; type: cp " in line


def test_channels_that_are_not_numbered_from_0(folders):
    for folder in folders:
        edit(folder / "dataset.json", channel_names={"1": "CT", "2": "PET"})
    (line,) = check()
    assert "must be numbered from 0, found ['1', '2']" in line


def test_names_and_modalities_that_contradict_each_other(folders):
    for folder in folders:
        edit(folder / "dataset.json", channel_names={"0": "PET", "1": "CT"})
    assert any("the CT channel is named 'PET'" in line for line in check(WARNING))


def test_another_file_ending(folders):
    for folder in folders:
        edit(folder / "dataset.json", file_ending=".nii")
    assert any("no case whose files end with .nii, as dataset.json says" in line for line in check(PROBLEM))


def edit_plan(folder, name, **changes):
    content = json.loads((folder / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_fullres"] |= changes
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_network_of_the_plans(folders):
    network = {"arch_kwargs": {}, "network_class_name": "nnunet_h2a.networks.ISANet"}
    edit_plan(folders[1], "Ours", architecture=network)
    assert any(
        "made for ISANet, and nnUNetTrainerH2ASeg trains H2ASeg; take -tr nnUNetTrainerISANet, or" in line
        for line in check(PROBLEM, plans="Ours")
    )
    assert check(PROBLEM, plans="Ours", trainer="nnUNetTrainerISANet") == check(
        PROBLEM, plans="Ours", trainer="nnUNetTrainer"
    )
    edit_plan(folders[1], "Ours", architecture=network | {"network_class_name": "nnunet_h2a.networks.Nope"})
    assert any("there is no network nnunet_h2a.networks.Nope" in line for line in check(PROBLEM, plans="Ours"))


def test_plans_that_nnunets_planning_has_outdated(folders):
    edit_plan(folders[1], "nnUNetPlans", spacing=[3, 2, 2])
    edit_plan(folders[1], "Ours", spacing=[3, 2, 2])
    assert not [line for line in check(PROBLEM, plans="Ours") if "planned anew" in line]
    edit_plan(folders[1], "nnUNetPlans", spacing=[4, 2, 2])
    assert any("its spacing is not that of" in line and "h2a_plan" in line for line in check(PROBLEM, plans="Ours"))


def test_labels_for_the_validation(folders):
    (folders[1] / "gt_segmentations" / "case_2.nii.gz").unlink()
    assert any("gt_segmentations lacks case_2, and the validation" in line for line in check(PROBLEM))


def test_regions(folders):
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    for folder in folders:
        edit(folder / "dataset.json", labels=regions)
    assert any("has regions and no regions_class_order" in line for line in check(PROBLEM))
    edit(folders[0] / "dataset.json", regions_class_order=[1, 2])
    edit(folders[1] / "dataset.json", regions_class_order=[2, 1])
    assert any("differ in regions_class_order" in line for line in check(PROBLEM))


def test_channels(folders):
    for folder in folders:
        edit(folder / "dataset.json", channel_names={"0": "CT", "1": "MR"}, h2a_modalities=["CT", "MR"])
    assert any("h2a_modalities is ['CT', 'MR']" in line for line in check(PROBLEM))
    for folder in folders:
        edit(folder / "dataset.json", channel_names={"0": "PET"}, h2a_modalities=["PET"])
    assert not [line for line in check(PROBLEM, trainer="nnUNetTrainerISANetPET") if "h2a_modalities" in line]
    assert [line for line in check(PROBLEM) if "nnUNetTrainerISANetPET" in line]
    # With a suffix it is ISANet with PET/CT augmentation.
    assert [line for line in check(PROBLEM, trainer="nnUNetTrainerISANetPETCT") if "needs CT and PET" in line]
    # A trainer that is not ours may take any channels.
    assert not [line for line in check(PROBLEM, trainer="nnUNetTrainer") if "CT and PET" in line]
    assert [line for line in check(NOTE, trainer="nnUNetTrainer") if "not a dataset for our networks" in line]


def test_plans_of_another_channel_order(folders):
    for folder in folders:
        edit(folder / "dataset.json", channel_names={"0": "noNorm", "1": "CT"}, h2a_modalities=["PET", "CT"])
    assert any("3d_fullres: made when CT was channel 0 and PET 1; write" in line for line in check(PROBLEM))


def test_files_that_are_missing(folders):
    (folders[0] / "imagesTr" / "case_1_0001.nii.gz").unlink()
    assert any("1 files are missing (case_1_0001.nii.gz)" in line for line in check(PROBLEM))


def test_a_case_too_many(folders):
    for kind in ("images", "labels"):
        for path in list((folders[0] / f"{kind}Tr").glob("case_0*")):
            write_image(path.with_name(path.name.replace("case_0", "case_9")), hash(path.name) % 1000)
    problems = check(PROBLEM)
    assert any("numTraining is 4, and there are 5 training cases" in line for line in problems)
    assert any("incomplete (case_9)" in line for line in problems)
    assert any("1 cases are in no fold (case_9)" in line for line in check(WARNING))


def test_grids_that_differ(folders):
    write_image(folders[0] / "labelsTr" / "case_2.nii.gz", 1, spacing=2.1)
    assert any("images and labels of 1 cases are on different grids (case_2)" in line for line in check(PROBLEM))


def test_a_file_that_cannot_be_read(folders):
    (folders[0] / "labelsTr" / "case_2.nii.gz").write_bytes(b"nothing")
    assert any("1 cases cannot be read (case_2)" in line for line in check(PROBLEM))


def test_one_image_twice(folders):
    images = folders[0] / "imagesTr"
    shutil.copy(images / "case_0_0000.nii.gz", images / "case_3_0000.nii.gz")
    assert any("case_0, case_3 have the same image" in line for line in check(PROBLEM))


def write_splits(folders, splits, which=(0, 1)):
    for number in which:
        text = splits if isinstance(splits, str) else json.dumps(splits)
        (folders[number] / "splits_final.json").write_text(text)


def test_a_patient_on_both_sides(folders):
    write_splits(folders, [GOOD[0], {"train": ["case_0", "case_2"], "val": ["case_1", "case_3"]}])
    assert any(
        "1 patients are trained and validated on (A; fold 1; patients by conv" in line for line in check(PROBLEM)
    )


def test_a_report_that_does_not_know_all_cases(folders):
    report = {case: {"patient": "A"} for case in CASES[:1]}
    (folders[0] / "conversion_report.json").write_text(json.dumps({"cases": report}))
    assert any("whose cases these are is not known" in line for line in check(NOTE))
    assert not [line for line in check(OK) if "none on both sides" in line]


@pytest.mark.parametrize(
    "names",
    [
        ("fdg_0b57b247b6_05-02-2002-NA", "fdg_0b57b247b6_06-02-2003-NA", "psma_95b833d65be26d2f_2018-04-23",
         "fdg_c2ddb8c2f3_2004-01-01"),
        ("fdg_0b57b247b6_20010713", "fdg_0b57b247b6_20020713", "psma_95b833d65be26d2f_20180423",
         "fdg_c2ddb8c2f3_20040101"),
    ],
    ids=["autoPET's", "our converters'"],
)  # fmt: skip
def test_patients_by_autopets_names(folders, names):
    raw, _ = folders
    names = dict(zip(CASES, names, strict=True))
    (raw / "conversion_report.json").unlink()
    for path in [*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")]:
        path.rename(path.with_name(path.name.replace(path.name[:6], names[path.name[:6]])))
    leaking = [{"train": [names["case_0"], names["case_2"]], "val": [names["case_1"], names["case_3"]]}]
    write_splits(folders, leaking)
    assert any("(fdg_0b57b247b6; fold 0; patients by the cases' names)" in line for line in check(PROBLEM))


@pytest.mark.parametrize(
    ("splits", "level", "text"),
    [
        ("[{", PROBLEM, "is no list of folds"),
        ("{}", PROBLEM, "is no list of folds"),
        ([{"train": CASES}], PROBLEM, "is no list of folds"),
        ([{"train": CASES, "val": ["case_3"]}], PROBLEM, "fold 0 trains and validates on case_3"),
        ([{"train": CASES, "val": CASES}], NOTE, "validates on what it trains on"),
        (
            [{"train": [*CASES[1:], "gone"], "val": ["case_0"]}],
            PROBLEM,
            "names cases that are not in the dataset: gone",
        ),
        ([{"train": CASES, "val": []}], PROBLEM, "fold 0 has an empty side"),
        ([GOOD[0], GOOD[0]], WARNING, "2 cases are validated in several folds (case_0, case_1)"),
    ],
)
def test_folds(folders, splits, level, text):
    write_splits(folders, splits)
    assert any(text in line for line in check(level)), check()


def test_folds_of_an_earlier_conversion(folders):
    write_splits(folders, GOOD[::-1], which=[0])
    assert any("differs from" in line and "nnU-Net trains by the former" in line for line in check(WARNING))


def test_no_folds(folders):
    for folder in folders:
        (folder / "splits_final.json").unlink()
    assert any("nnU-Net will draw folds by case, and 1 patients have several (A)" in line for line in check(PROBLEM))
    report = folders[0] / "conversion_report.json"
    report.write_text(json.dumps({"cases": {case: {"patient": case} for case in CASES}}))
    assert any("no patient has two" in line for line in check(OK))
    report.unlink()
    assert any("whose cases these are is not known" in line for line in check(WARNING))


def test_plans(folders):
    assert any("has no plans Other; it has nnUNetPlans (-p)" in line for line in check(PROBLEM, plans="Other"))
    for content in ("{}", '{"configurations": {"2d": []}}', "[]"):
        (folders[1] / "nnUNetPlans.json").write_text(content)
        assert any("nnUNetPlans.json is damaged (" in line for line in check(PROBLEM))


def test_an_old_fingerprint(folders):
    path = folders[1] / "dataset_fingerprint.json"
    edit(path, shapes_after_crop=[[3, 4, 5]] * 3)
    assert any("is of 3 cases, and the dataset has 4" in line and "--clean" in line for line in check(PROBLEM))
    path.write_text("?")
    assert any("dataset_fingerprint.json is damaged" in line for line in check(PROBLEM))


def test_preprocessed_files(folders, monkeypatch):
    data = folders[1] / "data"
    (data / "case_0.b2nd").unlink()
    command = "type: nnUNetv2_preprocess -d 741 -c 3d_fullres -plans_name nnUNetPlans"
    assert any(f"incomplete (case_0); {command}" in line for line in check(PROBLEM))
    (data / "case_0.b2nd").write_bytes(b"voxels")
    (data / "case_1_seg.b2nd").unlink()
    assert any(f"incomplete (case_1); {command}" in line for line in check(PROBLEM))
    (data / "case_1_seg.b2nd").write_bytes(b"voxels")
    (data / "case_2.b2nd").write_bytes(b"")
    assert any(f"incomplete (case_2.b2nd); {command}" in line for line in check(PROBLEM))
    (data / "case_2.b2nd").write_bytes(b"voxels")
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (data / f"case_7{ending}").write_bytes(b"voxels")
    assert any("case_7 are not in the dataset any more" in line for line in check(WARNING))
    shutil.rmtree(data)
    assert any(
        "3d_fullres is not preprocessed yet (up to 0.0 GiB; " in line and command in line for line in check(NOTE)
    )
    monkeypatch.setattr(checks, "GIB", 1)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("usage", (), {"free": 100}))
    assert any("takes up to 2160.0 GiB, and 100.0 are free" in line for line in check(WARNING))
