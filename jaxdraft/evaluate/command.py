"""``jaxdraft evaluate`` and ``jaxdraft sample``: any two Hugging Face folders that share a vocabulary."""

import logging
import sys
from pathlib import Path
from typing import Any

from jaxdraft.data.prompts import PromptFile, example_id, read_prompts
from jaxdraft.decode import Speculation, generate_batches, speculative_batches, token_origins
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Evaluator, Model, Settings, write_results
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models.hf import load_config
from jaxdraft.tokenizers import Tokenizer, differences, load_tokenizer, tokenizer_files
from jaxdraft.tracking import progress_bar

logger = logging.getLogger(__name__)

# Bold green for what the draft wrote; plain for the target's own tokens.
_ACCEPTED, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def evaluate_pair(
    *,
    target: Path,
    draft: Path,
    prompts: Path | str,
    task: str,
    out: Path,
    block_sizes: tuple[int, ...] = (3, 5),
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
) -> None:
    """Measures a draft, writes ``results.json`` and ``samples.jsonl`` into ``out``, and prints a table.

    Prompts that leave the target no room for ``max_new_tokens`` are left out, and how many is said.

    Raises:
      ConfigError: a folder, the prompts or a setting is wrong, or the two models' tokenizers differ.
    """
    room = load_config(target).max_positions - max_new_tokens
    if room < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: {target} has only {room + max_new_tokens} positions")
    measured = Task(task, PromptFile(str(prompts), limit, max_tokens=room), temperature, top_p, max_new_tokens)
    tokenizer = _shared_tokenizer(target, draft)
    out.mkdir(parents=True, exist_ok=True)
    found = read_prompts(measured.prompts, tokenizer)
    settings = Settings(block_sizes, seed, batch_size)
    with progress_bar(Evaluator.amount(len(found), 1, len(block_sizes)), task, "answer") as bar:
        evaluator = Evaluator(Model.load(target), [(measured, found)], settings, bar.update)
        results, samples = evaluator.measure(Model.load(draft))
    write_results(out, results, samples)
    _print_table(results, out)


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


def _print_table(results: dict, out: Path) -> None:
    print(
        f"{'γ':>2} {'block efficiency':>24} {'acceptance':>10} {'MBSU':>6} {'tokens/s':>10} {'alone':>10} {'ratio':>6}"
    )
    for run in results["runs"]:
        low, high = run["block_efficiency_ci95"]
        efficiency = f"{run['block_efficiency']:.3f} ({low:.3f} – {high:.3f})"
        print(
            f"{run['block_size']:>2} {efficiency:>24} {_number(run['acceptance_rate']):>10} {run['mbsu']:>6.3f} "
            f"{run['tokens_per_second']:>10,.0f} {run['tokens_per_second_autoregressive']:>10,.0f} "
            f"{run['token_rate_ratio']:>6.2f}"
        )
        if "identical_to_target" in run:
            print(f"   {run['identical_to_target']} of {run['prompts']} answers are the target's own, token for token")
    print(out / "results.json")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
