"""How much text to pretrain on, for two sizes of draft: Tables 1, 7 and Figure 1 of FastDraft (arXiv 2411.11055, 5.2).

    jaxdraft run fastdraft_data_size --workdir runs/fastdraft_data_size-full
    jaxdraft run fastdraft_data_size --workdir runs/fastdraft_data_size --set scale=small

What it takes: 1.8 hours on eight H100, by `jaxdraft plan fastdraft_data_size --hardware 8xH100`: 0.22 and 0.68 to
pretrain on all 10 B, less on their parts, 0.1 to evaluate; storage 122 GB, 50 of them text. No answers are written.

Six uniform samples of FineWeb's, each a part of the next, one pass over each. The paper's numbers: acceptance of the
50M draft on CNN/DailyMail at γ 3, greedy: 0.168, 0.304, 0.315, 0.347, 0.350, 0.325 for 0.1, 0.5, 1, 2, 5 and 10 B
tokens; of the 120M draft 0.194, 0.322, 0.376, 0.391, 0.393, 0.381. Perplexity (of WikiText-2; the split it does not
say: test here) still falls at 10 B; acceptance on CNN/DailyMail and Dolly is highest at 1 to 5 B, on TinyStories it
still grows. What differs is what `fastdraft_phi3_50m` says.
"""

import _fastdraft as fd
import _python as small

from jaxdraft.recipe import Recipe

BILLIONS = (0.1, 0.5, 1, 2, 5, 10)


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    samples = {billions: fd.sample(size, "text", billions) for billions in BILLIONS[:-1]}
    names = {f"{draft}, {billions:g}BT": (draft, billions) for draft in ("50M", "120M") for billions in BILLIONS}
    stage = lambda draft, billions: f"pretrain-{draft}-{billions:g}BT".replace(".", "_")
    drafts = [
        fd.train(
            size,
            stage(draft, billions),
            seed,
            samples[billions].name if billions in samples else "text",
            billions=billions,
            model=size.drafts[draft],
        )
        for seed in small.seeds_of(seeds, size.seeds)
        for draft, billions in names.values()
    ]
    rows = {row: stage(*of) for row, of in names.items()}
    shown = lambda exhibit, which: fd.shown(size, exhibit, {row: rows[row] for row in which}, fd.LANGUAGE)
    return Recipe(
        title="FastDraft: how much text",
        description="arXiv 2411.11055, section 5.2: drafts of two sizes pretrained on samples that nest.",
        target=size.target,
        draft=size.drafts["50M"],
        reproduces=(
            shown("Table 1", [row for row in rows if row.endswith((" 2BT", " 5BT", " 10BT"))]),
            shown("Table 7", rows),
            shown("Figure 1", [row for row in rows if row.endswith(" 5BT")]),
        ),
        stages=(
            fd.rows(size, "text", 10),
            *samples.values(),
            *drafts,
            fd.evaluate(size, drafts, fd.LANGUAGE, block_sizes=(3,), perplexity=size.perplexity),
        ),
    )
