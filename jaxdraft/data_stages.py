"""The stages that make data: a tokenizer, packed rows, the target's answers and scores, a draft's vocabulary."""

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.context import VOCABULARY, Context
from jaxdraft.data.quarantine import Quarantine
from jaxdraft.data.records import MANIFEST, write_rows
from jaxdraft.distributed import is_lead, on_lead
from jaxdraft.errors import ConfigError
from jaxdraft.recipe import DraftVocabulary, Score, TrainTokenizer
from jaxdraft.stored_targets import check_space, scored, target_logits
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import tokenizer_files
from jaxdraft.tracking import progress_bar

Outputs = tuple[list[Path], dict[str, Any]]  # files whose bytes are the stage's result; facts for the report


def run_train_tokenizer(stage: TrainTokenizer, context: Context) -> Outputs:
    folder, quarantine = context.folder(stage.name), Quarantine()
    train_sentencepiece(_documents(stage, quarantine), folder, stage.vocab_size)
    rejected = {"set aside": quarantine.counts.total()} if quarantine.counts else {}
    return [*tokenizer_files(folder), *quarantine.write(folder)], {"vocab_size": stage.vocab_size, **rejected}


def run_score(stage: Score, context: Context) -> Outputs:
    rows, stored = context.rows(stage.data), target_logits(stage.name, stage.keep_logits, context)
    on_lead(lambda: check_space(stage.name, len(rows) * rows.length, stored, context))
    source, counts = rows.manifest["source"]["settings"], rows.manifest["counts"]
    found = scored(stage.name, (rows[i] for i in range(len(rows))), stored, context, len(rows))
    if not is_lead():
        collections.deque(found, maxlen=0)  # takes part, and writes nothing
        return [], {}
    return write_packed(stage.name, found, rows.length, source, counts, context, stored)


def run_draft_vocabulary(stage: DraftVocabulary, context: Context) -> Outputs:
    target, rows = context.target_config(), context.rows(stage.data)
    stage.check_size(target.vocabulary)
    counts_V = np.zeros(target.vocabulary, np.int64)
    with progress_bar(len(rows), stage.name, "row") as bar:
        for i in range(len(rows)):
            row = rows[i]
            labels = row["tokens"][1:][row["loss_mask"][1:] > 0]
            counts_V += np.bincount(labels, minlength=target.vocabulary)
            bar.update(1)
    if not counts_V.any():
        raise ConfigError(f"{stage.name}: no token of {stage.data!r} is a label: there is nothing to count")
    ends = sorted({id for id in target.eos_ids if 0 <= id < target.vocabulary})
    if stage.size <= len(ends):
        raise ConfigError(f"{stage.name}: size is {stage.size}, the target's end tokens alone are {len(ends)}")
    by_frequency = np.argsort(-counts_V, kind="stable")
    ids = sorted([*ends, *by_frequency[~np.isin(by_frequency, ends)].tolist()][: stage.size])
    coverage = float(counts_V[ids].sum() / counts_V.sum())
    path = context.folder(stage.name) / VOCABULARY
    path.write_text(json.dumps({"ids": ids, "coverage": coverage, "labels": int(counts_V.sum())}) + "\n")
    seen = f"{coverage:.2%} of {counts_V.sum():,} labels"
    return [path], {"tokens": len(ids), "of the target's": target.vocabulary, "cover": seen}


def _documents(stage: TrainTokenizer, quarantine: Quarantine) -> Iterator[str]:
    documents = itertools.chain.from_iterable(quarantine.accepted(source.documents()) for source in stage.sources)
    with progress_bar(0, stage.name, "document") as bar:
        for document in documents:
            bar.update(1)
            yield document


def write_packed(name, rows, length, source, counts, context: Context, stored=None) -> Outputs:
    folder = context.folder(name)
    manifest = write_rows(
        folder,
        rows,
        length=length,
        vocab_size=context.tokenizer.vocab_size,
        tokenizer_fingerprint=context.tokenizer.fingerprint(),
        source={"settings": source},
        counts=counts,
        target_logits=stored,
    )
    files = [folder / MANIFEST, *(folder / shard["file"] for shard in manifest["shards"])]
    return files, {"rows": manifest["rows"], "tokens": manifest["tokens"], **counts}
