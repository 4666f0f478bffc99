"""Programs compiled ahead of time for TPUs that need not be there: what they take of each chip."""

import dataclasses
import importlib.util
import math
import re
import time
from typing import Any

import jax

from jaxdraft.errors import ConfigError
from jaxdraft.plan.hardware import Hardware, Topology
from jaxdraft.plan.hlo import Collective, collectives
from jaxdraft.plan.programs import Program
from jaxdraft.plan.work import MBU, MFU


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
      arguments: weights, optimizer state, batch or cache.
      temporaries: what the program needs beside them while it runs.
      outputs: of which ``in_place`` lie where arguments lay.
      in_place: outputs that take no room.
      code: the program itself.
      total: all together; of a program that does not fit, what the compiler says it would need.
    """

    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    in_place: int = 0
    code: int = 0
    total: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled program takes.

    Attributes:
      program: the program.
      memory: of one chip.
      fits: whether the compiler could place it.
      seconds: of compiling it.
      collectives: what the chips tell each other; of a program that does not fit, nothing is known.
      most_rows: estimate of the largest batch that fits, from ``memory`` and that of another batch; ``None`` where none
        was compiled.
    """

    program: Program
    memory: Memory
    fits: bool
    seconds: float
    collectives: tuple[Collective, ...] = ()
    most_rows: int | None = None

    def bounds(self, hardware: Hardware) -> dict[str, float]:
        """Seconds of one step by each of what it needs, were it all it needs."""
        rates, step = hardware.rates, self.program.step
        return {
            "compute": step.flops / (hardware.chips * rates.flops * MFU),
            "memory": step.bytes / (rates.bandwidth * MBU),
            "interconnect": sum(c.traffic for c in self.in_step) / rates.interconnect,
        }

    @property
    def in_step(self) -> list[Collective]:
        """Collectives of one step: of a program that loops until it is done, those of a round."""
        loops = any(c.is_open for c in self.collectives)
        return [c for c in self.collectives if c.is_open or not loops]

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """(how many, bytes that each chip receives) of each kind of collective in one step."""
        found: dict[str, tuple[int, float]] = {}
        for c in self.in_step:
            count, traffic = found.get(c.kind, (0, 0.0))
            found[c.kind] = count + c.times, traffic + c.traffic
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology that is not here.

    Raises:
      ConfigError: there is no TPU compiler, or it does not know the topology.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs the TPU compiler, which runs on any machine: EXTRAS=tpu bash launch/setup.sh in the "
            "checkout, or install libtpu beside jaxdraft"
        )
    host = tuple(min(2, size) for size in (*topology.shape[:2], 1))
    options: dict[str, Any] = {"num_slices": topology.slices, "chips_per_host_bounds": host}
    if topology.name == "v4":
        options["chip_config_name"] = "megacore"  # as v4 is used: one device to a chip
    try:
        made = topologies.get_topology_desc(platform="tpu", topology_name=topology.slice, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    return list(made.devices)


def compile_program(program: Program, hardware: Hardware) -> Compiled:
    """Compiles a program, and where its rows may be others once more with other rows, to tell how many fit.

    Memory grows in a straight line with the rows, as long as the compiler need not save any: hence an estimate.
    """
    found = _compiled(program, program.rows)
    if program.multiple is None:
        return found
    other = program.rows // 2 // program.multiple * program.multiple or program.rows + program.multiple
    if other > program.rows and not found.fits:
        return found
    second = _compiled(program, other)
    slope = (found.memory.total - second.memory.total) / (program.rows - other)
    if not second.fits or slope <= 0:
        return found
    most = other + (_usable(hardware) - second.memory.total) / slope
    return dataclasses.replace(found, most_rows=max(0, math.floor(most / program.multiple) * program.multiple))


def _usable(hardware: Hardware) -> int:
    return hardware.rates.memory * 63 // 64  # the compiler keeps 256 MiB of v5e's 16 GiB


def _compiled(program: Program, rows: int) -> Compiled:
    began = time.perf_counter()
    with jax.set_mesh(program.mesh):
        lowered = program.lower(rows)
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # "Used 25.30G of 15.75G hbm", or "required for HLO temporaries (16.36G) exceeds available HBM (15.75G)"
        needed = re.search(r"\b([\d.]+)([KMGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        total = float(needed[1]) * 1024 ** " KMGT".index(needed[2])
        return Compiled(program, Memory(total=int(total)), False, time.perf_counter() - began)
    m: Any = made.memory_analysis()
    sizes = (
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.generated_code_size_in_bytes,
    )
    arguments, temporaries, outputs, in_place, code = sizes
    total = arguments + temporaries + outputs - in_place + code
    seconds = time.perf_counter() - began
    return Compiled(program, Memory(*sizes, total), True, seconds, tuple(collectives(made.as_text() or "")))
