"""What the recipes of FastDraft (arXiv 2411.11055) have in common: two sizes, and stages that count in its billions.

A size says what everything runs on. ``billion`` is how many tokens are trained on where the paper says a billion: 1e9,
or 3e5 where ``scale=small``. Batches, rates, warm-up and decay are its A.3's (small: a larger rate for smaller drafts).
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import _python as small

from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.data.stdlib import PythonLibrary
from jaxdraft.evaluate import tasks
from jaxdraft.losses import CrossEntropy, Loss
from jaxdraft.models import ModelConfig, presets
from jaxdraft.recipe import Evaluate, Generate, HFModel, Prepare, Reproduction, Subset, TopK, Train

Scale = Literal["full", "small"]


class Size(NamedTuple):
    """What the paper's size and this machine's differ in."""

    target: HFModel
    drafts: dict[str, ModelConfig]  # by the paper's names
    seeds: int
    billion: float
    text: tuple  # sources; so are code, originals and perplexity
    code: tuple
    oig: tuple  # prompts
    alignment: tuple  # prompts
    magpie: int  # instructions that the target writes itself; 0 for none
    originals: Prepare
    perplexity: object
    tasks: dict[str, tasks.Task]  # by the paper's names
    length: int
    answer: int
    generate_batch: int
    batch_size: int
    mixed_batch_size: int  # of what learns from code and text together, in whole rows of each
    learning_rate: float
    finetune_steps: int  # on the answers to OIG-small-chip2
    align_steps: int  # on those to everything

    @property
    def names(self) -> dict[str, str]:
        """Task of the paper -> that of the recipe."""
        return {name: task.name for name, task in self.tasks.items()}


LANGUAGE = ("cnn-dailymail", "tinystories", "dolly")
PROMPT, ANSWER = 512, 512
ALPACA = Instructions("alpaca", limit=52_002, max_tokens=PROMPT)  # all there are, as of the next two
OIG = Instructions("oig-small-chip2", limit=210_289, max_tokens=PROMPT)
EVOL = Instructions("evol-instruct", limit=78_264, max_tokens=PROMPT)
MAGPIE = 100_000


def updates(answers: int) -> int:
    """One pass over so many answers of the full size, 384 tokens each with its prompt."""
    return answers * 384 // (128 * 2048)


PHI3 = Size(
    target=HFModel("microsoft/Phi-3-mini-4k-instruct"),
    drafts={
        name: replace(shape, vocab_size=None)  # the target's
        for name, shape in {"50M": presets.fastdraft_phi3_50m, "120M": presets.fastdraft_phi3_120m}.items()
    },
    seeds=1,
    billion=1e9,
    text=(Corpus("fineweb"),),
    code=(Corpus("stack-v2-smol"),),
    oig=(OIG,),
    alignment=(ALPACA, OIG, EVOL),
    magpie=MAGPIE,
    originals=Prepare("originals", sources=(OIG,), length=2048, labels="assistant"),
    perplexity=Corpus("wikitext-2", split="test"),
    tasks={
        "cnn-dailymail": tasks.cnn_dailymail(max_prompt_tokens=2048),
        "tinystories": tasks.tinystories(max_prompt_tokens=1024),
        "dolly": tasks.dolly(top_p=1.0, max_prompt_tokens=2048),
        "humaneval": tasks.humaneval(max_prompt_tokens=512),
    },
    length=2048,
    answer=ANSWER,
    generate_batch=256,
    batch_size=128,
    mixed_batch_size=128,
    learning_rate=1e-4,
    finetune_steps=updates(210_289),
    align_steps=updates(4 * (52_002 + 210_289 + 78_264 + MAGPIE)),
)
LLAMA31 = PHI3._replace(
    target=HFModel("meta-llama/Llama-3.1-8B-Instruct"),
    drafts={"150M": replace(presets.fastdraft_llama31_150m, vocab_size=None)},
)
SMALL = Size(
    target=small.TARGET,
    drafts={"50M": small.SMALL, "120M": small.LARGE, "150M": small.LARGE},
    seeds=3,
    billion=3e5,
    text=small.TEXT,
    code=small.CODE,
    oig=small.PROMPTS,
    alignment=small.PROMPTS,
    magpie=0,
    originals=Prepare("originals", sources=small.PROMPTS, length=small.LENGTH, labels="references"),
    perplexity=PythonLibrary("text", split="eval"),
    tasks={
        "cnn-dailymail": small.task("summary"),
        "tinystories": small.task("text"),
        "dolly": small.task("open"),
        "humaneval": small.task("code"),
    },
    length=small.LENGTH,
    answer=small.ANSWER,
    generate_batch=64,
    batch_size=4,
    mixed_batch_size=12,
    learning_rate=2e-3,
    finetune_steps=400,
    align_steps=600,
)


def size_of(scale: Scale, full: Size = PHI3) -> Size:
    return full if scale == "full" else SMALL


def rows(size: Size, kind: Literal["text", "code"], billions: float) -> Prepare:
    """So many billions of tokens of a kind, as the stage of its name."""
    sources = size.text if kind == "text" else size.code
    return Prepare(kind, sources=sources, length=size.length, tokens=round(billions * size.billion))


def sample(size: Size, kind: str, billions: float) -> Subset:
    """A part of ``rows``; of one kind they nest."""
    return Subset(f"{kind}-{_label(billions)}", data=kind, tokens=round(billions * size.billion))


def mix(size: Size, billions: dict[str, float]) -> dict[str, float]:
    """Shares of a batch, in whole rows, by how many billions are wanted of each stage's: within 4 % of the batch."""
    total = sum(billions.values())
    counts = {name: round(size.mixed_batch_size * each / total) for name, each in billions.items()}
    return {name: count / size.mixed_batch_size for name, count in counts.items()}


def train(size: Size, name: str, seed: int, data: str | dict[str, float], *, billions: float, **settings) -> Train:
    """One pass over so many billions of tokens: pretraining and continued pretraining (A.3)."""
    return _train(
        size,
        f"{name}-{seed}",
        seed,
        round(billions * size.billion) // (size.batch_size * size.length),
        data,
        **settings,
    )


def finetune(
    size: Size, name: str, seed: int, data: str, steps: int, init: str, loss: Loss | None = None, **settings
) -> Train:
    """On answers; without a loss, sequence-level distillation (section 5.4)."""
    return _train(size, f"{name}-{seed}", seed, steps, data, init=init, loss=loss or CrossEntropy(), **settings)


def _train(size: Size, name: str, seed: int, steps: int, data, loss: Loss = CrossEntropy(), **settings) -> Train:  # noqa: B008
    return Train(
        name,
        data=data,
        loss=loss,
        seed=seed,
        steps=max(steps, 2),
        batch_size=size.batch_size,
        learning_rate=size.learning_rate,
        weight_decay=0.01,
        warmup_steps=max(steps // 20, 1),
        **{"probe_block_sizes": (), **settings},
    )


def answers(
    size: Size, name: str, prompts: tuple, temperatures: tuple[float, ...], keep: TopK | None = None
) -> Generate:
    """What the target answers, with no top-p, which the paper does not name."""
    return Generate(
        name,
        prompts=prompts,
        temperatures=temperatures,
        top_p=1.0,
        max_new_tokens=size.answer,
        length=size.length,
        batch_size=size.generate_batch,
        shard_size=8 * size.generate_batch,
        keep_logits=keep,
    )


def evaluate(size: Size, drafts: list[Train] | tuple[Train, ...], names: tuple[str, ...] = (), **settings) -> Evaluate:
    """Greedily and at T 0.6 on the paper's tasks, or some of them; in batches, for no speed is asked for."""
    chosen = [task for name, task in size.tasks.items() if not names or name in names]
    return Evaluate(
        "evaluate",
        drafts=tuple(draft.name for draft in drafts),
        tasks=tuple(chosen),
        temperatures=(0.0, 0.6),
        **{"block_sizes": (3, 5), "batch_sizes": (8,), "repeats": 1, "predict_up_to": 0, **settings},
    )


def shown(size: Size, exhibit: str, rows: dict[str, str], names: tuple[str, ...] = ()) -> Reproduction:
    """An exhibit's rows, each the stage of its first seed; the report pools the others with it."""
    tasks_shown = {name: mine for name, mine in size.names.items() if not names or name in names}
    return Reproduction(
        "fastdraft", exhibit, rows={row: f"{stage}-0" for row, stage in rows.items()}, tasks=tasks_shown
    )


def _label(billions: float) -> str:
    return f"{billions:g}B" if billions == int(billions) else f"{billions * 1000:g}M"
