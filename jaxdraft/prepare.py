"""The stages that make packed rows out of text, and out of other rows.

Text is read in chunks, and those make units, at places that the text alone decides. The chunks of a unit are tokenised
side by side and packed into a shard of its own. No unit knows of another: of several processes each makes its share,
and rows are the same for any number of them. Beside a shard lies a record of what was read for it, with a hash of the
text. A run that was stopped makes only units that have no record, or one of another text or other settings, or whose
shard is damaged.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdraft.context import Context
from jaxdraft.data.chunks import Chunk, Conversations, Documents, Form, Part, References, chunks, in_order
from jaxdraft.data.pipeline import sample
from jaxdraft.data.quarantine import Quarantine, Rejected
from jaxdraft.data.records import FORMAT, MANIFEST, Block, Format, shard_name, write_manifest, write_rows, write_shard
from jaxdraft.data_stages import Outputs
from jaxdraft.distributed import from_all, is_lead, together
from jaxdraft.errors import ConfigError
from jaxdraft.files import sha256, write_json
from jaxdraft.recipe import Prepare, Subset
from jaxdraft.redaction import redacted
from jaxdraft.settings import to_json
from jaxdraft.stopping import poll
from jaxdraft.tokenizers import single_threaded
from jaxdraft.tracking import progress_bar, say

TIMING = "timing.jsonl"


class _Units:
    """The units of a stage, of which this process makes its share.

    Attributes:
      left: rows that are still wanted.
      count: units that rows were taken from.
      tokens: that this process has made; those of units that were there before do not count.
    """

    def __init__(self, stage: Prepare, context: Context, form: Form, advance: Callable[[int], Any]):
        self.left = sys.maxsize if stage.tokens is None else int(stage.tokens) // stage.length
        self.count = self.tokens = 0
        self.format = Format(stage.length, context.tokenizer.vocab_size)
        self._form, self._advance = form, advance
        self._settings = json.dumps([FORMAT, type(form).__name__, *form.settings]).encode()
        self._folder, self._keep = context.folder(stage.name), context.home.keep_own
        self._workers = stage.workers or os.cpu_count() or 1
        self._pool = concurrent.futures.ThreadPoolExecutor(self._workers)
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None
        self._text: Iterable[Chunk] = ()  # of this process's latest unit, once more
        self._number = -1

    def __enter__(self) -> "_Units":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._writer.shutdown()

    def make(self, text: Iterable[Chunk]) -> Iterator[tuple[int, int]]:
        """Makes the units in turns, one for each process, until there are rows enough or the text ends.

        Yields:
          after every turn the rows taken and the tokens made by all processes.
        """
        units = itertools.groupby(text, lambda chunk: chunk.unit)
        ended = False
        while self.left > 0 and not ended:
            poll()
            before, rows = self.tokens, together(lambda: self._next(units))
            turn = from_all(rows, self.tokens - before)
            together(functools.partial(self._cut, turn))
            taken = 0
            for rows, _ in turn:
                ended = ended or rows < 0
                if not ended and taken < self.left:
                    self.count += 1
                    taken = min(taken + rows, self.left)
            self.left -= taken
            yield taken, sum(tokens for _, tokens in turn)
        together(self._wait)

    def record(self, number: int) -> Path:
        """The file that says what a unit was made of."""
        return (self._folder / shard_name(number)).with_suffix(".json")

    def _next(self, units: Iterator[tuple[int, Iterator[Chunk]]]) -> int:
        """Rows of this process's next unit; -1 where there is none."""
        for number, unit in units:
            if number % jax.process_count() == jax.process_index():
                text, self._text = itertools.tee(unit)
                self._number = number
                if self.record(number).exists():
                    held = list(text)
                    found = self._found(number, held)
                    return self._make(number, held, self.left) if found is None else found
                return self._make(number, text, self.left)
        return -1

    def _cut(self, turn: list[tuple[int, ...]]) -> None:
        """Only now a process knows how many rows of the turn come before its own."""
        *earlier, (rows, _) = turn[: jax.process_index() + 1]
        wanted = self.left - sum(max(rows, 0) for rows, _ in earlier)
        if 0 < wanted <= rows and wanted < self.left:
            self._make(self._number, self._text, wanted)

    def _found(self, number: int, text: Sequence[Chunk]) -> int | None:
        """Rows of a unit that was made before, if they are of this text and whole."""
        try:
            record = json.loads(self.record(number).read_text("utf-8"))
            if record.pop("sha256") != _record_hash(record) or record["text"] != self._hash(text):
                return None
            shard, tokens = record["shard"], record["counts"].get("tokens", 0)
            file, rows, digest = (shard[key] for key in ("file", "rows", "sha256")) if shard else ("", 0, "")
        except (ValueError, LookupError, TypeError, AttributeError):  # damaged
            return None
        if shard is None:
            return 0
        path = self._folder / file
        if not path.is_file() or sha256(path) != digest:
            say(f"    {path} is damaged: it is made anew")
            return None
        if rows >= self.left:  # what follows the last row may not count
            return None
        self._advance(tokens)
        return int(rows)

    def _make(self, number: int, text: Iterable[Chunk], rows: int) -> int:
        """Tokenises, packs and begins to write a unit, at most so many rows; returns how many it has."""
        counts, read = collections.Counter[str](), list[Chunk]()
        quarantine = Quarantine()

        def parts() -> Iterator[Part]:
            for chunk, part in in_order(self._pool, self._encode, text, 2 * self._workers):
                read.append(chunk._replace(items=[]))
                quarantine.take(chunk.counts, chunk.rejected)
                quarantine.take(collections.Counter(row.reason for row in part.rejected), part.rejected)
                self._advance(part.tokens)
                yield part

        blocks = list(self._form.pack(parts(), counts, rows))
        made = sum(len(block["tokens"]) for block in blocks)
        self.tokens += counts["tokens"]
        record = {
            "text": None if made == rows else self._hash(read),  # not read to its end
            "counts": counts,
            "quarantined": quarantine.counts,
            "rejected": quarantine.rows,
        }
        self._wait()
        self._writing = self._writer.submit(self._write, number, blocks, record)
        return made

    def _encode(self, chunk: Chunk) -> tuple[Chunk, Part]:
        return chunk, self._form.encode(chunk.items)

    def _hash(self, text: Iterable[Chunk]) -> str:
        return hashlib.sha256(b"".join([self._settings, *(chunk.sha256 for chunk in text)])).hexdigest()

    def _write(self, number: int, blocks: Sequence[Block], record: dict[str, Any]) -> None:
        if blocks:
            path = self._folder / shard_name(number)
            record = {"shard": write_shard(path, blocks, self.format), **record}
            self._keep(path)
        record = {"shard": None, **record}
        write_json(self.record(number), {**record, "sha256": _record_hash(record)})
        self._keep(self.record(number))

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()


def _record_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def run_prepare(stage: Prepare, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    together(lambda: context.home.fetch(stage.name))
    folder.mkdir(parents=True, exist_ok=True)
    if is_lead():
        (folder / MANIFEST).unlink(missing_ok=True)
    form, item = _form(stage, context)
    rows = tokens = 0
    began = turn = time.perf_counter()
    with progress_bar(int(stage.tokens or 0), stage.name, "token" if stage.tokens else item) as bar:

        def text() -> Iterator[Chunk]:
            for chunk in chunks(stage.sources, form):
                if stage.tokens is None:
                    bar.update(len(chunk.items))
                yield chunk

        advance = bar.update if stage.tokens else lambda tokens: None
        with single_threaded(), _Units(stage, context, form, advance) as units:
            for taken, made in units.make(text()):
                rows, tokens = rows + taken, tokens + made
                if stage.tokens:
                    bar.update(rows * stage.length - bar.n)
                turn, seconds = time.perf_counter(), time.perf_counter() - turn
                if made and is_lead():
                    with (folder / TIMING).open("a") as file:
                        file.write(json.dumps({"units": units.count, "tokens": made, **_rate(made, seconds)}) + "\n")
                    context.home.keep(folder / TIMING)
    rate = _rate(tokens, time.perf_counter() - began)
    if not is_lead():
        return [], {}
    context.home.fetch(stage.name)
    files, facts = _merge(stage, context, units)
    if units.left and stage.tokens:
        facts["of the tokens asked for"] = f"{rows * stage.length / stage.tokens:.1%}"
        say(f"    the text ends after {rows * stage.length:,} tokens of {stage.tokens:,}")
    return files, {**facts, **({"tokens per second": round(rate["tokens_per_second"])} if tokens else {})}


def _form(stage: Prepare, context: Context) -> tuple[Form, str]:
    """How the text becomes rows, and what a piece of it is called."""
    if stage.labels is None:
        return Documents(context.tokenizer, stage.length, stage.segments), "document"
    if stage.labels == "references":
        return References(context.tokenizer, stage.length), "prompt"
    eos_ids = context.target_config().eos_ids
    return Conversations(context.tokenizer, stage.length, stage.labels, eos_ids), "conversation"


def _merge(stage: Prepare, context: Context, units: _Units) -> Outputs:
    """The data set out of the units, with all that their sources rejected."""
    folder, counts, quarantine = context.folder(stage.name), collections.Counter[str](), Quarantine()
    shards = []
    for number in range(units.count):
        record = json.loads(units.record(number).read_text("utf-8"))
        counts.update(record["counts"])
        quarantine.take(record["quarantined"], [Rejected(*row) for row in record["rejected"]])
        shards += [record["shard"]] if record["shard"] else []
    if quarantine.rows and not counts["tokens"]:
        where, reason = quarantine.rows[0]
        raise ConfigError(f"{stage.name}: nothing that was read gives a row: {where}: {reason}")
    kept = {*(shard["file"] for shard in shards), *(units.record(number).name for number in range(units.count))}
    for path in folder.glob("rows-*"):
        if path.name not in kept:  # of a longer text
            path.unlink()
    provenance = [source.provenance() if hasattr(source, "provenance") else {} for source in stage.sources]
    manifest = write_manifest(
        folder,
        shards,
        units.format,
        tokenizer_fingerprint=context.tokenizer.fingerprint(),
        source=redacted({"settings": to_json(stage.sources), "provenance": provenance}),
        counts=counts,
        quarantined=quarantine.counts,
    )
    files = [folder / MANIFEST, *(folder / shard["file"] for shard in shards), *quarantine.write(folder)]
    facts = {"rows": manifest["rows"], **counts}
    if quarantine.counts:
        facts["set aside"] = quarantine.counts.total()
    return files, facts


def _rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"seconds": round(seconds, 6), "tokens_per_second": round(tokens / seconds, 1)}


def run_subset(stage: Subset, context: Context) -> Outputs:
    folder, rows = context.folder(stage.name), context.rows(stage.data)
    manifest, count = rows.manifest, int(stage.tokens) // rows.length
    if count > len(rows):
        raise ConfigError(
            f"{stage.name}: tokens is {stage.tokens:,}, but {stage.data!r} has {len(rows) * rows.length:,}: take fewer"
        )
    chosen = sample(len(rows), count, context.recipe.seed, stage.data)
    with progress_bar(count, stage.name, "row") as bar:

        def taken() -> Iterator[dict[str, np.ndarray]]:
            for i in chosen:
                bar.update(1)
                yield rows[int(i)]

        written = write_rows(
            folder,
            taken(),
            length=rows.length,
            vocab_size=manifest["vocab_size"],
            tokenizer_fingerprint=manifest["tokenizer"],
            source=manifest["source"],
            counts={"of_rows": len(rows)},
            target_logits=manifest.get("target_logits"),
        )
    files = [folder / MANIFEST, *(folder / shard["file"] for shard in written["shards"])]
    return files, {"rows": written["rows"], "tokens": written["tokens"], **written["counts"]}
