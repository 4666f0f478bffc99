"""``jaxdraft plan``."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.backend import assumed
from jaxdraft.errors import ConfigError
from jaxdraft.licences import objection, target_licence
from jaxdraft.plan.compiled import Compiled, compile_program, topology_devices
from jaxdraft.plan.hardware import Hardware, parse_hardware, parse_topology
from jaxdraft.plan.programs import programs
from jaxdraft.plan.report import compiled_json, compiled_report, report, to_json
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import StagePlan, plan_stages
from jaxdraft.recipe_file import load_recipe
from jaxdraft.tracking import say


def plan(
    name: str,
    assignments: Sequence[str],
    hardware: str | None = None,
    topology: str | None = None,
    only: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Prints what a recipe takes.

    Args:
      name: recipe file or name.
      assignments: ``NAME=VALUE``.
      hardware: accelerators to count hours for; ``None`` takes those of the topology, else a node of eight H100.
      topology: TPUs to compile for; ``None`` compiles nothing.
      only: stages to compile; none compiles all.
      out: also gets the figures as JSON.

    Raises:
      ConfigError: a name that is not known, or no compiler for the topology.
    """
    context = PlannedContext.of(load_recipe(name, assignments))
    slices = None if topology is None else parse_topology(topology)
    if hardware is not None:
        chips = parse_hardware(hardware)
    else:
        chips = slices.hardware if slices else Hardware("H100", 8)
    for stage in only:
        context.recipe.stage(stage)
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--json {out}: there is no folder {out.parent}: make it first")
    if only and slices is None:
        raise ConfigError("--only names stages to compile: give --topology, such as v5e:4x4")
    devices = None if slices is None else topology_devices(slices)
    plans = plan_stages(context, chips)
    print("\n".join(report(context, plans, chips)), flush=True)
    if told := objection(context.recipe, target_licence(context.recipe)):
        print(f"note: {told}")
    found = to_json(context, plans, chips)
    if slices is not None and devices is not None:
        found["programs"] = []
        if slices.slices > 1:
            print("Between slices collectives take the data centre's network, which is slower than is counted here.")
        for compiled in compile_stages(context, plans, slices.hardware, devices, only):
            print("\n".join(compiled_report(compiled, slices.hardware)), flush=True)
            found["programs"].append(compiled_json(compiled, slices.hardware))
            if out is not None:  # what is done is worth keeping: each takes a minute
                out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def compile_stages(
    context: PlannedContext,
    plans: Sequence[StagePlan],
    hardware: Hardware,
    devices: Sequence[Any],
    only: Sequence[str] = (),
) -> Iterator[Compiled]:
    """Every program of these stages, or of all, compiled for the devices of a topology."""
    with assumed("tpu"):
        for stage, plan in zip(context.recipe.stages, plans, strict=True):
            if only and stage.name not in only:
                continue
            for program in programs(context, stage, plan, devices):
                say(f"compiling {program.stage}: {program.name}")
                yield compile_program(program, hardware)
