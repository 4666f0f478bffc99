"""From nothing to a trained, measured, exported draft, in minutes, offline, on any machine with Python.

    bash launch/quickstart.sh
    jaxdraft run quickstart --workdir runs/quickstart

The corpus is the standard library of the Python that runs this: documentation (text), modules (code), and instructions
made from them (signature -> docstring, docstring -> body, module -> summary line). A tokenizer and a small target are
trained on it; then comes what one does with a real target: pretrain a draft, let the target answer instructions it has
not seen at four temperatures, distil with KL, TVD and TVD++ on nine parts answers and one part text (Direct Alignment,
arXiv 2403.00858) while block efficiency on held-out answers is logged, measure on three held-out tasks that mirror the
paper's, export the draft distilled with TVD++.
"""

from jaxdraft.data.stdlib import PythonLibrary, PythonTask
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import KL, TVD, CrossEntropy, TVDPlusPlus
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, Export, Generate, Prepare, Recipe, Reproduction, Train, TrainTokenizer

CORPUS = (PythonLibrary("text"), PythonLibrary("instructions"), PythonLibrary("code", limit=60))
LENGTH = 160

TARGET = ModelConfig(
    hidden_size=128, intermediate_size=384, num_layers=6, num_heads=2, num_kv_heads=2, max_positions=512
)
# Rows and tasks of Direct Alignment's figures, and what stands for them here.
LOSSES = {"KLD": "distill-kl", "TVD": "distill-tvd", "TVD++": "distill-tvdpp"}
TASKS = {"dolly": "open", "xsum": "summary"}
DRAFT = ModelConfig(hidden_size=64, intermediate_size=192, num_layers=1, num_heads=2, num_kv_heads=2)


def distil(name, loss):
    return Train(
        name,
        init="pretrain",
        data={"responses": 0.9, "corpus": 0.1},
        loss=loss,
        steps=160,
        batch_size=20,
        learning_rate=2e-3,
        warmup_steps=10,
        save_every=80,
        keep_every=40,
        probe="probe",
    )


def task(name, kind, count, **decoding):
    prompts = PythonTask(kind, split="eval", limit=count, max_tokens=96)
    return Task(name, prompts, max_new_tokens=64, **decoding)


def recipe():
    distilled = ("distill-kl", "distill-tvd", "distill-tvdpp")
    return Recipe(
        title="Quickstart: a draft for a small model of Python and its documentation",
        description=(
            "Target and draft are trained from nothing on the standard library of the Python that ran this. The target "
            "is small so that everything takes minutes; the steps are those one takes with a real target."
        ),
        tokenizer="tokenizer",
        target="target",
        draft=DRAFT,
        reproduces=(
            Reproduction("direct-alignment", "Figure 1", rows=LOSSES, tasks=TASKS),
            Reproduction("direct-alignment", "Figure 2", rows={"base": "pretrain", **LOSSES}, tasks=TASKS),
        ),
        stages=(
            TrainTokenizer("tokenizer", sources=CORPUS, vocab_size=1024),
            Prepare("corpus", sources=CORPUS, length=LENGTH),
            Train(
                "target",
                model=TARGET,
                data="corpus",
                loss=CrossEntropy(),
                steps=500,
                batch_size=10,
                learning_rate=5e-3,
                warmup_steps=40,
                b2=0.98,
                save_every=100,
            ),
            Train(
                "pretrain",
                data="corpus",
                loss=CrossEntropy(),
                steps=300,
                batch_size=20,
                learning_rate=6e-3,
                warmup_steps=20,
                save_every=100,
            ),
            Generate(
                "responses",
                prompts=(PythonTask("all", split="seed", limit=256, max_tokens=96),),
                temperatures=(0.0, 0.3, 0.7, 1.0),
                top_p=0.95,
                max_new_tokens=64,
                length=LENGTH,
                batch_size=64,
                shard_size=256,
            ),
            Generate(  # held out, at the temperatures of the tasks below
                "probe",
                prompts=(PythonTask("all", split="eval", limit=24, max_tokens=96),),
                temperatures=(0.0, 0.6),
                top_p=0.9,
                max_new_tokens=64,
                length=LENGTH,
                batch_size=48,
            ),
            distil("distill-kl", KL()),
            distil("distill-tvd", TVD()),
            distil("distill-tvdpp", TVDPlusPlus()),
            Evaluate(
                "evaluate",
                drafts=("pretrain", *distilled),
                tasks=(
                    task("open", "open", 16, temperature=0.6, top_p=0.9),
                    task("summary", "summary", 16),
                    task("code", "code", 16),
                ),
                block_sizes=(3, 5),
                repeats=4,
                over_checkpoints=True,
            ),
            Export("export", draft="distill-tvdpp", evaluation="evaluate"),
        ),
    )
