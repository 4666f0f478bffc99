"""``jaxdraft evaluate`` and ``jaxdraft sample``: any two Hugging Face folders that share a vocabulary."""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.data.prompts import Prompt, example_id, read_prompts
from jaxdraft.decode import Speculation, generate_batches, speculative_batches, token_origins
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.sweep import Draft, Settings, Sweep, answers, at_temperatures, check_same, write_results
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models.hf import load_config
from jaxdraft.sharding import mesh_of
from jaxdraft.tokenizers import Tokenizer, differences, load_tokenizer, tokenizer_files
from jaxdraft.tracking import progress_bar

logger = logging.getLogger(__name__)

# Bold green for what the draft wrote; plain for the target's own tokens.
_ACCEPTED, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def evaluate(
    *,
    target: Path,
    drafts: Sequence[Draft],
    tasks: Sequence[Task],
    temperatures: Sequence[float],
    settings: Settings,
    out: Path,
) -> None:
    """Measures drafts of one target and prints a table.

    ``results.json`` and ``samples.jsonl`` are written into ``out``; of several drafts, into a folder of its name each.
    What ``out`` holds of the same models, prompts and settings is added to.

    Args:
      target: a Hugging Face folder.
      drafts: what is measured, each with a name of its own.
      tasks: prompts with their decoding settings; a prompt that leaves the target no room for an answer is left out,
        and how many are is said.
      temperatures: in place of the tasks' own.
      settings: how everything is decoded.
      out: where results are kept.

    Raises:
      ConfigError: a folder, the prompts or a setting is wrong, two models' tokenizers differ, or ``out`` holds results
        of other models or settings.
    """
    names = [draft.name for draft in drafts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two drafts are called {twice[0]}: give each a folder of another name")
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError("two tasks have the same name: give prompts in files of different names")
    for draft in drafts:
        tokenizer = _shared_tokenizer(target, draft.folder)
    positions = load_config(target).max_positions
    asked = at_temperatures([(task, _fitting(task, tokenizer, positions)) for task in tasks], temperatures)
    model = Model.load(target)
    with progress_bar(answers(asked, settings, len(drafts)), "evaluate", "answer") as bar:
        sweep = Sweep(model, asked, settings, tokenizer, out, bar)
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


def _fitting(task: Task, tokenizer: Tokenizer, positions: int) -> list[Prompt]:
    room = positions - task.max_new_tokens
    if room < 1:
        raise ConfigError(f"max_new_tokens is {task.max_new_tokens}: the target has only {positions} positions")
    return read_prompts(dataclasses.replace(task.prompts, max_tokens=room), tokenizer)


def _folder_of(draft: Draft, drafts: Sequence[Draft], out: Path) -> Path:
    """Where a draft's results lie: beside others' in a folder of its name, and there also when it is measured alone."""
    own = out / draft.name
    return own if len(drafts) > 1 or (own / "results.json").exists() else out


def sample(
    *,
    target: Path,
    draft: Path | None,
    prompt: str,
    block_size: int = 5,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> None:
    """Prints what the target writes after ``prompt``: with a draft, its accepted tokens coloured; and the speed.

    Raises:
      ConfigError: a folder or a setting is wrong, or the two models' tokenizers differ.
    """
    tokenizer = load_tokenizer(target) if draft is None else _shared_tokenizer(target, draft)
    prompts = [tokenizer.encode(prompt)]
    big = Model.load(target)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "example_ids": [example_id(prompt)],
        "batch_size": 1,
        "repeats": 2,
    }
    (alone,) = generate_batches(big.decoder, big.params, prompts, **settings)
    speed = len(alone.tokens[0]) / alone.seconds.decode
    if draft is None:
        print(tokenizer.decode([*prompts[0], *alone.tokens[0]]))
        print(f"\n{len(alone.tokens[0])} tokens, {speed:,.0f} tokens/s", file=sys.stderr)
        return
    small = Model.load(draft)
    (batch,) = speculative_batches(
        big.decoder, big.params, small.decoder, small.params, prompts, speculation=Speculation(block_size), **settings
    )
    result = batch.results[0]
    print(_coloured(tokenizer, prompts[0], result.tokens, result.accepted))
    faster = len(result.tokens) / batch.seconds.decode
    blocks = len(result.accepted)
    per_run = len(result.tokens) / blocks
    print(
        f"\n{len(result.tokens)} tokens in {blocks} runs of the target: {per_run:.2f} tokens a run\n"
        f"{faster:,.0f} tokens/s with the draft, {speed:,.0f} without: {faster / speed:.2f} times as fast",
        file=sys.stderr,
    )


def _shared_tokenizer(target: Path, draft: Path) -> Tokenizer:
    """The target's tokenizer, once it is known that both are models of one vocabulary.

    Another BOS, EOS or add_bos in the draft's folder is only warned of: the target's are used.

    Raises:
      ConfigError: the vocabularies differ in size, or the pieces do in anything.
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
        for difference in found:
            logger.warning("%s; the target's tokenizer is used", difference)
    return tokenizer


def _coloured(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], accepted: list[int]) -> str:
    drafted_each = [False] * len(prompt) + token_origins(accepted, len(tokens))
    pieces = zip(tokenizer.fragments([*prompt, *tokens]), drafted_each, strict=True)
    if not sys.stdout.isatty():
        return "".join(text for text, _ in pieces)
    return "".join(f"{_ACCEPTED}{text}{_PLAIN}" if drafted else text for text, drafted in pieces)


def _print_table(results: Mapping[str, Any]) -> None:
    """A line for each run, and the best block size for each task and batch size."""
    print(
        f"{'task':<24} {'T':>4} {'batch':>5} {'γ':>2} {'block efficiency':>24} {'acceptance':>10} {'MBSU':>6} "
        f"{'tokens/s':>10} {'alone':>10} {'ratio':>6} {'predicted':>9}"
    )
    for run in results["runs"]:
        low, high = run["block_efficiency_ci95"]
        efficiency = f"{run['block_efficiency']:.3f} ({low:.3f} – {high:.3f})"
        print(
            f"{run['task'][:24]:<24} {run['temperature']:>4g} {run['batch_size']:>5} {run['block_size']:>2} "
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
        where = f"{found['task']}, T {found['temperature']:g}, batch {found['batch_size']}"
        best = next(point for point in found["curve"] if point["block_size"] == found["best_block_size"])
        advice = (
            f"γ = {best['block_size']}, {best['predicted_speedup']:.2f} times as fast"
            if best["block_size"]
            else "no draft"
        )
        print(f"best for {where}: {advice}, as latencies predict")
    print(f"{results['compile_seconds']:.1f} s of compilation are in none of these times")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
