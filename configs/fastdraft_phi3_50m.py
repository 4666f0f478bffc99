"""FastDraft (Zafrir et al. 2024, arXiv 2411.11055), whole: a 50M draft for Phi-3-mini. Its stages: Tables 4 and 14.

    jaxdraft run fastdraft_phi3_50m --workdir runs/fastdraft_phi3_50m-full
    jaxdraft run fastdraft_phi3_50m --workdir runs/fastdraft_phi3_50m --set scale=small

What it takes: 11 hours on eight H100, by `jaxdraft plan fastdraft_phi3_50m --hardware 8xH100`: 0.44 for Magpie's
instructions and 10 for the answers at most, 0.11 to pretrain, 0.17 to go on, 0.015 to fine-tune, 0.07 to evaluate.
Storage 99 GB, beside what is downloaded. Hours are of chips at 40 % of their peak and 60 % of their bandwidth, without
tokenising; the paper: "under 24 hours" on eight Gaudi 2.

Of the paper: Table 5's draft; 5 B tokens of FineWeb, then 5 B of The Stack v2 with 2.5 B of FineWeb (4.1, 5.3); the
target's answers to Alpaca, OIG-small-chip2, Evol-Instruct and instructions it wrote itself (Magpie), greedily and at
0.6, 0.8 and 1.0 (5.1); cross-entropy on them (section 6); Adam at 1e-4, 0.9/0.999, decay 0.01, 5 % warm-up, linear, in
batches of 128 (A.3). Its numbers, acceptance at γ 3, greedy, after PT, CP and FT: CNN/DailyMail 0.350, 0.349, 0.399;
TinyStories 0.295, 0.304, 0.321; Dolly 0.258, 0.244, 0.390; HumanEval 0.312, 0.672, 0.663.

What differs. Rows of 2048 and answers of 512 tokens, 100,000 instructions of Magpie's, one pass over answers as long as
384 tokens with their prompts, A.3's settings for fine-tuning too and 100 prompts of each task (HumanEval: all 164) are
ours: the paper does not say. Its Evol-Instruct was never given out: here a replication of 78,264. Text is the first of
FineWeb's sample of 10 B, code the first of its data set (the paper sampled 10 B of it), and the 2.5 B are among the 5 B
pretrained on. Documents of a row do not see each other, and questions of more than 512 tokens are left out. Magpie's
are written at T 1.0; HumanEval is asked as plain text, all else in the chat template. Decay is AdamW's, for matrices
alone, and gradients are clipped at 1. It trained in float16, this computes in bfloat16 on accelerators. The code's
files come from Software Heritage's bucket (`EXTRAS=s3`, their agreement, AWS credentials).

Small: the target, text, code and questions of `configs/_python.py`, three seeds; 3e5 tokens for each of its billions.
Batches are of 4 rows, of 12 where code and text are mixed (`fastdraft_code_mixes`: everywhere); 400 updates on OIG's
answers and 600 on all are what a minute allows, four passes and one.
"""

import _fastdraft as fd
import _stages as stages


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    return stages.stages_of(
        size, "50M", "FastDraft: a 50M draft for Phi-3-mini", stages.of_tables(size, "Phi3-mini 50M"), seeds
    )
