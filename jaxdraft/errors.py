"""The exceptions that the command line turns into exit codes, and the words for a name that does not exist."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting or an input is wrong: the message names it and the remedy (exit code 2)."""


class Interrupted(BaseException):
    """The run was asked to stop and can be resumed by the same command (exit code 75).

    Like KeyboardInterrupt no Exception, so that no handler of errors takes it for one.
    """


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """``no stage 'distil': did you mean 'distill'? There are: …``"""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {kind} {name!r}: {hint}There are: {', '.join(known) or 'none'}"
