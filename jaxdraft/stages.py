"""What each kind of stage does. A stage reads the folders of earlier ones and writes its own."""

import collections
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.context import VOCABULARY, Context
from jaxdraft.data.pipeline import Batches, pack_concatenate, pack_whole
from jaxdraft.data.prompts import Prompt, example_id
from jaxdraft.data.records import MANIFEST, PackedRows, write_rows
from jaxdraft.decode import generate_batches
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Evaluator, Model, Settings, write_results
from jaxdraft.evaluate.metrics import offline_metrics
from jaxdraft.export import export_stage
from jaxdraft.models import Decoder, ModelConfig, compute_dtype, init_params
from jaxdraft.models.decoder import Params
from jaxdraft.models.hf import load_config, load_model, save_model
from jaxdraft.models.subclone import project_embedding, subclone
from jaxdraft.recipe import (
    INITS,
    DraftVocabulary,
    Evaluate,
    Export,
    Generate,
    HFModel,
    Prepare,
    Stage,
    Train,
    TrainTokenizer,
)
from jaxdraft.settings import to_json
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import tokenizer_files
from jaxdraft.tracking import progress_bar, read_jsonl, write_jsonl
from jaxdraft.train import train
from jaxdraft.train.state import abstract_state, state_shardings

# Pinned: another number is another run.
INIT_PURPOSE = 1
CALIBRATION_ROWS = 16


Outputs = tuple[list[Path], dict[str, Any]]  # files whose bytes are the stage's result; facts for the report


def run_train_tokenizer(stage: TrainTokenizer, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    train_sentencepiece(_documents(stage.sources, stage.name), folder, stage.vocab_size)
    return tokenizer_files(folder), {"vocab_size": stage.vocab_size}


def run_prepare(stage: Prepare, context: Context) -> Outputs:
    counts: collections.Counter[str] = collections.Counter()
    rows = pack_concatenate(_documents(stage.sources, stage.name), context.tokenizer, stage.length, counts)
    return _write_rows(stage.name, rows, stage.length, to_json(stage.sources), counts, context)


def run_train(stage: Train, context: Context) -> Outputs:
    folder, recipe = context.folder(stage.name), context.recipe
    mesh = recipe.mesh.build()
    rows = {name: context.rows(name) for name in stage.shares}
    batches = Batches(
        rows,
        stage.shares,
        batch_size=stage.batch_size,
        seed=recipe.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    target = load_model(context.target_folder, mesh=mesh, dtype=compute_dtype()) if stage.uses_target else None
    config, start = _start(stage, context, target, rows)
    teacher = target if stage.loss.needs_target else None
    del target  # one that only gave the start does not stay in memory
    params = train(
        folder,
        draft=Decoder(config, remat=stage.remat),
        params=start,
        loss=stage.loss,
        batches=batches,
        optimizer=stage,
        mesh=mesh,
        target=Decoder(teacher[0]) if teacher else None,
        target_params=teacher[1] if teacher else None,
        accumulate=stage.accumulate,
        save_every=stage.save_every,
        keep_every=stage.keep_every,
    )
    save_model(context.model_folder(stage.name), config, params)
    for file in tokenizer_files(context.tokenizer_folder):
        shutil.copyfile(file, context.model_folder(stage.name) / file.name)
    steps = read_jsonl(folder / "metrics.jsonl")
    files = [folder / "metrics.jsonl", *sorted(context.model_folder(stage.name).iterdir())]
    return files, {
        "parameters": config.num_parameters,
        "steps": stage.steps,
        "tokens": int(sum(step["tokens"] for step in steps)),
        "loss": steps[-1]["loss"],
        "shape": to_json(context.trained_config(stage)),
        **({} if config.head_ids is None else {"draft vocabulary": len(config.head_ids)}),
    }


def _start(
    stage: Train,
    context: Context,
    target: tuple[ModelConfig, Params] | None,
    rows: Mapping[str, PackedRows],
) -> tuple[ModelConfig, Params]:
    """The shape that is trained and the parameters that training begins with."""
    config = context.trained_config(stage)
    if stage.draft_vocabulary is not None:
        config = dataclasses.replace(config, head_ids=context.draft_vocabulary(stage.draft_vocabulary))
    if stage.init not in INITS:
        started, params = load_model(context.model_folder(stage.init), mesh=context.recipe.mesh.build())
        if _shape(started) != _shape(config):
            raise ConfigError(f"{stage.name}: init={stage.init!r} is a model of another shape than is trained here")
        return dataclasses.replace(config, head_ids=config.head_ids or started.head_ids), params
    if target and stage.init == "subclone":
        first = next(iter(rows.values()))  # the same rows on every process
        calibration = [first[i] for i in range(min(CALIBRATION_ROWS, len(first)))]
        tokens_BT, segments_BT = (np.stack([row[key] for row in calibration]) for key in ("tokens", "segment_ids"))
        return config, subclone(*target, config, jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(segments_BT > 0))
    params = init_params(config, jax.random.fold_in(jax.random.key(context.recipe.seed), INIT_PURPOSE))
    if target and stage.init == "target-embedding":
        return config, project_embedding(*target, config, params)
    return config, params


@dataclasses.dataclass(frozen=True)
class _Question:
    """One answer to be generated."""

    prompt: Prompt
    temperature: float

    @property
    def id(self) -> str:
        return f"{self.prompt.id}@{self.temperature:g}"


def run_generate(stage: Generate, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    questions = [
        _Question(prompt, temperature)
        for source in stage.prompts
        for prompt in source.prompts(context.tokenizer)
        for temperature in stage.temperatures
    ]
    if repeated := [id for id, count in collections.Counter(q.id for q in questions).items() if count > 1]:
        raise ConfigError(f"{stage.name}: two answers would have the id {repeated[0]!r}: give prompts ids of their own")
    if not questions:
        raise ConfigError(f"{stage.name}: no prompts: all of them are longer than the source's max_tokens allows")
    shards = [questions[i : i + stage.shard_size] for i in range(0, len(questions), stage.shard_size)]
    paths = [folder / f"responses-{i:05d}-of-{len(shards):05d}.jsonl" for i in range(len(shards))]
    target: Model | None = None
    with progress_bar(len(questions), stage.name, "answer") as bar:
        for path, shard in zip(paths, shards, strict=True):
            if path.exists():
                bar.update(len(shard))
                continue
            target = target or Model.load(context.target_folder)
            write_jsonl(path, _answers(stage, context, target, shard, bar.update))
    lines = [line for path in paths for line in read_jsonl(path)]

    def examples() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for line in lines:
            prompt, answer = line["prompt_tokens"], line["tokens"]
            yield prompt + answer, [int(stage.train_on_prompts)] * len(prompt) + [1] * len(answer)

    counts: collections.Counter[str] = collections.Counter()
    rows = pack_whole(examples(), stage.length, counts)
    source = {"target": to_json(context.recipe.target)}
    files, summary = _write_rows(stage.name, rows, stage.length, source, counts, context)
    ended = sum(line["finish"] == "eos" for line in lines)
    return [*paths, *files], {"answers": len(lines), "ended by EOS": f"{ended / len(lines):.0%}", **summary}


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


def run_evaluate(stage: Evaluate, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    target = Model.load(context.target_folder)
    tasks = [(task, task.prompts.prompts(context.tokenizer)) for task in stage.tasks]
    for task, prompts in tasks:
        if not prompts:
            raise ConfigError(f"{stage.name}: task {task.name!r} has no prompts")
    settings = Settings(stage.block_sizes, context.recipe.seed, stage.batch_size, stage.repeats)
    answers = Evaluator.amount(sum(len(p) for _, p in tasks), len(stage.drafts), len(stage.block_sizes))
    series: list[dict[str, Any]] = []
    with progress_bar(answers, stage.name, "answer") as bar:
        evaluator = Evaluator(target, tasks, settings, bar.update)
        for name in stage.drafts:
            results, samples = evaluator.measure(Model.load(context.model_folder(name)))
            results = {**results, "draft_stage": name, **_relative(context, name)}
            write_results(folder / name, results, samples)
            if stage.over_checkpoints:
                series += _over_checkpoints(stage, context, name, evaluator)
    if stage.over_checkpoints:
        write_jsonl(folder / "checkpoints.jsonl", series)
    files = [folder / name / file for name in stage.drafts for file in ("results.json", "samples.jsonl")]
    if stage.over_checkpoints:
        files.append(folder / "checkpoints.jsonl")
    return files, {"prompts": sum(len(p) for _, p in tasks)}


def run_export(stage: Export, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    written = export_stage(
        context.workdir,
        stage.draft,
        folder,
        dtype=stage.dtype,
        block_size=stage.block_size,
        evaluation=stage.evaluation,
        vocabulary=stage.vocabulary,
    )
    return written, {"folder": stage.name, "dtype": stage.dtype}


EXECUTE: dict[type[Stage], Callable[[Any, Context], Outputs]] = {
    TrainTokenizer: run_train_tokenizer,
    Prepare: run_prepare,
    Train: run_train,
    Generate: run_generate,
    DraftVocabulary: run_draft_vocabulary,
    Evaluate: run_evaluate,
    Export: run_export,
}


def external_inputs(stage: Stage, context: Context) -> dict[str, str]:
    """Hashes of what a stage reads from outside the run directory: corpora, prompts, a target's folder."""
    found = dict(_fingerprints(stage, stage.name))
    if isinstance(context.recipe.target, HFModel):
        if stage.uses_target:
            found["target"] = context.target_hash
        if stage.uses_tokenizer and context.recipe.tokenizer is None:
            found["tokenizer"] = context.tokenizer.fingerprint()
    return found


def _fingerprints(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if callable(getattr(value, "fingerprint", None)):
        yield name, value.fingerprint()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _fingerprints(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _fingerprints(item, f"{name}.{i}")


def _documents(sources: Sequence[Any], name: str) -> Iterator[str]:
    with progress_bar(0, name, "document") as bar:
        for document in itertools.chain.from_iterable(source.documents() for source in sources):
            bar.update(1)
            yield document


def _write_rows(name, rows, length, source, counts, context: Context) -> Outputs:
    folder = context.folder(name)
    manifest = write_rows(
        folder,
        rows,
        length=length,
        vocab_size=context.tokenizer.vocab_size,
        tokenizer_fingerprint=context.tokenizer.fingerprint(),
        source={"settings": source},
        counts=counts,
    )
    files = [folder / MANIFEST, *(folder / shard["file"] for shard in manifest["shards"])]
    return files, {"rows": manifest["rows"], "tokens": manifest["tokens"], **counts}


def _answers(stage, context, target, shard: list[_Question], advance) -> list[dict[str, Any]]:
    eos_ids = target.decoder.config.eos_ids
    lines: list[dict[str, Any]] = [{} for _ in shard]
    for batch in generate_batches(
        target.decoder,
        target.params,
        [question.prompt.tokens for question in shard],
        max_new_tokens=stage.max_new_tokens,
        temperature=[question.temperature for question in shard],
        top_p=stage.top_p,
        seed=context.recipe.seed,
        example_ids=[example_id(question.id) for question in shard],
        batch_size=stage.batch_size,
    ):
        for i, tokens in zip(batch.indices, batch.tokens, strict=True):
            lines[i] = {
                "id": shard[i].id,
                "temperature": shard[i].temperature,
                "top_p": stage.top_p,
                "seed": context.recipe.seed,
                "finish": "eos" if tokens[-1] in eos_ids else "length",
                "prompt_tokens": list(shard[i].prompt.tokens),
                "tokens": tokens,
                "prompt": shard[i].prompt.text,
                "text": context.tokenizer.continuation(shard[i].prompt.tokens, tokens),
            }
        advance(len(batch.indices))
    return lines


def _over_checkpoints(stage: Evaluate, context: Context, name: str, evaluator: Evaluator) -> list[dict[str, Any]]:
    """Exact offline block efficiency of every kept checkpoint: one pass over what the target wrote, no decoding."""
    train_stage = context.recipe.stage(name)
    assert isinstance(train_stage, Train)
    config = load_config(context.model_folder(name))
    shardings = state_shardings(config, train_stage, context.recipe.mesh.build())
    lines = []
    with Checkpoints(context.folder(name) / "checkpoints", train_stage.keep_every) as checkpoints:
        kept = (train_stage.steps, *range(0, train_stage.steps, train_stage.keep_every or train_stage.steps))
        for step in sorted(set(kept).intersection(checkpoints.steps)):
            state = checkpoints.restore(abstract_state(train_stage, config, shardings), step)
            draft = Model.create(name, config, state.params)
            for baseline in evaluator.baselines:
                acceptances = evaluator.acceptances(draft, baseline)
                for block_size in stage.block_sizes:
                    lines.append(
                        {
                            "draft": name,
                            "step": step,
                            "task": baseline.task.name,
                            "block_size": block_size,
                            **offline_metrics(acceptances, block_size),
                        }
                    )
    return lines


def _relative(context: Context, draft: str) -> dict[str, str]:
    """Names of target and draft that do not depend on where the run directory is."""
    target = context.recipe.target
    return {"target": target.path if isinstance(target, HFModel) else target, "draft": draft}


def _shape(config: ModelConfig) -> ModelConfig:
    """Without what two spellings of one shape may differ in, and without the draft vocabulary, which may change."""
    return dataclasses.replace(config, head_dim=config.head_size, head_ids=None)
