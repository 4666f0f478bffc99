"""From nothing to a trained, measured, exported draft, in minutes, offline, on any machine with Python.

    bash launch/quickstart.sh
    jaxdraft run quickstart --workdir runs/quickstart

The target lies beside this file: 5.2M parameters that have read Python's standard library (`python_target` made it).
The corpus is the library of the Python that runs this: documentation (text), modules (code), and instructions made from
them (signature -> docstring, docstring -> body, module -> summary line). What is done is what one does with a larger
target: pretrain a draft of six percent of its size; let the target answer instructions that neither has seen, at four
temperatures; distil with KL, TVD and TVD++ on nine parts answers and one part text (Direct Alignment, arXiv 2403.00858)
while block efficiency on held-out answers is logged; measure on three held-out tasks that mirror the paper's; export
the draft distilled with TVD++.
"""

import _python as small

from jaxdraft.data.stdlib import PythonTask
from jaxdraft.losses import KL, TVD, CrossEntropy, TVDPlusPlus
from jaxdraft.recipe import Evaluate, Export, Generate, Prepare, Recipe, Reproduction, Train

# Rows and tasks of Direct Alignment's figures, and what stands for them here.
LOSSES = {"KLD": "distill-kl", "TVD": "distill-tvd", "TVD++": "distill-tvdpp"}
TASKS = {"dolly": "open", "xsum": "summary"}


def distil(name, loss):
    return Train(
        name,
        init="pretrain",
        data={"responses": 0.9, "corpus": 0.1},
        loss=loss,
        steps=150,
        batch_size=10,
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_steps=10,
        save_every=75,
        keep_every=50,
        probe="probe",
    )


def recipe():
    distilled = tuple(LOSSES.values())
    return Recipe(
        title="Quickstart: a draft for a small model of Python and its documentation",
        description=(
            "The target is a model of 5.2M parameters that has read Python's standard library. It is that small so "
            "that everything takes minutes; the steps are those one takes with a larger one."
        ),
        target=small.TARGET,
        draft=small.SMALL,
        reproduces=(
            Reproduction("direct-alignment", "Figure 1", rows=LOSSES, tasks=TASKS),
            Reproduction("direct-alignment", "Figure 2", rows={"base": "pretrain", **LOSSES}, tasks=TASKS),
        ),
        stages=(
            Prepare("corpus", sources=small.CORPUS, length=small.LENGTH),
            Train(
                "pretrain",
                data="corpus",
                loss=CrossEntropy(),
                steps=4000,
                batch_size=4,
                learning_rate=2e-3,
                final_learning_rate=2e-5,
                warmup_steps=100,
                save_every=1000,
            ),
            Generate(
                "responses",
                prompts=(PythonTask("all", split="seed", limit=256, max_tokens=small.PROMPT),),
                temperatures=(0.0, 0.3, 0.7, 1.0),
                top_p=0.95,
                max_new_tokens=small.ANSWER,
                length=small.LENGTH,
                batch_size=64,
                shard_size=256,
            ),
            Generate(  # held out, at the temperatures of the tasks below
                "probe",
                prompts=(small.task("all").prompts,),
                temperatures=(0.0, 0.6),
                top_p=0.9,
                max_new_tokens=small.ANSWER,
                length=small.LENGTH,
                batch_size=48,
            ),
            distil("distill-kl", KL()),
            distil("distill-tvd", TVD()),
            distil("distill-tvdpp", TVDPlusPlus()),
            Evaluate(
                "evaluate",
                drafts=("pretrain", *distilled),
                tasks=(
                    small.task("open", limit=16, temperature=0.6, top_p=0.9),
                    small.task("summary", limit=16),
                    small.task("code", limit=16),
                ),
                block_sizes=(3, 5),
                repeats=1,
                over_checkpoints=True,
            ),
            Export("export", draft="distill-tvdpp", evaluation="evaluate"),
        ),
    )
