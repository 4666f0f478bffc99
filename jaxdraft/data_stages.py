"""The stages that make data: a tokenizer, packed rows, the target's answers and scores, a draft's vocabulary."""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.context import VOCABULARY, Context
from jaxdraft.data.pipeline import pack_whole
from jaxdraft.data.prompts import Prompt, example_id, read_prompts
from jaxdraft.data.records import MANIFEST, write_rows
from jaxdraft.decode import generate_batches
from jaxdraft.distributed import is_lead, on_lead, together
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.recipe import TARGET, DraftVocabulary, Generate, Score, TrainTokenizer
from jaxdraft.settings import to_json
from jaxdraft.stored_targets import check_space, scored, target_logits
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import tokenizer_files
from jaxdraft.tracking import progress_bar, read_jsonl, write_jsonl

Outputs = tuple[list[Path], dict[str, Any]]  # files whose bytes are the stage's result; facts for the report


def run_train_tokenizer(stage: TrainTokenizer, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    train_sentencepiece(_documents(stage.sources, stage.name), folder, stage.vocab_size)
    return tokenizer_files(folder), {"vocab_size": stage.vocab_size}


@dataclasses.dataclass(frozen=True)
class _Question:
    """One answer to be generated."""

    prompt: Prompt
    temperature: float

    @property
    def id(self) -> str:
        return f"{self.prompt.id}@{self.temperature:g}"

    def writer(self, shares: Mapping[str, float], seed: int) -> str:
        """One of the writers with their shares, in whatever order, chosen by the answer's id and the seed alone."""
        digest = hashlib.sha256(f"{seed}/writer/{self.id}".encode()).digest()
        point = int.from_bytes(digest[:8], "little") / 2**64
        names = sorted(shares)
        ends = list(itertools.accumulate(shares[name] for name in names))
        return names[min(bisect.bisect(ends, point), len(names) - 1)]


def run_generate(stage: Generate, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    prompts = together(lambda: [p for source in stage.prompts for p in read_prompts(source, context.tokenizer)])
    questions = [_Question(prompt, temperature) for prompt in prompts for temperature in stage.temperatures]
    if repeated := [id for id, count in collections.Counter(q.id for q in questions).items() if count > 1]:
        raise ConfigError(f"{stage.name}: two answers would have the id {repeated[0]!r}: give prompts ids of their own")
    if not questions:
        raise ConfigError(f"{stage.name}: no prompts: all of them are longer than the source's max_tokens allows")
    stored = stage.keep_logits and target_logits(stage.name, stage.keep_logits, context)
    if stored:
        tokens = sum(len(question.prompt.tokens) + stage.max_new_tokens for question in questions)
        on_lead(lambda: check_space(stage.name, tokens, stored, context, packed=False))
    shards = [questions[i : i + stage.shard_size] for i in range(0, len(questions), stage.shard_size)]
    paths = [folder / f"responses-{i:05d}-of-{len(shards):05d}.jsonl" for i in range(len(shards))]
    models: dict[str, Model] = {}
    done = on_lead(lambda: [path.exists() for path in paths])
    with progress_bar(len(questions), stage.name, "answer") as bar:
        for path, shard, is_done in zip(paths, shards, done, strict=True):
            if is_done:
                bar.update(len(shard))
                continue
            answers = _answers(stage, context, models, shard, bar.update)
            if is_lead():
                write_jsonl(path, answers)
                context.home.keep(path)
    models.clear()  # the scoring pass loads the target in the shape for training
    lines = [line for path in paths for line in read_jsonl(path)] if is_lead() else []

    def examples() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for line in lines:
            prompt, answer = line["prompt_tokens"], line["tokens"]
            yield prompt + answer, [int(stage.train_on_prompts)] * len(prompt) + [1] * len(answer)

    counts: collections.Counter[str] = collections.Counter()
    packed = pack_whole(examples(), stage.length, counts)
    rows = scored(stage.name, packed, stored, context) if stored else packed
    if not is_lead():
        collections.deque(rows, maxlen=0)  # takes part in the scoring, and writes nothing
        return [], {}
    source = {"target": to_json(context.recipe.target)} if stage.uses_target else {}
    if stage.writer != TARGET:
        source["writer"] = stage.writer
    files, summary = _write_rows(stage.name, rows, stage.length, source, counts, context, stored)
    ended = sum(line["finish"] == "eos" for line in lines)
    facts = {"answers": len(lines), "ended by EOS": f"{ended / len(lines):.0%}"}
    if stage.writer != TARGET:
        written = collections.Counter(line["writer"] for line in lines)
        facts["written by"] = ", ".join(f"{name} {written[name]}" for name in stage.writers)
    return [*paths, *files], {**facts, **summary}


def run_score(stage: Score, context: Context) -> Outputs:
    rows, stored = context.rows(stage.data), target_logits(stage.name, stage.keep_logits, context)
    on_lead(lambda: check_space(stage.name, len(rows) * rows.length, stored, context))
    source, counts = rows.manifest["source"]["settings"], rows.manifest["counts"]
    found = scored(stage.name, (rows[i] for i in range(len(rows))), stored, context, len(rows))
    if not is_lead():
        collections.deque(found, maxlen=0)  # takes part, and writes nothing
        return [], {}
    return _write_rows(stage.name, found, rows.length, source, counts, context, stored)


def run_draft_vocabulary(stage: DraftVocabulary, context: Context) -> Outputs:
    target, rows = context.draft_config(), context.rows(stage.data)
    if stage.size > target.vocabulary:
        raise ConfigError(f"{stage.name}: size is {stage.size}, the target's vocabulary {target.vocabulary}")
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


def _documents(sources: Sequence[Any], name: str) -> Iterator[str]:
    with progress_bar(0, name, "document") as bar:
        for document in itertools.chain.from_iterable(source.documents() for source in sources):
            bar.update(1)
            yield document


def _write_rows(name, rows, length, source, counts, context: Context, stored=None) -> Outputs:
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


def _answers(stage, context, models: dict[str, Model], shard: list[_Question], advance) -> list[dict[str, Any]]:
    """Lines of a shard, in its order; each writer answers what is its own, and is loaded when it is first needed."""
    seed = context.recipe.seed
    lines: list[dict[str, Any]] = [{} for _ in shard]
    for writer in stage.writers:
        places = [i for i, question in enumerate(shard) if question.writer(stage.writers, seed) == writer]
        if not places:
            continue
        if writer not in models:
            folder = context.target_folder if writer == TARGET else context.model_folder(writer)
            models[writer] = Model.load(folder, context.decode_mesh)
        model, own = models[writer], [shard[i] for i in places]
        for batch in generate_batches(
            model.decoder,
            model.params,
            [question.prompt.tokens for question in own],
            max_new_tokens=stage.max_new_tokens,
            temperature=[question.temperature for question in own],
            top_p=stage.top_p,
            seed=seed,
            example_ids=[example_id(question.id) for question in own],
            batch_size=stage.batch_size,
        ):
            for i, tokens in zip(batch.indices, batch.tokens, strict=True):
                prompt = own[i].prompt
                lines[places[i]] = {
                    "id": own[i].id,
                    "writer": writer,
                    "temperature": own[i].temperature,
                    "top_p": stage.top_p,
                    "seed": seed,
                    "finish": "eos" if tokens[-1] in model.decoder.config.eos_ids else "length",
                    "prompt_tokens": list(prompt.tokens),
                    "tokens": tokens,
                    "prompt": prompt.text,
                    "text": context.tokenizer.continuation(prompt.tokens, tokens),
                }
            advance(len(batch.indices))
    return lines
