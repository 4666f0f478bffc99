"""What the sweeps run on: the small target of `_python.py` and its tasks, or any target and any text."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import _python as small

from jaxdraft.data.passages import Beginnings, Passages
from jaxdraft.data.sources import Text
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import CrossEntropy, Loss, TVDPlusPlus
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, Prepare, TopK, Train


class Ground(NamedTuple):
    """Where drafts learn and are measured."""

    text: tuple  # sources
    prompts: tuple  # of what they are distilled on
    tasks: tuple[Task, ...]


def ground(text: str | None, limit: int = 24) -> Ground:
    """Python's library and questions about it; or a text, which is pretrained on, gone on with and held out by passage.

    Args:
      text: path; None for Python's library.
      limit: prompts of each task.
    """
    if text is None:
        tasks = tuple(small.task(kind, limit=limit) for kind in ("open", "summary", "code"))
        return Ground(small.CORPUS, small.PROMPTS, tasks)
    source = Text(text)
    held_out = Beginnings(Passages(source, split="eval"), limit=limit)
    return Ground(
        (Passages(source),),
        (Beginnings(Passages(source, split="seed"), limit=256),),
        (Task("continue", held_out, max_new_tokens=small.ANSWER),),
    )


def rows(sources: Sequence) -> Prepare:
    """What drafts are pretrained on, "corpus"."""
    return Prepare("corpus", sources=tuple(sources), length=small.LENGTH)


def answers(name: str, prompts: tuple, temperatures: tuple[float, ...] = (0.0, 0.7)) -> Generate:
    """What the target answers, with its 32 most likely tokens: distillation then needs no target."""
    return Generate(
        name,
        prompts=prompts,
        temperatures=temperatures,
        max_new_tokens=small.ANSWER,
        length=small.LENGTH,
        batch_size=64,
        keep_logits=TopK(32),
    )


def pretrain(name: str, steps: int, **settings) -> Train:
    return _train(name, "corpus", CrossEntropy(), steps, batch_size=4, learning_rate=2e-3, **settings)


def distil(name: str, data: str | dict[str, float], steps: int, **settings) -> Train:
    """TVD++ from stored targets."""
    return _train(
        name, data, TVDPlusPlus(), steps, batch_size=10, learning_rate=1e-3, target_logits="stored", **settings
    )


def _train(
    name: str, data: str | dict[str, float], loss: Loss, steps: int, *, learning_rate: float, **settings
) -> Train:
    return Train(
        name,
        data=data,
        loss=loss,
        steps=steps,
        learning_rate=learning_rate,
        final_learning_rate=0.1 * learning_rate,
        warmup_steps=max(steps // 20, 1),
        probe_block_sizes=(),
        **settings,
    )


def shaped(shapes: Mapping[str, ModelConfig], seeds: int, pretrain_steps: int, distil_steps: int) -> list[Train]:
    """Drafts of each shape and seed, pretrained and distilled alike."""
    drafts: list[Train] = []
    for seed in small.seeds_of(seeds):
        for name, model in shapes.items():
            start = f"pretrain-{name}-{seed}"
            drafts += [
                pretrain(start, pretrain_steps, model=model, seed=seed),
                distil(f"{name}-{seed}", "responses", distil_steps, init=start, model=model, seed=seed),
            ]
    return drafts
