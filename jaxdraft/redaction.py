"""Keeps secrets out of what is written: run records, logs and messages.

What counts as one: the value of an environment variable with a name like ``HF_TOKEN``, ``OPENAI_API_KEY`` or
``AWS_SECRET_ACCESS_KEY``; the user name and password of a URL; what is given under such a name in a URL or a setting;
and the tokens of services that can be told by their first letters.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "(secret)"
"""What stands in the place of a secret."""
_NAMES = r"(?:api[_-]?key|access[_-]?key|secret|password|passwd|passphrase|authorization|credentials?|signature)"
_GIVEN = rf"(?<![a-z])(?:{_NAMES}|token)(?:=['\"]?|['\"]\s*:\s*['\"])"
_FIELD = re.compile(rf"(?i)(?:.*[_-])?{_NAMES}|(?:(?:hf|hub|auth|access|api|bearer)[_-])?token")
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$")
_SHORTEST = 8  # a shorter value would be found in words that are none
_PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), HIDDEN),
    (re.compile(rf"(?i)({_GIVEN}|[?&](?:key|sig|auth)=)[^\s&'\",}}]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{8,}"), f"Bearer {HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza)[\w-]{16,}"), HIDDEN),
)


def redacted(value: Any) -> Any:
    """A text, or every text in a value of JSON, with ``(secret)`` in the place of each secret."""
    return _redacted(value, _of_environment())


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(x, str) and names_secret(str(key)) else _redacted(x, secrets)
            for key, x in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(x, secrets) for x in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    for pattern, hidden in _PATTERNS:
        value = pattern.sub(hidden, value)
    return value


def names_secret(field: str) -> bool:
    """Whether a field by this name holds a secret, as ``api_key`` and ``hf_token`` do and ``bos_token`` does not."""
    return bool(_FIELD.fullmatch(field))


def _of_environment() -> list[str]:
    """Longest first: one may be a part of another. A variable that holds a path names a file and is no secret."""
    named = (value.strip() for name, value in os.environ.items() if _VARIABLE.search(name.upper()))
    return sorted((x for x in named if len(x) >= _SHORTEST and not x.startswith(("/", "~"))), key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Of a log's lines."""

    def format(self, record: logging.LogRecord) -> str:
        return str(redacted(super().format(record)))
