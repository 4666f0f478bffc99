"""Drafts that differ only in their seed, measured as one: statistics pooled over seeds and prompts, with intervals.

Shapes: S seeds, P prompts, N resamples.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxdraft.evaluate.collect import RunDirectory, Stage
from jaxdraft.evaluate.metrics import RESAMPLES, mbsu, plain
from jaxdraft.evaluate.words import decoding

MOST_DRAFTS = 12  # that the page shows one by one
FEWER_DRAFTS = 7  # shown where there are more: as many as have colours of their own, the first one's included

# What tells one setting from another, as far as a line names it; the batch size changes nothing but speed.
_SETTING = ("task", "temperature", "top_p", "top_k", "verification", "drafting", "stop_below", "block_size")
_DRAFTS = ("init", "reference")  # settings of a Train stage that may name another
Setting = tuple[tuple[str, Any], ...]
# Metric -> the sums over prompts that it is the ratio of.
RATIOS = {
    "acceptance_rate": ("accepted", "drafted_complete"),
    "block_efficiency": ("tokens", "blocks"),
    "block_efficiency_offline": ("target_tokens", "expected_blocks"),
    "overlap": ("overlap_sum", "target_tokens"),
}


@dataclass(frozen=True)
class Group:
    """Drafts that differ only in their seed.

    Attributes:
      name: what their names have in common.
      stage: that trained the first of them; None for a draft that was trained elsewhere.
      drafts: in the order in which they were trained.
    """

    name: str
    stage: Stage | None
    drafts: tuple[str, ...]

    @property
    def data(self) -> str:
        """What they learned from, in a few words."""
        settings = self.stage.settings if self.stage else {}
        words = " + ".join([data] if isinstance(data := settings.get("data", ()), str) else data)
        return f"{words}, stored targets" if settings.get("target_logits") == "stored" else words


def group_by_seed(run: RunDirectory, drafts: Sequence[str]) -> list[Group]:
    """``drafts`` in groups; one without siblings, or without a seed of its own, is a group of one."""
    found: dict[str, list[str]] = {}
    for draft in drafts:
        stage = run.stage(draft)
        has_seed = stage is not None and stage.settings.get("seed") is not None
        found.setdefault(repr(_but_for_seed(run, draft)) if has_seed else draft, []).append(draft)
    groups: dict[str, Group] = {}
    for members in found.values():
        name, *others = {re.sub(r"-\d+$", "", draft) for draft in members}
        if others or len(members) == 1 or name in drafts or name in groups:
            name = members[0]
        groups[name] = Group(name, run.stage(members[0]), tuple(members))
    return list(groups.values())


def _but_for_seed(run: RunDirectory, draft: str) -> Any:
    """What a draft shares with those that differ only in their seed; start and reference may differ likewise."""
    stage = run.stage(draft)
    if stage is None:
        return draft
    same = {key: value for key, value in stage.settings.items() if key not in ("name", "seed", *_DRAFTS)}
    others = [stage.settings.get(key) for key in _DRAFTS]
    return sorted(same.items()), [_but_for_seed(run, other) if other else None for other in others]


def compare(run: RunDirectory) -> list[dict[str, Any]]:
    """A row per group, task, decoding setting and block size; none where no draft was trained with several seeds.

    Each has ``group, loss, data, seeds, prompts``, the setting, and ``acceptance_rate``, ``block_efficiency``,
    ``block_efficiency_offline``, ``mbsu`` and ``overlap`` with their intervals, null where samples.jsonl lacks what
    they are made of. Only prompts that all seeds answered count.
    """
    groups = group_by_seed(run, run.drafts)
    if all(len(group.drafts) == 1 for group in groups):
        return []
    answers = answers_by_setting(run)
    settings = dict.fromkeys(setting for _, setting in answers)
    rows = []
    for group in groups:
        for setting in settings:
            by_seed = [answers[key] for draft in group.drafts if (key := (draft, setting)) in answers]
            prompts = answered_by_all(by_seed)
            if prompts:
                ratio = run.parameters[group.drafts[0]]["ratio"]
                counts = [[counts_of(seed[prompt]) for prompt in prompts] for seed in by_seed]
                rows.append(
                    {
                        "group": group.name,
                        "loss": group.stage.loss if group.stage else "",
                        "data": group.data,
                        "seeds": len(by_seed),
                        "prompts": len(prompts),
                        **dict(setting),
                        **_pooled(counts, ratio),
                    }
                )
    return rows


def answers_by_setting(run: RunDirectory) -> dict[tuple[str, Setting], dict[str, Mapping[str, Any]]]:
    """Lines of samples.jsonl by draft and setting, and then by prompt."""
    answers: dict[tuple[str, Setting], dict[str, Mapping[str, Any]]] = {}
    for line in run.samples:
        answers.setdefault((line["draft"], setting_of(line)), {})[str(line["id"])] = line
    return answers


def setting_of(line: Mapping[str, Any]) -> Setting:
    """What tells its setting from another, of a sample or a result."""
    return tuple((name, line[name]) for name in _SETTING if name in line)


def answered_by_all(drafts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prompts that every one of some drafts answered, in order."""
    return [prompt for prompt in drafts[0] if all(prompt in draft for draft in drafts)] if drafts else []


def counts_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What one answer adds to the sums."""
    accepted = line["accepted"]
    # A block that is not cut writes its accepted tokens and one more.
    is_cut = len(line["tokens"]) < sum(accepted) + len(accepted)
    complete = accepted[:-1] if is_cut else accepted
    drafted = line.get("drafted", [line["block_size"]] * len(accepted))
    return {
        "tokens": len(line["tokens"]),
        "blocks": len(accepted),
        "accepted": sum(complete),
        "drafted": sum(drafted),
        "drafted_complete": sum(drafted[: len(complete)]),
        **{key: line.get(key, np.nan) for key in ("target_tokens", "expected_blocks", "overlap_sum")},
    }


def _pooled(counts: Sequence[Sequence[Mapping[str, float]]], ratio: float) -> dict[str, Any]:
    """The metrics of one group in one setting, from counts per seed and prompt."""
    found = {}
    for name, sums in RATIOS.items():
        found[name] = pooled_ratio(*(np.array([[c[key] for c in seed] for seed in counts]) for key in sums))
    drafted = np.sum([[c["drafted"] for c in seed] for seed in counts])
    blocks = np.sum([[c["blocks"] for c in seed] for seed in counts])
    found["mbsu"] = [mbsu(value, ratio, drafted / blocks) for value in found["block_efficiency"]]
    row: dict[str, Any] = {}
    for name, values in found.items():
        value, low, high = map(plain, values)
        row |= {name: value, f"{name}_ci95": [low, high]}
    return row


def pooled_ratio(above_SP: np.ndarray, below_SP: np.ndarray) -> list[float]:
    """Σ above / Σ below over seeds and prompts, and the ends of its 95% interval.

    The interval is a two-way percentile bootstrap: seeds and prompts are drawn anew independently of each other, and a
    prompt that is drawn comes with its answers from every seed, because they are alike. A few seeds tell little of
    others: what they contribute to the interval is rough.
    """
    value, draws_N = _resampled(above_SP, below_SP)
    return _with_ends(value, draws_N)


def pooled_change(
    above_SP: np.ndarray, below_SP: np.ndarray, base_above_SP: np.ndarray, base_below_SP: np.ndarray
) -> list[float] | None:
    """By how much a ratio is above another of the same seeds and prompts, relative to it, and its 95% interval.

    As ``pooled_ratio``, with the same seeds and prompts drawn for both: what they share is not counted as chance. None
    where the other one is 0, or is in a resample.
    """
    value, draws_N = _resampled(above_SP, below_SP)
    base, base_draws_N = _resampled(base_above_SP, base_below_SP)
    if not (base > 0 and np.all(base_draws_N > 0)):
        return None
    return _with_ends(value / base - 1, draws_N / base_draws_N - 1)


def _resampled(above_SP: np.ndarray, below_SP: np.ndarray) -> tuple[float, np.ndarray]:
    """Σ above / Σ below, and the same of each resample, which for a shape are always the same ones."""
    rng = np.random.default_rng(0)
    seeds_NS, prompts_NP = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in above_SP.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        above_N, below_N = (np.sum(seeds_NS @ x_SP * prompts_NP, axis=1) for x_SP in (above_SP, below_SP))
        return above_SP.sum() / below_SP.sum(), above_N / below_N


def _with_ends(value: float, draws_N: np.ndarray) -> list[float]:
    finite = draws_N[np.isfinite(draws_N)]
    return [float(x) for x in (value, *np.percentile(finite if finite.size else [value], [2.5, 97.5]))]


def fewer_drafts(run: RunDirectory, first: str | None) -> RunDirectory:
    """``run`` with no more drafts than a page can show one by one; itself where it has few.

    Of many, the first seed is kept of the groups with the highest block efficiency, ``first`` before all.
    """
    target = run.recipe.get("target")
    trained = [stage.name for stage in run.stages if stage.kind == "Train" and stage.name != target]
    drafts = list(dict.fromkeys([*trained, *run.drafts]))
    if len(drafts) <= MOST_DRAFTS:
        return run
    groups = group_by_seed(run, drafts)
    order = sorted(groups, key=lambda group: (first not in group.drafts, -_mean_efficiency(run, group)))
    left_out = set(drafts).difference(group.drafts[0] for group in order[:FEWER_DRAFTS])
    kept = lambda lines: [line for line in lines if line["draft"] not in left_out]
    return replace(
        run,
        stages=[stage for stage in run.stages if stage.name not in left_out],
        results=kept(run.results),
        curves=kept(run.curves),
        checkpoints=kept(run.checkpoints),
        while_learning=kept(run.while_learning),
    )


def _mean_efficiency(run: RunDirectory, group: Group) -> float:
    """Mean block efficiency over the group's drafts and settings; 0 before it was measured."""
    values = [row["block_efficiency"] for row in run.results if row["draft"] in group.drafts]
    return float(np.mean(values)) if values else 0.0


def ranked(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of ``compare`` by task and decoding setting and then by group, each with its block sizes in order.

    The group with the highest block efficiency at its largest block size comes first.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["block_size"]):
        found.setdefault(f"{row['task']} ({decoding(row)})", {}).setdefault(row["group"], []).append(row)
    return {
        title: sorted(groups.values(), key=lambda group: -(group[-1]["block_efficiency"] or 0))
        for title, groups in found.items()
    }
