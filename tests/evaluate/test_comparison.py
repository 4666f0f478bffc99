"""Seeds pooled: made-up runs of several seeds, and the sums done by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdraft.decode import SpeculativeResult
from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.collect import Stage, read_run
from jaxdraft.evaluate.comparison import compare, fewer_drafts, group_by_seed, pooled_change, pooled_ratio
from jaxdraft.evaluate.metrics import acceptance_metrics, ratio_of_sums, with_interval
from jaxdraft.evaluate.report import write_report

RATIO = 0.1
LIMIT = 40  # new tokens
SETTINGS = [("story", 0.0), ("story, sampled", 1.0)]
SEEDS = ("kl-live-0", "kl-live-1")


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(name: str, seed: int | None, **settings: Any) -> dict[str, Any]:
    """A Train stage's settings."""
    same = {"loss": {"type": "KL", "weights": None}, "data": "responses", "target_logits": "live", "reference": None}
    return {"name": name, "kind": "Train", "seed": seed, **same, **settings}


def answer(rng: np.random.Generator, block_size: int) -> tuple[list[int], list[int]]:
    """Tokens and accepted counts as the decoding loop leaves them: the last block may be cut at the limit."""
    accepted: list[int] = []
    while sum(accepted) + len(accepted) < LIMIT:
        accepted.append(int(rng.binomial(block_size, 0.4)))
    return [7] * LIMIT, accepted


def result_of(tokens: list[int], accepted: list[int], block_size: int) -> SpeculativeResult:
    is_cut, blocks = sum(accepted) + len(accepted) > len(tokens), len(accepted)
    return SpeculativeResult(tokens, accepted, is_cut, drafted=[block_size] * blocks, rejected=[-1] * blocks)


def make_run(folder: Path, stages: list[dict[str, Any]], prompts: int = 6) -> Path:
    """A run whose stages are trained and measured."""
    rng = np.random.default_rng(0)
    recipe = {"name": "losses", "target": {"path": str(folder)}, "stages": [*stages, {"name": "evaluate"}]}
    write_json(folder / "recipe.json", recipe)
    for stage in stages:
        name = stage["name"]
        write_json(folder / name / "stage.json", {"status": "done", "settings": stage})
        acceptance = "acceptance_low" if stage["target_logits"] == "stored" else "acceptance"
        write_lines(folder / name / "metrics.jsonl", [{"step": i, "loss": 1 / i, acceptance: 0.5} for i in (1, 2, 3)])
        samples, runs = [], []
        for (task, temperature), block_size in ((setting, size) for setting in SETTINGS for size in (3, 5)):
            setting = {"task": task, "block_size": block_size, "temperature": temperature, "top_p": 1.0}
            results = []
            for prompt in range(prompts):
                tokens, accepted = answer(rng, block_size)
                results.append(result_of(tokens, accepted, block_size))
                line = {"id": prompt, **setting, "prompt_tokens": [1], "tokens": tokens, "accepted": accepted}
                line |= {"target_tokens": 30, "expected_blocks": 30 / rng.uniform(1.5, 2), "overlap_sum": 12.0}
                samples.append(line)
            runs.append({**setting, **acceptance_metrics(results, block_size, RATIO), "token_rate_ratio": 0.8})
        parameters = {"target": 1000, "draft": 100, "ratio": RATIO}
        results_json = {"draft_stage": name, "parameters": parameters, "runs": runs}
        write_json(folder / "evaluate" / name / "results.json", results_json)
        write_lines(folder / "evaluate" / name / "samples.jsonl", samples)
    return folder


def two_seeds(folder: Path) -> Path:
    pretrain = trained("pretrain", None, loss={"type": "CrossEntropy"}, data="text")
    return make_run(folder, [pretrain, *(trained(name, seed) for seed, name in enumerate(SEEDS))])


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "picture", lambda file, alt, draw, height=0: plotting.Picture(file, alt, b""))


def names(folder: Path, *stages: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Groups by name of stages that have not run."""
    write_json(folder / "recipe.json", {"name": "names", "stages": stages})
    groups = group_by_seed(read_run(folder), [stage["name"] for stage in stages])
    return {group.name: group.drafts for group in groups}


def test_groups_are_named_by_what_their_names_share(tmp_path: Path) -> None:
    assert names(tmp_path, *(trained(f"kl-{seed}", seed) for seed in (0, 1, 12))) == {"kl": ("kl-0", "kl-1", "kl-12")}
    assert names(tmp_path, trained("first", 0), trained("second", 1)) == {"first": ("first", "second")}
    assert names(tmp_path, trained("kl-0", 0)) == {"kl-0": ("kl-0",)}


def test_only_a_seed_of_its_own_may_differ(tmp_path: Path) -> None:
    alone = {"kl-0": ("kl-0",), "kl-1": ("kl-1",)}
    assert names(tmp_path, trained("kl-0", None), trained("kl-1", None)) == alone
    assert names(tmp_path, trained("kl-0", 0), trained("kl-1", 1, data="top8")) == alone
    assert names(tmp_path, trained("kl-0", 0), trained("kl-1", 1, steps=5)) == alone
    taken = names(tmp_path, trained("kl", None), trained("kl-0", 0), trained("kl-1", 1))
    assert taken == {"kl": ("kl",), "kl-0": ("kl-0", "kl-1")}


def test_references_may_differ_in_their_seed_alone(tmp_path: Path) -> None:
    references = [trained(f"{kept}-{seed}", seed, data=kept) for kept in ("live", "top8") for seed in (0, 1)]
    adaspec = [trained(f"ada-{r['name']}", r["seed"], reference=r["name"]) for r in references]
    found = names(tmp_path, *references, *adaspec)
    assert {name: len(drafts) for name, drafts in found.items()} == {
        "live": 2,
        "top8": 2,
        "ada-live": 2,
        "ada-top8": 2,
    }


def test_starts_may_differ_in_their_seed_alone(tmp_path: Path) -> None:
    pretrained = [trained(f"{text}-{seed}", seed, data=text) for text in ("web", "code") for seed in (0, 1)]
    distilled = [trained(f"kl-{p['name']}", p["seed"], init=p["name"]) for p in pretrained]
    fresh = [trained(f"fresh-{seed}", seed, init="random") for seed in (0, 1)]
    found = names(tmp_path, *pretrained, *distilled, *fresh)
    assert found == {name: (f"{name}-0", f"{name}-1") for name in ("web", "code", "kl-web", "kl-code", "fresh")}


def test_data_made_with_another_seed_is_other_data(tmp_path: Path) -> None:
    alone = {"kl-0": ("kl-0",), "kl-1": ("kl-1",)}
    assert names(tmp_path, *(trained(f"kl-{seed}", seed, data=f"answers-{seed}") for seed in (0, 1))) == alone


def test_pooled_values_are_the_sums_over_seeds_and_prompts(tmp_path: Path) -> None:
    run = read_run(two_seeds(tmp_path))
    rows = {(row["group"], row["task"], row["block_size"]): row for row in compare(run)}
    assert len(rows) == 2 * 2 * 2
    for (group, task, block_size), row in rows.items():
        drafts = SEEDS if group == "kl-live" else ("pretrain",)
        lines = [
            line
            for line in run.samples
            if line["draft"] in drafts and (line["task"], line["block_size"]) == (task, block_size)
        ]
        answers = [(line["tokens"], line["accepted"]) for line in lines]
        results = [result_of(t, a, block_size) for t, a in answers]
        assert any(result.cut for result in results)
        expected = acceptance_metrics(results, block_size, RATIO)
        for name in ("acceptance_rate", "block_efficiency", "mbsu"):
            assert row[name] == pytest.approx(expected[name], abs=1e-6)
        offline = sum(line["target_tokens"] for line in lines) / sum(line["expected_blocks"] for line in lines)
        assert row["block_efficiency_offline"] == pytest.approx(offline, abs=1e-6)
        assert row["overlap"] == 0.4
        for name in ("acceptance_rate", "block_efficiency", "block_efficiency_offline", "mbsu"):
            low, high = row[f"{name}_ci95"]
            assert low < row[name] < high
        assert (row["seeds"], row["prompts"]) == (len(drafts), 6)


def test_an_interval_is_over_prompts_and_over_seeds() -> None:
    rng = np.random.default_rng(1)
    above_P, below_P = rng.uniform(30, 50, 40), rng.uniform(15, 25, 40)
    alone = pooled_ratio(above_P[None], below_P[None])
    # The same answers from every seed say no more than those of one.
    np.testing.assert_allclose(pooled_ratio(np.stack([above_P] * 3), np.stack([below_P] * 3)), alone, rtol=0.01)
    one_way = with_interval("x", ratio_of_sums(above_P, below_P))
    np.testing.assert_allclose(alone, [one_way["x"], *one_way["x_ci95"]], rtol=0.01)
    # Equal prompts, different seeds: as likely as not one seed is drawn twice.
    seeds_SP = np.repeat([[1.0], [3.0]], 40, axis=1)
    assert pooled_ratio(seeds_SP, np.ones((2, 40))) == [2.0, 1.0, 3.0]


def test_only_prompts_that_every_seed_answered_count(tmp_path: Path) -> None:
    file = two_seeds(tmp_path) / "evaluate" / SEEDS[1] / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [line for line in lines if line["id"] != 2])
    assert {row["prompts"] for row in compare(read_run(tmp_path)) if row["group"] == "kl-live"} == {5}


def test_samples_of_earlier_versions_lack_what_is_offline(tmp_path: Path) -> None:
    two_seeds(tmp_path)
    for file in tmp_path.glob("evaluate/*/samples.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        new = ("target_tokens", "expected_blocks", "overlap_sum")
        write_lines(file, [{key: line[key] for key in line if key not in new} for line in lines])
    row = compare(read_run(tmp_path))[0]
    assert row["block_efficiency_offline"] is None
    assert row["overlap_ci95"] == [None, None]
    assert row["acceptance_rate"] > 0
    assert "Seeds pooled" in write_report(tmp_path).read_text()


def test_report_has_the_comparison(tmp_path: Path) -> None:
    page = write_report(two_seeds(tmp_path))
    expected = compare(read_run(tmp_path))
    with (page.parent / "comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["group"], row["task"], int(row["block_size"])) for row in rows] == [
        (row["group"], row["task"], row["block_size"]) for row in expected
    ]
    for row, whole in zip(rows, expected, strict=True):
        assert float(row["mbsu"]) == whole["mbsu"]
        ends = [float(row["block_efficiency_ci95_low"]), float(row["block_efficiency_ci95_high"])]
        assert ends == whole["block_efficiency_ci95"]
    words = page.read_text()
    for row in expected:
        assert f"{row['block_efficiency_offline']:.3f}" in words
    pictures = {path.name for path in page.parent.glob("comparison_*.png")}
    assert pictures == {"comparison_1.png", "comparison_2.png"}


@pytest.mark.usefixtures("no_figures")
def test_nothing_is_compared_without_a_second_seed(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, [trained("kl-0", 0), trained("tvd-0", 0, loss={"type": "TVD"})]))
    assert "Seeds pooled" not in page.read_text()
    assert not list(page.parent.glob("comparison*"))


@pytest.mark.usefixtures("no_figures")
def test_many_drafts_are_not_all_shown_one_by_one(tmp_path: Path) -> None:
    kinds = {name: {"type": name, "weights": None} for name in ("KL", "TVD", "JSD", "ReverseKL", "A", "B", "C")}
    drafts = [trained(f"{name}-{seed}", seed, loss=loss) for seed in (0, 1) for name, loss in kinds.items()]
    pretrain = trained("pretrain", None, loss={"type": "CrossEntropy"}, data="text")
    page = write_report(make_run(tmp_path, [pretrain, *drafts], prompts=2))
    run = read_run(tmp_path)
    few = fewer_drafts(run, "pretrain")
    mean = {name: np.mean([row["block_efficiency"] for row in run.results if name in row["draft"]]) for name in kinds}
    best = sorted(kinds, key=lambda name: -mean[name])[:6]
    assert set(few.drafts) == {"pretrain", *(f"{name}-0" for name in best)}
    assert {stage.name for stage in few.stages} == {*few.drafts, "evaluate"}
    words = page.read_text()
    assert "8 are left out" in words
    left_out = next(name for name in kinds if name not in best)
    assert f">{left_out}<" in words  # in the comparison
    assert f"{left_out}-0" not in words
    assert f"{left_out}-1," in (page.parent / "results.csv").read_text()
    twelve = make_run(tmp_path / "twelve", drafts[:12], prompts=2)
    assert fewer_drafts(read_run(twelve), None).drafts == [draft["name"] for draft in drafts[:12]]


def test_stored_targets_count_as_compared(tmp_path: Path) -> None:
    stored = trained("kl-top8", None, data="top8", target_logits="stored")
    page = write_report(make_run(tmp_path, [trained("kl", None), stored]))
    assert [stage.compared for stage in read_run(tmp_path).stages] == [True, True, False]
    assert {path.name for path in page.parent.glob("acceptance*.png")} == {"acceptance.png", "acceptance_low.png"}
    assert "only bounds of it are known" in page.read_text()


TERMS = [[0.5, {"type": "CrossEntropy"}], [0.5, {"type": "KL"}]]
NAMES = {
    "cross-entropy": {"type": "CrossEntropy", "weights": None},
    "JSD": {"type": "JSD", "beta": 0.5},
    "−log α": {"type": "LogAcceptance"},
    "TVD++ (global σ)": {"type": "TVDPlusPlusGlobal"},
    "TVD++, D-PACE weights": {"type": "TVDPlusPlus", "weights": {"type": "DPACE", "block_size": 5}},
    "KL, AdaSPEC weights": {"type": "KL", "weights": {"type": "AdaSPEC", "keep": 0.4}},
    "0.5 CE + 0.5 KL": {"type": "Mixture", "terms": TERMS, "weights": None},
    "TVD + 0.1 KL": {"type": "Mixture", "terms": [[1.0, {"type": "TVD"}], [0.1, {"type": "KL"}]]},
    "my_package:MyLoss (source 0123)": {"type": "my_package:MyLoss (source 0123)"},
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_named_as_papers_write_them(name: str) -> None:
    assert Stage("distill", "Train", "done", {"loss": NAMES[name]}, {}, None, []).loss == name


def test_a_change_is_drawn_with_its_base() -> None:
    """Of drafts that differ by a factor in every prompt, the change is exact however prompts and seeds are drawn."""
    rng = np.random.default_rng(0)
    below = rng.integers(5, 40, (3, 20)).astype(float)
    above = below * rng.uniform(1, 3, (1, 20))
    assert pooled_change(1.2 * above, below, above, below) == pytest.approx([0.2, 0.2, 0.2])
    value, low, high = pooled_change(above * rng.uniform(1.0, 1.4, (3, 20)), below, above, below)
    assert low < value < high
    alone = pooled_ratio(above, below)
    assert high - low < alone[2] - alone[1]  # what both share is no part of it
    assert pooled_change(above, below, 0 * above, below) is None
