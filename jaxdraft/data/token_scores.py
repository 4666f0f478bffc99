"""What the target said of the tokens of its answers while it wrote them: a file beside a shard of answers.

ArrayRecord with a record for each answer of N tokens: ``target_ids`` [N, k], then ``target_log_probs`` [N, k + 2], in
the types of rows that store them (``jaxdraft.data.records``).

Shapes: P tokens of prompt, N of answer, T = P + N, k most likely tokens.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdraft.data.records import Format, new_records, random_access

_NAMES = ("target_ids", "target_log_probs")


class TokenScores(NamedTuple):
    """Of each token of an answer, as ``records`` defines the columns of these names.

    Attributes:
      target_ids: ``[N, k]``.
      target_log_probs: ``[N, k + 2]``.
    """

    target_ids: np.ndarray
    target_log_probs: np.ndarray


def write_scores(path: Path, scores: Iterable[TokenScores], format: Format) -> None:
    """Writes the file, which appears under its name only when it is complete."""
    with new_records(path) as write:
        for answer in scores:
            write(b"".join(x.astype(format.columns[name].dtype).tobytes() for name, x in _named(answer)))


def read_scores(path: Path, format: Format) -> Iterator[TokenScores]:
    """Each answer's, in the order in which they were written."""
    ids, log_probs = (format.columns[name] for name in _NAMES)
    reader = random_access(path)
    for i in range(reader.num_records()):
        record = reader.read([i])[0]
        count = len(record) // (ids.bytes + log_probs.bytes)
        arrays = (
            np.frombuffer(record, column.dtype, count * (column.width or 1), offset).reshape(column.shape(count))
            for column, offset in ((ids, 0), (log_probs, count * ids.bytes))
        )
        yield TokenScores(*arrays)


def with_prompt(scores: TokenScores, prompt: int) -> TokenScores:
    """``[T, …]``: what is said after each token of prompt and answer, which of the last and of most of the prompt's
    tokens is not known: there, where nothing is a label, k tokens and the rest are said to be equally likely.
    """
    count, k = scores.target_ids.shape
    ids = np.tile(np.arange(k, dtype=scores.target_ids.dtype), (prompt + count, 1))
    log_probs = np.full((prompt + count, k + 2), -np.log(k + 1), scores.target_log_probs.dtype)
    log_probs[:, k] = -np.inf
    known = slice(prompt - 1, prompt + count - 1)
    ids[known], log_probs[known] = scores
    return TokenScores(ids, log_probs)


def _named(scores: TokenScores) -> Iterable[tuple[str, np.ndarray]]:
    return zip(_NAMES, scores, strict=True)
