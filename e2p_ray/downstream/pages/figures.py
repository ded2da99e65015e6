"""Figures as people read them: intervals, shares, counts and costs, the same on the page and in the terminal."""

from __future__ import annotations

from e2p_ray.downstream.measures.bootstrap import Interval

ABSENT = "–"
_UNITS = {1e3: "k", 1e6: "M", 1e9: "G"}


def level_text(interval: Interval) -> tuple[str, str]:
    """A loss and its interval: 2.345 and 2.310–2.380."""
    return f"{interval.value:.3f}", f"{interval.low:.3f}–{interval.high:.3f}"


def gain_text(gain: Interval | None) -> tuple[str, str]:
    """A signed difference and its interval: +0.0121 and +0.0090 to +0.0152."""
    if gain is None:
        return ABSENT, ""
    return signed_text(gain.value), f"{signed_text(gain.low)} to {signed_text(gain.high)}"


def signed_text(value: float) -> str:
    """A difference with four decimals; one that has none of them is 0.0000, without a sign."""
    text = f"{value:+.4f}"
    return text if float(text) else "0.0000"


def share_text(share: Interval | None) -> tuple[str, str]:
    """A share and its interval: 64 % and 58–70 %."""
    if share is None:
        return ABSENT, ""
    return percent(share.value), f"{100 * share.low:.{_decimals(share)}f}–{100 * share.high:.{_decimals(share)}f} %"


def _decimals(share: Interval) -> int:
    return 1 if share.high < 0.1 else 0


def percent(share: float) -> str:
    """A share with one decimal where it is small."""
    return f"{100 * share:.{1 if abs(share) < 0.0995 else 0}f} %"


def score_text(score: Interval | None) -> tuple[str, str]:
    """A score between 0 and 1 and its interval: 0.412 and 0.390–0.433."""
    return (ABSENT, "") if score is None else level_text(score)


def count_text(number: float | None) -> str:
    """A count in few characters: 12, 4.5k, 1.2M."""
    if number is None:
        return ABSENT
    if abs(number) >= 1e3:
        return short_text(number)
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def short_text(number: float) -> str:
    """A number from a thousand on in three digits and a letter: what three digits make a thousand has the next one."""
    unit = next(unit for unit in (1e3, 1e6, 1e9) if unit == 1e9 or abs(number) < 999.5 * unit)
    return f"{number / unit:.3g}{_UNITS[unit]}"
