"""Sweeps through the real decoders: what is compiled, what is kept, what is believed of the figures."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxdraft.data.prompts import Prompt, PromptFile
from jaxdraft.decode import Acceptance, Seconds, Speculation, SpeculativeResult
from jaxdraft.decode.blocks import start_in_blocks, write_in_blocks
from jaxdraft.decode.generate import start, write
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import sweep as sweeps
from jaxdraft.evaluate import tpot
from jaxdraft.evaluate.cell import Cell, _losslessness, _speeds
from jaxdraft.evaluate.measure import Baseline, Model, Timed, Work
from jaxdraft.evaluate.sweep import Settings, Sweep, answers, at_temperatures, check_same, write_results
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models import Decoder, ModelConfig, for_decoding, init_params
from jaxdraft.tokenizers import load_tokenizer
from jaxdraft.tracking import progress_bar

VOCAB = 24
CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=VOCAB, eos_ids=(VOCAB,)
)


class Letters:
    def encode(self, text, bos):
        return [0]

    def continuation(self, prompt, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def random_model(name, noise_seed=None):
    """A target whose every layer matters, and drafts near to it."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes)
    if noise_seed is not None:
        rng = np.random.default_rng(noise_seed)
        params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)
    return Model(name, Decoder(CONFIG, scan=False), for_decoding(CONFIG, params))


@pytest.fixture(autouse=True)
def latencies(monkeypatch):
    """Given, because every width is a program to compile."""
    monkeypatch.setattr(tpot, "step_latency", lambda *model, width, **how: 1e-3 * (1 + width))


@pytest.fixture(scope="module")
def target():
    return random_model("target")


@pytest.fixture(scope="module")
def drafts():
    return random_model("one", 1), random_model("two", 2)


def prompts(count, seed):
    rng = np.random.default_rng(seed)
    return [Prompt(f"{seed}-{i}", tuple(map(int, rng.integers(0, VOCAB, 3 + i))), "") for i in range(count)]


TASKS = (
    (Task("first", None, max_new_tokens=12), prompts(4, 0)),
    (Task("second", None, max_new_tokens=12), prompts(3, 1)),
    (Task("sampled", None, 0.8, 0.9, max_new_tokens=12), prompts(4, 2)),
)


def make(target, folder, tasks=TASKS, block_sizes=(1, 3), batch_sizes=(2,), drafts=1, earlier=(), how=(), seed=0):
    speculations = tuple(Speculation(block_size, *how) for block_size in block_sizes)
    settings = Settings(speculations, batch_sizes, seed, repeats=1, predict_up_to=2)
    bar = progress_bar(answers(tasks, settings, drafts), "test", "answer")
    return Sweep(target, tasks, settings, Letters(), folder, bar, earlier), bar


@pytest.fixture
def decoded(monkeypatch):
    """Of each decoding that really takes place, what it is of."""
    done = []

    def with_draft(target, draft, work, speculation, advance):
        done.append((draft.name, work.task.name, work.batch_size, speculation.block_size))
        return write_with_draft(target, draft, work, speculation, advance)

    def without(target, work, advance):
        done.append((work.task.name, work.batch_size))
        return write_alone(target, work, advance)

    write_with_draft, write_alone = sweeps.write_with_draft, sweeps.write_alone
    monkeypatch.setattr(sweeps, "write_with_draft", with_draft)
    monkeypatch.setattr(sweeps, "write_alone", without)
    return done


def test_each_shape_is_compiled_once_whatever_drafts_and_tasks_there_are(target, drafts, tmp_path):
    programs = start_in_blocks, write_in_blocks, start, write
    count = lambda: [program._cache_size() for program in programs]
    before = count()
    made, bar = make(target, tmp_path, drafts=2)
    made.measure(drafts[0])
    # Two block sizes, greedy and sampled; the target alone, greedy and sampled.
    assert [now - then for now, then in zip(count(), before, strict=True)] == [2, 4, 1, 2]
    once = count()
    made.measure(drafts[1])
    assert count() == once
    assert bar.n == bar.total
    first, second = (made.results(draft)[0] for draft in drafts)
    assert second["compile_seconds"] < first["compile_seconds"]
    assert first["compile_seconds"] >= sum(run["compile_seconds"] for run in first["runs"])


def test_figures_are_those_of_lossless_decoding(target, drafts, tmp_path):
    tasks = TASKS[1:]
    made, _ = make(target, tmp_path, tasks, batch_sizes=(1, 2))
    made.measure(drafts[0])
    results, samples = made.results(drafts[0])
    keys = [(run["task"], run["batch_size"], run["block_size"]) for run in results["runs"]]
    assert keys == [(task.name, b, g) for task, _ in tasks for b in (1, 2) for g in (1, 3)]
    assert len(samples) == sum(run["prompts"] for run in results["runs"])
    for run in results["runs"]:
        mine = [line for line in samples if all(line[key] == run[key] for key in ("task", "batch_size", "block_size"))]
        assert sum(len(line["tokens"]) for line in mine) == run["tokens"]
        classes = run["acceptance_by_class"].values()
        kept = sum(sum(line["accepted"]) for line in mine)
        assert sum(found["accepted"] for found in classes) <= kept  # but for what the limit cuts off
        assert run["measured_over_predicted"] == pytest.approx(
            run["measured_speedup"] / run["predicted_speedup"], rel=1e-4
        )
        assert 0 < run["rows_busy"] <= 1
        if run["batch_size"] == 1:
            assert run["rows_busy"] == run["rows_busy_autoregressive"] == 1
            assert run["tpot"] == pytest.approx(1 / run["tokens_per_second"], rel=1e-4)
            assert run["measured_speedup"] == pytest.approx(run["token_rate_ratio"], rel=1e-4)
        if run["temperature"] == 0:
            assert run["identical_to_target"] == run["blocks_as_offline"] == run["prompts"]
        else:
            assert abs(run["offline_deviation"]) < 4
    assert [(found["task"], found["batch_size"]) for found in results["best_block_size"]] == [
        (task.name, b) for task, _ in tasks for b in (1, 2)
    ]
    for found in results["best_block_size"]:
        assert [point["block_size"] for point in found["curve"]] == [0, 1, 2]
        assert ["measured_speedup" in point for point in found["curve"]] == [False, True, False]
        best = max(found["curve"], key=lambda point: point["predicted_speedup"])
        assert found["best_block_size"] == best["block_size"]


def test_other_ways_to_speculate_stand_beside(target, drafts, tmp_path):
    for how in ((), ("block", "sampled", 0.0), ("token", "greedy", 0.3)):
        made, _ = make(target, tmp_path, TASKS[2:], block_sizes=(3,), how=how)
        made.measure(drafts[0])
    results, samples = made.results(drafts[0])
    plain, block, greedy = sorted(results["runs"], key=lambda run: ("drafting" in run, "verification" in run))
    assert block["verification"] == "block"
    assert (greedy["drafting"], greedy["stop_below"]) == ("greedy", 0.3)
    assert all(abs(run["offline_deviation"]) < 4 for run in results["runs"])
    assert plain["block_efficiency_offline"] <= block["block_efficiency_offline"]
    # How much is drafted where that adapts is known only when it is decoded.
    assert [found.get("verification") for found in results["best_block_size"]] == [None, "block"]
    assert sum("drafted" in line for line in samples) == greedy["prompts"]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(target, drafts, tmp_path, decoded, monkeypatch):
    written = sweeps.write_with_draft

    def stops(target, draft, work, speculation, advance):
        if (work.task.name, speculation.block_size) == ("second", 3):
            raise KeyboardInterrupt
        return written(target, draft, work, speculation, advance)

    monkeypatch.setattr(sweeps, "write_with_draft", stops)
    stopped, _ = make(target, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.measure(drafts[0])
    before, _ = stopped.results(drafts[0])
    assert [(run["task"], run["block_size"]) for run in before["runs"]] == [("first", 1), ("first", 3), ("second", 1)]
    monkeypatch.setattr(sweeps, "write_with_draft", written)
    decoded.clear()
    again, bar = make(target, tmp_path)
    again.measure(drafts[0])
    assert decoded == [("one", "second", 2, 3), ("sampled", 2), ("one", "sampled", 2, 1), ("one", "sampled", 2, 3)]
    assert again.results(drafts[0])[0]["runs"][:3] == before["runs"]
    assert bar.n == bar.total


def test_what_is_asked_for_later_is_added(target, drafts, tmp_path, decoded):
    tasks = TASKS[:1]
    make(target, tmp_path, tasks)[0].measure(drafts[0])
    decoded.clear()
    more, _ = make(target, tmp_path, at_temperatures(tasks, (0.0, 1.0)), block_sizes=(3, 5))
    more.measure(drafts[0])
    assert decoded == [("one", "first", 2, 5), ("first", 2), ("one", "first", 2, 3), ("one", "first", 2, 5)]
    runs = more.results(drafts[0])[0]["runs"]
    assert [(run["temperature"], run["block_size"]) for run in runs] == [(0, 1), (0, 3), (0, 5), (1, 3), (1, 5)]
    decoded.clear()
    renamed = dataclasses.replace(drafts[0], name="elsewhere")  # the weights are what counts
    make(target, tmp_path, tasks)[0].measure(renamed)
    assert decoded == []
    # Another prompt, or another draft, is another part; parts of a folder that was set aside serve too.
    other, _ = make(target, tmp_path, [(tasks[0][0], prompts(4, 9))], block_sizes=(1,))
    other.measure(drafts[0])
    # Under the name of the old prompts the new ones stand alone, and the old ones again where they are asked for.
    results, samples = other.results(drafts[0])
    assert [(run["temperature"], run["block_size"]) for run in results["runs"]] == [(0, 1)]
    assert {line["id"] for line in samples} == {f"9-{i}" for i in range(4)}
    assert more.results(drafts[0])[0]["runs"] == runs
    make(target, tmp_path / "new", tasks, earlier=[tmp_path])[0].measure(drafts[0])
    make(target, tmp_path, tasks, block_sizes=(1,))[0].measure(drafts[1])
    assert decoded == [("first", 2), ("one", "first", 2, 1), ("two", "first", 2, 1)]
    assert len(list((tmp_path / "new" / "measured").glob("*.json"))) == 2 + 1 + 1


def test_results_of_another_pair_or_setting_are_not_added_to(target, drafts, tmp_path):
    made, _ = make(target, tmp_path, TASKS[:1], block_sizes=(1,))
    made.measure(drafts[0])
    write_results(tmp_path, *made.results(drafts[0]))
    check_same(tmp_path / "results.json", made.header(drafts[0]))
    with pytest.raises(ConfigError, match="was measured with weights"):
        check_same(tmp_path / "results.json", made.header(drafts[1]))
    with pytest.raises(ConfigError, match="with seed 0, here it is 1: give another folder"):
        check_same(tmp_path / "results.json", make(target, tmp_path, seed=1)[0].header(drafts[0]))
    for other in ("{", "[]", "{}"):
        (tmp_path / "results.json").write_text(other)
        with pytest.raises(ConfigError, match=r"results\.json is damaged .* holds no results"):
            check_same(tmp_path / "results.json", made.header(drafts[0]))


def test_a_damaged_part_is_named(target, drafts, tmp_path):
    made, _ = make(target, tmp_path, TASKS[:1], block_sizes=(1,))
    made.measure(drafts[0])
    path = next((tmp_path / "measured").glob("*.json"))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigError, match=f"{path.name} is damaged .*delete it"):
        made.results(drafts[0])


@pytest.mark.parametrize("count", [1, 3])
def test_prompts_that_are_alike_say_nothing_of_chance(target, drafts, count):
    """Their spread is rounding, of which any difference is many times as much."""
    cell = Cell(target, drafts[0], Work(Task("t", None, 0.8), prompts(count, 0)), Speculation(3))
    seen = Acceptance(np.array([0.3, 0.9, 0.7]), np.ones(3), np.ones(3, bool), np.ones(3))
    results = [SpeculativeResult([1, 2, 3], [0, 1], cut=False, drafted=[3, 3], rejected=[4, 4])] * count
    found = _losslessness(cell, results, Baseline([[1, 2, 3]] * count, []), [seen] * count)
    assert found["offline_deviation"] is None


def test_times_by_hand():
    """Two batches of two; rows of 6 and 2 tokens, and of 4 and 4, the same with a draft in 3, 2, 1 and 2 blocks."""
    work = Work(Task("x", None), (), batch_size=2)
    tokens, blocks = [6, 2, 4, 4], [3, 2, 1, 2]
    results = [
        SpeculativeResult([0] * n, [0] * b, cut=False, drafted=[1] * b, rejected=[-1] * b)
        for n, b in zip(tokens, blocks, strict=True)
    ]
    alone = [Timed([0, 1], Seconds(3.0, 0.5, 9.0)), Timed([2, 3], Seconds(2.0, 0.25, 0.0))]
    drafted = [Timed([0, 1], Seconds(1.5, 1.0, 8.0)), Timed([2, 3], Seconds(1.0, 0.5, 0.0))]
    found = _speeds(work, results, drafted, Baseline([[0] * n for n in tokens], alone))
    assert found["tokens_per_second_autoregressive"] == pytest.approx(16 / 5)
    assert found["tokens_per_second"] == pytest.approx(16 / 2.5)
    assert found["token_rate_ratio"] == pytest.approx(2.0)
    # Alone 10 steps of half a second, a token each; with the draft 5 of half a second, 8 of 10 places busy.
    assert found["tpot_autoregressive"] == pytest.approx(0.5)
    assert found["tpot"] == pytest.approx(0.5 / (16 / 8))
    assert found["measured_speedup"] == pytest.approx(2.0)
    assert (found["rows_busy"], found["rows_busy_autoregressive"]) == (0.8, 0.8)
    assert (found["prefill_seconds"], found["compile_seconds"]) == (1.5, 8.0)
    assert (found["prefill_seconds_autoregressive"], found["compile_seconds_autoregressive"]) == (0.75, 9.0)


def test_real_models_agree_with_the_offline_count(shared_data, tmp_path):
    """stories260K with llama2xs as its draft, on beginnings of real stories."""
    models = shared_data / "models"
    target, draft = (Model.load(models / name) for name in ("stories260K-hf", "llama2xs-hf"))
    tokenizer = load_tokenizer(models / "stories260K-hf")
    lines = [
        line for line in (shared_data / "corpora" / "tinystories_head.txt").read_text().split("\n") if len(line) > 200
    ]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"prompt": line[: 20 + i]}) + "\n" for i, line in enumerate(lines[:24])))
    asked = list(PromptFile(str(file)).prompts(tokenizer))
    tasks = [(Task("greedy", None, max_new_tokens=64), asked), (Task("sampled", None, 0.6, 0.9, 64), asked)]
    settings = Settings((Speculation(4),), (8,), repeats=1, predict_up_to=0)
    made = Sweep(target, tasks, settings, tokenizer, tmp_path, progress_bar(96, "test", "answer"))
    made.measure(draft)
    greedy, sampled = made.results(draft)[0]["runs"]
    assert greedy["identical_to_target"] == greedy["blocks_as_offline"] == 24
    assert greedy["block_efficiency"] == greedy["block_efficiency_offline"]
    assert abs(sampled["offline_deviation"]) < 3
