"""Direct Alignment (Goel et al. 2024, arXiv 2403.00858), whole: a 115M draft for Llama-2-7b-chat. Figures 1, 2 and 3.

    jaxdraft run direct_alignment_llama2_115m --workdir runs/direct_alignment_llama2_115m-full --accept-license
    jaxdraft run direct_alignment_llama2_115m --workdir runs/direct_alignment_llama2_115m --set scale=small

What it takes: 91 hours on eight TPU v5p, by `jaxdraft plan direct_alignment_llama2_115m --hardware 8xv5p`: 77 to
pretrain, 5 for the answers at most, 2.2 for each of four distillations, 0.84 to evaluate; on eight H100 (`8xH100`) 44,
of which 36 to pretrain. Storage 3.05 TB, 3 TB of them text as tokens, beside what is downloaded. Hours are of chips at
40 % of their peak, without tokenising; the paper pretrained on 32 A100 and distilled on 8, and gives no hours.

Of the paper: table 1's draft; 600 B tokens in rows of 2048, EOS after each document (A.4), batches of 496, 1e-4 falling
to 1e-6 after 5000 steps of warm-up (A.3); answers to OIG-small-chip2 and OpenAssistant at temperatures 0, 0.3, 0.7 and
1.0 with top-p 0.95 (section 3); distillation in batches of 40 at 3e-4 after 2000 steps of warm-up, nine parts answers
and one part text, with KL, TVD and TVD++; Dolly at T 0.6 with top-p 0.9, XSum and CNN/DailyMail greedily, WMT18 out of
distribution (A.5), γ 3 and 5. Its numbers: Dolly about 21 % above the pretrained draft, CNN/DailyMail 2.29 before and
2.4 after, at most 2.3 tokens a block and 2.4 times the speed in the abstract; on WMT18 all distilled drafts below the
pretrained one.

What differs. The 600 B tokens are of "publicly available datasets" that are not named: here FineWeb's first, of its
oldest snapshots; attention does not see past the document (`segments`). How many prompts were answered, how long
answers were and how many updates distillation took it does not say: here all of OIG-small-chip2 and 10,000 of
OpenAssistant, 256 tokens and 10,000 updates; nor does it name AdamW's betas (0.9/0.999), its decay (0.01) and any
clipping of gradients (at 1). Its table 1 has 2048 as the target's hidden size, which is 4096. The rate of distillation
falls to 1e-6 as well, by "same scheduler"; warm-up begins at 0, and both are linear. The part of text has the same
loss. TVD++ normalises at each position; the paper's mean and variance are "over the input sequences and the entire
vocabulary", which is `TVDPlusPlusGlobal`, nearly TVD under Adam. It varies system prompts and prints none: here none,
or the one that Meta first shipped with Llama 2. It does not say which prompts are measured: here 100 of each task.
`scratch` is added: TVD++ without pretraining. Llama-2-7b-chat is gated (`hf auth login`), and its licence forbids to
improve other models with its output (1.b.v), so the run asks for `--accept-license`.

Small: the target, text and questions of `configs/_python.py`, three seeds of every draft. "open" is measured for Dolly,
"summary" for XSum, "translate" for WMT18, nothing for CNN/DailyMail, and "code" beside them. `seeds` says how many.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import _python as small

from jaxdraft.data.named import Instructions
from jaxdraft.data.sources import Text
from jaxdraft.evaluate import tasks
from jaxdraft.losses import KL, TVD, CrossEntropy, TVDPlusPlus
from jaxdraft.models import ModelConfig, presets
from jaxdraft.recipe import Evaluate, Export, Generate, HFModel, Prepare, Recipe, Reproduction, Train

LOSSES = {"kl": KL(), "tvd": TVD(), "tvdpp": TVDPlusPlus()}
ROWS = {"base": "pretrain-0", "KLD": "kl-0", "TVD": "tvd-0", "TVD++": "tvdpp-0"}  # the report pools the seeds
SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
FINEWEB = "hf://datasets/HuggingFaceFW/fineweb@9bb295ddab0e05d785b879661af7260fed5140fc/data/*/*.parquet"


class Size(NamedTuple):
    """What the paper's size and this machine's differ in."""

    target: HFModel
    draft: ModelConfig
    seeds: int
    text: tuple  # sources
    tokens: float | None
    prompts: tuple
    system_prompts: tuple[str, ...]
    probe: tuple
    tasks: dict[str, tasks.Task]
    length: int
    answer: int
    generate_batch: int
    pretrain: dict
    distill: dict
    evaluate: dict


FULL = Size(
    target=HFModel("meta-llama/Llama-2-7b-chat-hf"),
    draft=replace(presets.llama2_chat_drafter_115m, vocab_size=None),  # the target's
    seeds=1,
    text=(Text(FINEWEB, licence="ODC-By-1.0"),),
    tokens=600e9,
    prompts=(
        Instructions("oig-small-chip2", limit=210_289, max_tokens=512),
        Instructions("oasst1", limit=10_000, max_tokens=512),
    ),
    system_prompts=("", SYSTEM),
    probe=(
        Instructions("dolly", limit=100, max_tokens=1024),
        Instructions("xsum", limit=50, max_tokens=1024),
        Instructions("cnn-dailymail", limit=50, max_tokens=1024),
    ),
    tasks={
        "dolly": tasks.dolly(max_prompt_tokens=2048),
        "xsum": tasks.xsum(max_prompt_tokens=2048),
        "cnn-dailymail": tasks.cnn_dailymail(max_prompt_tokens=2048),
        "wmt18-de-en": tasks.wmt18_de_en(max_prompt_tokens=512),
    },
    length=2048,
    answer=256,
    generate_batch=256,
    pretrain={
        "steps": 600_000_000_000 // (496 * 2048),
        "batch_size": 496,
        "accumulate": 2,
        "remat": "full",
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-6,
        "warmup_steps": 5000,
    },
    distill={
        "steps": 10_000,
        "batch_size": 40,
        "learning_rate": 3e-4,
        "final_learning_rate": 1e-6,
        "warmup_steps": 2000,
        "keep_every": 2000,
    },
    evaluate={"repeats": 1},
)
SMALL = Size(
    target=small.TARGET,
    draft=small.SMALL,
    seeds=3,
    text=small.CORPUS,
    tokens=None,
    prompts=small.PROMPTS,
    system_prompts=(),
    probe=(small.task("all", limit=24).prompts,),
    tasks={
        "dolly": small.task("open", temperature=0.6, top_p=0.9),
        "xsum": small.task("summary"),
        "humaneval": small.task("code"),
        "wmt18-de-en": small.task("translate"),
    },
    length=small.LENGTH,
    answer=small.ANSWER,
    generate_batch=64,
    pretrain={
        "steps": 5000,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "final_learning_rate": 2e-5,
        "warmup_steps": 100,
        "save_every": 1000,
    },
    distill={
        "steps": 250,
        "batch_size": 10,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "warmup_steps": 20,
        "keep_every": 100,
    },
    evaluate={"repeats": 1},
)


def draft_stages(size: Size, seed: int) -> tuple[Train, ...]:
    """A pretrained draft, what each loss makes of it, and what TVD++ makes of none."""
    distill = {
        "data": {"responses": 0.9, "text": 0.1},
        "probe": "probe",
        "seed": seed,
        "save_every": 500,
        **size.distill,
    }
    return (
        Train(f"pretrain-{seed}", data="text", loss=CrossEntropy(), seed=seed, **size.pretrain),
        *(Train(f"{name}-{seed}", init=f"pretrain-{seed}", loss=loss, **distill) for name, loss in LOSSES.items()),
        Train(f"scratch-{seed}", loss=TVDPlusPlus(), **distill),
    )


def recipe(*, scale: Literal["full", "small"] = "full", seeds: int | None = None):
    size = FULL if scale == "full" else SMALL
    trained = [stage for seed in small.seeds_of(seeds, size.seeds) for stage in draft_stages(size, seed)]
    names = {task: mine.name for task, mine in size.tasks.items()}
    shown = lambda figure, rows, *shown_tasks: Reproduction(
        "direct-alignment", figure, rows=rows, tasks={task: names[task] for task in shown_tasks if task in names}
    )
    in_domain = ("dolly", "xsum", "cnn-dailymail")
    distilled = {row: stage for row, stage in ROWS.items() if row != "base"}
    return Recipe(
        title="Direct Alignment: a 115M draft for Llama-2-7b-chat" if scale == "full" else "Direct Alignment, small",
        description="arXiv 2403.00858: pretrained, distilled from the target's answers with KL, TVD and TVD++.",
        target=size.target,
        draft=size.draft,
        reproduces=(
            shown("Figure 1", distilled, *in_domain),
            shown("Figure 2", ROWS, *in_domain),
            shown("Figure 3", ROWS, "wmt18-de-en"),
        ),
        stages=(
            Prepare("text", sources=size.text, length=size.length, tokens=size.tokens),
            Generate(
                "responses",
                prompts=size.prompts,
                temperatures=(0.0, 0.3, 0.7, 1.0),
                top_p=0.95,
                system_prompts=size.system_prompts,
                max_new_tokens=size.answer,
                length=size.length,
                batch_size=size.generate_batch,
                shard_size=8 * size.generate_batch,
            ),
            Generate(  # held out, for block efficiency while a draft learns
                "probe",
                prompts=size.probe,
                temperatures=(0.0, 0.6),
                top_p=0.9,
                max_new_tokens=min(size.answer, 128),
                length=size.length,
                batch_size=size.generate_batch,
            ),
            *trained,
            Evaluate(
                "evaluate",
                drafts=tuple(stage.name for stage in trained),
                tasks=tuple(size.tasks.values()),
                block_sizes=(3, 5),
                over_checkpoints=True,
                **size.evaluate,
            ),
            Export("export", draft="tvdpp-0", dtype="bfloat16", evaluation="evaluate"),
        ),
    )
