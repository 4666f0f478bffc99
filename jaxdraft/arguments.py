"""Kinds of values on the command line, each with the words for one that is wrong."""

import argparse
import math
from pathlib import Path


def integers(text: str) -> tuple[int, ...]:
    """``3,5``: whole numbers of at least 1, each once."""
    return _each(text, int, lambda value: value >= 1, "whole numbers of at least 1 with commas, as in 3,5")


def numbers(text: str) -> tuple[float, ...]:
    """``0,0.6``: numbers of at least 0, each once."""
    return _each(text, float, lambda value: 0 <= value < math.inf, "numbers of at least 0 with commas, as in 0,0.6")


def number(text: str) -> float:
    """A number of at least 0."""
    return _one(text, lambda value: 0 <= value < math.inf, "a number of at least 0")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return _one(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def folder(text: str) -> Path:
    """Where a folder is or will be."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file: name a folder")
    return path


def checkpoints(text: str) -> tuple[int, ...]:
    """``100,200``, or nothing for ``all``."""
    return () if text == "all" else integers(text)


def step_range(text: str) -> tuple[int, int]:
    """``10:20``: the first step and the one to stop before."""
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: write the first step and the one to stop before, as in 10:20")
    return int(first), int(end)


def seed(text: str) -> int:
    """A whole number below 2³¹."""
    if not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 0 to 2**31 - 1")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least 0")
    return int(text)


def _one(text, is_valid, what):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r}: write {what}")
    return value


def _each(text, kind, is_valid, what):
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(is_valid, values)):
        raise argparse.ArgumentTypeError(f"{text!r}: write {what}")
    return tuple(dict.fromkeys(values))
