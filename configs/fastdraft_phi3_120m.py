"""FastDraft (Zafrir et al. 2024, arXiv 2411.11055): its larger draft for Phi-3-mini, 120M. A part of Table 7, Figure 1.

    jaxdraft run fastdraft_phi3_120m --workdir runs/fastdraft_phi3_120m-full
    jaxdraft run fastdraft_phi3_120m --workdir runs/fastdraft_phi3_120m --set scale=small

What it takes: 12 hours on eight H100, by `jaxdraft plan fastdraft_phi3_120m --hardware 8xH100`: 11 for instructions
and answers at most, 0.34 to pretrain, 0.51 to go on, 0.046 to fine-tune, 0.08 to evaluate; storage 106 GB. With
`--only text pretrain-0` it is 0.34 and 29 GB: the paper's own part, measured in `fastdraft_data_size`.

As `fastdraft_phi3_50m`, whose docstring says what is the paper's and what is not. The paper only pretrains this draft;
after 5 B tokens it prints, acceptance at γ 3, greedy and at T 0.6: CNN/DailyMail 0.393 and 0.366, TinyStories 0.343 and
0.327, Dolly 0.293 and 0.281, perplexity 167.7. Its other stages are here for those who want the draft. With table 5's
widths it has 134M parameters, 110M with a tied head; which the paper does not say. Small it is `fastdraft_llama31_150m`
to the byte: there is one larger draft.
"""

import _fastdraft as fd
import _stages as stages


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    reproduces = tuple(fd.shown(size, name, {"120M, 5BT": "pretrain"}, fd.LANGUAGE) for name in ("Table 7", "Figure 1"))
    return stages.stages_of(size, "120M", "FastDraft: a 120M draft for Phi-3-mini", reproduces, seeds)
