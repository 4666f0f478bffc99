"""``jaxdraft evaluate``: any two Hugging Face folders that share a vocabulary."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.data.sources import Source
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.perplexity import read_documents
from jaxdraft.evaluate.sweep import Draft, Settings, Sweep, answers, at_temperatures, check_same, write_results
from jaxdraft.evaluate.tasks import TASKS, Task
from jaxdraft.evaluate.words import decoding
from jaxdraft.models.hf import load_config
from jaxdraft.sharding import mesh_of
from jaxdraft.tokenizers import Tokenizer, differences, load_tokenizer, tokenizer_files
from jaxdraft.tracking import progress_bar

logger = logging.getLogger(__name__)

_PERPLEXITIES = {"perplexity": "per token", "word_perplexity": "per word", "bits_per_byte": "bits per byte"}


def evaluate(
    *,
    target: Path,
    drafts: Sequence[Draft],
    tasks: Sequence[Task],
    temperatures: Sequence[float],
    settings: Settings,
    out: Path,
    perplexity: Source | None = None,
) -> None:
    """Measures drafts of one target and prints a table.

    ``results.json`` and ``samples.jsonl`` are written into ``out``; of several drafts, into a folder of its name each.
    What ``out`` holds of the same models, prompts and settings is added to.

    Args:
      target: a Hugging Face folder.
      drafts: what is measured, each with a name of its own.
      tasks: prompts with their decoding settings; a prompt that leaves the target no room for an answer is left out,
        and how many are is said.
      temperatures: in place of the tasks' own; none keeps those.
      settings: how everything is decoded.
      out: where results are kept.
      perplexity: the text on which that of target and drafts is measured.

    Raises:
      ConfigError: there is nothing to measure on, a folder, the prompts or a setting is wrong, two models' tokenizers
        differ, or ``out`` holds results of other models or settings.
    """
    if not tasks and perplexity is None:
        raise ConfigError(f"nothing to measure on: give --prompts FILE, or --task with one of {', '.join(TASKS)}")
    names = [draft.name for draft in drafts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two drafts are called {twice[0]}: give each a folder of another name")
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError("two tasks have the same name: give prompts in files of different names, and no task twice")
    for draft in drafts:
        tokenizer = shared_tokenizer(target, draft.folder)
    positions = load_config(target).max_positions
    asked = at_temperatures([(task, task.read(tokenizer, positions)) for task in tasks], temperatures)
    text = None if perplexity is None else read_documents(perplexity, tokenizer)
    model = Model.load(target)
    with progress_bar(answers(asked, settings, len(drafts)), "evaluate", "answer") as bar:
        sweep = Sweep(model, asked, settings, tokenizer, out, bar, text=text)
        measured = []
        for draft in drafts:
            folder = _folder_of(draft, drafts, out)
            loaded = draft.load(mesh_of(model.params))
            check_same(folder / "results.json", sweep.header(loaded))
            try:
                sweep.measure(loaded)
            finally:
                results, samples = sweep.results(loaded)
                write_results(folder, results, samples)
            measured.append((draft.name, results, folder))
    for name, results, folder in measured:
        if len(measured) > 1:
            print(f"\n{name}")
        _print_table(results)
        print(folder / "results.json")


def _folder_of(draft: Draft, drafts: Sequence[Draft], out: Path) -> Path:
    """Where a draft's results lie: beside others' in a folder of its name, and there also when it is measured alone."""
    own = out / draft.name
    return own if len(drafts) > 1 or (own / "results.json").exists() else out


def shared_tokenizer(target: Path, draft: Path) -> Tokenizer:
    """The target's tokenizer, once it is known that both are models of one vocabulary.

    Another add_bos in the draft's folder is only warned of: the target's is used.

    Raises:
      ConfigError: the vocabularies differ in size, or the pieces, BOS or EOS in anything.
    """
    tokenizer = load_tokenizer(target)
    sizes = [load_config(folder).vocabulary for folder in (target, draft)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{target} has a vocabulary of {sizes[0]} and {draft} one of {sizes[1]}: they must be equal")
    if tokenizer_files(draft):
        theirs = load_tokenizer(draft)
        found = differences(tokenizer, theirs)
        if theirs.pieces() != tokenizer.pieces():
            raise ConfigError(
                f"target and draft have different tokenizers: {found[0]}. A draft works only for a target with its own "
                "vocabulary"
            )
        if (theirs.bos_id, theirs.eos_id) != (tokenizer.bos_id, tokenizer.eos_id):
            raise ConfigError(
                f"{found[0]}: the draft begins or ends otherwise. If it was trained on the target's tokens, put "
                f"the target's tokenizer files into {draft}"
            )
        for difference in found:
            logger.warning("%s; the target's tokenizer is used", difference)
    return tokenizer


def _print_table(results: Mapping[str, Any]) -> None:
    """A line for each run, and the best block size for each task and batch size."""
    print(
        f"{'task':<24} {'decoded':<20} {'batch':>5} {'γ':>2} {'block efficiency':>24} {'acceptance':>10} {'MBSU':>6} "
        f"{'tokens/s':>10} {'alone':>10} {'ratio':>6} {'predicted':>9}"
    )
    for run in results["runs"]:
        low, high = run["block_efficiency_ci95"]
        efficiency = f"{run['block_efficiency']:.3f} ({low:.3f} – {high:.3f})"
        print(
            f"{run['task'][:24]:<24} {decoding(run):<20} {run['batch_size']:>5} {run['block_size']:>2} "
            f"{efficiency:>24} {_number(run['acceptance_rate']):>10} {run['mbsu']:>6.3f} "
            f"{run['tokens_per_second']:>10,.0f} {run['tokens_per_second_autoregressive']:>10,.0f} "
            f"{run['token_rate_ratio']:>6.2f} {run['predicted_speedup']:>9.2f}"
        )
    greedy = [run for run in results["runs"] if "identical_to_target" in run]
    if greedy:
        equal, total = (sum(run[key] for run in greedy) for key in ("identical_to_target", "prompts"))
        print(f"{equal} of {total} greedy answers are the target's own, token for token")
    far = [abs(run["offline_deviation"]) for run in results["runs"] if run.get("offline_deviation") is not None]
    if far:
        print(f"sampled block efficiency is at most {max(far):.1f} standard errors from the exact one")
    for found in results["best_block_size"]:
        where = f"{found['task']}, {decoding(found)}, batch {found['batch_size']}"
        best = next(point for point in found["curve"] if point["block_size"] == found["best_block_size"])
        advice = (
            f"γ = {best['block_size']}, {best['predicted_speedup']:.2f} times as fast"
            if best["block_size"]
            else "no draft"
        )
        print(f"best for {where}: {advice}, as latencies predict")
    for whose, found in (
        ("the draft's", results.get("perplexity")),
        ("the target's", results.get("target_perplexity")),
    ):
        if found:
            each = ", ".join(f"{_number(found[name])} {unit}" for name, unit in _PERPLEXITIES.items())
            print(f"{whose} perplexity on {found['text']}: {each}")
    print(f"{results['compile_seconds']:.1f} s of compilation are in none of these times")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
