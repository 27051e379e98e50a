"""Decay reference time and injection time of a PET series (steps 7 to 9 of the SUV decision table).

Both are hard because vendors fill the time tags differently and de-identification shifts dates tag by tag. All times
are naive local datetimes; durations are seconds unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from dataset_conversion._suv_header import (
    SeriesHeaders,
    SUVError,
    parse_date,
    parse_datetime,
    parse_time,
    read_private_text,
    tag_label,
)

MAX_UPTAKE_S = 6 * 3600.0
MAX_UPTAKE_HALF_LIVES = 3.0
MIN_UPTAKE_S = 30 * 60.0
FRAME_TOLERANCE_S = 2.0
CLOCK_TOLERANCE_S = 60.0
DECAY_FACTOR_TOLERANCE = 1e-3
_DAY = timedelta(days=1)


@dataclass
class Notes:
    """What was decided on the way: doubtful choices as sentences, and the figures behind the result."""

    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Keep a doubtful choice."""
        self.warnings.append(text)


def average_decay_time(duration_s: float, half_life_s: float) -> float:
    """Return the time after frame start at which activity equals its average over the frame, in seconds."""
    x = math.log(2.0) * duration_s / half_life_s
    if x < 1e-6:
        return duration_s / 2.0
    return duration_s / x * math.log(x / -math.expm1(-x))


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.2f} h"


def _nearest_day(moment: datetime, anchor: datetime) -> datetime:
    """Return ``moment`` moved by whole days to within 12 h of ``anchor``."""
    return moment - round((moment - anchor) / _DAY) * _DAY


def acquisition_times(headers: SeriesHeaders, notes: Notes) -> list[datetime]:
    """Return the acquisition date-time of every slice, from (0008,0022) + (0008,0032), else (0008,002A).

    Where the acquisition date is missing, the day that brings the time nearest to the series date-time is taken, so
    that beds after midnight come out after it.
    """
    utc_offset = headers.text("TimezoneOffsetFromUTC")
    result = []
    date_assumed = False
    for time, day, moment, series_day, series_time in zip(
        *map(
            headers.texts,
            ("AcquisitionTime", "AcquisitionDate", "AcquisitionDateTime", "SeriesDate", "SeriesTime"),
        ),
        strict=True,
    ):
        if not time and moment:
            result.append(parse_datetime(moment, tag_label("AcquisitionDateTime"), utc_offset))
            continue
        if not time:
            raise SUVError(
                f"{tag_label('AcquisitionTime')} is missing",
                "the decay reference cannot be told without it: restore the tag",
            )
        clock = parse_time(time, tag_label("AcquisitionTime"))
        if day:
            result.append(parse_date(day, tag_label("AcquisitionDate")) + clock)
            continue
        if not series_day:
            raise SUVError(
                f"{tag_label('AcquisitionDate')} and {tag_label('SeriesDate')} are missing", "restore one of the dates"
            )
        date_assumed = True
        midnight = parse_date(series_day, tag_label("SeriesDate"))
        if series_time:
            result.append(_nearest_day(midnight + clock, midnight + parse_time(series_time, tag_label("SeriesTime"))))
        else:
            result.append(midnight + clock)
    if date_assumed:
        notes.warn(f"{tag_label('AcquisitionDate')} is missing; the day nearest to the series date and time was taken")
    if max(result) - min(result) > _DAY / 2 and len({moment.date() for moment in result}) == 1:
        notes.warn(
            "acquisition times of one date lie more than 12 h apart: beds after midnight were moved to the next day"
        )
        result = [moment + _DAY if moment.hour < 12 else moment for moment in result]
    return result


def frame_durations(headers: SeriesHeaders) -> list[float] | None:
    """Return ActualFrameDuration of every slice in seconds, None where any slice lacks it."""
    values = headers.numbers("ActualFrameDuration")
    known = [value / 1000.0 for value in values if value is not None and value > 0]
    return known if len(known) == len(values) else None


def decay_factor_convention(headers: SeriesHeaders, half_life_s: float, notes: Notes) -> str | None:
    """Compare (0054,1321) with (0054,1300) and say which FrameReferenceTime convention it proves.

    Returns:
        "frame-middle" where DecayFactor = 2^(FRT/T), "frame-start" where it is 2^((FRT + T_ave)/T), None where it
        proves neither. The finding goes into the provenance; a filled-in factor that fits neither is a warning.
    """
    factors = [value for value in headers.numbers("DecayFactor") if value is not None]
    references = [value / 1000.0 for value in headers.numbers("FrameReferenceTime") if value is not None]
    if len(factors) < len(headers) or len(references) < len(headers):
        notes.provenance["decay_factor_check"] = "DecayFactor or FrameReferenceTime missing"
        return None
    if all(abs(value - 1.0) < 1e-9 for value in factors):
        notes.provenance["decay_factor_check"] = "DecayFactor is 1 on every slice: not filled in"
        return None
    candidates = {"frame-middle": references}
    durations = frame_durations(headers)
    if durations is not None:
        candidates["frame-start"] = [
            reference + average_decay_time(duration, half_life_s)
            for reference, duration in zip(references, durations, strict=True)
        ]
    deviations = {
        name: max(abs(2.0 ** (moment / half_life_s) / factor - 1.0) if factor > 0 else math.inf
                  for moment, factor in zip(moments, factors, strict=True))
        for name, moments in candidates.items()
    }  # fmt: skip
    best = min(deviations, key=lambda name: deviations[name])
    if deviations[best] <= DECAY_FACTOR_TOLERANCE:
        notes.provenance["decay_factor_check"] = (
            f"DecayFactor agrees with FrameReferenceTime as {best} within {deviations[best]:.1e}"
        )
        return best
    notes.provenance["decay_factor_check"] = f"no convention fits; nearest is {best}, off by {deviations[best]:.1e}"
    notes.warn(
        f"{tag_label('DecayFactor')} fits {tag_label('FrameReferenceTime')} in no known convention "
        f"(off by {deviations[best]:.2%}): the decay reference time could not be confirmed"
    )
    return None


def reference_time(headers: SeriesHeaders, half_life_s: float, notes: Notes) -> datetime:
    """Return the time to which a START-corrected series is decay-corrected (step 7)."""
    convention = decay_factor_convention(headers, half_life_s, notes)
    acquired = acquisition_times(headers, notes)
    earliest = min(acquired)
    moment, rule = _reference_by_rule(headers, acquired, half_life_s, convention, notes)
    notes.provenance.update(
        reference_time=moment.isoformat(), reference_rule=rule, earliest_acquisition=earliest.isoformat()
    )
    _compare_with_decay_factor(headers, acquired, half_life_s, moment, notes)
    return moment


def _reference_by_rule(
    headers: SeriesHeaders, acquired: list[datetime], half_life_s: float, convention: str | None, notes: Notes
) -> tuple[datetime, str]:
    earliest = min(acquired)
    series = _series_time(headers, earliest, notes)
    private = _ge_scan_time(headers, earliest, notes)
    if series is not None and series <= earliest + timedelta(seconds=1):
        if private is not None and abs(private - series) > timedelta(seconds=CLOCK_TOLERANCE_S):
            notes.warn(
                f"{tag_label('SeriesTime')} and GE (0009,100D) differ by "
                f"{abs(private - series).total_seconds():.0f} s; the series time was taken"
            )
        return series, "SeriesTime (not after the earliest acquisition)"
    if private is not None:
        return private, "GE private scan date-time (0009,100D)"
    by_frame = _frame_based_reference(headers, acquired, half_life_s, convention, notes)
    if by_frame is not None:
        return by_frame
    why = "is missing" if series is None else "is later than the earliest acquisition"
    notes.warn(
        f"{tag_label('SeriesTime')} {why} and nothing else tells the decay reference: the earliest acquisition "
        "time was taken, which is wrong where the scanner corrects to another time"
    )
    return earliest, "earliest AcquisitionTime"


def _series_time(headers: SeriesHeaders, earliest: datetime, notes: Notes) -> datetime | None:
    time = headers.text("SeriesTime")
    if not time:
        return None
    since_midnight = parse_time(time, tag_label("SeriesTime"))
    day = headers.text("SeriesDate")
    if not day:
        notes.warn(f"{tag_label('SeriesDate')} is missing; the acquisition date was taken")
        return _nearest_day(datetime(earliest.year, earliest.month, earliest.day) + since_midnight, earliest)
    moment = parse_date(day, tag_label("SeriesDate")) + since_midnight
    if earliest - moment > _DAY / 2:
        # No scan starts half a day before its first bed: dates were shifted tag by tag on de-identification, and only
        # the clock times can be compared. (A much later series time is real: images are often made again.)
        notes.warn(
            f"{tag_label('SeriesDate')} {day} and the acquisition date {earliest:%Y%m%d} do not belong together; "
            "only the times of day were compared"
        )
        moment = _nearest_day(moment, earliest)
    return moment


def _ge_scan_time(headers: SeriesHeaders, earliest: datetime, notes: Notes) -> datetime | None:
    found = headers.per_slice(lambda header: read_private_text(header, 0x0009, 0x0D, "GEMS_PETD_01"))
    values = {text for text, _ in found}
    if "" in values:
        return None
    if len(values) > 1:
        raise SUVError(
            f"GE (0009,100D) differs between the slices ({', '.join(sorted(values)[:3])})",
            "give the slices of one series only",
        )
    try:
        moment = parse_datetime(values.pop(), "GE (0009,100D)", headers.text("TimezoneOffsetFromUTC"))
    except SUVError as error:
        notes.warn(f"{error.what}; it was passed over")
        return None
    if any(by_number for _, by_number in found):
        notes.provenance["ge_private_tag"] = "(0009,100D) read by number: its creator element is absent"
    if abs(moment - earliest) > _DAY / 2:
        notes.warn("the date in GE (0009,100D) does not belong to the acquisition date; only its time of day was used")
        moment = _nearest_day(moment, earliest)
    return moment


def _frame_based_reference(
    headers: SeriesHeaders, acquired: list[datetime], half_life_s: float, convention: str | None, notes: Notes
) -> tuple[datetime, str] | None:
    """Return acquisition time minus frame reference time, where every slice gives the same moment."""
    references = [value for value in headers.numbers("FrameReferenceTime") if value is not None]
    if len(references) < len(headers):
        return None
    is_ge = headers.text("Manufacturer").upper().startswith("GE")
    frame_start = is_ge if convention is None else convention == "frame-start"
    if convention is not None and frame_start != is_ge:
        notes.warn(
            f"{tag_label('DecayFactor')} proves that {tag_label('FrameReferenceTime')} counts to the {convention}, "
            f"unlike this manufacturer's habit; the proof was followed"
        )
    if frame_start:
        offsets = [0.0] * len(headers)
        rule = "AcquisitionTime - FrameReferenceTime (frame start)"
    else:
        durations = frame_durations(headers)
        if durations is None or max(references) <= 0.0:
            return None
        offsets = [average_decay_time(duration, half_life_s) for duration in durations]
        rule = "AcquisitionTime + T_ave - FrameReferenceTime (frame middle)"
    moments = sorted(
        moment + timedelta(seconds=offset - reference / 1000.0)
        for moment, offset, reference in zip(acquired, offsets, references, strict=True)
    )
    middle = moments[len(moments) // 2]
    spread = max((moments[-1] - middle).total_seconds(), (middle - moments[0]).total_seconds())
    return (middle, rule) if spread <= FRAME_TOLERANCE_S else None


def _compare_with_decay_factor(
    headers: SeriesHeaders, acquired: list[datetime], half_life_s: float, chosen: datetime, notes: Notes
) -> None:
    """Warn where acquisition time and DecayFactor of all slices agree on another reference than the chosen one."""
    factors = headers.numbers("DecayFactor")
    durations = frame_durations(headers)
    if durations is None or any(value is None or value <= 0 for value in factors):
        return
    known = [value for value in factors if value is not None]
    if all(abs(value - 1.0) < 1e-9 for value in known):
        return
    moments = [
        moment + timedelta(seconds=average_decay_time(duration, half_life_s) - half_life_s * math.log2(value))
        for moment, duration, value in zip(acquired, durations, known, strict=True)
    ]
    if (max(moments) - min(moments)).total_seconds() > 2 * FRAME_TOLERANCE_S:
        return
    deviation = abs((moments[0] - chosen).total_seconds())
    if deviation > CLOCK_TOLERANCE_S:
        notes.warn(
            f"{tag_label('DecayFactor')} counts from {moments[0]:%H:%M:%S}, {deviation:.0f} s from the decay "
            f"reference taken ({chosen:%H:%M:%S}): SUV may be off by {abs(2 ** (deviation / half_life_s) - 1):.1%}"
        )


def injection_time(headers: SeriesHeaders, reference: datetime, half_life_s: float, notes: Notes) -> datetime:
    """Return the injection date-time that belongs to ``reference`` (step 8), checked for plausibility (step 9)."""
    limit = timedelta(seconds=max(MAX_UPTAKE_S, MAX_UPTAKE_HALF_LIVES * half_life_s))
    date_time = _injection_date_time(headers, notes)
    time_text = headers.text("RadiopharmaceuticalStartTime", nested=True)
    clock = parse_time(time_text, tag_label("RadiopharmaceuticalStartTime")) if time_text else None
    if date_time is None and clock is None:
        raise SUVError(
            f"{tag_label('RadiopharmaceuticalStartTime')} and {tag_label('RadiopharmaceuticalStartDateTime')} "
            "are missing",
            "the decay since injection cannot be told without one of them: restore it",
        )
    if date_time is not None and timedelta(0) <= reference - date_time <= limit:
        if clock is not None and _clock_difference(date_time, clock) > CLOCK_TOLERANCE_S:
            notes.warn(
                f"{tag_label('RadiopharmaceuticalStartTime')} {time_text} and "
                f"{tag_label('RadiopharmaceuticalStartDateTime')} {date_time.isoformat()} differ; "
                "the date-time was taken"
            )
        return _accept(date_time, reference, half_life_s, "RadiopharmaceuticalStartDateTime (0018,1078)", notes)
    apart = ""
    if date_time is not None:
        apart = (
            f"{tag_label('RadiopharmaceuticalStartDateTime')} is {date_time.isoformat()}, "
            f"{_hours(reference - date_time)} before the decay reference {reference}"
        )
    if clock is None:
        raise SUVError(
            apart,
            f"it must lie 0 to {_hours(limit)} before it: correct the tag, or add "
            f"{tag_label('RadiopharmaceuticalStartTime')} where only the date was shifted",
        )
    moment = datetime(reference.year, reference.month, reference.day) + clock
    crossed = moment > reference
    if crossed:
        moment -= _DAY
    differ = date_time is not None and _clock_difference(date_time, clock) > CLOCK_TOLERANCE_S
    if differ:
        # Within a day any time of day lies before the scan: for long-lived nuclides that would prove nothing.
        limit = timedelta(seconds=MAX_UPTAKE_S)
    if reference - moment > limit:
        raise SUVError(
            f"{tag_label('RadiopharmaceuticalStartTime')} is {time_text}: taken on the day of the scan or the day "
            f"before, injection lies {_hours(reference - moment)} before the decay reference {reference}"
            + (f"; {apart}" if apart else ""),
            f"it must lie 0 to {_hours(limit)} before it: correct the tag",
        )
    if crossed:
        notes.provenance["injection_crossed_midnight"] = True
    if differ:
        notes.warn(
            f"{apart}, and differs from {tag_label('RadiopharmaceuticalStartTime')} {time_text}, which is plausible "
            "and was taken"
        )
    elif date_time is not None:
        notes.warn(f"{apart}: its date seems shifted by de-identification; only the time of day was used")
    if half_life_s > _DAY.total_seconds():
        notes.warn(
            f"only a time of day is known for the injection of a nuclide with a half-life of "
            f"{half_life_s / 3600:.0f} h; the last such time before the scan was taken"
        )
    return _accept(moment, reference, half_life_s, "RadiopharmaceuticalStartTime (0018,1072)", notes)


def _injection_date_time(headers: SeriesHeaders, notes: Notes) -> datetime | None:
    keyword = "RadiopharmaceuticalStartDateTime"
    text = headers.text(keyword, nested=True)
    if not text:
        return None
    try:
        return parse_datetime(text, tag_label(keyword), headers.text("TimezoneOffsetFromUTC"))
    except SUVError as error:
        if not headers.text("RadiopharmaceuticalStartTime", nested=True):
            raise SUVError(
                f"{error.what}, and {tag_label('RadiopharmaceuticalStartTime')} is missing",
                f"{error.remedy}, or restore {tag_label('RadiopharmaceuticalStartTime')}",
            ) from error
        notes.warn(f"{error.what}; it was passed over")
        return None


def _clock_difference(moment: datetime, clock: timedelta) -> float:
    """Return how far the time of day of ``moment`` is from ``clock``, in seconds, around midnight too."""
    since_midnight = moment - datetime(moment.year, moment.month, moment.day)
    apart = abs((since_midnight - clock).total_seconds())
    return min(apart, _DAY.total_seconds() - apart)


def _accept(moment: datetime, reference: datetime, half_life_s: float, rule: str, notes: Notes) -> datetime:
    uptake = (reference - moment).total_seconds()
    if uptake < MIN_UPTAKE_S and half_life_s >= 3600.0:
        notes.warn(f"only {uptake / 60:.0f} min lie between injection and decay reference")
    notes.provenance.update(
        injection_time=moment.isoformat(), injection_rule=rule, uptake_minutes=round(uptake / 60.0, 3)
    )
    return moment
