"""Runs a recipe in its run directory: finds what is missing or changed, does only that, writes down what was done."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax

from jaxdraft.context import Context
from jaxdraft.distributed import is_alone, is_lead, on_lead, together
from jaxdraft.early_checks import check_early
from jaxdraft.errors import ConfigError, Interrupted, naming
from jaxdraft.export import MODEL
from jaxdraft.files import sha256, write_json
from jaxdraft.home import LOCK, Home, open_home
from jaxdraft.licences import check_licence
from jaxdraft.losses import check_loss
from jaxdraft.provenance import environment, output_hash, stage_fingerprint
from jaxdraft.recipe import Recipe, Stage, Train
from jaxdraft.redaction import redacted
from jaxdraft.settings import changes, to_json
from jaxdraft.stages import EXECUTE, TOGETHER, external_inputs
from jaxdraft.stopping import align, owned, poll
from jaxdraft.tracking import say
from jaxdraft.untrusted import read_json


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do with one stage.

    Attributes:
      stage: the stage.
      state: ``"done"``, ``"missing"``, ``"unfinished"``, ``"changed"``, or ``"waiting"`` for a stage that runs first.
      reason: why, in words.
      inputs: hashes of all it reads, empty while a stage before it has to run.
      fingerprint: of settings and inputs.
      output: hash of what it made, for a stage that is done.
    """

    stage: Stage
    state: str
    reason: str
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    output: str = ""


# What the report reads of a stage, besides its record.
REPORTED = (
    "answers.json",
    "manifest.json",
    "results.json",
    "samples.jsonl",
    "metrics.jsonl",
    "block_efficiency.jsonl",
    "checkpoints.jsonl",
    "config.json",
    "special_tokens_map.json",
    "tokenizer*",
)


def run(
    recipe: Recipe,
    workdir: Path | str,
    only: Sequence[str] = (),
    command: Sequence[str] = (),
    profile: tuple[int, int] | None = None,
    accept_licence: bool = False,
) -> Path | None:
    """Runs what is missing and returns the report's path; ``None`` if not one stage has run yet.

    A stage whose settings or inputs have changed runs again, and so do those that read what it makes if that comes
    out differently. What it had made is moved to ``superseded/`` in the run directory.

    Args:
      recipe: the recipe.
      workdir: the run directory, made if it does not exist; ``gs://bucket/path`` keeps it in a bucket.
      only: run these stages only.
      command: the command line, for ``run.json``.
      profile: first step to trace of each Train stage, and the one to stop before.
      accept_licence: go on though the target's licence forbids to train other models on its output.

    Raises:
      ConfigError: a setting or an input is wrong, or such a licence is not accepted.
      Interrupted: another run holds the directory, or this one was asked to stop.
    """
    for name in only:
        recipe.stage(name)
    licences = on_lead(lambda: check_licence(recipe, workdir, accept_licence))
    home = open_home(workdir, 0 if is_alone() else jax.process_index())
    context = Context(recipe, home, profile)
    with contextlib.ExitStack() as held, owned():
        together(lambda: check_early(context))
        _ = context.mesh, context.decode_mesh  # what does not fit is told before anything is written
        on_lead(lambda: _begin(context, held))
        ran, made = False, dict[str, str]()
        for number, stage in enumerate(recipe.stages, start=1):
            plan = _shared_plan(stage, context, made)
            poll()
            banner = f"[{number}/{len(recipe.stages)}] {stage.name} ({type(stage).__name__})"
            if plan.state == "done":
                made[stage.name] = plan.output
                say(f"{banner}: done before")
            elif only and stage.name not in only:
                say(f"{banner}: left out, {plan.reason}")
            elif plan.state == "waiting":
                raise ConfigError(f"{stage.name}: {plan.reason}; add it to --only")
            else:
                say(f"{banner}: {plan.reason}")
                if not ran and is_lead():
                    _write_json(home, "run.json", {**_run_json(context, command), **licences})
                made[stage.name] = _execute(plan, context)
                ran = True
        if ran and is_lead():
            _write_json(home, "run.json", {**_run_json(context, command), **licences, "outputs": made})
        return Path(report) if (report := on_lead(lambda: _report(context))) else None


def _begin(context: Context, held: contextlib.ExitStack) -> None:
    """What is done once before the first stage: the lock, which ``held`` releases, and all checks that need no data."""
    context.workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(_locked(context.workdir))
    held.enter_context(context.home.held())
    context.home.fetch_records()
    _check_losses(context)
    if not _holds(context.workdir / "recipe.json", _recipe_json(context.recipe)):
        _write_json(context.home, "recipe.json", _recipe_json(context.recipe))


def _shared_plan(stage: Stage, context: Context, made: Mapping[str, str]) -> Plan:
    """The lead's plan: the others might see what it has already begun to write."""
    told = on_lead(lambda: {**vars(plan_stage(stage, context, made)), "stage": None})
    return Plan(**{**told, "stage": stage})


def plan_all(recipe: Recipe, workdir: Path | str) -> list[Plan]:
    """The plan of every stage, without doing anything."""
    context, plans, made = Context(recipe, open_home(workdir, None)), [], dict[str, str]()
    context.home.fetch_records()
    for stage in recipe.stages:
        plans.append(plan_stage(stage, context, made))
        if plans[-1].state == "done":
            made[stage.name] = plans[-1].output
    return plans


def plan_stage(stage: Stage, context: Context, made: Mapping[str, str]) -> Plan:
    """Compares a stage with what its folder holds.

    Args:
      stage: the stage.
      context: recipe and run directory.
      made: hash of the output of every stage that is done and current.
    """
    needs = context.recipe.needs(stage)
    if missing := [name for name in needs if name not in made]:
        return Plan(stage, "waiting", f"{missing[0]!r} has to run first")
    inputs = {name: made[name] for name in needs} | external_inputs(stage, context)
    settings = to_json(stage)
    shape = _resolved_shape(stage, context)
    fingerprint = stage_fingerprint(settings, shape, inputs, context.recipe.seed)
    record = _record(context.folder(stage.name))
    if record is None:
        return Plan(stage, "missing", "to do", inputs, fingerprint)
    if record["fingerprint"] != fingerprint:
        new = {"settings": settings, "shape": shape, "seed": context.recipe.seed, "inputs": inputs}
        return Plan(stage, "changed", f"runs again, {'; '.join(changes(record, new))}", inputs, fingerprint)
    if record["status"] != "done":
        return Plan(stage, "unfinished", "goes on where it stopped", inputs, fingerprint)
    if lost := context.home.lost(stage.name, list(record["outputs"])):
        return Plan(stage, "unfinished", f"runs again, {lost[0]} is gone", inputs, fingerprint)
    return Plan(stage, "done", "done", inputs, fingerprint, record["output"])


def _execute(plan: Plan, context: Context) -> str:
    """Runs a stage, writes its record and returns the hash of its output."""
    stage, began = plan.stage, time.perf_counter()
    align()
    _fetch_inputs(stage, context)
    record = on_lead(lambda: _opened(plan, context))
    execute = lambda: EXECUTE[type(stage)](stage, context)
    elapsed = lambda: round(record["seconds"] + time.perf_counter() - began, 3)
    try:
        with naming(context.folder(stage.name)):
            if isinstance(stage, TOGETHER):
                files, summary = execute()
                return on_lead(lambda: _closed(record, files, summary, elapsed(), context))
            return on_lead(lambda: _closed(record, *execute(), elapsed(), context))
    except BaseException:
        if is_lead():
            with contextlib.suppress(OSError):
                _write_json(context.home, f"{stage.name}/stage.json", {**record, "seconds": elapsed()})
        raise


def _fetch_inputs(stage: Stage, context: Context) -> None:
    """Brings what a stage reads to every process that takes part in it."""
    takes_part = is_lead() or isinstance(stage, TOGETHER)
    names = context.recipe.needs(stage) if takes_part else ()
    together(lambda: list(map(context.home.fetch, names)))
    on_lead(lambda: _check_outputs(list(map(context.folder, names))))


def _check_outputs(folders: Sequence[Path]) -> None:
    """A file that rotted since its stage was done is named before anything is made of it.

    Packed rows are hashed where they are opened, against the manifest; a Train stage's logs are read by no other.
    """
    for folder in folders:
        record = _record(folder) or {}
        for name, expected in record["outputs"].items():
            is_log = record["kind"] == Train.__name__ and not name.startswith(f"{MODEL}/")
            if not is_log and not fnmatch(name, "rows-*") and sha256(folder / name) != expected:
                raise ConfigError(
                    f"{folder / name} is damaged: it is not what its stage wrote. Delete it, and run again"
                )


def _opened(plan: Plan, context: Context) -> dict[str, Any]:
    """The record of a stage that begins or goes on; what is out of date is set aside first."""
    stage, folder = plan.stage, context.folder(plan.stage.name)
    is_running = (_record(folder) or {}).get("status") == "running"
    if plan.state == "changed" and not (stage.keeps_parts and is_running):
        if is_running and context.home.has_begun(stage.name):
            raise ConfigError(
                f"{stage.name} was stopped half way, and what it has made would be lost: it {plan.reason}. Set that "
                f"back to go on, or delete {context.home}/{stage.name} to begin anew"
            )
        say(f"    what it had made is now in {context.home.set_aside(stage.name)}")
    context.home.fetch(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    before = _record(folder)
    record = {
        "name": stage.name,
        "kind": type(stage).__name__,
        "settings": to_json(stage),
        "shape": _resolved_shape(stage, context),
        "seed": context.recipe.seed,
        "inputs": plan.inputs,
        "fingerprint": plan.fingerprint,
        "status": "running",
        "seconds": before.get("seconds", 0.0) if before else 0.0,
    }
    _write_json(context.home, f"{stage.name}/stage.json", record)
    return record


def _closed(record: dict[str, Any], files: Sequence[Path], summary: Any, seconds: float, context: Context) -> str:
    """Writes the record of a stage that is done and returns the hash of its output."""
    folder = context.folder(record["name"])
    traces = [file for file in (folder / "profile").rglob("*") if file.is_file()]
    context.home.keep(*files, *folder.glob("timing.jsonl"), *traces)
    outputs = {str(file.relative_to(folder)): sha256(file) for file in files}
    output = output_hash(outputs)
    done = {"status": "done", "outputs": outputs, "output": output, "summary": summary, "seconds": seconds}
    _write_json(context.home, f"{record['name']}/stage.json", {**record, **done})
    say(f"    done in {seconds:.1f} s")
    return output


def _report(context: Context) -> str | None:
    path = context.workdir / "report" / "index.html"
    records = [context.folder(stage.name) / "stage.json" for stage in context.recipe.stages]
    shown = [record for record in records if record.exists()]
    if not shown:
        return None
    newest = max(file.stat().st_mtime_ns for file in [*shown, context.workdir / "recipe.json"])
    if not path.exists() or path.stat().st_mtime_ns < newest:
        from jaxdraft.evaluate.report import write_report

        for record in shown:
            context.home.fetch(record.parent.name, REPORTED)
        with naming(path):
            write_report(context.workdir)
        context.home.keep_report()
    return str(path)


def _resolved_shape(stage: Stage, context: Context) -> Any:
    """The shape that a Train stage trains: the recipe's draft is not among the stage's own settings."""
    return to_json(context.trained_config(stage)) if isinstance(stage, Train) else None


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / "stage.json"
    if not path.exists():
        return None
    fields = {"status": str, "fingerprint": str, "settings": dict, "inputs": dict}
    return read_json(path, fields=fields, remedy=f"delete the folder {folder} to run the stage again")


def _recipe_json(recipe: Recipe) -> dict[str, Any]:
    stages = [{**to_json(stage), "kind": type(stage).__name__} for stage in recipe.stages]
    return {**to_json(recipe), "stages": stages}


def _run_json(context: Context, command: Sequence[str]) -> dict[str, Any]:
    stages = context.recipe.stages
    records = {stage.name: record for stage in stages if (record := _record(context.folder(stage.name)))}
    return {
        "command": list(command),
        **environment(),
        "mesh": dict(context.mesh.shape),
        "decode_mesh": dict(context.decode_mesh.shape),
        "seed": context.recipe.seed,
        "stage_seeds": {stage.name: context.seed(stage) for stage in stages if isinstance(stage, Train)},
        "inputs": {name: record["inputs"] for name, record in records.items()},
    }


def _check_losses(context: Context) -> None:
    """A mistake in a loss is told now, and not when its stage begins; one that a stage began with was tried then."""
    for stage in context.recipe.stages:
        if not isinstance(stage, Train):
            continue
        record, settings = _record(context.folder(stage.name)), to_json(stage)
        if record and all(record["settings"].get(key) == settings[key] for key in ("loss", "target_logits")):
            continue
        try:
            check_loss(stage.loss, stage.target_logits == "stored")
        except ConfigError as error:
            raise ConfigError(f"{stage.name}: {error}") from error


def _holds(path: Path, value: Any) -> bool:
    return path.exists() and path.read_text() == json.dumps(redacted(value), indent=2) + "\n"


def _write_json(home: Home, name: str, value: Any) -> None:
    write_json(home.folder / name, redacted(value))
    home.keep(home.folder / name)


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "jaxdraft run"
            raise Interrupted(f"another {holder} is at work in {workdir}: wait for it, or stop it") from None
        file.truncate(0)
        file.write(f"jaxdraft run (process {os.getpid()} on {socket.gethostname()})")
        file.flush()
        yield
