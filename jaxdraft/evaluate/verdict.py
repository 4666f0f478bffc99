"""Says in plain words what a run's numbers show, also where they show that something did not work."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.words import count, decoding, in_words, number


class Figure(NamedTuple):
    """One of the page's large numbers, with what it counts and where it was measured."""

    value: str
    name: str
    detail: str


class Summary(NamedTuple):
    """What the page opens with.

    Attributes:
      best: the draft with the highest mean block efficiency at the largest block size; distilled ones first.
      baseline: the draft before distillation, if it was evaluated.
      sentences: the verdict.
      figures: the large numbers.
    """

    best: str | None
    baseline: str | None
    sentences: list[str]
    figures: list[Figure]


def summarise(run: RunDirectory) -> Summary:
    """The verdict on ``run``, from its results alone."""
    if not run.results:
        return Summary(None, None, [_without_results(run)], [])
    distilled = [draft for draft in run.drafts if (stage := run.stage(draft)) and stage.distilled]
    others = [draft for draft in run.drafts if draft not in distilled]
    baseline = others[0] if others else None
    best = max(distilled or others, key=lambda draft: _mean_efficiency(run, draft, baseline))
    if best in distilled and baseline:
        sentences = [_gain(run, best, baseline), _comparisons(run, best, baseline)]
    else:
        sentences = [_alone(run, best, bool(distilled))]
    sentences += [_size(run, best), _speed(run, best), _best_block_size(run, best), _lossless(run)]
    return Summary(best, baseline, [sentence for sentence in sentences if sentence], _figures(run, best))


def _cells(run: RunDirectory, draft: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The draft's results by task, decoding setting and block size."""
    mine = [row for row in run.distinct_results if row["draft"] == draft]
    return {(row["task"], decoding(row), row["block_size"]): row for row in mine}


def _shared(run: RunDirectory, drafts: Sequence[str]) -> list[tuple[str, str, int]]:
    """Settings at the largest block size in which all of ``drafts`` were measured."""
    largest = max(row["block_size"] for row in run.results)
    common = set.intersection(*(set(_cells(run, draft)) for draft in drafts))
    return sorted(key for key in common if key[2] == largest)


def _mean_efficiency(run: RunDirectory, draft: str, other: str | None) -> float:
    """Mean block efficiency over the settings in which ``other`` was measured too."""
    cells = _cells(run, draft)
    values = [cells[key]["block_efficiency"] for key in _shared(run, [draft, other or draft])]
    return sum(values) / len(values) if values else 0.0


def _without_results(run: RunDirectory) -> str:
    done = sum(stage.status == "done" for stage in run.stages)
    if done == len(run.stages) and not any(stage.kind == "Evaluate" for stage in run.stages):
        return f"All {done} stages are done. None of them measures a draft."
    return (
        f"Nothing has been measured yet: {done} of {len(run.stages)} stage(s) done, and none of them "
        "is an evaluation with results. The same command goes on from here."
    )


def _size(run: RunDirectory, best: str) -> str:
    parameters = run.parameters[best]
    return (
        f"The draft has {count(parameters['draft'])} parameters, {parameters['ratio']:.1%} of the target's "
        f"{count(parameters['target'])}."
    )


def _gain(run: RunDirectory, best: str, baseline: str) -> str:
    shared = _shared(run, [best, baseline])
    if not shared:
        return (
            f"{run.label(best)} and {run.label(baseline)} were measured on different tasks, so they cannot be compared."
        )
    before, after = _mean_efficiency(run, baseline, best), _mean_efficiency(run, best, baseline)
    tasks = len({task for task, _, _ in shared})
    what = in_words(tasks, "task") if tasks == len(shared) else f"{len(shared)} settings of {in_words(tasks, 'task')}"
    where = f"averaged over {what} at block size γ = {shared[0][2]}"
    if after > before:
        return (
            f"Distillation raised block efficiency, the tokens gained from one run of the target, from "
            f"{number(before)} to {number(after)}, {where}; the best draft is {run.label(best)}."
        )
    return (
        f"Distillation did not help: the best distilled draft, {run.label(best)}, has a block efficiency (tokens "
        f"gained from one run of the target) of {number(after)} against {number(before)} before it, {where}."
    )


def _comparisons(run: RunDirectory, best: str, baseline: str) -> str:
    mine, theirs = _cells(run, best), _cells(run, baseline)
    common = [key for key in mine if key in theirs]
    lost = [key for key in common if mine[key]["block_efficiency"] <= theirs[key]["block_efficiency"]]
    clear = sum(_above(mine[key], theirs[key]) for key in common)
    words = (
        f"It is ahead of {run.label(baseline)} in {len(common) - len(lost)} of {len(common)} comparisons (task × γ), "
        f"in {clear} of them with 95% intervals that do not overlap"
    )
    behind = ", ".join(f"{task} ({how}) at γ = {block_size}" for task, how, block_size in lost)
    return words + (f", and not ahead in {behind}." if lost else ".")


def _above(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the whole 95% interval of ``row`` lies above that of ``other``."""
    key = "block_efficiency_ci95"
    return bool(row.get(key) and other.get(key)) and row[key][0] > other[key][1]


def _alone(run: RunDirectory, best: str, distilled: bool) -> str:
    value = _mean_efficiency(run, best, None)
    missing = (
        "the draft before distillation was not measured"
        if distilled
        else "no draft distilled from the target's distribution was measured"
    )
    largest = max(row["block_size"] for row in run.results)
    return (
        f"With {run.label(best)} every run of the target yields {number(value)} tokens on average at block size "
        f"γ = {largest}; {missing}, so nothing can be said about what distillation gained."
    )


def _speed(run: RunDirectory, best: str) -> str:
    by_batch: dict[int, list[float]] = {}
    for row in run.results:
        if row["draft"] == best and row.get("token_rate_ratio") is not None:
            by_batch.setdefault(row.get("batch_size", 1), []).append(row["token_rate_ratio"])
    if not by_batch:
        return ""
    if len(by_batch) > 1:
        each = [
            f"{' to '.join(dict.fromkeys(map(number, (min(ratios), max(ratios)))))} times as fast at batch size {batch}"
            for batch, ratios in sorted(by_batch.items())
        ]
        return f"On this machine text came {', '.join(each)} with it as from the target alone."
    (ratios,) = by_batch.values()
    low, high = number(min(ratios)), number(max(ratios))
    if max(ratios) < 1:
        return (
            f"On this machine it did not pay: with the draft, text came only {low} to {high} times as fast as from "
            "the target alone."
        )
    slower = sum(ratio < 1 for ratio in ratios)
    words = f"On this machine text came {low} to {high} times as fast with it as from the target alone"
    return words + (f"; {slower} of {len(ratios)} settings were slower than no draft at all." if slower else ".")


def _best_block_size(run: RunDirectory, best: str) -> str:
    """Which γ is predicted to be the fastest, for each batch size; empty where it was not looked for."""
    found: dict[int, list[int]] = {}
    for curve in run.curves:
        if curve["draft"] == best:
            found.setdefault(curve["batch_size"], []).append(curve["best_block_size"])
    if not found:
        return ""
    words = [f"{_between(sizes)} at batch size {batch}" for batch, sizes in sorted(found.items())]
    return f"The fastest block size, predicted from latencies measured here, is {', '.join(words)}."


def _between(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    first = f"γ = {low}" if low else "no draft at all"
    return first if low == high else f"{first} to {high}, depending on the task,"


def _lossless(run: RunDirectory) -> str:
    rows = [row for row in run.results if not row.get("temperature") and row.get("identical_to_target") is not None]
    if not rows:
        return ""
    equal, total = sum(row["identical_to_target"] for row in rows), sum(row["prompts"] for row in rows)
    if equal == total:
        return f"All {total:,} greedy answers written with a draft are the target's own, token for token."
    return (
        f"Only {equal:,} of {total:,} greedy answers written with a draft are the target's own, token for token: "
        "in float32 all of them should be."
    )


def _figures(run: RunDirectory, best: str) -> list[Figure]:
    parameters = run.parameters[best]
    found = [
        Figure(
            f"{parameters['ratio']:.1%}",
            "draft size",
            f"of the target: {count(parameters['draft'])} of {count(parameters['target'])} parameters",
        )
    ]
    largest = {
        "block_efficiency": ("best block efficiency", "", "tokens per target run"),
        "mbsu": ("best MBSU", "×", "speed-up if memory alone sets the pace"),
        "token_rate_ratio": ("best measured speed", "×", "tokens per second with the draft / without"),
    }
    for metric, (name, unit, meaning) in largest.items():
        rows = [row for row in run.results if row.get(metric) is not None]
        if rows:
            top = max(rows, key=lambda row: row[metric])
            where = f"{top['draft']}, {top['task']}, γ = {top['block_size']}"
            where += f", batch {top['batch_size']}" if top.get("batch_size", 1) > 1 else ""
            found.append(Figure(number(top[metric]) + unit, name, f"{meaning}: {where}"))
    return found
