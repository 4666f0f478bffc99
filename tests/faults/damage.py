"""Files damaged, disks full, numbers that are none: F5, F6, F8, F9."""

import contextlib
import itertools
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.context import Context
from jaxdraft.fingerprint import fingerprint
from jaxdraft.home import open_home
from jaxdraft.models.hf import load_config
from jaxdraft.recipe import Train
from jaxdraft.recipe_file import load_recipe
from jaxdraft.train.state import abstract_state, state_shardings
from tests.faults.bench import RECIPE, Bench, Outcome, called, fault, hashes

BLOCK = 512  # bytes, of a disk


def _flipped(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def _zeroed(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = drawn.choice([i for i, byte in enumerate(content) if byte])
    start = at - at % BLOCK
    end = min(start + BLOCK, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _cut_short(path: Path, drawn: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: drawn.randrange(path.stat().st_size)])


def _deleted(path: Path, drawn: random.Random) -> None:
    path.unlink()


def _removed(folder: Path, drawn: random.Random) -> None:
    shutil.rmtree(folder)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (_flipped, _zeroed, _cut_short, _deleted)


@contextlib.contextmanager
def _damaged(path: Path, damage: Callable[[Path, random.Random], None], drawn: random.Random) -> Iterator[None]:
    """A file is damaged, and mended again."""
    content = path.read_bytes()
    damage(path, drawn)
    try:
        yield
    finally:
        path.write_bytes(content)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package warns of meanwhile."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("jaxdraft").addHandler(handler)
    try:
        yield heard
    finally:
        logging.getLogger("jaxdraft").removeHandler(handler)


def _each(files: list[Path], bench: Bench) -> Iterator[tuple[Path, Callable[[Path, random.Random], None]]]:
    """Every file with ``effort`` damages, in turn, from a drawn one on."""
    for file in files:
        first = bench.random.randrange(len(DAMAGES))
        turn = itertools.islice(itertools.cycle(DAMAGES), first, first + bench.effort)
        yield from ((file, damage) for damage in turn)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _abstract(workdir: Path) -> Any:
    """Shapes of the state that the stage ``pretrain`` trains."""
    recipe = load_recipe(str(RECIPE))
    stage, context = recipe.stage("pretrain"), Context(recipe, open_home(workdir, None))
    assert isinstance(stage, Train)
    config = load_config(context.model_folder(stage.name))
    return abstract_state(stage, config, state_shardings(config, stage, context.mesh))


@fault("F5", "a file of the newest checkpoint is damaged")
def checkpoints(bench: Bench) -> Outcome:
    """It is named, and the step before restored, bit for bit; where only its hashes are gone its fingerprint counts."""
    made, abstract = bench.undisturbed / "pretrain" / "checkpoints", _abstract(bench.undisturbed)
    with Checkpoints(made) as kept:
        *_, before, newest = kept.steps
        intact = {step: fingerprint(kept.restore(abstract, step)) for step in (before, newest)}
    bad, count = [], 0
    files = [made / f"{newest}.json", *_files(made / str(newest))]
    for file, damage in [*_each(files, bench), *[(made / str(newest), _removed)] * bench.effort]:
        count += 1
        folder = Path(shutil.copytree(made, bench.new("f5")))
        damage(folder / file.relative_to(made), bench.random)
        try:
            with _warnings() as heard, Checkpoints(folder) as kept:
                step, state = kept.restore_newest(abstract)
            expected = newest if (file, damage) == (files[0], _deleted) else before
            held = step == expected and (fingerprint(state) == intact[step]).all()
            held &= any(str(folder / file.relative_to(made)) in warning for warning in heard)
            found = f"step {step}, warnings {heard}"
        except Exception as error:
            held, found = False, repr(error)
        if not held:
            bad.append(f"{file.relative_to(made)} {damage.__name__}: {found}")
        shutil.rmtree(folder)
    return Outcome(count, count - len(bad), "; ".join(bad))


@fault("F5", "a run goes on from a checkpoint that is damaged, or from none that is not")
def resumed(bench: Bench) -> Outcome:
    """The real command ends with the same bytes, or is refused and leaves everything as it is."""
    expected, bad = bench.expected, []
    command = ["run", str(RECIPE), "--only", "pretrain", "--workdir"]
    for _ in range(bench.effort):
        workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f5")))
        (workdir / "pretrain" / "model" / "model.safetensors").unlink()  # so that the stage has to go on
        folder = workdir / "pretrain" / "checkpoints"
        *_, before, newest = sorted(int(path.stem) for path in folder.glob("*.json"))
        damage = bench.random.choice(DAMAGES)
        file = bench.random.choice(_files(folder / str(newest)))
        damage(file, bench.random)
        there = {path: path.read_bytes() for path in _files(folder)}
        other = bench.random.choice(_files(folder / str(before)))
        with _damaged(other, damage, bench.random):
            code, said = called(*command, str(workdir))
        if code != 1 or str(folder) not in said or {path: path.read_bytes() for path in _files(folder)} != there:
            bad.append(f"{file} and {other} {damage.__name__}: exit {code}, {said[-300:]!r}")
        with _warnings() as heard:
            code, said = called(*command, str(workdir))
        if code or not any(str(file) in warning for warning in heard) or hashes(workdir) != expected:
            bad.append(f"{file} {damage.__name__}: exit {code}, {said[-300:]!r}, warnings {heard}")
    return Outcome(2 * bench.effort, 2 * bench.effort - len(bad), "; ".join(bad))


READS = {  # what is changed so that a stage has to read the outputs of these
    "pretrain.steps=7": ("tokenizer", "corpus"),
    "distill.steps=7": ("tokenizer", "target", "pretrain", "responses", "vocabulary"),
    "export.block_size=4": ("distill", "evaluate"),
}


@fault("F6", "a file that a finished stage made is damaged, before another reads it")
def outputs(bench: Bench) -> Outcome:
    """Tokenizer files, packed rows and manifests, answers and their records, safetensors, results: each is named."""
    workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f6")))
    before, bad, count = hashes(workdir), [], 0
    for setting, stages in READS.items():
        reader = setting.partition(".")[0]
        command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", reader, "--set", setting]
        made = [
            workdir / stage / name
            for stage in stages
            for name in json.loads((workdir / stage / "stage.json").read_text())["outputs"]
        ]
        for file, damage in _each(made, bench):
            count += 1
            with _damaged(file, damage, bench.random):
                code, said = called(*command)
            name = str(file.relative_to(workdir))
            words = name if damage is not _deleted else f"{name.partition('/')[2]} is gone"
            if code != 2 or words not in said:
                bad.append(f"{name} {damage.__name__}: exit {code}, {said[-300:]!r}")
                shutil.rmtree(workdir)  # something may have been set aside
                shutil.copytree(bench.undisturbed, workdir)
    if hashes(workdir) != before:
        bad.append("a refused run changed what was there")
    return Outcome(count, count - len(bad), "; ".join(bad))


@fault("F6", "a shard of answers is damaged while others are still to be written")
def shards(bench: Bench) -> Outcome:
    """It is named, and written again with the same bytes."""
    expected, bad, count = bench.expected, [], 0
    workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f6")))
    command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", "responses"]
    for file, damage in _each(sorted((workdir / "responses").glob("responses-00001-*")), bench):
        count += 1
        (workdir / "responses" / "manifest.json").unlink(missing_ok=True)  # the last file of this stage
        damage(file, bench.random)
        code, said = called(*command)
        if code or file.name not in said or hashes(workdir) != expected:
            bad.append(f"{file.name} {damage.__name__}: exit {code}, {said[-300:]!r}")
    return Outcome(count, count - len(bad), "; ".join(bad))


OUTSIDE = """
from jaxdraft.data.prompts import PromptFile
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe


def recipe(*, target: HFModel, prompts: PromptFile):
    return Recipe(
        title="Outside",
        target=target,
        draft=ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        stages=(Generate("responses", prompts=(prompts,), length=64, temperatures=(0.0,), max_new_tokens=4),),
    )
"""


@fault("F6", "a target's files or a file of prompts are damaged outside the run directory")
def inputs(bench: Bench) -> Outcome:
    """Whatever can still be read counts as another input, which is named before it is used."""
    folder = bench.new("f6")
    target = Path(shutil.copytree(bench.undisturbed / "target" / "model", folder / "target"))
    prompts, recipe = folder / "prompts.jsonl", folder / "outside.py"
    prompts.write_text('{"prompt": "def f(x):"}\n{"prompt": "class A:"}\n')
    recipe.write_text(OUTSIDE)
    command = ["run", str(recipe), "--workdir", str(folder / "run")]
    command += ["--set", f"target.path={target}", "--set", f"prompts.path={prompts}"]
    code, said = called(*command)
    bad, count = [] if code == 0 else [said], 0
    names = {prompts: "responses.prompts.0"}
    names |= {target / name: f"target/{name}" for name in ("config.json", "model.safetensors")}
    names |= {target / name: f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer.model")}
    for file, damage in _each(list(names), bench):
        count += 1
        with _damaged(file, damage, bench.random):
            code, said = called(*command, "--list")
        is_another = code == 0 and f"input {names[file]} {'is gone' if damage is _deleted else 'has changed'}" in said
        if not is_another and not (code == 2 and file.name in said):
            bad.append(f"{file.name} {damage.__name__}: exit {code}, {said[-300:]!r}")
    return Outcome(count, count - len(bad), "; ".join(bad))
