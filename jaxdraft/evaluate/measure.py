"""Measures a draft in one setting: decodes with it what its target writes alone, by programs of one style."""

import dataclasses
import functools
import hashlib
import json
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
    generate_batches,
    speculative_batches,
)
from jaxdraft.evaluate.tasks import Task
from jaxdraft.fingerprint import fingerprint
from jaxdraft.models import Decoder, ModelConfig, compute_dtype, for_decoding
from jaxdraft.models.decoder import Params, model_shardings
from jaxdraft.models.hf import load_model

Advance = Callable[[int], Any]
"""Is told of every number of prompts that is done."""


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

    @property
    def num_parameters_read(self) -> int:
        """Those that a step reads: all but an input table of its own, of which it reads a row."""
        config = self.decoder.config
        return config.num_parameters - (0 if config.tie_embeddings else config.vocabulary * config.hidden_size)

    @property
    def dtype(self) -> np.dtype:
        return jax.tree.leaves(self.params)[0].dtype

    @functools.cached_property
    def identity(self) -> str:
        """A hash of shape and weights: the same wherever they were read from."""
        content = repr(self.decoder.config).encode() + fingerprint(self.params).tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What is decoded: a task with its prompts, a batch size, and what every way of decoding it has in common.

    Attributes:
      task: the task.
      prompts: its prompts.
      batch_size: prompts decoded at once.
      seed: of all randomness.
      repeats: each batch is timed so often, and the best counts.
    """

    task: Task
    prompts: Sequence[Prompt]
    batch_size: int = 1
    seed: int = 0
    repeats: int = 2

    @property
    def tokens(self) -> list[list[int]]:
        """Of each prompt."""
        return [list(prompt.tokens) for prompt in self.prompts]

    @property
    def sampling(self) -> dict[str, Any]:
        """What makes the distributions, as results name it."""
        task = self.task
        return {"temperature": task.temperature, "top_p": task.top_p, **({"top_k": task.top_k} if task.top_k else {})}

    @property
    def decoding(self) -> dict[str, Any]:
        """Settings of ``generate_batches`` and ``speculative_batches``."""
        return {
            "example_ids": [example_id(prompt.id) for prompt in self.prompts],
            "max_new_tokens": self.task.max_new_tokens,
            "temperature": self.task.temperature,
            "top_p": self.task.top_p,
            "top_k": self.task.top_k,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
        }

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides what is written and timed, the models apart."""
        content = json.dumps([[prompt.id, prompt.tokens] for prompt in self.prompts])
        return {
            "task": self.task.name,
            **self.sampling,
            "max_new_tokens": self.task.max_new_tokens,
            "prompts": hashlib.sha256(content.encode()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "seed": self.seed,
            "repeats": self.repeats,
        }


@dataclasses.dataclass(frozen=True)
class Timed:
    """A batch as it was timed.

    Attributes:
      prompts: which of the prompts are in it.
      seconds: what it took.
    """

    prompts: list[int]
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What the target writes alone, and how long it takes.

    Attributes:
      answers: new tokens per prompt.
      batches: in which they were written.
    """

    answers: list[list[int]]
    batches: list[Timed]

    def to_json(self) -> dict[str, Any]:
        return {"answers": self.answers, "batches": [[batch.prompts, batch.seconds] for batch in self.batches]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Baseline":
        """What ``to_json`` made, JSON's lists in it."""
        return cls(found["answers"], [Timed(prompts, Seconds(*seconds)) for prompts, seconds in found["batches"]])


def write_alone(target: Model, work: Work, advance: Advance) -> Baseline:
    """Decodes without a draft."""
    answers: list[list[int]] = [[] for _ in work.prompts]
    batches = []
    for batch in generate_batches(target.decoder, target.params, work.tokens, **work.decoding):
        batches.append(Timed(batch.indices, batch.seconds))
        for i, tokens in zip(batch.indices, batch.tokens, strict=True):
            answers[i] = tokens
        advance(len(batch.indices))
    return Baseline(answers, batches)


def write_with_draft(
    target: Model, draft: Model, work: Work, speculation: Speculation, advance: Advance
) -> tuple[list[SpeculativeResult], list[Timed]]:
    """The same with a draft: the result of each prompt, and the batches."""
    found: dict[int, SpeculativeResult] = {}
    batches = []
    models = target.decoder, target.params, draft.decoder, draft.params
    for batch in speculative_batches(*models, work.tokens, speculation=speculation, **work.decoding):
        batches.append(Timed(batch.indices, batch.seconds))
        found.update(zip(batch.indices, batch.results, strict=True))
        advance(len(batch.indices))
    return [found[i] for i in range(len(work.prompts))], batches


def acceptances(target: Model, draft: Model, work: Work, answers: Sequence[Sequence[int]]) -> list[Acceptance]:
    """The draft's acceptance at every token that the target wrote alone."""
    return acceptance_ratios(
        target.decoder,
        target.params,
        draft.decoder,
        draft.params,
        work.tokens,
        answers,
        max_new_tokens=work.task.max_new_tokens,
        temperature=work.task.temperature,
        top_p=work.task.top_p,
        top_k=work.task.top_k,
    )
