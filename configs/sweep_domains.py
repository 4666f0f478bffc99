"""A draft off its domain, and what helps: open question 4 of Direct Alignment (arXiv 2403.00858), many languages.

    jaxdraft run sweep_domains --workdir runs/sweep_domains
    jaxdraft run sweep_domains --workdir runs/domains-own --set target.path=FOLDER

A draft distilled on answers about Python, beside the one it was pretrained from, is measured in domain ("open",
"summary", "code", "text") and out of it: instructions to translate from German, French, Spanish and Italian, of which
neither it nor the small target has seen any, and sequences of numbers. A second, "languages", is distilled on the
target's answers to translations as well. The prompts in ``configs/prompts`` are few: those of even number are for
distillation, those of odd number for measuring (12 German, 4 of each other language: intervals are wide). No answer
needs to be right: the draft has to foresee what the target writes, and what it writes where it knows nothing is as good
a thing to learn. ``report/comparison.csv`` is the table: ``seeds`` pooled. What it said of the small target, after a
quarter of an hour on one core, stands in ``configs/RESULTS.md``.
"""

import json
from pathlib import Path

import _python as small
import _sweep as sweep

from jaxdraft.data.prompts import PromptList
from jaxdraft.evaluate.tasks import Task
from jaxdraft.recipe import Evaluate, HFModel, Recipe, Train

FILES = {"german": "translate", "french": "french", "spanish": "spanish", "italian": "italian"}
SEQUENCES = ((1, 1), (2, 2), (5, 5), (7, 3), (10, 10), (40, -2), (100, 25), (99, -11))  # start and step


def lines(language: str) -> list[dict]:
    path = Path(__file__).parent / "prompts" / f"{FILES[language]}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def numbers() -> PromptList:
    return PromptList(
        tuple(
            {"id": f"numbers:{start}:{step}", "prompt": ", ".join(str(start + step * i) for i in range(6)) + ","}
            for start, step in SEQUENCES
        )
    )


def recipe(
    *,
    target: HFModel = small.TARGET,
    pretrain_steps: int = 1500,
    distil_steps: int = 400,
    seeds: int = 3,
):
    ground = sweep.ground(None)
    drafts: list[Train] = []
    for seed in small.seeds_of(seeds):
        start = f"pretrain-{seed}"
        mixed = {"responses": 0.8, "translations": 0.2}
        drafts += [
            sweep.pretrain(start, pretrain_steps, seed=seed),
            sweep.distil(f"python-{seed}", "responses", distil_steps, init=start, seed=seed),
            sweep.distil(f"languages-{seed}", mixed, distil_steps, init=start, seed=seed),
        ]
    asked = tuple(PromptList(tuple(lines(language)[::2])) for language in FILES)
    held_out = {language: PromptList(tuple(lines(language)[1::2])) for language in FILES}
    return Recipe(
        title="A draft off its domain",
        description="Distilled on Python alone, or on other languages too; measured on both.",
        target=target,
        draft=small.SMALL,
        stages=(
            sweep.rows(ground.text),
            sweep.answers("responses", ground.prompts),
            sweep.answers("translations", asked, temperatures=(0.0, 0.3, 0.7, 1.0)),
            *drafts,
            Evaluate(
                "evaluate",
                drafts=tuple(draft.name for draft in drafts),
                tasks=(
                    *ground.tasks,
                    small.task("text"),
                    *(Task(name, prompts, max_new_tokens=small.ANSWER) for name, prompts in held_out.items()),
                    Task("numbers", numbers(), max_new_tokens=small.ANSWER),
                ),
                block_sizes=(3,),
                batch_sizes=(8,),
                repeats=1,
                predict_up_to=0,
            ),
        ),
    )
