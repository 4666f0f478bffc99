"""The target's distribution stored beside packed rows: the room it takes, how it is made, whether it still fits."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxdraft.context import Context
from jaxdraft.data.pipeline import segment_positions
from jaxdraft.data.records import PackedRows, columns
from jaxdraft.decode import top_scores
from jaxdraft.distributed import fetch, from_lead
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, compute_dtype
from jaxdraft.models.hf import load_model
from jaxdraft.recipe import TopK, Train
from jaxdraft.sharding import place, row_groups
from jaxdraft.stopping import poll
from jaxdraft.tracking import progress_bar, say

# In bfloat16 the rounding depends on the shape of a pass: another number gives other bytes.
TOKENS_PER_PASS = 8192

Row = Mapping[str, np.ndarray]


def target_logits(name: str, keep: TopK, context: Context) -> dict[str, Any]:
    """What the manifest of rows says of the distribution stored with them.

    Raises:
      ConfigError: k is not less than the target's vocabulary.
    """
    vocabulary = context.target_config().vocabulary
    if keep.k >= vocabulary:
        raise ConfigError(f"{name}: keep_logits.k is {keep.k}: it must be less than the target's {vocabulary} tokens")
    return {"k": keep.k, "temperature": keep.temperature, "target": context.target_hash, "vocabulary": vocabulary}


def check_space(name: str, tokens: int, stored: Mapping[str, Any], context: Context, *, packed: bool = True) -> None:
    """Says how much the rows of this many tokens will take.

    Raises:
      ConfigError: there is not as much room on the disk.
    """
    width = sum(column.bytes for column in columns(context.tokenizer.vocab_size, stored).values())
    needed, free = tokens * width, shutil.disk_usage(context.workdir).free
    bound = "" if packed else "about "  # answers end early, and rows are filled up with padding
    size = f"{bound}{_size(needed)} of rows ({tokens:,} tokens × {width} bytes), {_size(free)} free"
    if needed > free:
        raise ConfigError(
            f"{name}: {size} in {context.workdir}: lower keep_logits.k ({stored['k']}), take less text, or run with a "
            "--workdir on a larger disk"
        )
    say(f"    {size}")


def scored(
    name: str, rows: Iterable[Row], stored: Mapping[str, Any], context: Context, total: int = 0
) -> Iterator[Row]:
    """The rows with ``target_ids`` and ``target_log_probs`` as ``jaxdraft.data.records`` defines them.

    Of several processes the lead reads the rows and gets the result; the others take part, and get nothing.

    A packed row's segments do not see each other, and their positions restart: these are the distributions of the
    target that reads each segment alone.

    Args:
      name: the stage's, for the progress bar.
      rows: of one length.
      stored: of ``target_logits``.
      context: recipe and run directory.
      total: how many rows there are, where it is known.

    Raises:
      FloatingPointError: the target gave logits that are not finite.
    """
    mesh = context.mesh
    config, params = load_model(context.target_folder, mesh=mesh, dtype=compute_dtype())
    config.check_target()
    groups = row_groups(mesh)
    batch: list[Row] = []  # what the lead is at

    def batches() -> Iterator[list[list[list[int]]]]:
        remaining = iter(rows)
        for first in remaining:
            count = max(1, TOKENS_PER_PASS // len(first["tokens"])) * groups
            batch[:] = [first, *itertools.islice(remaining, count - 1)]
            filled = [*batch, *[first] * (count - len(batch))]
            yield [[row[key].tolist() for row in filled] for key in ("tokens", "segment_ids")]

    with progress_bar(total, name, "row") as bar:
        for texts in from_lead(batches):
            tokens_BT, segments_BT = (np.asarray(x, np.int32) for x in texts)
            found = top_scores(
                Decoder(config),
                params,
                *place(mesh, (tokens_BT, segment_positions(segments_BT), segments_BT), rows=True),
                k=stored["k"],
                temperature=stored["temperature"],
                mesh=mesh,
            )
            ids_BTK, log_probs_BTS = (x[: len(batch)] for x in fetch(tuple(found)))
            if np.isnan(log_probs_BTS).any():
                raise FloatingPointError(
                    f"{name}: the target gave logits that are not finite: are its weights damaged?"
                )
            bar.update(len(batch))
            poll()
            for row, ids, log_probs in zip(batch, ids_BTK, log_probs_BTS.astype(np.float16), strict=True):
                yield {**row, "target_ids": ids, "target_log_probs": log_probs}


def check_stored(stage: Train, context: Context, rows: Mapping[str, PackedRows]) -> None:
    """Whether what is stored is of this target and at the loss's temperature.

    Raises:
      ConfigError: it is not; the message says what differs.
    """
    for packed in rows.values():
        stored = packed.manifest.get("target_logits")
        if stored is None:
            differs = "stores nothing of the target"
        elif stored["target"] != context.target_hash:
            differs = f"stores another target's probabilities ({stored['target'][:12]}, not {context.target_hash[:12]})"
        elif stored["temperature"] != stage.loss.temperature:
            differs = f"stores them at temperature {stored['temperature']:g}, the loss's is {stage.loss.temperature:g}"
        else:
            continue
        raise ConfigError(f"{stage.name}: {packed.folder} {differs}; delete it to make it anew")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
