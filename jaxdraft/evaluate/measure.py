"""Measures drafts against a target: decodes alone and with the draft, on the same prompts, by programs of one style."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdraft.data.prompts import Prompt, example_id
from jaxdraft.decode import (
    Acceptance,
    Seconds,
    Speculation,
    SpeculativeResult,
    acceptance_ratios,
    expected_blocks,
    generate_batches,
    speculative_batches,
    step_latency,
)
from jaxdraft.evaluate import metrics
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models import Decoder, ModelConfig, compute_dtype, for_decoding
from jaxdraft.models.decoder import Params, model_shardings
from jaxdraft.models.hf import load_model
from jaxdraft.tracking import write_jsonl

logger = logging.getLogger(__name__)

_LATENCY_CONTEXT = 64


@functools.lru_cache
def _unstack(config: ModelConfig, mesh: Mesh) -> Callable[[Params], Params]:
    """Made once for a model that is shown again and again: to trace its shardings takes longer than the copy."""
    to = model_shardings(config, mesh, scan=False)
    return jax.jit(functools.partial(for_decoding, config), out_shardings=to)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model ready to decode.

    Attributes:
      name: for results.
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
    """

    name: str
    decoder: Decoder
    params: Params

    @classmethod
    def create(cls, name: str, config: ModelConfig, params: Params, mesh: Mesh) -> "Model":
        """From stacked parameters on the same devices in the same order."""
        return cls(name, Decoder(config, scan=False), _unstack(config, mesh)(params))

    @classmethod
    def load(cls, folder: str | Path, mesh: Mesh | None = None) -> "Model":
        """From a Hugging Face folder, onto a mesh or the first device."""
        config, params = load_model(folder, mesh=mesh, dtype=compute_dtype(), scan=False)
        return cls(str(folder), Decoder(config, scan=False), params)

    @property
    def num_parameters(self) -> int:
        return self.decoder.config.num_parameters


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """What the target writes alone for a task, and how long it takes.

    Attributes:
      task: the task.
      prompts: its prompts.
      answers: new tokens per prompt.
      batches: per batch, indices of its prompts and its times.
    """

    task: Task
    prompts: list[Prompt]
    answers: list[list[int]]
    batches: list[tuple[list[int], Seconds]]

    @property
    def prompt_tokens(self) -> list[list[int]]:
        return [list(prompt.tokens) for prompt in self.prompts]

    @property
    def decoding(self) -> dict[str, Any]:
        return {"temperature": self.task.temperature, "top_p": self.task.top_p}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How everything is decoded.

    Attributes:
      block_sizes: γ.
      seed: of all randomness.
      batch_size: prompts decoded at once.
      repeats: each batch is timed so often, and the best counts.
    """

    block_sizes: tuple[int, ...]
    seed: int = 0
    batch_size: int = 1
    repeats: int = 2


class Evaluator:
    """Measures drafts of one target; what the target does alone is done once.

    Args:
      target: the model to be accelerated.
      tasks: with the prompts of each.
      settings: how to decode.
      advance: called with a number of prompts whenever they are done.
    """

    def __init__(
        self,
        target: Model,
        tasks: Sequence[tuple[Task, list[Prompt]]],
        settings: Settings,
        advance: Callable[[int], Any] = lambda _: None,
    ):
        self._target, self._settings, self._advance = target, settings, advance
        self._latencies: dict[tuple[str, int], float] = {}
        self.baselines = [self._alone(task, prompts) for task, prompts in tasks]

    @staticmethod
    def amount(tasks: int, drafts: int, block_sizes: int) -> int:
        """How often ``advance`` hears of each prompt."""
        return tasks * (1 + drafts * block_sizes)

    def measure(self, draft: Model) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Contents of ``results.json`` and lines of ``samples.jsonl`` for one draft."""
        ratio = draft.num_parameters / self._target.num_parameters
        runs, samples = [], []
        for baseline in self.baselines:
            acceptances = self.acceptances(draft, baseline)
            for block_size in self._settings.block_sizes:
                results, batches = self._with_draft(draft, baseline, block_size)
                runs.append(self._run(draft, baseline, block_size, ratio, results, batches, acceptances))
                samples += _samples(baseline, block_size, results, acceptances)
        parameters = {"target": self._target.num_parameters, "draft": draft.num_parameters, "ratio": ratio}
        settings = {**dataclasses.asdict(self._settings), "dtype": str(jax.tree.leaves(draft.params)[0].dtype)}
        results_json = {
            "target": self._target.name,
            "draft": draft.name,
            "parameters": parameters,
            "settings": settings,
            "runs": runs,
        }
        return results_json, samples

    def acceptances(self, draft: Model, baseline: Baseline) -> list[Acceptance]:
        """The draft's acceptance at every token that the target wrote alone."""
        return acceptance_ratios(
            self._target.decoder,
            self._target.params,
            draft.decoder,
            draft.params,
            baseline.prompt_tokens,
            baseline.answers,
            max_new_tokens=baseline.task.max_new_tokens,
            **baseline.decoding,
        )

    def _alone(self, task: Task, prompts: list[Prompt]) -> Baseline:
        answers: list[list[int]] = [[] for _ in prompts]
        batches = []
        for batch in generate_batches(
            self._target.decoder, self._target.params, [p.tokens for p in prompts], **self._decoding(task, prompts)
        ):
            batches.append((batch.indices, batch.seconds))
            for i, tokens in zip(batch.indices, batch.tokens, strict=True):
                answers[i] = tokens
            self._advance(len(batch.indices))
        return Baseline(task, prompts, answers, batches)

    def _with_draft(
        self, draft: Model, baseline: Baseline, block_size: int
    ) -> tuple[list[SpeculativeResult], list[tuple[list[int], Seconds]]]:
        found: dict[int, SpeculativeResult] = {}
        batches = []
        for batch in speculative_batches(
            self._target.decoder,
            self._target.params,
            draft.decoder,
            draft.params,
            baseline.prompt_tokens,
            speculation=Speculation(block_size),
            **self._decoding(baseline.task, baseline.prompts),
        ):
            batches.append((batch.indices, batch.seconds))
            found.update(zip(batch.indices, batch.results, strict=True))
            self._advance(len(batch.indices))
        return [found[i] for i in range(len(baseline.prompts))], batches

    def _decoding(self, task: Task, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {
            "example_ids": [example_id(prompt.id) for prompt in prompts],
            "max_new_tokens": task.max_new_tokens,
            "temperature": task.temperature,
            "top_p": task.top_p,
            "seed": self._settings.seed,
            "batch_size": self._settings.batch_size,
            "repeats": self._settings.repeats,
        }

    def _run(self, draft, baseline, block_size, ratio, results, batches, acceptances) -> dict[str, Any]:
        task = baseline.task
        counted = metrics.acceptance_metrics(results, block_size, ratio)
        latencies = {
            "draft_latency": self._latency(draft, 1),
            "target_latency_1": self._latency(self._target, 1),
            "target_latency_block": self._latency(self._target, block_size + 1),
        }
        run = {
            "task": task.name,
            "block_size": block_size,
            **baseline.decoding,
            **counted,
            **metrics.offline_metrics([a.accept_N for a in acceptances], block_size),
            **metrics.overlap_metrics(acceptances),
            **_speeds(baseline, results, batches),
            **latencies,
            "predicted_speedup": round(
                metrics.predicted_speedup(counted["block_efficiency"], block_size, *latencies.values()), 4
            ),
        }
        if task.temperature == 0:
            run["identical_to_target"] = sum(
                r.tokens == answer for r, answer in zip(results, baseline.answers, strict=True)
            )
            if run["identical_to_target"] < len(results):
                logger.warning(
                    "%s, γ = %d: %d of %d greedy answers differ from the target's own%s",
                    task.name,
                    block_size,
                    len(results) - run["identical_to_target"],
                    len(results),
                    "" if run_is_exact(draft) else " (bfloat16 rounds differently for other shapes)",
                )
        return run

    def _latency(self, model: Model, width: int) -> float:
        key = model.name, width
        if key not in self._latencies:
            context = min(_LATENCY_CONTEXT, model.decoder.config.max_positions - width)
            self._latencies[key] = step_latency(model.decoder, model.params, self._settings.batch_size, width, context)
        return self._latencies[key]


def run_is_exact(model: Model) -> bool:
    """Whether greedy answers must be the target's own: float32 rounds far below the gaps between logits."""
    return jax.tree.leaves(model.params)[0].dtype == np.float32


def write_results(folder: Path, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """Writes ``samples.jsonl`` and then ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "samples.jsonl", samples)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def _speeds(baseline: Baseline, results: Sequence[SpeculativeResult], batches) -> dict[str, Any]:
    """Tokens per second with the draft and without, over the same batches; prefill and compilation are outside."""
    tokens_alone = [sum(len(baseline.answers[i]) for i in indices) for indices, _ in baseline.batches]
    tokens_draft = [sum(len(results[i].tokens) for i in indices) for indices, _ in batches]
    alone = metrics.ratio_of_sums(tokens_alone, [s.decode for _, s in baseline.batches])
    with_draft = metrics.ratio_of_sums(tokens_draft, [s.decode for _, s in batches])
    count = len(batches)
    return {
        **metrics.with_interval("tokens_per_second", with_draft, count),
        **metrics.with_interval("tokens_per_second_autoregressive", alone, count),
        **metrics.with_interval("token_rate_ratio", lambda i: with_draft(i) / alone(i), count),
        "seconds": round(sum(s.decode for _, s in batches), 4),
        "prefill_seconds": round(sum(s.prefill for _, s in batches), 4),
        "compile_seconds": round(sum(s.compile for _, s in batches), 4),
    }


def _samples(
    baseline: Baseline,
    block_size: int,
    results: Sequence[SpeculativeResult],
    acceptances: Sequence[Acceptance],
) -> list[dict[str, Any]]:
    """Each prompt's answer, and what it adds to the sums: of the text that the target wrote alone, its tokens, the
    blocks expected for them and their overlap."""
    return [
        {
            "id": prompt.id,
            "task": baseline.task.name,
            "block_size": block_size,
            **baseline.decoding,
            "prompt_tokens": list(prompt.tokens),
            "tokens": result.tokens,
            "accepted": result.accepted,
            "target_tokens": len(acceptance.accept_N),
            "expected_blocks": round(expected_blocks(acceptance.accept_N, block_size), 6),
            "overlap_sum": round(float(acceptance.overlap_N.sum()), 6),
        }
        for prompt, result, acceptance in zip(baseline.prompts, results, acceptances, strict=True)
    ]
