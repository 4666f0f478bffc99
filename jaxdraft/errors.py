"""The exceptions that the command line turns into exit codes, and the words for a name that does not exist."""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

RESUME = 75
"""The exit code that says: the same command goes on from here."""


class ConfigError(ValueError):
    """A setting or an input is wrong: the message names it and the remedy (exit code 2)."""


class Interrupted(BaseException):
    """The run was asked to stop and can be resumed by the same command (exit code 75).

    Like KeyboardInterrupt no Exception, so that no handler of errors takes it for one.
    """


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file, as that of a full disk does, the name of the one that is written here."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """``no stage 'distil': did you mean 'distill'? There are: …``"""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {kind} {name!r}: {hint}There are: {', '.join(known) or 'none'}"
