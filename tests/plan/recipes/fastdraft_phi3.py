"""FastDraft (arXiv 2411.11055) at full size: Phi-3-mini-4k-instruct and its 50M draft.

Of the paper: 5 B tokens of FineWeb, then 5 B of code with 2.5 B of FineWeb, batches of 128, rates and warm-up (A.3),
instructions of Alpaca, OIG-small-chip2 and Evol-Instruct answered at four temperatures (5.1), cross-entropy on them
(section 6). It does not say the length of rows or answers, nor how often the answers were read: here 2048, 256 tokens,
and once. `distill` is its token-level distillation (5.5) with the target in the loop, 1000 updates.
"""

from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.sources import Text
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import KL, CrossEntropy
from jaxdraft.models import ModelConfig, presets
from jaxdraft.recipe import Evaluate, Export, Generate, HFModel, Prepare, Recipe, Train

LENGTH, BATCH = 2048, 128
TOKENS_PER_STEP = LENGTH * BATCH
SEEDS = {"alpaca": 52_002, "oig-small-chip2": 210_289, "evol-instruct": 70_000}
ANSWER = 256


def train(name: str, steps: int, **settings):
    return Train(
        name,
        steps=steps,
        batch_size=BATCH,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_steps=steps // 20,
        **settings,
    )


def recipe(
    *,
    target: HFModel = HFModel("microsoft/Phi-3-mini-4k-instruct"),  # noqa: B008 (immutable)
    draft: ModelConfig = presets.fastdraft_phi3_50m,
    text: Text = Text("data/fineweb/*.parquet"),  # noqa: B008 (immutable)
    code: Text = Text("data/the-stack-v2-smol/*.parquet"),  # noqa: B008 (immutable)
):
    prompts = tuple(PromptFile(f"data/{name}.jsonl", limit=n, max_tokens=128) for name, n in SEEDS.items())
    tasks = ("cnn_dm", "tinystories", "dolly", "humaneval")
    answers = 4 * sum(SEEDS.values()) * (128 + ANSWER)
    return Recipe(
        title="FastDraft: a small draft for Phi-3-mini or Llama-3.1-8B",
        target=target,
        draft=draft,
        stages=(
            Prepare("text", sources=(text,), length=LENGTH),
            Prepare("code", sources=(code,), length=LENGTH),
            train("pretrain", 5_000_000_000 // TOKENS_PER_STEP, data="text", loss=CrossEntropy()),
            train(
                "continue",
                7_500_000_000 // TOKENS_PER_STEP,
                init="pretrain",
                data={"code": 85 / BATCH, "text": 43 / BATCH},
                loss=CrossEntropy(),
            ),
            Generate(
                "responses",
                prompts=prompts,
                temperatures=(0.0, 0.6, 0.8, 1.0),
                top_p=1.0,
                max_new_tokens=ANSWER,
                length=LENGTH,
                batch_size=128,
            ),
            train(
                "finetune",
                answers // TOKENS_PER_STEP,
                init="continue",
                data="responses",
                loss=CrossEntropy(),
                probe_block_sizes=(),
            ),
            train("distill", 1000, init="finetune", data="responses", loss=KL(), accumulate=4),
            Evaluate(
                "evaluate",
                drafts=("pretrain", "continue", "finetune"),
                tasks=tuple(
                    Task(f"{name} {kind}", PromptFile(f"data/{name}.jsonl", limit=164, max_tokens=1024), temperature)
                    for name in tasks
                    for kind, temperature in {"greedy": 0.0, "sampled": 0.6}.items()
                ),
                batch_sizes=(8,),
                repeats=1,
            ),
            Export("export", draft="finetune", dtype="bfloat16"),
        ),
    )
