"""Text on a terminal while it is written: whole characters, colours where wanted, and a line while one waits."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from jaxdraft.tokenizers import Tokenizer

FAINT, DRAFTED, REFUSED, HEADING = "2", "32", "9;31", "1"
"""Faint, green, red and struck out, bold: parameters of the escape sequence ESC [ … m."""

_WINDOW = 16
_KEPT = 8
# Whatever a model writes, no terminal obeys it: control characters are shown as pictures of themselves.
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | {0x7F: 0x2421} | dict.fromkeys(range(128, 160))


class Screen:
    """A stream as a person sees it.

    Args:
      stream: standard output or standard error.
      colour: whether colours are wanted: if it is a terminal that has them, and ``NO_COLOR`` (no-color.org) is not set.

    Attributes:
      is_watched: it is a terminal.
      has_colour: styles show.
    """

    def __init__(self, stream: TextIO, colour: bool):
        self.is_watched = stream.isatty()
        self._stream = stream
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.has_colour = colour and self.is_watched and not is_plain

    def write(self, text: str, style: str = "") -> None:
        """Shows text at once, in one of this module's styles."""
        if self.is_watched:
            text = text.translate(_CONTROLS)
        if self.has_colour and style and text:
            text = f"\x1b[{style}m{text}\x1b[0m"
        self._stream.write(text)
        self._stream.flush()


class Fragments:
    """The text that each of a model's tokens adds; together ``Tokenizer.continuation``.

    A token that ends within a character waits for those that complete it. Only the last few tokens are decoded anew
    for the next one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer, self._ids, self._text = tokenizer, list(prompt), tokenizer.decode(prompt)

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        text = self._tokenizer.decode([*self._ids, token])
        self._ids.append(token)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        added, self._text = text[len(self._text) :], text
        if len(self._ids) > _WINDOW:
            tail = self._tokenizer.decode(self._ids[-_KEPT:])
            if tail and text.endswith(tail):  # else the cut went through a character
                self._ids, self._text = self._ids[-_KEPT:], tail
        return added

    def instead(self, token: int) -> str:
        """The text that another token would add here, as far as it is complete."""
        text = self._tokenizer.decode([*self._ids, token])
        return text[len(self._text) :].rstrip("\N{REPLACEMENT CHARACTER}")

    def rest(self) -> str:
        """What the last character lacked a token for."""
        return self._tokenizer.decode(self._ids)[len(self._text) :]


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on standard error what takes long, on a terminal with the seconds, for as long as it does."""
    if not sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr, flush=True)
        yield
        return
    room = shutil.get_terminal_size().columns - 13  # a line that wraps cannot be written over
    what = what if len(what) <= room else what[: room - 1] + "…"
    done, began = threading.Event(), time.perf_counter()

    def tick() -> None:
        while True:
            sys.stderr.write(f"\r{what} … {time.perf_counter() - began:.1f} s")
            sys.stderr.flush()
            if done.wait(0.1):
                return

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield
    finally:
        done.set()
        ticking.join()
        sys.stderr.write("\r" + " " * (len(what) + 12) + "\r")
        sys.stderr.flush()
