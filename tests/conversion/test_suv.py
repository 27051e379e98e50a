"""SUV factors against closed-form figures, for every row of the decision table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from dataset_conversion.suv import SUVError, SUVWarning, suv_conversion, suvbw_scale_factors
from tests.conversion.data import needs, shared_data
from tests.conversion.synthetic_dicom import DELETE, add_private, pet_header

F18 = 6586.2
FULL = 70_000.0 / 370e6
ONE_HOUR = FULL * 2 ** (3600 / F18)


def beds(*seconds: float, **tags: object) -> list[Dataset]:
    """Slices acquired ``seconds`` after 11:00:00."""
    slices = []
    for offset in seconds:
        clock = 11 * 3600 + offset
        text = f"{int(clock // 3600):02d}{int(clock % 3600 // 60):02d}{clock % 60:09.6f}"
        slices.append(pet_header(AcquisitionTime=text, **tags))
    return slices


def average_time(duration: float, half_life: float = F18) -> float:
    rate = math.log(2) / half_life
    return math.log(rate * duration / (1 - math.exp(-rate * duration))) / rate


@pytest.mark.parametrize(
    "name", ["DRO_0_0", "DRO_1_0", "DRO_2_0", "DRO_2_4", "DRO_3_0", "DRO_3_1", "DRO_4_0", "DRO_5_0"]
)
@needs("suv_dro")
def test_reference_objects(name: str) -> None:
    folder = shared_data() / "suv_dro" / name
    slices = [pydicom.dcmread(path) for path in sorted((folder / "PT").iterdir())]
    slices.sort(key=lambda item: float(item.ImagePositionPatient[2]))
    factors = suv_conversion(slices).factors
    values = np.stack(
        [item.pixel_array * float(item.RescaleSlope) * factor for item, factor in zip(slices, factors, strict=True)]
    )
    inside = values[sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "mask" / "DRO_mask.nii.gz"))) > 0]
    assert [inside.min(), np.median(inside), inside.max()] == pytest.approx([0.20, 1.00, 4.00], abs=0.005)


@needs("sts_raw")
def test_original_sts_001() -> None:
    files = sorted((shared_data() / "sts_raw" / "STS_001" / "FDG_PET" / "image").iterdir())
    conversion = suv_conversion([pydicom.dcmread(path, stop_before_pixels=True) for path in files])
    assert conversion.factors.shape == (267,)
    assert conversion.factors == pytest.approx(2.42903e-4, rel=1e-6)
    assert conversion.warnings == []
    assert "frame-start" in conversion.provenance["decay_factor_check"]


@pytest.mark.parametrize("patient", ["STS_001", "STS_002"])
@needs("sts")
def test_published_sts_is_suv_already(patient: str) -> None:
    files = sorted((shared_data() / "sts" / patient / "PET" / "dicom" / "image").iterdir())
    assert (suvbw_scale_factors([pydicom.dcmread(path) for path in files]) == 1.0).all()


def test_start_and_order_of_slices() -> None:
    factors = suvbw_scale_factors(beds(240, 0, 120))
    assert factors.dtype == np.float64
    assert factors == pytest.approx([ONE_HOUR] * 3, rel=1e-9)


def test_admin_needs_no_times() -> None:
    header = pet_header(
        {"RadiopharmaceuticalStartTime": DELETE, "RadiopharmaceuticalStartDateTime": DELETE},
        DecayCorrection="ADMIN",
        AcquisitionTime=DELETE,
    )
    assert suvbw_scale_factors([header]) == pytest.approx([FULL], rel=1e-12)


def test_no_decay_correction_is_slice_by_slice() -> None:
    slices = beds(0, 600, DecayCorrection="NONE", CorrectedImage=["ATTN", "SCAT"])
    decay = [3600 + average_time(120), 4200 + average_time(120)]
    assert suvbw_scale_factors(slices) == pytest.approx([FULL * 2 ** (t / F18) for t in decay], rel=1e-9)


def test_no_decay_correction_with_long_frame_is_not_its_middle() -> None:
    slices = beds(0, DecayCorrection="NONE", CorrectedImage=["ATTN"], ActualFrameDuration=3_600_000)
    late = average_time(3600)
    assert 1740 < late < 1750
    assert suvbw_scale_factors(slices) == pytest.approx([FULL * 2 ** ((3600 + late) / F18)], rel=1e-9)


def test_late_series_time_uses_ge_private_time() -> None:
    slices = beds(0, 300, SeriesTime="150000", Manufacturer="GE MEDICAL SYSTEMS")
    for header in slices:
        add_private(header, 0x0009, "GEMS_PETD_01", 0x0D, "DT", "20200310105000.00")
    assert suvbw_scale_factors(slices) == pytest.approx([FULL * 2 ** (3000 / F18)] * 2, rel=1e-9)


def test_ge_private_time_without_creator_is_noted() -> None:
    slices = beds(0, SeriesTime="150000")
    add_private(slices[0], 0x0009, None, 0x0D, "DT", "20200310105000.00")
    conversion = suv_conversion(slices)
    assert conversion.factors == pytest.approx([FULL * 2 ** (3000 / F18)], rel=1e-9)
    assert "creator" in conversion.provenance["ge_private_tag"]


def test_private_block_of_another_vendor_is_not_ge_time() -> None:
    slices = beds(0, SeriesTime="150000")
    add_private(slices[0], 0x0009, "SOMEBODY ELSE", 0x0D, "DT", "20200310105000.00")
    assert suv_conversion(slices).factors == pytest.approx([ONE_HOUR], rel=1e-9)


def test_late_series_time_siemens_counts_from_frame_middle() -> None:
    slices = beds(0, 300, SeriesTime="150000")
    for header, start in zip(slices, (60.0, 360.0), strict=True):
        header.FrameReferenceTime = round(1000 * (start + average_time(120)), 3)
    assert suvbw_scale_factors(slices) == pytest.approx([FULL * 2 ** (3540 / F18)] * 2, rel=1e-6)


def test_late_series_time_ge_counts_from_frame_start() -> None:
    slices = beds(0, 300, SeriesTime="150000", Manufacturer="GE MEDICAL SYSTEMS")
    for header, start in zip(slices, (60.0, 360.0), strict=True):
        header.FrameReferenceTime = start * 1000
    assert suvbw_scale_factors(slices) == pytest.approx([FULL * 2 ** (3540 / F18)] * 2, rel=1e-9)


@pytest.mark.parametrize("references", [(0.0, 0.0), (0.0, 243000.0)])
def test_frame_times_that_do_not_agree_leave_the_earliest_acquisition(references: tuple[float, float]) -> None:
    slices = beds(0, 0, SeriesTime="150000")
    for header, reference in zip(slices, references, strict=True):
        header.FrameReferenceTime = reference
    with pytest.warns(SUVWarning, match="SeriesTime"):
        assert suvbw_scale_factors(slices) == pytest.approx([ONE_HOUR] * 2, rel=1e-9)


def test_earliest_acquisition_is_over_all_slices() -> None:
    """The first slice in hand may be of any bed; SeriesTime lies between two beds' times here."""
    slices = beds(1800, 0, 900, SeriesTime="111000")
    with pytest.warns(SUVWarning, match="earliest acquisition"):
        assert suvbw_scale_factors(slices) == pytest.approx([ONE_HOUR] * 3, rel=1e-9)


def test_decay_factor_that_counts_from_elsewhere_is_a_warning() -> None:
    start = average_time(120) + 600
    slices = beds(0, FrameReferenceTime=1000.0 * start, DecayFactor=2 ** (start / F18))
    with pytest.warns(SUVWarning, match="DecayFactor"):
        assert suvbw_scale_factors(slices) == pytest.approx([ONE_HOUR], rel=1e-9)


@pytest.mark.parametrize(
    ("injection", "minutes"),
    [
        ({"RadiopharmaceuticalStartDateTime": DELETE}, 60),
        ({"RadiopharmaceuticalStartTime": DELETE}, 60),
        ({"RadiopharmaceuticalStartTime": "10:15:00", "RadiopharmaceuticalStartDateTime": DELETE}, 45),
        ({"RadiopharmaceuticalStartTime": "1015", "RadiopharmaceuticalStartDateTime": ""}, 45),
        ({"RadiopharmaceuticalStartTime": DELETE, "RadiopharmaceuticalStartDateTime": "20200310100000+0100"}, 60),
        # a date-time that cannot be, beside a time of day that can
        ({"RadiopharmaceuticalStartTime": "103000", "RadiopharmaceuticalStartDateTime": "20200311100000"}, 30),
        ({"RadiopharmaceuticalStartTime": "103000", "RadiopharmaceuticalStartDateTime": "20200310000000"}, 30),
        ({"RadiopharmaceuticalStartTime": "103000", "RadiopharmaceuticalStartDateTime": "20200310"}, 30),
        # date shifted by de-identification, the time of day confirms it
        ({"RadiopharmaceuticalStartDateTime": "20200311100000.00"}, 60),
        ({"RadiopharmaceuticalStartDateTime": "19990102100000"}, 60),
    ],
)
@pytest.mark.filterwarnings("ignore::dataset_conversion.suv.SUVWarning", "ignore:Invalid value for VR")
def test_injection_time(injection: dict, minutes: float) -> None:
    assert suvbw_scale_factors([pet_header(injection)]) == pytest.approx([FULL * 2 ** (minutes * 60 / F18)], rel=1e-9)


def test_shifted_injection_date_warns() -> None:
    with pytest.warns(SUVWarning, match="0018,1078"):
        suvbw_scale_factors([pet_header({"RadiopharmaceuticalStartDateTime": "20200311100000.00"})])


def test_injection_tags_that_differ_warn_with_both() -> None:
    injection = {"RadiopharmaceuticalStartTime": "103000", "RadiopharmaceuticalStartDateTime": "20200311100000"}
    with pytest.warns(SUVWarning, match=r"\(0018,1078\).*\(0018,1072\)"):
        suvbw_scale_factors([pet_header(injection)])


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_injection_date_without_time_says_so() -> None:
    injection = {"RadiopharmaceuticalStartTime": DELETE, "RadiopharmaceuticalStartDateTime": "20200310"}
    with pytest.raises(SUVError, match=r"time of day is missing, and \(0018,1072\) \w+ is missing"):
        suvbw_scale_factors([pet_header(injection)])


@pytest.mark.parametrize("clocks", [("235000", "000500"), ("000500", "001000"), ("235000", "235500")])
def test_beds_after_midnight_without_acquisition_date(clocks: tuple[str, ...]) -> None:
    """The day nearest to the series' start is the one meant; the series date would put beds a day too early."""
    injection = {"RadiopharmaceuticalStartTime": "225000", "RadiopharmaceuticalStartDateTime": DELETE}
    slices = [
        pet_header(injection, SeriesTime="235000", AcquisitionDate=DELETE, AcquisitionTime=clock) for clock in clocks
    ]
    conversion = suv_conversion(slices)
    assert conversion.factors == pytest.approx([ONE_HOUR] * 2, rel=1e-9)
    assert conversion.provenance["reference_time"] == "2020-03-10T23:50:00"
    assert any("AcquisitionDate" in text for text in conversion.warnings)


@pytest.mark.parametrize("with_date", [True, False])
def test_injection_before_midnight(with_date: bool) -> None:
    injection = {
        "RadiopharmaceuticalStartTime": "233000",
        "RadiopharmaceuticalStartDateTime": "20200309233000" if with_date else DELETE,
    }
    header = pet_header(injection, SeriesTime="002000", AcquisitionTime="002000")
    assert suvbw_scale_factors([header]) == pytest.approx([FULL * 2 ** (3000 / F18)], rel=1e-9)


def test_scan_across_midnight() -> None:
    injection = {"RadiopharmaceuticalStartTime": "230000", "RadiopharmaceuticalStartDateTime": DELETE}
    late = pet_header(injection, SeriesTime="235000", AcquisitionTime="235500")
    early = pet_header(injection, SeriesTime="235000", AcquisitionTime="000500", AcquisitionDate="20200311")
    assert suvbw_scale_factors([early, late]) == pytest.approx([FULL * 2 ** (3000 / F18)] * 2, rel=1e-9)


def test_dose_in_mbq_and_weight_in_grams() -> None:
    with pytest.warns(SUVWarning) as caught:
        factors = suvbw_scale_factors([pet_header({"RadionuclideTotalDose": 370.0}, PatientWeight=70000.0)])
    assert factors == pytest.approx([ONE_HOUR], rel=1e-9)
    texts = [str(item.message) for item in caught]
    assert sorted(word for text in texts for word in ("MBq", "grams") if word in text) == ["MBq", "grams"]


def test_every_doubtful_choice_is_in_the_provenance() -> None:
    """Units that were guessed, and any other doubt, are told in the record of the figures as well."""
    doubtful = suv_conversion([pet_header({"RadionuclideTotalDose": 350.0}, PatientWeight=70000.0)])
    assert doubtful.provenance["weight_read_as"] == "g"
    assert doubtful.provenance["dose_read_as"] == "MBq"
    assert doubtful.provenance["doubtful"] == doubtful.warnings
    assert len(doubtful.warnings) >= 2
    plain = suv_conversion([pet_header()]).provenance
    assert not {"doubtful", "weight_read_as", "dose_read_as"} & set(plain)


@pytest.mark.parametrize(
    ("code", "meaning", "half_life"),
    [
        ("C-111A1", "^18^Fluorine", 6586.2),
        ("77004003", "^18^Fluorine", 6586.2),
        ("C-131A3", "^68^Gallium", 67.71 * 60),
        ("C-105A1", "11C", 20.36 * 60),
        ("C-107A1", "13N", 9.965 * 60),
        ("C-B1038", "O-15", 122.24),
        ("C-127A2", "Cu-64", 12.701 * 3600),
        ("C-168A4", "Zr-89", 78.41 * 3600),
        ("C-114A5", "I-124", 4.176 * 86400),
        ("C-159A2", "Rb-82", 75.45),
        ("XX", "Fluorine F^18^", 6586.2),
        ("", "Ga-68", 67.71 * 60),
    ],
)
def test_half_life_from_radionuclide(code: str, meaning: str, half_life: float) -> None:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = code, meaning
    injection = {
        "RadionuclideHalfLife": DELETE,
        "RadionuclideCodeSequence": [item],
        "Radiopharmaceutical": "",
        "RadiopharmaceuticalStartTime": "105800",
        "RadiopharmaceuticalStartDateTime": "20200310105800",
    }
    conversion = suv_conversion([pet_header(injection)])
    assert conversion.factors == pytest.approx([FULL * 2 ** (120 / half_life)], rel=2e-3)
    assert any("RadionuclideHalfLife" in text for text in conversion.warnings)


def test_gml_body_weight_and_unstated() -> None:
    assert suvbw_scale_factors([pet_header(Units="GML", SUVType="BW", PatientWeight=DELETE)]) == pytest.approx([1.0])
    assert suvbw_scale_factors([pet_header(Units="GML")]) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("kind", "sex", "mass"),
    [
        ("LBM", "M", 1.10 * 70 - 120 * (70 / 175) ** 2),
        ("LBM", "F", 1.07 * 70 - 148 * (70 / 175) ** 2),
        ("LBMJAMES128", "M", 1.10 * 70 - 128 * (70 / 175) ** 2),
        ("LBMJANMA", "M", 9270 * 70 / (6680 + 216 * 70 / 1.75**2)),
        ("LBMJANMA", "F", 9270 * 70 / (8780 + 244 * 70 / 1.75**2)),
        ("IBW", "M", 48.0 + 1.06 * 23),
        ("IBW", "F", 45.5 + 0.91 * 23),
        ("IBW", "O", (48.0 + 1.06 * 23 + 45.5 + 0.91 * 23) / 2),
    ],
)
def test_other_normalisations(kind: str, sex: str, mass: float) -> None:
    header = pet_header(Units="GML", SUVType=kind, PatientSex=sex)
    assert suvbw_scale_factors([header]) == pytest.approx([70 / mass], rel=1e-9)


def test_body_surface() -> None:
    surface = 0.007184 * 175**0.725 * 70**0.425
    assert suvbw_scale_factors([pet_header(Units="CM2ML")]) == pytest.approx([7 / surface], rel=1e-9)


@pytest.mark.parametrize("creator", ["Philips PET Private Group", None])
@pytest.mark.parametrize("vr", ["DS", "UN"])
def test_philips_counts(creator: str | None, vr: str) -> None:
    def counts(**factors: str) -> Dataset:
        header = pet_header(Units="CNTS", Manufacturer="Philips")
        for name, value in factors.items():
            raw = value.encode() if vr == "UN" else value
            add_private(header, 0x7053, creator, {"suv": 0x00, "activity": 0x09}[name], vr, raw)
        return header

    assert suvbw_scale_factors([counts(suv="0.0005 ")]) == pytest.approx([0.0005])
    assert suvbw_scale_factors([counts(activity="2.5 ")]) == pytest.approx([2.5 * ONE_HOUR], rel=1e-9)
    assert suvbw_scale_factors([counts(suv="0 ", activity="2.5 ")]) == pytest.approx([2.5 * ONE_HOUR], rel=1e-9)
    with pytest.warns(SUVWarning, match="7053,1009"):
        assert suvbw_scale_factors([counts(suv="0.0005", activity="2.5 ")]) == pytest.approx([0.0005])


@pytest.mark.parametrize(
    ("vr", "creator"),
    [
        ("UN", b"Philips PET Private Group "),
        ("UN", b"Philips PET Private Group\0"),
        ("LO", "PHILIPS PET PRIVATE GROUP"),
        ("LO", " philips pet private group "),
    ],
)
@pytest.mark.parametrize("block", [0x10, 0x12])
def test_private_creator_in_any_form(vr: str, creator: str | bytes, block: int) -> None:
    header = pet_header(Units="CNTS", Manufacturer="Philips")
    header.add_new((0x7053, block), vr, creator)
    header.add_new((0x7053, block << 8), "UN", b"0.0005\0")
    conversion = suv_conversion([header])
    assert conversion.factors == pytest.approx([0.0005])
    assert "philips_private_tag" not in conversion.provenance


REFUSED = {
    "modality": ("0008,0060", {}, {"Modality": "CT"}),
    "no modality": ("0008,0060", {}, {"Modality": DELETE}),
    "enhanced": ("0008,0016", {}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.130"}),
    "legacy enhanced": ("0008,0016", {}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128.1"}),
    "multi-frame": ("0028,0008", {}, {"NumberOfFrames": 40}),
    "intercept": ("0028,1052", {}, {"RescaleIntercept": -3.0}),
    "no units": ("0054,1001", {}, {"Units": DELETE}),
    "units CPS": ("0054,1001", {}, {"Units": "CPS"}),
    "units PROPCPS": ("0054,1001", {}, {"Units": "PROPCPS"}),
    "counts without factors": ("7053,1000", {}, {"Units": "CNTS"}),
    "unknown SUV type": ("0054,1006", {}, {"Units": "GML", "SUVType": "XYZ"}),
    "LBM without height": ("0010,1020", {}, {"Units": "GML", "SUVType": "LBM", "PatientSize": DELETE}),
    "LBM without sex": ("0010,0040", {}, {"Units": "GML", "SUVType": "LBM", "PatientSex": ""}),
    "no attenuation correction": ("0028,0051", {}, {"CorrectedImage": ["DECY", "SCAT"]}),
    "no decay correction": ("0028,0051", {}, {"CorrectedImage": ["ATTN", "SCAT"]}),
    "no corrections": ("0028,0051", {}, {"CorrectedImage": DELETE}),
    "no weight": ("0010,1030", {}, {"PatientWeight": DELETE}),
    "empty weight": ("0010,1030", {}, {"PatientWeight": None}),
    "weight 0": ("0010,1030", {}, {"PatientWeight": 0.0}),
    "weight 0.07": ("0010,1030", {}, {"PatientWeight": 0.07}),
    "no dose": ("0018,1074", {"RadionuclideTotalDose": DELETE}, {}),
    "dose 0": ("0018,1074", {"RadionuclideTotalDose": 0.0}, {}),
    "no radiopharmaceutical": ("0054,0016", {}, {"RadiopharmaceuticalInformationSequence": DELETE}),
    "half-life of another nuclide": ("0018,1075", {"RadionuclideHalfLife": 4062.0}, {}),
    "half-life in minutes": ("0018,1075", {"RadionuclideHalfLife": 109.8}, {}),
    "unknown half-life": (
        "0018,1075",
        {"RadionuclideHalfLife": DELETE, "RadionuclideCodeSequence": DELETE, "Radiopharmaceutical": "X"},
        {},
    ),
    "decay correction": ("0054,1102", {}, {"DecayCorrection": "SOMETIME"}),
    "no decay correction tag": ("0054,1102", {}, {"DecayCorrection": DELETE}),
    "no acquisition time": ("0008,0032", {}, {"AcquisitionTime": DELETE}),
    "no injection time": (
        "0018,1072",
        {"RadiopharmaceuticalStartTime": DELETE, "RadiopharmaceuticalStartDateTime": DELETE},
        {},
    ),
    "injection after the scan": (
        "0018,1072",
        {"RadiopharmaceuticalStartTime": "111500", "RadiopharmaceuticalStartDateTime": DELETE},
        {},
    ),
    "injection 7 h before": (
        "0018,1072",
        {"RadiopharmaceuticalStartTime": "040000", "RadiopharmaceuticalStartDateTime": DELETE},
        {},
    ),
    "injection date unconfirmed": (
        "0018,1078",
        {"RadiopharmaceuticalStartTime": DELETE, "RadiopharmaceuticalStartDateTime": "20200311100000"},
        {},
    ),
    "injection tags contradict": (
        "0018,1078",
        {"RadiopharmaceuticalStartTime": "113000", "RadiopharmaceuticalStartDateTime": "20200311100000"},
        {},
    ),
    "unreadable time": (
        "0018,1072",
        {"RadiopharmaceuticalStartTime": "late", "RadiopharmaceuticalStartDateTime": ""},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_refusals_name_the_tag(name: str) -> None:
    tag, injection, tags = REFUSED[name]
    with pytest.raises(SUVError, match=rf"\({tag}\)"):
        suvbw_scale_factors([pet_header(injection, **tags)])


def test_slices_that_contradict_each_other() -> None:
    with pytest.raises(SUVError, match="0010,1030"):
        suvbw_scale_factors([pet_header(), pet_header(PatientWeight=71.0)])
    with pytest.raises(SUVError, match="0020,000E"):
        suvbw_scale_factors([pet_header(), pet_header(SeriesInstanceUID="1.9")])


@pytest.mark.parametrize("day", ["20191201", "20200309", "20150101"])
def test_series_date_shifted_into_the_past(day: str) -> None:
    """The clock time still says that the series time is the scan's start, 5 minutes before the first bed."""
    with pytest.warns(SUVWarning, match="0008,0021"):
        factors = suvbw_scale_factors(beds(300, 600, SeriesDate=day))
    assert factors == pytest.approx([ONE_HOUR] * 2, rel=1e-9)


@pytest.mark.parametrize(("day", "time"), [("20200311", "090000"), ("20200313", "103000"), ("20200310", "230000")])
def test_series_made_again_later_is_no_reference(day: str, time: str) -> None:
    """Its clock time may be earlier than the scan's; the date says that it is later."""
    with pytest.warns(SUVWarning, match="later than the earliest"):
        factors = suvbw_scale_factors(beds(0, 600, SeriesDate=day, SeriesTime=time))
    assert factors == pytest.approx([ONE_HOUR] * 2, rel=1e-9)


def test_no_slices() -> None:
    with pytest.raises(SUVError, match="no slice"):
        suvbw_scale_factors([])


def test_long_lived_nuclide_imaged_a_day_later() -> None:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = "C-168A4", "^89^Zirconium"
    injection = {
        "RadionuclideHalfLife": 282276.0,
        "RadionuclideCodeSequence": [item],
        "Radiopharmaceutical": "",
        "RadiopharmaceuticalStartDateTime": "20200307100000",
    }
    decay = 3 * 86400 + 3600
    assert suvbw_scale_factors([pet_header(injection)]) == pytest.approx([FULL * 2 ** (decay / 282276.0)], rel=1e-9)


def test_paths_are_not_needed(tmp_path: Path) -> None:
    """Headers read with delayed pixel data convert like those in memory."""
    header = pet_header()
    header.save_as(tmp_path / "a.dcm", implicit_vr=True, little_endian=True)
    read = pydicom.dcmread(tmp_path / "a.dcm", force=True)
    assert suvbw_scale_factors([read]) == pytest.approx([ONE_HOUR], rel=1e-9)
