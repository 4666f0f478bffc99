"""The folder that engines load: weights, configuration, the target's tokenizer files byte for byte, a model card."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft import __version__
from jaxdraft.data.records import MANIFEST
from jaxdraft.errors import ConfigError, naming
from jaxdraft.evaluate.collect import of_smallest_batch
from jaxdraft.evaluate.words import decoding
from jaxdraft.files import commit
from jaxdraft.licences import TERMS, source_licences
from jaxdraft.models import ModelConfig, head_weight, init_params
from jaxdraft.models.decoder import Params
from jaxdraft.models.folder import INDEX, WEIGHTS
from jaxdraft.models.hf import load_config, load_model, save_model
from jaxdraft.models.hf_config import eos_json
from jaxdraft.models.presets import preset
from jaxdraft.tokenizers import load_tokenizer, tokenizer_files
from jaxdraft.untrusted import damaged, is_plain_name, read_json

CARD = "README.md"
_MADE = "Made by jaxdraft for speculative decoding"
MODEL = "model"  # the folder in a Train stage's own that holds its model


def export_stage(
    run: Path,
    stage: str,
    out: Path,
    *,
    dtype: str = "float32",
    block_size: int = 5,
    evaluation: str | None = None,
    vocabulary: str = "full",
) -> list[Path]:
    """Exports the model of a finished Train stage and returns the files written.

    The recipe's own target gets a target's model card, which opens with the recipe's description.

    Args:
      run: the run directory.
      stage: name of the Train stage.
      out: the folder to write.
      dtype: of the stored weights.
      block_size: draft tokens per block that transformers' assisted generation shall use.
      evaluation: the Evaluate stage whose figures go into the model card.
      vocabulary: as in ``export_model``.

    Raises:
      ConfigError: there is no such finished stage, or the evaluation did not measure it, or it has no draft vocabulary
        to be exported with.
    """
    record = run / stage / "stage.json"
    made: dict[str, Any] = {"status": "missing"}
    if record.exists():
        made = read_json(record, fields={"status": str, "kind": str})
    if made["status"] != "done" or made["kind"] != "Train":
        trained = [p.parents[1].name for p in sorted(run.glob(f"*/{MODEL}/config.json"))]
        raise ConfigError(f"{run} has no finished Train stage {stage!r}; it has: {', '.join(trained) or 'none'}")
    evaluations = []
    if evaluation is not None:
        results = run / evaluation / stage / "results.json"
        if not results.exists():
            raise ConfigError(f"{results} does not exist: stage {evaluation!r} did not measure {stage!r}")
        evaluations = of_smallest_batch(read_json(results, fields={"runs": list})["runs"])
    recipe = read_json(run / "recipe.json", fields={"title": str, "target": object})
    target = recipe["target"]
    folder = run / stage / MODEL
    with damaged(record):
        settings = made["settings"]
        if target == stage:
            run_by = read_json(run / "run.json", fields={"git": object, "python": str})
            own = {
                "run by": f"jaxdraft at revision {run_by['git']}, Python {run_by['python']}",
                "trained": f"{settings['steps']} steps of {settings['batch_size']} rows",
            }
        else:
            own = {"target": target if isinstance(target, str) else Path(target["path"]).name}
        provenance = {
            "recipe": recipe["title"],
            **own,
            "stage": stage,
            "loss": settings["loss"]["type"],
            "seed": made["seed"],
            "settings and data (sha256)": made["fingerprint"],
            "tokenizer (sha256)": load_tokenizer(folder).fingerprint(),
            **_licences(run, stage, recipe),
        }
    config, params = load_model(folder)
    return export_model(
        out,
        config,
        params,
        folder,
        dtype=dtype,
        block_size=block_size,
        provenance=provenance,
        evaluations=evaluations,
        vocabulary=vocabulary,
        description=recipe.get("description", "") if target == stage else None,
    )


def _licences(run: Path, stage: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """For the model card: of the target, what it asks of models that learn from it, and of the data.

    What the run holds besides the data that the stage came of is left out: the card would depend on what has run.
    """
    found = {}
    if (record := run / "run.json").is_file() and (target := read_json(record).get("target_licence")):
        found["licence of the target"] = target
        if terms := TERMS.get(target):
            found["it says"] = f"{terms.clause} ({terms.where})"
    read = _came_of(run, stage)
    # What Score made of rows names their texts no better than their own manifest.
    names = [made["name"] for made in recipe["stages"] if made["name"] in read and made["kind"] != "Score"]
    manifests = [path for name in names if (path := run / name / MANIFEST).is_file()]
    data = [licence for path in manifests for licence in source_licences(read_json(path))]
    return found | ({"licences of the data": ", ".join(dict.fromkeys(data))} if data else {})


def _came_of(run: Path, stage: str) -> set[str]:
    """The stages that a stage has read, and those that these have read, by their records."""
    found, left = set[str](), [stage]
    while left:
        record = run / left.pop() / "stage.json"
        inputs = read_json(record, fields={"inputs": dict})["inputs"] if record.is_file() else {}
        new = {name for name in inputs if is_plain_name(name)} - found
        found, left = found | new, [*left, *new]
    return found


def export_untrained(
    target: Path, shape: str, out: Path, *, dtype: str = "float32", block_size: int = 5, seed: int = 0
) -> list[Path]:
    """Exports a draft with random weights, to try an engine with before a day is spent on training.

    Args:
      target: Hugging Face folder whose vocabulary, tokenizer and context the draft takes.
      shape: a preset's name, or a number of parameters as in ``50M``.
      out: the folder to write.
      dtype: of the stored weights.
      block_size: draft tokens per block that transformers' assisted generation shall use.
      seed: of the weights.

    Raises:
      ConfigError: no such preset, or one of another vocabulary than the target's.
    """
    model = load_config(target)
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMB]?)", shape.upper())
    if number:
        count = float(number[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[number[2]]
        draft = ModelConfig.for_target(model, parameters=int(count))
    else:
        draft = preset(shape)
        if draft.vocab_size != model.vocab_size:
            raise ConfigError(f"{shape} has a vocabulary of {draft.vocab_size}, {target} one of {model.vocab_size}")
        draft = dataclasses.replace(
            draft, bos_id=model.bos_id, eos_ids=model.eos_ids, max_positions=model.max_positions
        )
    if draft.num_parameters >= model.num_parameters:
        raise ConfigError(f"{shape} has {draft.num_parameters:,} parameters, {target} only {model.num_parameters:,}")
    provenance = {"recipe": "none: untrained", "target": target.name, "shape": shape, "seed": seed}
    params = init_params(draft, jax.random.key(seed, impl="threefry2x32"))
    return export_model(out, draft, params, target, dtype=dtype, block_size=block_size, provenance=provenance)


def export_model(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer_folder: Path,
    *,
    dtype: str = "float32",
    block_size: int = 5,
    provenance: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    vocabulary: str = "full",
    description: str | None = None,
) -> list[Path]:
    """Writes a Hugging Face folder, byte-identical whenever its inputs are, and returns its files.

    Args:
      folder: made if it does not exist.
      config: the model's shape.
      params: with stacked layers.
      tokenizer_folder: whose tokenizer files are copied byte for byte; engines compare them with the target's.
      dtype: of the stored weights.
      block_size: draft tokens per block that transformers' assisted generation shall use.
      provenance: facts for the model card.
      evaluations: ``runs`` of a ``results.json``, for the model card.
      vocabulary: ``"full"`` is plain weights: rows outside a draft vocabulary propose too, as they learned to before it
        was chosen, so a draft that was never trained on all tokens gets worse; ``"draft"`` the draft vocabulary's rows
        of the head, and the map ``d2t``.
      description: of a target, for its model card; ``None`` says that this is a draft.

    Raises:
      ConfigError: the folder holds a model of another origin, there is no draft vocabulary to be exported with, or a
        weight does not fit into ``dtype``.
      OSError: a file cannot be written; the message names it, or the folder.
    """
    _check_out(folder, tokenizer_folder)
    if vocabulary == "draft" and config.head_ids is None:
        raise ConfigError("this draft has no draft vocabulary: export it with vocabulary full")
    if vocabulary == "full" and config.head_ids is not None:
        limited = f"{len(config.head_ids)} tokens in training and in figures below; all can be proposed here"
        provenance = {**provenance, "draft vocabulary": limited}
        config = dataclasses.replace(config, head_ids=None)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # First of all, and at once: it marks the folder as one that an export may write to again.
        card = folder / f"{CARD}.tmp"
        card.write_text(_card(config, dtype, block_size, provenance, evaluations, description))
        commit(card, folder / CARD)
        weights = save_model(folder, config, params, dtype=jnp.dtype(dtype), narrow_head=True)
        for stale in tokenizer_files(folder):
            stale.unlink()
        copied = [Path(shutil.copyfile(file, folder / file.name)) for file in tokenizer_files(tokenizer_folder)]
        generation: dict[str, Any] = {"bos_token_id": config.bos_id, "eos_token_id": eos_json(config)}
        if description is None:
            # Assisted generation reads the draft's own file; its defaults are 20 tokens, a stop below confidence 0.4.
            generation |= {
                "num_assistant_tokens": block_size,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": 0.0,
            }
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        _check_readable(folder, config, params, dtype)
        return [*weights, folder / "generation_config.json", folder / CARD, *copied]


def _check_out(folder: Path, tokenizer_folder: Path) -> None:
    """Weights cannot be had back: nothing but an earlier export is written over."""
    card = folder / CARD
    ours = card.is_file() and _MADE in card.read_text("utf-8", errors="replace")
    other_model = any((folder / name).exists() for name in ("config.json", INDEX, WEIGHTS)) and not ours
    if other_model or folder.resolve() == tokenizer_folder.resolve():
        raise ConfigError(f"{folder} holds a model that no export wrote: give a new folder to write to")


def _check_readable(folder: Path, config: ModelConfig, params: Params, dtype: str) -> None:
    """What was written reads back as what is in memory, to the bit once rounded to ``dtype``: so do its logits."""
    _, stored = load_model(folder, dtype=jnp.dtype(dtype))
    if not config.tie_embeddings:
        params, stored = ({**tree, "head": head_weight(config, tree)} for tree in (params, stored))
    names = jax.tree_util.tree_leaves_with_path(params)
    for (path, ours), theirs in zip(names, jax.tree.leaves(stored), strict=True):
        if not np.array_equal(np.asarray(jnp.asarray(ours, theirs.dtype)), np.asarray(theirs)):
            raise OSError(f"{folder}: {jax.tree_util.keystr(path)} does not read back as it was written")


def _card(config, dtype, block_size, provenance, evaluations, description) -> str:
    proposed = "" if config.head_ids is None else f" ({len(config.head_ids)} of it proposed)"
    versions = f"jaxdraft {__version__}, jax {jax.__version__}"
    is_draft = description is None
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [speculative-decoding, {'draft-model, ' if is_draft else ''}jaxdraft]",
        "---",
        f"# A {'draft' if is_draft else 'target'} model of {config.num_parameters:,} parameters",
        "",
        f"{_MADE}{'' if is_draft else ', to be sped up by a draft'}. {config.num_layers} layers, "
        f"hidden size {config.hidden_size}, vocabulary {config.vocabulary}{proposed}, weights in {dtype}.",
        "",
        *([description, ""] if description else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**provenance, "made with": versions}.items()),
        "",
        "## Use",
        "",
        *(_draft_use(block_size) if is_draft else _TARGET_USE),
    ]
    if evaluations:
        lines += [
            "",
            "## Measured",
            "",
            "| task | decoded | block size | block efficiency | 95 % interval | MBSU |",
            "|---|---|---|---|---|---|",
        ]
        for run in evaluations:
            low, high = run["block_efficiency_ci95"]
            lines.append(
                f"| {run['task']} | {decoding(run)} | {run['block_size']} | {run['block_efficiency']:.3f} | "
                f"{low:.3f} – {high:.3f} | {run['mbsu']:.3f} |"
            )
    return "\n".join(lines) + "\n"


_TARGET_USE = (
    "```sh",
    "jaxdraft sample --target THIS_FOLDER --prompt TEXT",
    "jaxdraft evaluate --target THIS_FOLDER --draft DRAFT --prompts prompts.jsonl --out results",
    "```",
    "",
    'A recipe of `jaxdraft run` makes drafts for it with `target=HFModel("THIS_FOLDER")`.',
)


def _draft_use(block_size: int) -> list[str]:
    return [
        "```python",
        "target.generate(**inputs, assistant_model=draft)  # transformers, batch size 1",
        "# OpenVINO; greedily: sampling with a draft fails in 2026.4 (openvinotoolkit/openvino.genai#4190)",
        'pipeline = openvino_genai.LLMPipeline(target, "CPU", draft_model=openvino_genai.draft_model(draft, "CPU"))',
        f"pipeline.generate(prompt, max_new_tokens=128, num_assistant_tokens={block_size})",
        "```",
        "```sh",
        f'vllm serve TARGET --speculative-config \'{{"method": "draft_model", "model": "THIS_FOLDER", '
        f'"num_speculative_tokens": {block_size}}}\'',
        "python -m sglang.launch_server --model-path TARGET --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path THIS_FOLDER --speculative-num-steps {block_size} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {block_size + 1}",
        "optimum-cli export openvino --task text-generation-with-past --model THIS_FOLDER DRAFT_OV  # OpenVINO's draft",
        "python convert_hf_to_gguf.py THIS_FOLDER --outfile draft.gguf  # llama.cpp, then:",
        f"llama-server -m TARGET.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {block_size}",
        "jaxdraft evaluate --target TARGET --draft THIS_FOLDER --prompts prompts.jsonl --out results",
        "```",
        "",
        "llama.cpp proposes the draft's most likely tokens also where the target samples, and so does vLLM without "
        '`"draft_sample_method": "probabilistic"`: fewer are then accepted than by rejection sampling.',
    ]
