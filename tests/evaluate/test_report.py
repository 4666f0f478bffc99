"""The report of a made-up run: every number is the run's own, and nothing in a run can become markup."""

import base64
import csv
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import figures, plotting, training_figures
from jaxdraft.evaluate.collect import read_run
from jaxdraft.evaluate.report import write_report
from jaxdraft.evaluate.verdict import summarise
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import load_tokenizer

DRAFTS = ("pretrain", "distill_kl", "distill_tvd", "distill_tvdpp")
LOSSES = {"pretrain": "CrossEntropy", "distill_kl": "KL", "distill_tvd": "TVD", "distill_tvdpp": "TVDPlusPlus"}
TASKS = {"open-ended": (0.6, 0.9, 1.6), "summary": (0.0, 1.0, 2.0), "code completion": (0.0, 1.0, 2.4)}
TARGET, DRAFT = 5_123_456, 412_928
HOSTILE = """<script src="https://evil.example/x.js">alert(1)</script><img src=x onerror="alert('2')">&amp;"""


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def make_metrics(name: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    grown = 1 - np.exp(-np.arange(1, steps + 1) / (0.2 * steps))
    noise = rng.normal(0, 1, (2, steps))
    start, end = {"distill_kl": (1.3, 0.7), "distill_tvd": (0.5, 0.33), "distill_tvdpp": (0.0, -0.12)}.get(
        name, (7, 2.6)
    )
    lines = [
        {"step": i + 1, "loss": start + (end - start) * grown[i] + 0.03 * noise[0, i], "tokens": 4096}
        for i in range(steps)
    ]
    if name.startswith("distill"):
        for i, line in enumerate(lines):
            line["acceptance"] = 0.5 + 0.16 * grown[i] + 0.01 * noise[1, i]
    return lines


def make_result(draft: str, task: str, block_size: int) -> dict[str, Any]:
    temperature, top_p, base = TASKS[task]
    efficiency = (
        base + 0.25 * (block_size - 3) / 2 + {"pretrain": 0, "distill_kl": 0.42, "distill_tvd": 0.45}.get(draft, 0.58)
    )
    c = DRAFT / TARGET
    ratio = 0.62 * efficiency
    return {
        "task": task,
        "block_size": block_size,
        "temperature": temperature,
        "top_p": top_p,
        "prompts": 24,
        "tokens": 2304,
        "blocks": round(2304 / efficiency),
        "acceptance_rate": (efficiency - 1) / block_size,
        "block_efficiency": efficiency,
        "block_efficiency_ci95": [efficiency - 0.09, efficiency + 0.1],
        "block_efficiency_full": efficiency + 0.02,
        "block_efficiency_offline": efficiency - 0.01,
        "mbsu": efficiency / (c * block_size + 1),
        "mbsu_ci95": [(efficiency + d) / (c * block_size + 1) for d in (-0.09, 0.1)],
        "acceptance_by_position": [((efficiency - 1) / efficiency) ** i for i in range(1, block_size + 1)],
        "overlap": 0.5 + efficiency / 20,
        "tokens_per_second": 412.3 * ratio,
        "tokens_per_second_autoregressive": 412.3,
        "token_rate_ratio": ratio,
        "token_rate_ratio_ci95": [ratio - 0.04, ratio + 0.05],
        "acceptance_by_class": {
            kind: {"accepted": round(90 * rate), "proposed": 90, "rate": rate, "rate_ci95": [rate - 0.05, rate + 0.05]}
            for kind, rate in {"first": 0.3, "punctuation": efficiency / 4, "other": efficiency / 5}.items()
        },
        "tpot": 0.0024 / efficiency,
        "tpot_ci95": [0.0023 / efficiency, 0.0025 / efficiency],
        "tpot_autoregressive": 0.0024,
        "draft_latency": 0.00031,
        "target_latency_1": 0.0024,
        "target_latency_block": 0.0031,
        "predicted_speedup": 0.66 * efficiency,
        "identical_to_target": None if temperature else 24,
    }


def make_curve(task: str, batch_size: int) -> dict[str, Any]:
    """Predicted speed-ups that are highest at γ = 4 / batch size, and one that was measured."""
    temperature, top_p, base = TASKS[task]
    points = [
        {"block_size": n, "block_efficiency": 1 + n / 2, "predicted_speedup": base - abs(n - 4 / batch_size) / 8}
        for n in range(9)
    ]
    points[3]["measured_speedup"] = base - 0.2
    setting = {"task": task, "temperature": temperature, "top_p": top_p, "batch_size": batch_size}
    return {**setting, "best_block_size": 4 // batch_size, "curve": points}


def make_samples(folder: Path, draft: str, block_size: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    answer = textwrap.dedent(str(textwrap.TextWrapper.__doc__)).strip()
    lines = []
    for task, (temperature, top_p, base) in TASKS.items():
        for i in range(3):
            tokens = tokenizer.encode(answer[150 * i : 150 * i + 320], bos=False)[:96]
            accepted: list[int] = []
            while sum(accepted) + len(accepted) < len(tokens):
                accepted.append(int(rng.binomial(block_size, min(0.9, base / 5 + 0.1 * (draft != "pretrain")))))
            rejected = [-1 if count == block_size else int(rng.integers(5, 300)) for count in accepted]
            prompt = f"Write the documentation of function number {i}.\n\ndef wrap(text, width=70):\n    "
            lines.append({"id": i, "task": task, "block_size": block_size, "temperature": temperature, "top_p": top_p})
            lines[-1] |= {"prompt_tokens": tokenizer.encode(prompt), "tokens": tokens, "accepted": accepted}
            lines[-1]["rejected"] = rejected
    return lines


def make_run(folder: Path) -> None:
    """Writes a run directory with everything in it, made-up but of realistic size."""
    rng = np.random.default_rng(0)
    train_sentencepiece([str(textwrap.__doc__), Path(textwrap.__file__).read_text()], folder / "tokenizer", 400)
    shapes = {
        "target": {"family": "llama", "num_layers": 6, "hidden_size": 256, "num_heads": 8, "vocab_size": 4096},
        "draft": {"family": "llama", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": None},
    }
    kinds = {"tokenizer": "TrainTokenizer", "text": "Prepare", "target": "Train", "pretrain": "Train"}
    kinds |= {"responses": "Generate"} | dict.fromkeys(DRAFTS[1:], "Train")
    kinds |= {"evaluate": "Evaluate", "export": "Export"}
    stages: list[dict[str, Any]] = [{"name": name, "kind": kind} for name, kind in kinds.items()]
    for stage in stages:
        if stage["name"] in LOSSES:
            stage |= {"loss": {"type": LOSSES[stage["name"]]}, "init": "pretrain"}
    recipe = {"name": "quickstart", "title": "Quickstart", "seed": 0, "stages": stages}
    recipe["description"] = "A draft for a small target, both trained from the Python standard library."
    write_json(folder / "recipe.json", recipe | {"target": "target", "draft": shapes["draft"]})
    record = {"command": ["jaxdraft", "run", "configs/quickstart.py", "--workdir", "runs/a b"], "seed": 0}
    record |= {"git": "0123abc-dirty", "packages": {"jax": "0.10.2", "flax": "0.12.0"}}
    write_json(
        folder / "run.json", record | {"devices": ["cpu:0"], "xla_flags": "", "mesh": {"type": "MeshShape", "data": 1}}
    )
    for name, kind in kinds.items():
        settings: dict[str, Any] = {"name": name}
        summary: dict[str, Any] = {}
        if kind == "Train":
            steps = {"target": 600, "pretrain": 500}.get(name, 400)
            write_lines(folder / name / "metrics.jsonl", make_metrics(name, steps, rng))
            settings["loss"] = {"type": LOSSES.get(name, "CrossEntropy"), "temperature": 1.0}
            distilled = name.startswith("distill")
            settings |= (
                {"data": {"responses": 0.9, "text": 0.1}, "init": "pretrain"}
                if distilled
                else {"data": "text", "init": "random"}
            )
            summary = {"parameters": TARGET if name == "target" else DRAFT, "steps": steps, "tokens": 4096 * steps}
            summary["shape"] = shapes["target" if name == "target" else "draft"]
        if kind in ("Prepare", "Generate"):
            summary = {"rows": 6120, "tokens": 1_566_720, "cut_off": 17}
        stage = {
            "name": name,
            "kind": kind,
            "settings": settings,
            "status": "done",
            "summary": summary,
            "seconds": 83.4,
        }
        write_json(folder / name / "stage.json", stage)
    parameters = {"target": TARGET, "draft": DRAFT, "ratio": DRAFT / TARGET}
    for draft in DRAFTS:
        runs = [make_result(draft, task, block_size) for task in TASKS for block_size in (3, 5)]
        results = {"target": "target", "draft": draft, "draft_stage": draft, "parameters": parameters, "runs": runs}
        results["best_block_size"] = [make_curve(task, batch_size) for task in TASKS for batch_size in (1, 2)]
        write_json(folder / "evaluate" / draft / "results.json", results)
        samples = [line for block_size in (3, 5) for line in make_samples(folder, draft, block_size, rng)]
        write_lines(folder / "evaluate" / draft / "samples.jsonl", samples)
    checkpoints = []
    for draft in DRAFTS:
        for step in (500,) if draft == "pretrain" else (100, 200, 300, 400):
            for task in TASKS:
                height = make_result(draft, task, 3)["block_efficiency_offline"] - 0.5 * np.exp(-step / 120)
                line = {"draft": draft, "step": step, "task": task, "block_size": 3, "block_efficiency_offline": height}
                checkpoints.append(line | {"block_efficiency_offline_ci95": [height - 0.08, height + 0.08]})
    write_lines(folder / "evaluate" / "checkpoints.jsonl", checkpoints)
    for i, draft in enumerate(DRAFTS[1:]):
        measured = []
        for step, temperature, block_size in itertools.product(range(0, 401, 40), (0.0, 0.6), (3, 5)):
            height = 1.5 + 0.4 * block_size * (1 - np.exp(-step / (80 + 40 * i))) * (1 - 0.3 * temperature)
            line = {"step": step, "temperature": temperature, "top_p": 0.9, "block_size": block_size}
            line |= {"block_efficiency_offline": height, "block_efficiency_offline_ci95": [height - 0.1, height + 0.1]}
            if temperature:
                line |= {"block_efficiency": height + 0.05, "decoded_prompts": 4}
            measured.append(line | {"prompts": 32, "tokens": 2048})
        write_lines(folder / draft / "block_efficiency.jsonl", measured)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run of one's own to change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that read the words need not wait for the drawings."""
    monkeypatch.setattr(plotting, "picture", lambda file, alt, draw, height=0: plotting.Picture(file, alt, b""))


def text_of(page: str) -> str:
    """The page's words as a reader sees them."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def contents(report: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in report.iterdir()}


@pytest.fixture(scope="module")
def drawn(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the unchanged run's report, figures and all."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("drawn") / "run"))
    index = write_report(folder)
    assert index == folder / "report" / "index.html"
    return contents(index.parent)


def test_files(drawn: dict[str, bytes]) -> None:
    metrics = ("block_efficiency", "mbsu", "token_rate_ratio")
    bars = {f"{metric}_gamma_{block_size}.png" for metric in metrics for block_size in (3, 5)}
    kinds = ("checkpoints", "positions", "classes", "best_block_size")
    each = {f"{kind}_{i}.png" for kind in kinds for i in (1, 2, 3)}
    each |= {"while_learning_1.png", "while_learning_2.png"}
    pictures = bars | each | {"loss.png", "acceptance.png", "loss_distillation.png"}
    tables = {"results.csv", "acceptance_by_position.csv", "checkpoints.csv", "while_learning.csv", "stages.csv"}
    tables |= {"acceptance_by_class.csv", "best_block_size.csv"}
    assert set(drawn) == pictures | tables | {"index.html", "report.md"}
    inline = re.findall(r'src="data:image/png;base64,([^"]+)"', drawn["index.html"].decode())
    assert sorted(map(base64.b64decode, inline)) == sorted(drawn[name] for name in pictures)


def test_same_run_same_bytes(run: Path, drawn: dict[str, bytes]) -> None:
    (run / "report").mkdir()
    (run / "report" / "left_over.png").touch()
    assert contents(write_report(run).parent) == drawn


def test_needs_nothing_from_outside(drawn: dict[str, bytes]) -> None:
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "", drawn["index.html"].decode())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bfetch\(|\bimport\(", page)
    linked = [source for source in re.findall(r'(?:src|href)="([^"]*)"', page) if not source.startswith("data:")]
    assert "results.csv" in linked
    assert {source for source in linked if not source.startswith("#")} <= set(drawn)
    assert {source[1:] for source in linked if source.startswith("#")} <= set(re.findall(r'id="([^"]+)"', page))


def test_only_the_page_s_own_script_may_run(drawn: dict[str, bytes]) -> None:
    page = drawn["index.html"].decode()
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1] == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


@pytest.mark.usefixtures("no_figures")
def test_verdict(run: Path) -> None:
    words = text_of(write_report(run).read_text())
    assert "412,928 parameters, 8.1% of the target's 5,123,456" in words
    # Mean over tasks at γ = 5: (1.6 + 2.0 + 2.4) / 3 + 0.25, and 0.58 more for TVD++.
    assert "raised block efficiency" in words
    assert "from 2.25 to 2.83, averaged over three tasks at block size γ = 5" in words
    assert "the best draft is distill_tvdpp (TVD++)" in words
    assert "ahead of pretrain in 6 of 6 comparisons (task × γ), in 6 of them with 95% intervals" in words
    assert "text came 1.35 to 2.00 times as fast with it" in words
    assert "predicted from latencies measured here, is γ = 4 at batch size 1, γ = 2 at batch size 2" in words
    assert "All 384 greedy answers" in words


@pytest.mark.usefixtures("no_figures")
def test_verdict_admits_what_did_not_work(run: Path) -> None:
    def spoil(results: dict[str, Any]) -> None:
        for row in results["runs"]:
            row |= {"block_efficiency": 1.5, "block_efficiency_ci95": [1.4, 1.6], "token_rate_ratio": 0.8}
            row["identical_to_target"] = row["identical_to_target"] and 23

    for draft in DRAFTS[1:]:
        edit(run / "evaluate" / draft / "results.json", spoil)
    words = text_of(write_report(run).read_text())
    assert "Distillation did not help" in words
    assert "1.50 against 2.25 before it" in words
    assert "ahead of pretrain in 0 of 6 comparisons" in words
    assert "not ahead in open-ended (T 0.6, top-p 0.9) at γ = 3" in words
    assert "it did not pay: with the draft, text came only 0.80 to 0.80 times as fast" in words
    assert "Only 372 of 384 greedy answers" in words


@pytest.mark.usefixtures("no_figures")
def test_overlapping_intervals_are_not_counted_as_clear(run: Path) -> None:
    def widen(results: dict[str, Any]) -> None:
        results["runs"][0]["block_efficiency_ci95"][0] = 1.6  # pretrain: 1.51 to 1.70

    edit(run / "evaluate" / "distill_tvdpp" / "results.json", widen)
    assert "in 6 of 6 comparisons (task × γ), in 5 of them" in summarise(read_run(run)).sentences[1]


SHOWN = {
    "block_efficiency": 3.4567,
    "mbsu": 2.9876,
    "token_rate_ratio": 7.3125,
    "predicted_speedup": 2.7891,
    "tokens_per_second": 765.4321,
    "tokens_per_second_autoregressive": 654.321,
    "tpot": 0.123456,
    "draft_latency": 0.0456789,
}
AS_SHOWN = {"tpot": "123 ms", "draft_latency": "45.7 ms"}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("key", SHOWN)
def test_every_number_is_the_run_s_own(run: Path, key: str) -> None:
    shown = AS_SHOWN.get(key) or (f"{SHOWN[key]:.1f}" if SHOWN[key] > 100 else f"{SHOWN[key]:.2f}")
    assert shown not in text_of(write_report(run).read_text())
    edit(
        run / "evaluate" / "distill_tvdpp" / "results.json",
        lambda results: results["runs"][3].update({key: SHOWN[key]}),
    )
    assert shown in text_of(write_report(run).read_text())


def test_every_figure_draws_the_run_s_own(run: Path, drawn: dict[str, bytes]) -> None:
    def change(results: dict[str, Any]) -> None:
        open_3, open_5, summary_3, summary_5, *_ = results["runs"]
        open_3["block_efficiency"] += 0.1
        open_5["acceptance_by_position"].reverse()
        summary_3["token_rate_ratio_ci95"][0] -= 0.1
        summary_5["mbsu"] += 0.1
        summary_3["block_efficiency_offline"] -= 0.1
        summary_5["acceptance_by_class"]["other"]["rate"] += 0.1

    edit(run / "evaluate" / "pretrain" / "results.json", change)
    file = run / "distill_kl" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[9]["acceptance"] += 0.2
    write_lines(file, lines)
    file = run / "distill_tvd" / "block_efficiency.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (lines[7]["temperature"], lines[7]["block_size"]) == (0.6, 5)
    lines[7]["block_efficiency"] += 0.2
    write_lines(file, lines)
    now = contents(write_report(run).parent)
    changed = {name for name in now if name.endswith(".png") and now[name] != drawn[name]}
    bars = {"block_efficiency_gamma_3.png", "mbsu_gamma_5.png", "token_rate_ratio_gamma_3.png"}
    # Tasks are numbered in their order: 1 is open-ended, 2 the summary.
    assert changed == bars | {
        "positions_1.png",
        "classes_2.png",
        "checkpoints_2.png",
        "while_learning_2.png",
        "acceptance.png",
    }


NEW = {"acceptance_by_class", "tpot", "tpot_ci95", "tpot_autoregressive", "draft_latency"}
NEW |= {"target_latency_1", "target_latency_block"}


@pytest.mark.usefixtures("no_figures")
def test_results_of_earlier_versions_lack_some_fields(run: Path) -> None:
    def strip(results: dict[str, Any]) -> None:
        del results["best_block_size"]
        results["runs"] = [{key: row[key] for key in row if key not in NEW} for row in results["runs"]]

    for draft in DRAFTS:
        edit(run / "evaluate" / draft / "results.json", strip)
    page = write_report(run)
    words = text_of(page.read_text())
    assert "2.58" in words
    for missing in ("The best γ", "class of token", "Time per output token", "fastest block size"):
        assert missing not in words
    assert not [path.name for path in page.parent.iterdir() if path.name.startswith(("classes", "best_block"))]


@pytest.mark.usefixtures("no_figures")
def test_batch_sizes_differ_in_speed_alone(run: Path) -> None:
    def double(results: dict[str, Any]) -> None:
        ones = [{**row, "batch_size": 1, "measured_speedup_ci95": [1.1, 1.2]} for row in results["runs"]]
        results["runs"] = [{**row, "batch_size": 8, "token_rate_ratio": 0.456} for row in ones] + ones

    for draft in DRAFTS:
        edit(run / "evaluate" / draft / "results.json", double)
    found = read_run(run)
    assert (len(found.results), {row["batch_size"] for row in found.distinct_results}) == (48, {1})
    assert found.curves[0]["curve"][3]["measured_speedup_ci95"] == [1.1, 1.2]
    assert "measured_speedup_ci95" not in found.curves[0]["curve"][2]
    assert "measured_speedup_ci95" not in found.curves[1]["curve"][3]  # batch size 2
    page = write_report(run)
    words, names = text_of(page.read_text()), {path.name for path in page.parent.glob("*.png")}
    assert words.count("0.46 ") == 6 * len(DRAFTS) + 1
    assert "came 1.35 to 2.00 times as fast at batch size 1, 0.46 times as fast at batch size 8" in words
    assert {"block_efficiency_gamma_3.png", "token_rate_ratio_gamma_3_batch_8.png", "positions_3.png"} <= names
    assert not names & {"token_rate_ratio_gamma_3.png", "positions_4.png"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: chromium")
@pytest.mark.usefixtures("no_figures")
def test_the_viewer_shows_what_the_page_shows_without_it(run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    static = re.search(r'id="samples-without-script".*?<pre>(.*?)</pre>', page.read_text(), re.DOTALL)
    quiet = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
    command = ["chromium", "--headless", "--no-sandbox", *quiet, "--disable-component-update", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    shown = re.search(r'data-part="answer"[^>]*>(.*?)</pre>', seen, re.DOTALL)
    assert static
    assert shown
    assert html.unescape(shown[1]) == html.unescape(static[1])
    assert re.search(r'<div id="samples-without-script" class="samples" hidden="">', seen)


@pytest.mark.usefixtures("no_figures")
def test_csv_is_the_results(run: Path) -> None:
    report = write_report(run).parent
    with (report / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24
    found = {(row["draft"], row["task"], int(row["block_size"])): row for row in rows}
    for draft in DRAFTS:
        for run_ in json.loads((run / "evaluate" / draft / "results.json").read_text())["runs"]:
            row = found[draft, run_["task"], run_["block_size"]]
            for key, value in run_.items():
                if key.endswith("_ci95"):
                    assert [float(row[f"{key}_low"]), float(row[f"{key}_high"])] == value
                elif isinstance(value, float | int):
                    assert float(row[key]) == value
    with (report / "acceptance_by_position.csv").open() as stream:
        positions = [row for row in csv.DictReader(stream) if row["draft"] == "distill_kl" and row["task"] == "summary"]
    expected = [*make_result("distill_kl", "summary", 3)["acceptance_by_position"]]
    expected += make_result("distill_kl", "summary", 5)["acceptance_by_position"]
    assert [float(row["accepted"]) for row in positions] == expected


@pytest.mark.usefixtures("no_figures")
def test_nothing_in_a_run_becomes_markup(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer")
    line = {"id": HOSTILE, "task": HOSTILE, "block_size": 5, "temperature": 0.0, "top_p": 1.0, "accepted": [5] * 200}
    line |= {"prompt_tokens": tokenizer.encode(HOSTILE), "tokens": tokenizer.encode(HOSTILE, bos=False)}
    write_lines(run / "evaluate" / "distill_tvdpp" / "samples.jsonl", [line])
    edit(run / "evaluate" / "distill_tvdpp" / "results.json", lambda results: results["runs"][0].update(task=HOSTILE))
    edit(run / "recipe.json", lambda recipe: recipe.update(title=HOSTILE, description=HOSTILE))
    edit(run / "run.json", lambda record: record.update(command=["jaxdraft", HOSTILE], git=HOSTILE))
    page = write_report(run).read_text()
    assert re.findall("<script[^>]*>", page) == ['<script type="application/json" id="viewer-data">', "<script>"]
    assert page.count("</script>") == 2
    assert not re.search(r"<[^>]*onerror", page)
    # Title twice, description, sample's name twice, prompt, command, git: all there, as text.
    assert page.count("&lt;script src=&#34;https://evil.example/x.js&#34;&gt;") >= 7
    samples = page.split('id="samples"')[1].split("</section>")[0]
    assert HOSTILE in html.unescape(re.sub(r"</?span[^>]*>|<del.*?</del>", "", samples))
    (data,) = re.findall(r'id="viewer-data">(.*?)</script>', page)
    assert f"{HOSTILE} (greedy)" in json.loads(data)["tasks"]
    for line in (run / "report" / "report.md").read_text().splitlines():
        assert not re.search(r"(?<!\\)[<>|]", re.sub(r"^\| | \| | \|$|<br>", "", line)), line


def test_any_task_name_can_be_drawn() -> None:
    rows = [
        {**make_result("pretrain", "summary", 3), "task": name, "draft": "_x"}
        for name in ("$\\frac{1$", "../a", "b\nc")
    ]
    picture = figures.draw_bars("bars.png", rows, {}, "mbsu", "MBSU at γ = 3", "times the target alone")
    assert picture.png.startswith(b"\x89PNG")


MISSING = {
    "evaluate": [
        "Nothing has been measured yet",
        "No evaluation results yet",
        "No samples yet",
        "No speed was measured",
    ],
    "evaluate/checkpoints.jsonl": ["No checkpoints of a distilled draft were measured"],
    "tokenizer/tokenizer.json": ["With distill_tvdpp: 96 tokens in"],
    "tokenizer": ["No tokenizer was found"],
    "run.json": ["How to repeat it seed 0"],
    "evaluate/pretrain": ["the draft before distillation was not measured"],
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", MISSING)
def test_missing_parts(run: Path, name: str) -> None:
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    words = text_of(write_report(run).read_text())
    for sentence in MISSING[name]:
        assert sentence in words


def test_a_run_that_only_pretrained(run: Path) -> None:
    for path in run.iterdir():
        if path.is_dir() and path.name not in ("tokenizer", "pretrain"):
            shutil.rmtree(path)
    index = write_report(run)
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "report.md", "loss.png", "stages.csv"}
    words = text_of(index.read_text())
    assert "2 of 10 stage(s) done" in words
    assert "no draft was distilled beside answers of the target" in words
    assert "distill_kl not run Trains with KL, starting from pretrain" in words


@pytest.mark.parametrize("trained", [(), ("target",), ("target", "pretrain", "distill_kl")])
def test_a_stage_that_has_no_steps_yet_is_no_error(run: Path, trained: tuple[str, ...]) -> None:
    """As after ``jaxdraft run --only``: the recipe says what a stage learns from before it has a step."""

    def on_answers(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"]:
            stage |= {"data": "responses"} if stage["name"] in DRAFTS[1:] else {}

    edit(run / "recipe.json", on_answers)
    for path in run.iterdir():
        if path.is_dir() and path.name not in ("tokenizer", *trained):
            shutil.rmtree(path)
    pictures = {path.name for path in write_report(run).parent.glob("*.png")}
    others = {"loss.png"} if trained else set()
    measured = {"acceptance.png", "while_learning_1.png", "while_learning_2.png"}
    compared = measured if "distill_kl" in trained else set()
    assert pictures == {"loss_distillation.png"} | others | compared


def test_a_stage_that_logged_nothing_leaves_the_others_as_they_are(run: Path) -> None:
    write_lines(run / "pretrain" / "metrics.jsonl", [{"step": 1, "loss": None}])
    target, pretrain = (stage for stage in read_run(run).stages if stage.name in ("target", "pretrain"))
    known = plotting.looks([target, pretrain])
    draw = lambda stages: training_figures.draw_curves("loss.png", stages, known, "loss", "loss", "Loss").png
    assert draw([target, pretrain]) == draw([target])
    assert draw([pretrain]).startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_distillation(run: Path) -> None:
    for draft in DRAFTS[1:]:
        shutil.rmtree(run / draft)
        shutil.rmtree(run / "evaluate" / draft)
    words = text_of(write_report(run).read_text())
    assert "With pretrain every run of the target yields 2.25 tokens on average" in words
    assert "no draft distilled from the target's distribution was measured" in words


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.json", {"name": "new", "stages": [{"name": "text", "kind": "Prepare"}]})
    assert "0 of 1 stage(s) done" in text_of(write_report(tmp_path).read_text())


def test_refuses_other_folders_and_broken_files(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no recipe\.json"):
        write_report(tmp_path / "run" / "tokenizer")
    metrics = run / "pretrain" / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is not JSON"):
        write_report(run)
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [stage.metrics for stage in read_run(run).stages if stage.name == "pretrain"] == [[{"step": 1, "loss": 2.0}]]


def test_smoothing_is_a_trailing_mean() -> None:
    np.testing.assert_allclose(training_figures.smooth([5.0, 7.0]), [5.0, 7.0])
    values = np.random.default_rng(0).normal(size=150)
    smoothed = training_figures.smooth(values)  # over the last 3
    np.testing.assert_allclose(smoothed[:2], [values[0], values[:2].mean()])
    np.testing.assert_allclose(smoothed[149], values[147:].mean())


def test_a_draft_keeps_its_colour(run: Path) -> None:
    stages = read_run(run).stages
    known = plotting.looks(stages)
    assert len({look.colour for look in known.values()}) == len(known)
    assert plotting.looks(stages[:-4])["distill_kl"].colour == known["distill_kl"].colour
