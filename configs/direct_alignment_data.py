"""The data of Direct Alignment (arXiv 2403.00858): text to pretrain on, and what the target answers to instructions.

    jaxdraft run direct_alignment_data --workdir runs/direct-alignment-data --accept-license

Llama-2-7b-chat is gated (`hf auth login`), and its tokenizer needs its chat template. Its licence forbids to improve
other models with its output (1.b.v), so the run asks for `--accept-license`; `--list` says where to read it. Done as
the paper says it:

- `text` (A.4): tokenised with the target's tokenizer, EOS after each document, concatenated, cut into rows of 2048. The
  600 B tokens are of "publicly available datasets" that are not named: here FineWeb's sample of 10 B.
- `responses` (section 3): OIG-small-chip2 and OpenAssistant, answered at temperatures 0, 0.3, 0.7 and 1.0 with top-p
  0.95. Section 2 varies system prompts too and prints none: here an answer gets none, or the one that Meta first
  shipped with Llama 2. How long answers may be it does not say: here 256 tokens.
- `probe`: answers to held-out prompts of its three tasks, on which block efficiency is measured while a draft learns.

`Train(data={"responses": 0.9, "text": 0.1})` is its mix for distillation (section 3). `jaxdraft inspect
runs/direct-alignment-data --stage responses` shows answers at random.

Every source can be read from a folder of the same shape, and cut short, to try it all on a small target first:

    --set target.path=FOLDER --set length=512 --set fineweb.path=TEXT.jsonl --set text.tokens=200_000 \\
    --set oasst.path=TREES.jsonl --set oasst.limit=40 --set responses.max_new_tokens=48 …
"""

import dataclasses

from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.models import presets
from jaxdraft.recipe import Generate, HFModel, Prepare, Recipe

PROMPT, ANSWER = 512, 256
SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


def recipe(
    *,
    target: HFModel = HFModel("meta-llama/Llama-2-7b-chat-hf"),  # noqa: B008 (immutable)
    fineweb: Corpus = Corpus("fineweb"),  # noqa: B008
    oig: Instructions = Instructions("oig-small-chip2", max_tokens=PROMPT),  # noqa: B008
    oasst: Instructions = Instructions("oasst1", max_tokens=PROMPT),  # noqa: B008
    dolly: Instructions = Instructions("dolly", limit=200, max_tokens=PROMPT),  # noqa: B008
    xsum: Instructions = Instructions("xsum", limit=100, max_tokens=2 * PROMPT),  # noqa: B008
    cnn: Instructions = Instructions("cnn-dailymail", limit=100, max_tokens=2 * PROMPT),  # noqa: B008
    length: int = 2048,
):
    return Recipe(
        title="Direct Alignment: the data",
        description="Text for pretraining and the distillation set of arXiv 2403.00858, section 3 and appendix A.4.",
        target=target,
        draft=dataclasses.replace(presets.llama2_chat_drafter_115m, vocab_size=None),  # the target's
        stages=(
            Prepare("text", sources=(fineweb,), length=length, tokens=10e9),
            Generate(
                "responses",
                prompts=(oig, oasst),
                temperatures=(0.0, 0.3, 0.7, 1.0),
                top_p=0.95,
                system_prompts=("", SYSTEM),
                max_new_tokens=ANSWER,
                length=length,
                batch_size=64,
            ),
            Generate(
                "probe",
                prompts=(dolly, xsum, cnn),
                temperatures=(0.0, 0.6),
                top_p=0.9,
                max_new_tokens=128,
                length=length,
                batch_size=64,
            ),
        ),
    )
