"""Code and text, mixed or one after the other: Figure 2 and Tables 8 to 13 of FastDraft (arXiv 2411.11055, 5.3, A.5).

    jaxdraft run fastdraft_code_mixes --workdir runs/fastdraft_code_mixes-full
    jaxdraft run fastdraft_code_mixes --workdir runs/fastdraft_code_mixes --set scale=small

What it takes: 1.9 hours on eight H100, by `jaxdraft plan fastdraft_code_mixes --hardware 8xH100`: 0.11 for each 5 B
tokens, 77 B in all, 0.22 to evaluate; storage 201 GB, 60 of them text and code, 125 their samples.

Pretrained on 5 B tokens of text and continued on 5 B of code with 0, 1 or 2.5 B of text; the other way round; and on
10 B of a mixture. The paper's numbers, acceptance on HumanEval at γ 3, greedy: text first 0.688, 0.678, 0.672; code
first 0.320, 0.628, 0.667; mixed 0.639, 0.656, 0.657. On Dolly: 0.210, 0.245, 0.244; 0.220, 0.222, 0.227; 0.205,
0.220, 0.216. What differs is what `fastdraft_phi3_50m` says: what comes again is a part of what was pretrained on. A.5
speaks of 4 B of text and 6 B of code, its tables of 6 and 4: here as in the tables.
"""

from collections.abc import Mapping

import _fastdraft as fd
import _python as small

from jaxdraft.recipe import Recipe

Parts = Mapping[str, float]

# Row of tables 8 to 11 -> the first 5 B, and billions of tokens of each that follow.
CONTINUED: Mapping[str, tuple[str, Parts]] = {
    "FineWeb + 5B code": ("text", {"code": 5}),
    "FineWeb + 5B code + 1B text": ("text", {"code": 5, "text": 1}),
    "FineWeb + 5B code + 2.5B text": ("text", {"code": 5, "text": 2.5}),
    "Stack + 5B text": ("code", {"text": 5}),
    "Stack + 1B code + 5B text": ("code", {"text": 5, "code": 1}),
    "Stack + 2.5B code + 5B text": ("code", {"text": 5, "code": 2.5}),
}
# Row of tables 12 and 13.
MIXED: Mapping[str, Parts] = {
    "5B text + 5B code": {"text": 5, "code": 5},
    "6B text + 4B code": {"text": 6, "code": 4},
    "7B text + 3B code": {"text": 7, "code": 3},
}


def stage(first: str, then: Parts) -> str:
    return "-".join((first, *(f"{kind}{billions:g}".replace(".", "_") for kind, billions in then.items())))


def recipe(*, scale: fd.Scale = "full", seeds: int | None = None):
    size = fd.size_of(scale)
    size = size._replace(batch_size=size.mixed_batch_size)
    samples = {
        (kind, billions): fd.sample(size, kind, billions)
        for kind, few in {"text": (1, 2.5, 5, 6), "code": (1, 2.5, 3, 4)}.items()
        for billions in few
    }
    # Of text there are 7 B, of code 5 B, and all that is wanted of them is a part of that.
    rows_of = lambda kind, billions: samples[kind, billions].name if (kind, billions) in samples else kind
    data = lambda parts: fd.mix(size, {rows_of(kind, billions): billions for kind, billions in parts.items()})
    drafts = []
    for seed in small.seeds_of(seeds, size.seeds):
        drafts += [fd.train(size, f"base-{kind}", seed, rows_of(kind, 5), billions=5) for kind in ("text", "code")]
        drafts += [
            fd.train(
                size, stage(first, then), seed, data(then), billions=sum(then.values()), init=f"base-{first}-{seed}"
            )
            for first, then in CONTINUED.values()
        ]
        drafts += [fd.train(size, stage("mixed", parts), seed, data(parts), billions=10) for parts in MIXED.values()]
    continued = {row: stage(*of) for row, of in CONTINUED.items()}
    mixed = {row: stage("mixed", parts) for row, parts in MIXED.items()}
    text_first = {row: name for row, name in continued.items() if row.startswith("FineWeb")}
    return Recipe(
        title="FastDraft: code and text",
        description="arXiv 2411.11055, section 5.3 and appendix A.5: one after the other, in either order, or mixed.",
        target=size.target,
        draft=size.drafts["50M"],
        reproduces=(
            fd.shown(size, "Figure 2", {"base": "base-text", **text_first}),
            *(fd.shown(size, name, continued, ("humaneval",)) for name in ("Table 8", "Table 10")),
            *(fd.shown(size, name, continued, fd.LANGUAGE) for name in ("Table 9", "Table 11")),
            *(fd.shown(size, name, mixed) for name in ("Table 12", "Table 13")),
        ),
        stages=(
            fd.rows(size, "text", 7),
            fd.rows(size, "code", 5),
            *samples.values(),
            *drafts,
            fd.evaluate(size, drafts),
        ),
    )
