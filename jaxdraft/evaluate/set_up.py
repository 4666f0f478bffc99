"""How a run's numbers came about, beside how a paper's did."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxdraft.evaluate.collect import RunDirectory, Stage
from jaxdraft.evaluate.papers import TASKS
from jaxdraft.evaluate.reproduction import Reproduced
from jaxdraft.evaluate.tables import Cell, Table, headings
from jaxdraft.evaluate.words import amount, count, decoding, listed

_NOT_SAID = "not said"


class SetUp(NamedTuple):
    """One thing about how numbers came about, here and in the paper."""

    what: str
    ours: str
    theirs: str


def differences(found: Reproduced) -> Table:
    """What differs in set-up between the run and the paper."""
    rows = [[Cell(what), Cell(ours), Cell(theirs)] for what, ours, theirs in _set_up(found) if ours != theirs]
    return Table(headings("Set-up", "Here", f"{found.paper.short}"), rows, names=3)


def agreements(found: Reproduced) -> str:
    """What is the same in both, as a sentence; empty where nothing is."""
    same = [f"{what} {ours}" for what, ours, theirs in _set_up(found) if ours == theirs]
    return f"The same in both: {'; '.join(same)}." if same else ""


def _set_up(found: Reproduced) -> Iterator[SetUp]:
    run, paper, published = found.run, found.paper, found.declared.published
    drafts = [draft for _, draft in found.rows]
    targets = list(dict.fromkeys(row.target for row, _ in found.rows))
    known = [run.parameters[draft] for draft in drafts if draft in run.parameters]
    name = run.target_folder.name if run.target_folder else str(run.recipe.get("target"))
    size = f", {amount(known[0]['target'])} parameters" if known else ""
    theirs = [f"{target.name}, {amount(target.parameters)} parameters" for target in targets]
    yield SetUp("Target", name + size, listed(theirs))
    if published.tasks:
        vocabulary = run.shapes(drafts[0])["target"].get("Vocabulary")
        printed = [count(target.vocab_size) for target in targets if target.vocab_size]
        yield SetUp("Vocabulary", count(vocabulary), listed(printed) or _NOT_SAID)
    if known:
        sizes = [f"{amount(parameters['draft'])} parameters" for parameters in known]
        yield SetUp("Draft", listed(sizes), listed([f"{amount(row.parameters)} parameters" for row, _ in found.rows]))
        ratios = [f"{parameters['ratio']:.2%}" for parameters in known]
        yield SetUp("Draft / target", listed(ratios), listed([f"{row.ratio:.2%}" for row, _ in found.rows]))
    if published.tasks:
        seeds = [str(cell["result"].get("seeds", 1)) for cell in found.cells.values() if "result" in cell]
        yield SetUp("Seeds", listed(seeds, "and"), _NOT_SAID)
        yield from _decoded(found)
        formats = [run.circumstances.get(draft, {}).get("dtype", "–") for draft in drafts]
        yield SetUp("Weights", listed(formats), paper.weights or _NOT_SAID)
    if any(column.metric == "perplexity" for column in found.columns):
        texts = [
            f"{of['text']}, {amount(of['tokens'])} tokens in windows of {of['length']:,}"
            for of in (run.perplexity[draft] for draft in drafts if draft in run.perplexity)
        ]
        yield SetUp("Perplexity", listed(texts), f"WikiText-2, windows {_NOT_SAID}")
    if any(column.metric == "token_rate_ratio" for column in found.columns):
        yield SetUp("Machine", listed(map(str, run.record.get("devices", ()))) or "–", _NOT_SAID)
    if published.tasks:
        for row, draft in found.rows:
            yield SetUp(f"Training of {row.name}", _trained(run, draft), row.data)


def _decoded(found: Reproduced) -> Iterator[SetUp]:
    """Of tasks: what stands for them, and how they are decoded."""
    columns = [column for column in found.columns if column.block_size is not None]
    sizes = sorted({column.block_size for column in columns if column.block_size})
    theirs = sorted({column.block_size for column in found.declared.published.columns if column.block_size})
    yield SetUp("γ", " and ".join(map(str, sizes)), " and ".join(map(str, theirs)))
    for task in dict.fromkeys(column.task for column in columns):
        assert task is not None
        mine = [column for column in columns if column.task == task]
        results = [cell["result"] for (_, column), cell in found.cells.items() if column in mine]
        names = list(dict.fromkeys(row["task"] for row in results))
        asked = listed([f"{count(row['prompts'])} prompts" for row in results])
        limits = [found.run.max_new_tokens(row) for row in results]
        longest = listed([f"at most {limit} new tokens" for limit in limits if limit is not None])
        stands = "" if names == [task] else f"{listed(names, 'and')}: "
        yield SetUp(TASKS[task], stands + ", ".join(filter(None, (asked, longest))), f"prompts and lengths {_NOT_SAID}")
        ours = listed([decoding(row) for row in results], "and")
        sampled = {"top_p": found.paper.top_p} if found.paper.top_p else {}
        printed = [decoding({"temperature": column.temperature, **sampled}) for column in mine]
        yield SetUp(f"{TASKS[task]} decoded", ours, listed(printed, "and"))


def _trained(run: RunDirectory, draft: str) -> str:
    """What a draft was trained on, from its first stage to its last."""
    chain: list[Stage] = []
    stage = run.stage(draft)
    while stage is not None and stage not in chain:
        chain.insert(0, stage)
        stage = run.stage(str(stage.settings.get("init")))
    return "; then ".join(map(_learned, chain)) or "–"


def _learned(stage: Stage) -> str:
    data = stage.settings.get("data") or "–"
    words = data if isinstance(data, str) else " + ".join(f"{share:.0%} {name}" for name, share in data.items())
    tokens = stage.summary.get("tokens")
    size = f"{amount(tokens)} tokens of " if tokens else ""
    return f"{size}{words}" + (f", with {stage.loss}" if stage.loss else "")
