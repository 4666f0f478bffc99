"""What each kind of stage does. A stage reads the folders of earlier ones and writes its own."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdraft.context import Context
from jaxdraft.data.pipeline import Batches
from jaxdraft.data.records import MANIFEST, PackedRows
from jaxdraft.data_stages import (
    Outputs,
    run_draft_vocabulary,
    run_score,
    run_train_tokenizer,
)
from jaxdraft.distributed import fetch, is_lead, on_lead, together
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.perplexity import read_documents
from jaxdraft.evaluate.sweep import Settings, Sweep, answers, at_temperatures, write_results
from jaxdraft.export import export_stage
from jaxdraft.generation import run_generate
from jaxdraft.home import RECORD
from jaxdraft.models import Decoder, ModelConfig, compute_dtype, init_params
from jaxdraft.models.decoder import Params, model_shardings
from jaxdraft.models.hf import load_config, load_model, save_model
from jaxdraft.models.subclone import project_embedding, subclone
from jaxdraft.past_drafts import PastDrafts
from jaxdraft.prepare import run_prepare, run_subset
from jaxdraft.probe import efficiency_summary, probe
from jaxdraft.recipe import (
    INITS,
    DraftVocabulary,
    Evaluate,
    Export,
    Generate,
    HFModel,
    Prepare,
    Score,
    Stage,
    Subset,
    Train,
    TrainTokenizer,
)
from jaxdraft.settings import to_json
from jaxdraft.stored_targets import check_stored
from jaxdraft.tokenizers import tokenizer_files
from jaxdraft.tracking import progress_bar, read_jsonl, write_jsonl
from jaxdraft.train import train

# Pinned: another number is another run.
INIT_PURPOSE = 1
CALIBRATION_ROWS = 16


def run_train(stage: Train, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    config, params, logs = train_stage(stage, context, folder, context.home.checkpoints(stage.name))
    params = fetch(params)
    if not is_lead():
        return [], {}
    save_model(context.model_folder(stage.name), config, params)
    for file in tokenizer_files(context.tokenizer_folder):
        shutil.copyfile(file, context.model_folder(stage.name) / file.name)
    steps = read_jsonl(folder / "metrics.jsonl")
    skipped = sum("skipped" in step for step in steps)
    return [*logs, *sorted(context.model_folder(stage.name).iterdir())], {
        "parameters": config.num_parameters,
        "steps": stage.steps,
        "tokens": int(sum(step["tokens"] for step in steps)),
        "loss": steps[-1]["loss"],
        **({"skipped updates": skipped} if skipped else {}),
        **efficiency_summary([line for measured in logs[1:] for line in read_jsonl(measured)]),
        "shape": to_json(context.trained_config(stage)),
        **({} if config.head_ids is None else {"draft vocabulary": len(config.head_ids)}),
    }


def train_stage(
    stage: Train, context: Context, folder: Path, checkpoints: Path | str, until: int | None = None
) -> tuple[ModelConfig, Params, list[Path]]:
    """Trains as a stage says, from the newest checkpoint or from the stage's start.

    Args:
      stage: the stage.
      context: where it reads.
      folder: gets the logs, and may hold those of the steps before the checkpoint.
      checkpoints: where the checkpoints are.
      until: the step to stop after, instead of the stage's last.

    Returns:
      The shape and the parameters of the model, and the logs whose bytes repeat: ``metrics.jsonl``, then
      ``block_efficiency.jsonl`` where it is measured.
    """
    recipe, seed = context.recipe, context.seed(stage)
    mesh = context.mesh
    rows = {name: context.rows(name) for name in stage.shares}
    is_stored = stage.target_logits == "stored"
    if is_stored:
        check_stored(stage, context, rows)
    batches = Batches(
        rows,
        stage.shares,
        batch_size=stage.batch_size,
        seed=seed,
        stored=is_stored,
    )
    target = load_model(context.target_folder, mesh=mesh, dtype=compute_dtype()) if recipe.uses_target(stage) else None
    config, start = _start(stage, context, target, rows)
    draft = Decoder(config, remat=stage.remat)
    measure = probe(stage, context, target, draft) if target else None
    teacher = target if stage.loss.needs_target and not is_stored else None
    del target  # one that only gave the start or its probabilities does not stay in memory
    frozen = {"target": (Decoder(teacher[0]), teacher[1])} if teacher else {}
    if stage.reference is not None:
        frozen["reference"] = _reference(stage.reference, config, context)
    params = train(
        folder,
        draft=draft,
        params=start,
        loss=stage.loss,
        batches=batches,
        optimizer=stage,
        mesh=mesh,
        frozen=frozen,
        seed=seed,
        accumulate=stage.accumulate,
        save_every=stage.save_every,
        keep_every=stage.keep_every,
        measure=measure,
        measure_every=stage.probe_every or max(1, stage.steps // 10),
        profile=context.profile,
        checkpoints_folder=checkpoints,
        before_save=context.home.keep,
        identity=on_lead(lambda: _identity(context.folder(stage.name))),
        until=until,
    )
    return config, params, [folder / "metrics.jsonl", *([folder / "block_efficiency.jsonl"] if measure else [])]


def _identity(folder: Path) -> dict[str, Any]:
    """What a checkpoint of a stage depends on, as its record says."""
    record = json.loads((folder / RECORD).read_text("utf-8"))
    return {key: record[key] for key in ("settings", "shape", "seed", "inputs")}


def _reference(name: str, config: ModelConfig, context: Context) -> tuple[Decoder, Params]:
    reference, params = load_model(context.model_folder(name), mesh=context.mesh, dtype=compute_dtype())
    if (reference.vocabulary, reference.head_ids) != (config.vocabulary, config.head_ids):
        raise ConfigError(f"reference={name!r} does not propose the same tokens as the draft that is trained")
    return Decoder(reference), params


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
        started, params = load_model(context.model_folder(stage.init), mesh=context.mesh)
        if _shape(started) != _shape(config):
            raise ConfigError(f"{stage.name}: init={stage.init!r} is a model of another shape than is trained here")
        return dataclasses.replace(config, head_ids=config.head_ids or started.head_ids), params
    if target and stage.init == "subclone":
        first = next(iter(rows.values()))  # the same rows on every process
        calibration = [first[i] for i in range(min(CALIBRATION_ROWS, len(first)))]
        tokens_BT, segments_BT = (np.stack([row[key] for row in calibration]) for key in ("tokens", "segment_ids"))
        return config, subclone(*target, config, tokens_BT.astype(np.int32), segments_BT > 0)
    key = jax.random.fold_in(jax.random.key(context.seed(stage), impl="threefry2x32"), INIT_PURPOSE)
    params = jax.jit(init_params, static_argnums=0, out_shardings=model_shardings(config, context.mesh))(config, key)
    if target and stage.init == "target-embedding":
        return config, project_embedding(*target, config, params)
    return config, params


def run_evaluate(stage: Evaluate, context: Context) -> Outputs:
    folder, drafts = context.folder(stage.name), stage.drafts
    target = Model.load(context.target_folder, context.decode_mesh)
    positions = target.decoder.config.max_positions
    asked = together(lambda: [(task, task.read(context.tokenizer, positions)) for task in stage.tasks])
    tasks = at_temperatures(asked, stage.temperatures)
    source = stage.perplexity
    text = None if source is None else together(lambda: read_documents(source, context.tokenizer))
    settings = Settings(
        stage.speculations, stage.batch_sizes, context.recipe.seed, stage.repeats, predict_up_to=stage.predict_up_to
    )
    past = {name: _past_drafts(context, name) for name in drafts} if stage.over_checkpoints else {}
    decoded = len(drafts) + sum(len(kept.steps) for kept in past.values() if stage.decode_checkpoints)
    series: list[dict[str, Any]] = []
    with progress_bar(answers(tasks, settings, decoded), stage.name, "answer") as bar:
        home = context.home
        sweep = Sweep(target, tasks, settings, context.tokenizer, folder, bar, home.aside(stage.name), home.keep, text)
        for name in drafts:
            draft = Model.load(context.model_folder(name), context.decode_mesh)
            try:
                sweep.measure(draft)
            finally:  # what is there of a stage that is stopped can be seen
                if is_lead():
                    results, samples = sweep.results(draft)
                    write_results(folder / name, {**results, "draft_stage": name, **_relative(context, name)}, samples)
        for name, kept in past.items():
            for step in kept.steps:
                draft = kept.load(step, context.mesh, context.decode_mesh)
                if stage.decode_checkpoints:
                    sweep.measure(draft)
                    lines = sweep.results(draft)[0]["runs"] if is_lead() else ()
                else:
                    lines = sweep.offline(draft)
                series += [{"draft": name, "step": step, **line} for line in lines]
    files = [folder / name / file for name in drafts for file in ("results.json", "samples.jsonl")]
    if stage.over_checkpoints:
        files.append(folder / "checkpoints.jsonl")
        if is_lead():
            write_jsonl(files[-1], series)
    return files, {"prompts": sum(len(prompts) for _, prompts in tasks)}


def run_export(stage: Export, context: Context) -> Outputs:
    folder = context.folder(stage.name)
    for other in context.recipe.stages:  # the card names the licences of all data
        context.home.fetch(other.name, (MANIFEST,))
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
    Subset: run_subset,
    Train: run_train,
    Generate: run_generate,
    Score: run_score,
    DraftVocabulary: run_draft_vocabulary,
    Evaluate: run_evaluate,
    Export: run_export,
}

TOGETHER = (Prepare, Train, Generate, Score, Evaluate)
"""What all processes do together; the lead alone does the rest. Files and facts are the lead's."""

RENDER = (Prepare, Generate, Evaluate)
"""What may read conversations, in the words of the chat template."""


def external_inputs(stage: Stage, context: Context) -> dict[str, str]:
    """Hashes of what a stage reads from outside the run directory: corpora, prompts, a target's folder."""
    found = dict(_fingerprints(stage, stage.name))
    if isinstance(context.recipe.target, HFModel) and context.recipe.uses_target(stage):
        found |= {f"target/{name}": digest for name, digest in context.target_hashes.items()}
    if stage.uses_tokenizer and not isinstance(context.recipe.tokenizer, str):
        found["tokenizer"] = context.tokenizer.fingerprint()
        found |= {f"tokenizer/{name}": digest for name, digest in context.tokenizer_hashes.items()}
        if isinstance(stage, RENDER) and (template := context.tokenizer.template_fingerprint()):
            found["chat template"] = template
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


def _past_drafts(context: Context, name: str) -> PastDrafts:
    stage = context.recipe.stage(name)
    assert isinstance(stage, Train)
    config = load_config(context.model_folder(name))
    return PastDrafts(name, context.home.checkpoints(name), stage, stage.keep_every, config)


def _relative(context: Context, draft: str) -> dict[str, str]:
    """Names of target and draft that do not depend on where the run directory is."""
    target = context.recipe.target
    return {"target": target.path if isinstance(target, HFModel) else target, "draft": draft}


def _shape(config: ModelConfig) -> ModelConfig:
    """Without what two spellings of one shape may differ in, and without the draft vocabulary, which may change."""
    return dataclasses.replace(config, head_dim=config.head_size, head_ids=None)
