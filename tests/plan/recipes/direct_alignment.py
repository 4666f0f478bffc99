"""Direct Alignment (arXiv 2403.00858) at full size: Llama-2-7b-chat and its 115M draft.

Of the paper: 600 B tokens in rows of 2048, batches of 496 and 40, learning rates and warm-up (A.3, A.4), temperatures
and top-p (section 3), nine parts answers and one part text, tasks and block sizes. It does not say how many
instructions were answered, how long answers were, or how many updates distillation took: here all 210,289 of
OIG-small-chip2 and 10,000 of OpenAssistant, 256 tokens, and 10,000.
"""

from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.sources import Text
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import CrossEntropy, TVDPlusPlus
from jaxdraft.models import presets
from jaxdraft.recipe import Evaluate, Export, Generate, HFModel, Prepare, Recipe, Train

LENGTH = 2048


def recipe(
    *,
    target: HFModel = HFModel("meta-llama/Llama-2-7b-chat-hf"),  # noqa: B008 (immutable)
    text: Text = Text("data/text/*.parquet"),  # noqa: B008 (immutable)
):
    prompts = {name: PromptFile(f"data/{name}.jsonl", limit=n, max_tokens=256) for name, n in SEEDS.items()}
    tasks = {
        name: PromptFile(f"data/{name}.jsonl", limit=1000, max_tokens=1024) for name in ("dolly", "xsum", "cnn_dm")
    }
    return Recipe(
        title="Direct Alignment: a 115M draft for Llama-2-7b-chat",
        target=target,
        draft=presets.llama2_chat_drafter_115m,
        stages=(
            Prepare("text", sources=(text,), length=LENGTH),
            Train(
                "pretrain",
                data="text",
                loss=CrossEntropy(),
                steps=600_000_000_000 // (496 * LENGTH),
                batch_size=496,
                accumulate=2,
                remat="full",
                learning_rate=1e-4,
                final_learning_rate=1e-6,
                warmup_steps=5000,
            ),
            Generate("responses", prompts=tuple(prompts.values()), length=LENGTH, max_new_tokens=256, batch_size=128),
            Train(
                "distill",
                init="pretrain",
                data={"responses": 0.9, "text": 0.1},
                loss=TVDPlusPlus(),
                steps=10_000,
                batch_size=40,
                learning_rate=3e-4,
                final_learning_rate=1e-6,
                warmup_steps=2000,
                keep_every=2000,
            ),
            Evaluate(
                "evaluate",
                drafts=("pretrain", "distill"),
                tasks=(
                    Task("dolly", tasks["dolly"], temperature=0.6, top_p=0.9),
                    Task("xsum", tasks["xsum"]),
                    Task("cnn_dm", tasks["cnn_dm"]),
                ),
                batch_sizes=(8,),
                repeats=1,
            ),
            Export("export", draft="distill", dtype="bfloat16"),
        ),
    )


SEEDS = {"oig-small-chip2": 210_289, "oasst": 10_000}
