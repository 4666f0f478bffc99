"""The data of FastDraft (arXiv 2411.11055): text and code to pretrain on, and instructions that the target answers.

    jaxdraft run fastdraft_data --workdir runs/fastdraft-data            # --set target.path=… for Llama-3.1-8B-Instruct

- `text`, `code` (4.1, 5.1): 10 B tokens of FineWeb's sample and of The Stack v2 smol, whose files come from Software
  Heritage's bucket (`EXTRAS=s3`, their agreement, AWS credentials). Rows of 2048, which the paper does not say.
- `text-100M` to `text-5B` (5.2, table 7): uniform samples of the 10 B tokens, each a part of the next; the recommended
  draft is pretrained on 5 B. `code-5B` is what it continues on, with `text-2500M` (5.3, section 6):
  `Train(data={"code-5B": 85 / 128, "text-2500M": 43 / 128}, batch_size=128)`, two thirds and one third of the tokens.
- `instructions` (5.1, arXiv 2406.08464): what the target writes from the bare beginning of a user's turn, at the
  temperature that Magpie uses. How many it does not say: here 100,000.
- `responses` (5.1): Alpaca, OIG-small-chip2, Evol-Instruct and those, answered greedily and at 0.6, 0.8 and 1.0, with
  no top-p. How long answers may be it does not say: here 512 tokens.
- `originals` (5.4, table 2): OIG-small-chip2 with its own answers, which the target's are compared with.
- `probe`: answers to held-out prompts of its tasks, on which block efficiency is measured while a draft learns.

Every source can be read from a folder of the same shape, and cut short, as in `direct_alignment_data`; `--set
scale=1e-5` takes so much of all text.
"""

import dataclasses

from jaxdraft.data.magpie import Magpie
from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.data.passages import Continuations
from jaxdraft.models import presets
from jaxdraft.recipe import Generate, HFModel, Prepare, Recipe, Subset, Written

PROMPT, ANSWER = 512, 512
SAMPLES = {"100M": 1e8, "500M": 5e8, "1B": 1e9, "2B": 2e9, "2500M": 2.5e9, "5B": 5e9}


def recipe(
    *,
    target: HFModel = HFModel("microsoft/Phi-3-mini-4k-instruct"),  # noqa: B008 (immutable)
    fineweb: Corpus = Corpus("fineweb"),  # noqa: B008
    stack: Corpus = Corpus("stack-v2-smol"),  # noqa: B008
    alpaca: Instructions = Instructions("alpaca", max_tokens=PROMPT),  # noqa: B008
    oig: Instructions = Instructions("oig-small-chip2", max_tokens=PROMPT),  # noqa: B008
    evol: Instructions = Instructions("evol-instruct", max_tokens=PROMPT),  # noqa: B008
    magpie: Magpie = Magpie(100_000),  # noqa: B008
    cnn: Instructions = Instructions("cnn-dailymail", limit=100, max_tokens=2 * PROMPT),  # noqa: B008
    dolly: Instructions = Instructions("dolly", limit=200, max_tokens=PROMPT),  # noqa: B008
    humaneval: Instructions = Instructions("humaneval", max_tokens=PROMPT, form="plain"),  # noqa: B008
    tinystories: Corpus = Corpus("tinystories", split="validation"),  # noqa: B008
    length: int = 2048,
    scale: float = 1.0,
):
    return Recipe(
        title="FastDraft: the data",
        description="Text, code and the alignment set of arXiv 2411.11055, sections 4.1 and 5.1 to 5.4.",
        target=target,
        draft=dataclasses.replace(presets.fastdraft_phi3_50m, vocab_size=None),  # the target's
        stages=(
            Prepare("text", sources=(fineweb,), length=length, tokens=round(10e9 * scale)),
            *(Subset(f"text-{name}", data="text", tokens=round(tokens * scale)) for name, tokens in SAMPLES.items()),
            Prepare("code", sources=(stack,), length=length, tokens=round(10e9 * scale)),
            Subset("code-5B", data="code", tokens=round(5e9 * scale)),
            Generate(
                "instructions",
                prompts=(magpie,),
                temperatures=(1.0,),
                top_p=1.0,
                max_new_tokens=PROMPT,
                length=length,
                batch_size=64,
            ),
            Generate(
                "responses",
                prompts=(alpaca, oig, evol, Written("instructions")),
                temperatures=(0.0, 0.6, 0.8, 1.0),
                top_p=1.0,
                max_new_tokens=ANSWER,
                length=length,
                batch_size=64,
            ),
            Prepare("originals", sources=(oig,), length=length, labels="assistant"),
            Generate(
                "probe",
                prompts=(cnn, Continuations(tinystories, limit=100, max_tokens=PROMPT), dolly, humaneval),
                temperatures=(0.0, 0.6),
                top_p=1.0,
                max_new_tokens=128,
                length=length,
                batch_size=64,
            ),
        ),
    )
