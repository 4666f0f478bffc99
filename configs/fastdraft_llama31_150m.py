"""FastDraft (Zafrir et al. 2024, arXiv 2411.11055), whole: a 150M draft for Llama-3.1-8B. Tables 4 and 14.

    jaxdraft run fastdraft_llama31_150m --workdir runs/fastdraft_llama31_150m-full
    jaxdraft run fastdraft_llama31_150m --workdir runs/fastdraft_llama31_150m --set scale=small

What it takes: 12 hours on eight H100, by `jaxdraft plan fastdraft_llama31_150m --hardware 8xH100`: 0.51 for Magpie's
instructions and 11 for the answers at most, 0.27 to pretrain, 0.4 to go on, 0.036 to fine-tune, 0.14 to evaluate;
storage 136 GB, for a token of 128,256 takes seven bytes, one of Phi-3's five.

As `fastdraft_phi3_50m`, whose docstring says what is the paper's and what is not; only target and draft differ. Its
numbers, acceptance at γ 3, greedy, after PT, CP and FT: CNN/DailyMail 0.298, 0.300, 0.327; TinyStories 0.243, 0.250,
0.271; Dolly 0.257, 0.284, 0.350; HumanEval 0.282, 0.658, 0.700. Llama 3.1's licence asks for a name that begins with
"Llama" and for "Built with Llama"; the model is gated (`hf auth login`). Small: the larger draft of
`configs/_python.py`.
"""

import _fastdraft as fd
import _stages as stages


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale, fd.LLAMA31)
    return stages.stages_of(
        size, "150M", "FastDraft: a 150M draft for Llama-3.1-8B", stages.of_tables(size, "Llama3.1 150M"), seeds
    )
