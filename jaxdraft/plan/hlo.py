"""Collectives of a compiled program, read from its optimised HLO text and counted as often as their loops run.

An all-gather that XLA runs beside other work stands in several computations, among them bodies of loops that it only
accompanies; it is one collective, as often as the outermost of its places says.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


class Instruction(NamedTuple):
    """A line of a computation: ``%name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", re.split(r"\), [\w]+=", self.rest)[0])

    def attribute(self, name: str) -> str | None:
        """A computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each array of its result."""
        return [_bytes(kind, dims) for kind, dims in _SHAPE.findall(re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", self.shape))]


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of ``KINDS``.
      bytes: of the whole array that is gathered, summed, scattered or sent.
      group: devices that take part together.
      times: how often it runs; inside an open loop, in one round of it.
      depth: loops around it.
      is_open: a loop around it runs until something happens, such as the last row's end.
      name: where in the source it is from, as far as XLA says.
      shape: of its result, as XLA writes it.
    """

    kind: str
    bytes: int
    group: int
    times: int
    depth: int
    is_open: bool
    name: str
    shape: str

    @property
    def traffic(self) -> float:
        """Bytes that each device receives, of all times, by a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation of a program, and the entry's name."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # a kernel's attributes span lines, and some begin with a brace
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    return found, entry


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program (``compiled.as_text()``)."""
    program, entry = computations(text)
    found: dict[tuple[str, ...], Collective] = {}
    for place, instruction, times, depth, is_open in _visited(program, entry, 1, 0, False):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        group = _group(instruction.rest, program)
        sizes = instruction.sizes
        if kind == "reduce-scatter":
            total = sum(sizes) * group
        elif kind == "collective-permute" or (kind == "all-gather" and instruction.opcode.endswith("-start")):
            total = max(sizes)  # its operands and what the hardware needs stand beside its result
        else:
            total = sum(sizes)
        if place.startswith("all-reduce-scatter"):  # what a TPU makes of an all-reduce of which each keeps its part
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        name = source[1] if source else instruction.name
        one = Collective(kind, total, group, times, depth, is_open, name, instruction.shape)
        chain, channel = (re.search(rf"{name}[=\"]+(\d+)", instruction.rest) for name in ("chain_id", "channel_id"))
        key = (chain[1], channel[1] if channel else "") if chain else (place, instruction.name, str(len(found)))
        if key not in found or (depth, times) < (found[key].depth, found[key].times):
            found[key] = one
    return [collective for collective in found.values() if collective.group > 1 or collective.kind == KINDS[-1]]


def buffers(text: str) -> Iterator[tuple[str, tuple[int, ...], Instruction]]:
    """(element type, shape, instruction) of every array that a program's instructions give, those in fusions apart."""
    program, _ = computations(text)
    fused = {i.attribute("calls") for body in program.values() for i in body if i.opcode == "fusion"}
    for name, body in program.items():
        for instruction in () if name in fused else body:
            for kind, dims in _SHAPE.findall(re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", instruction.shape)):
                yield kind, tuple(int(size) for size in dims.split(",") if size), instruction


def _visited(
    program: dict[str, list[Instruction]], name: str, times: int, depth: int, is_open: bool
) -> Iterator[tuple[str, Instruction, int, int, bool]]:
    for instruction in program.get(name, ()):
        yield name, instruction, times, depth, is_open
        if instruction.opcode == "while":
            trips = _trips(program, name, instruction)
            body = instruction.attribute("body") or ""
            yield from _visited(program, body, times * (trips or 1), depth + 1, is_open or trips is None)
            continue
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        called = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
        called += filter(None, map(instruction.attribute, ("calls", "true_computation", "false_computation")))
        called += [instruction.attribute("to_apply") or ""] if instruction.opcode == "call" else []
        for other in called:
            yield from _visited(program, other, times, depth, is_open)


def _trips(program: dict[str, list[Instruction]], place: str, loop: Instruction) -> int | None:
    """How often a loop runs: as XLA says, or from the constant that its counter is compared with."""
    if known := re.search(r'known_trip_count[^\d]*"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = {i.name: i for i in program.get(loop.attribute("condition") or "", ())}
    compare = list(condition.values())[-1] if condition else None
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return None
    counter, bound = (condition.get(name) for name in compare.operands[:2])
    if counter is None or bound is None or bound.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.rest)[1])  # type: ignore[index]
    start = _element(program[place], loop.operands[0], index)
    first = _constant(start) if start is not None else None
    step = _step(program.get(loop.attribute("body") or "", []), index)
    return max(0, math.ceil((int(_constant(bound) or 0) - (first or 0)) / step))


def _step(body: list[Instruction], index: int) -> int:
    """What a loop adds to its counter in each round; 1 where that is hidden in a fusion."""
    named = {i.name: i for i in body}
    if not body:
        return 1
    added = _element(body, body[-1].name, index)
    constants = [_constant(named[name]) for name in added.operands if name in named] if added is not None else []
    return next((value for value in constants if value), 1) if added is not None and added.opcode == "add" else 1


def _element(body: list[Instruction], name: str, index: int) -> Instruction | None:
    """What lies at a place of a tuple that a computation makes."""
    named = {i.name: i for i in body}
    found = named.get(name)
    if found is None or found.opcode != "tuple" or index >= len(found.operands):
        return None
    element = named.get(found.operands[index])
    while element is not None and element.opcode in ("copy", "bitcast") and element.operands:
        element = named.get(element.operands[0])
    return element


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"(-?\d+)\)", instruction.rest)
    return int(value[1]) if instruction.opcode == "constant" and value else None


def _group(rest: str, program: dict[str, list[Instruction]]) -> int:
    """Devices of one of the groups that work together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    return 1


def _bytes(kind: str, dims: str) -> int:
    bits = _BITS.get(kind) or int(re.sub(r"^\D+", "", kind.split("e")[0]) or 0)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8
