"""What ``jaxdraft plan`` prints, and the same for scripts."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdraft.plan.compiled import Compiled
from jaxdraft.plan.hardware import Hardware
from jaxdraft.plan.programs import layout
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import StagePlan, phase_lines
from jaxdraft.plan.work import ACCEPTANCE, MBU, MFU, expected_block

_COLUMNS = ("Stage", "Kind", "Parameters", "Tokens", "Steps", "Storage", "Flops", "Hours", "Bound by")


def report(context: PlannedContext, plans: Sequence[StagePlan], hardware: Hardware) -> Iterator[str]:
    """Lines: a table of the stages, what they store and what was assumed."""
    target, draft = context.target_shape, context.draft_config()
    yield context.recipe.title
    yield f"target {target.num_parameters:,} parameters, draft {draft.num_parameters:,}, on {hardware}"
    yield ""
    rows = [_row(plan, hardware) for plan in plans]
    hours = sum(plan.hours(hardware) for plan in plans)
    storage = sum(sum(plan.storage.values()) for plan in plans)
    work = sum(plan.flops for plan in plans)
    rows.append(["all", "", "", "", "", size(storage), _flops(work), _hours(hours), ""])
    yield from table(_COLUMNS, rows, left=2)
    yield ""
    for plan in plans:
        stored = [f"{what} {size(bytes)}" for what, bytes in plan.storage.items()]
        spent = [f"{phase.name} {_hours(h)} h ({by})" for phase, h, by in _merged(plan, hardware)]
        parts = [*stored, *(spent if len(spent) > 1 else []), *dict.fromkeys(plan.notes)]
        if parts:
            yield f"{plan.name}: {'; '.join(parts)}"
    yield ""
    yield "Assumed:"
    yield from (f"  {line}" for line in assumptions(context))


def assumptions(context: PlannedContext) -> list[str]:
    """What the figures rest on."""
    blocks = ", ".join(f"{expected_block(size):.2f} for γ {size}" for size in (3, 5))
    return [
        *context.notes,
        f"products run at {MFU:.0%} of the chip's peak (MFU), memory at {MBU:.0%} of its bandwidth: measure a step, "
        "and scale",
        "every answer is as long as max_new_tokens, every prompt as its source's max_tokens",
        f"the target accepts {ACCEPTANCE:.0%} of the tokens it looks at: tokens per block {blocks}",
        "text is written on groups of chips that hold the models, rows spread over the groups",
        "hours are of accelerators at work: tokenising, reading, checkpoints, compiling, and what is measured while a "
        "draft learns are not in them",
    ]


def compiled_report(found: Compiled, hardware: Hardware) -> Iterator[str]:
    """Lines about one program."""
    program, memory = found.program, found.memory
    mesh = " × ".join(f"{name} {ways}" for name, ways in program.mesh.shape.items())
    yield f"{program.stage}: {program.name}, {program.rows} rows on {mesh} (compiled in {found.seconds:.0f} s)"
    of = f"{_gib(memory.total)} of {_gib(hardware.rates.memory)} a chip"
    if not found.fits:
        yield f"  does not fit: needs {of}. Try {'; '.join(program.remedies)}"
    else:
        parts = f"arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, code {_gib(memory.code)}"
        yield f"  memory        {of}: {parts}, outputs {_gib(memory.outputs)}, {_gib(memory.in_place)} of them in place"
    if found.most_rows is not None:
        fewer = min((n for n in range(1, program.micro_batches) if _holds(found, n)), default=None)
        also = "" if fewer is None else f"; these rows fit in {fewer} micro-batches (accumulate={fewer}) too"
        yield f"  largest batch about {found.most_rows} rows fit, by two compilations and a straight line{also}"
    for placed in layout(program):
        shape = "×".join(map(str, placed.shape))
        yield f"  {placed.name:<24} {placed.dtype} [{shape}] {_spec(placed.spec)}: {_gib(placed.bytes)} a chip"
    if not found.fits:
        return
    for kind, (count, traffic) in found.by_kind().items():
        yield f"  {kind:<24} {count:,} times, {size(traffic)} to each chip in {program.step.name}"
    bounds = found.bounds(hardware)
    slowest = max(bounds, key=lambda name: bounds[name])
    each = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in bounds.items())
    rate = f"{program.tokens / bounds[slowest]:,.0f} tokens/s"
    yield f"  {program.step.name}: {_flops(program.step.flops)} operations; {each}: {slowest} bounds it, {rate} at most"


def compiled_json(found: Compiled, hardware: Hardware) -> dict[str, Any]:
    """The same for scripts."""
    program = found.program
    return {
        "stage": program.stage,
        "program": program.name,
        "rows": program.rows,
        "mesh": dict(program.mesh.shape),
        "fits": found.fits,
        "memory": dataclasses.asdict(found.memory),
        "most_rows": found.most_rows,
        "compile_seconds": found.seconds,
        "layout": [placed._asdict() | {"spec": _spec(placed.spec)} for placed in layout(program, 8)],
        "collectives": {kind: {"count": n, "bytes": traffic} for kind, (n, traffic) in found.by_kind().items()},
        "step": program.step._asdict(),
        "tokens": program.tokens,
        "seconds": found.bounds(hardware),
    }


def _holds(found: Compiled, micro_batches: int) -> bool:
    """Whether the rows divide into so many micro-batches, each no larger than the largest that fits."""
    program = found.program
    groups = (program.multiple or 1) // program.micro_batches
    largest = (found.most_rows or 0) // program.micro_batches
    return program.rows % (micro_batches * groups) == 0 and program.rows // micro_batches <= largest


def _spec(spec: Any) -> str:
    names = ["+".join(axis) if isinstance(axis, tuple) else str(axis or "–") for axis in spec]
    return f"({', '.join(names)})" if any(spec) else "whole"


def _gib(bytes: float) -> str:
    return f"{bytes / 2**30:.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:.3g} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def to_json(context: PlannedContext, plans: Sequence[StagePlan], hardware: Hardware) -> dict[str, Any]:
    """The figures, for scripts; bytes, flops and hours are plain numbers."""
    return {
        "title": context.recipe.title,
        "hardware": {"chip": hardware.name, "count": hardware.chips},
        "parameters": {
            "target": context.target_shape.num_parameters,
            "draft": context.draft_config().num_parameters,
        },
        "stages": [
            {
                **dataclasses.asdict(plan),
                "phases": [
                    phase._asdict() | {"hours": hours, "bound": by} for phase, hours, by in phase_lines(plan, hardware)
                ],
                "flops": plan.flops,
                "hours": plan.hours(hardware),
            }
            for plan in plans
        ],
        "assumed": assumptions(context),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Lines of columns, the first ``left`` of them words and the others figures."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            f"{text:<{w}}" if i < left else f"{text:>{w}}" for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def size(count: float) -> str:
    """Bytes."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def _row(plan: StagePlan, hardware: Hardware) -> list[str]:
    works = bool(plan.phases)
    return [
        plan.name,
        plan.kind,
        "–" if plan.parameters is None else _scaled(plan.parameters, ("", "k", "M", "B")),
        "–" if plan.tokens is None else _scaled(plan.tokens, ("", "k", "M", "B", "T")),
        "–" if plan.steps is None else f"{plan.steps:,}",
        size(sum(plan.storage.values())) if plan.storage else "–",
        _flops(plan.flops) if works else "–",
        _hours(plan.hours(hardware)) if works else "–",
        plan.bound(hardware) if works else "–",
    ]


def _merged(plan: StagePlan, hardware: Hardware) -> list[tuple[Any, float, str]]:
    """Phases of one name together."""
    merged: dict[str, tuple[Any, float, str]] = {}
    for phase, hours, by in phase_lines(plan, hardware):
        before = merged.get(phase.name, (phase, 0.0, by))
        merged[phase.name] = (phase, before[1] + hours, by)
    return list(merged.values())


def _scaled(count: float, units: Sequence[str]) -> str:
    rest = list(units)
    while count >= 1000 and len(rest) > 1:
        count, rest = count / 1000, rest[1:]
    digits = f"{count:.3g}" if count < 1000 else f"{count:,.0f}"
    return f"{digits} {rest[0]}".rstrip()


def _flops(count: float) -> str:
    return f"{count:.2e}"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "<0.01"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
