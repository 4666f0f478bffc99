"""``jaxdraft evaluate``: any two Hugging Face folders that share a vocabulary."""

import logging
from pathlib import Path

from jaxdraft.data.prompts import PromptFile, read_prompts
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Evaluator, Model, Settings, write_results
from jaxdraft.evaluate.tasks import Task
from jaxdraft.models.hf import load_config
from jaxdraft.tokenizers import Tokenizer, differences, load_tokenizer, tokenizer_files
from jaxdraft.tracking import progress_bar

logger = logging.getLogger(__name__)


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
    tokenizer = shared_tokenizer(target, draft)
    out.mkdir(parents=True, exist_ok=True)
    found = read_prompts(measured.prompts, tokenizer)
    settings = Settings(block_sizes, seed, batch_size)
    with progress_bar(Evaluator.amount(len(found), 1, len(block_sizes)), task, "answer") as bar:
        evaluator = Evaluator(Model.load(target), [(measured, found)], settings, bar.update)
        results, samples = evaluator.measure(Model.load(draft))
    write_results(out, results, samples)
    _print_table(results, out)


def shared_tokenizer(target: Path, draft: Path) -> Tokenizer:
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
