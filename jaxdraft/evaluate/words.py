"""How the report writes numbers and settings."""

from collections.abc import Iterable, Mapping
from typing import Any

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with three or more significant digits, ``digits`` after the point below 100; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """``value`` with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def amount(value: float) -> str:
    """A number of parameters or tokens to two or three digits: "41.6 thousand", "1.22 million", "5 billion"."""
    for power, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= power:
            return f"{value / power:.3g} {name}"
    return f"{value:.0f}"


def seconds(value: float | None) -> str:
    """A time in the unit that gives it one to three digits before the point."""
    if value is None:
        return "–"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


def in_words(total: int, noun: str) -> str:
    """A number and its noun: "three tasks"."""
    word = _NUMBERS[total] if total < len(_NUMBERS) else str(total)
    return f"{word} {noun}{'' if total == 1 else 's'}"


def listed(words: Iterable[str], last: str = "or") -> str:
    """The different ones of them: "a, b or c"."""
    *others, end = list(dict.fromkeys(words)) or [""]
    return f"{', '.join(others)} {last} {end}" if others else end


def decoding(row: Mapping[str, Any]) -> str:
    """How a result was decoded, in words: "greedy" or "T 0.6, top-p 0.9", and what is not as usual."""
    words = ["greedy"] if not row.get("temperature") else [f"T {row['temperature']:g}"]
    if row.get("temperature"):
        words += [f"top-k {row['top_k']}"] if row.get("top_k") else []
        words += [f"top-p {row['top_p']:g}"] if row.get("top_p", 1) < 1 else []
    words += [f"{row['verification']} verification"] if row.get("verification", "token") != "token" else []
    words += [f"{row['drafting']} drafting"] if row.get("drafting", "sampled") != "sampled" else []
    words += [f"stops below {row['stop_below']:g}"] if row.get("stop_below") else []
    return ", ".join(words)
