"""Files damaged, disks full, numbers that are none: F5, F6, F8, F9."""

import contextlib
import itertools
import json
import logging
import random
import shutil
import subprocess
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.context import Context
from jaxdraft.data.pipeline import Batches
from jaxdraft.data.records import PackedRows
from jaxdraft.fingerprint import all_finite, fingerprint
from jaxdraft.home import open_home
from jaxdraft.models.hf import load_config
from jaxdraft.recipe import Train
from jaxdraft.recipe_file import load_recipe
from jaxdraft.tracking import read_jsonl
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


@fault("F6", "any file of a finished run is damaged, and `jaxdraft verify` asked")
def verified(bench: Bench) -> Outcome:
    """Outputs that nothing reads any more, and checkpoints: drawn ones, ten for each effort; each is named."""
    workdir, bad = Path(shutil.copytree(bench.undisturbed, bench.new("f6"))), []
    code, said = called("verify", str(workdir))
    if code:
        return Outcome(1, 0, f"the undisturbed run: exit {code}, {said!r}")
    stages = [path.parent for path in workdir.glob("*/stage.json")]
    made = [stage / name for stage in stages for name in json.loads((stage / "stage.json").read_text())["outputs"]]
    made += [file for stage in stages for file in _files(stage / "checkpoints")]
    drawn = bench.random.choices(sorted(made), k=10 * bench.effort)
    for file, damage in zip(drawn, itertools.cycle(DAMAGES), strict=False):
        with _damaged(file, damage, bench.random):
            code, said = called("verify", str(workdir))
        is_refused = code == 2 and str(file.relative_to(workdir)) in said
        is_noted = f"{file.parent}: {file.stem} without hashes" in said  # then the arrays have a fingerprint still
        if not is_refused and not (damage is _deleted and is_noted):
            bad.append(f"{file.relative_to(workdir)} {damage.__name__}: exit {code}, {said[-300:]!r}")
    return Outcome(len(drawn), len(drawn) - len(bad), "; ".join(bad))


@fault("F6", "a shard of answers is damaged while others are still to be written")
def shards(bench: Bench) -> Outcome:
    """It is named, and written again with the same bytes."""
    expected, bad, count = bench.expected, [], 0
    workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f6")))
    command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", "responses"]
    files = sorted((workdir / "responses").glob("responses-00001-*"))
    for file, damage in zip(bench.random.choices(files, k=bench.effort), itertools.cycle(DAMAGES), strict=False):
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


PLACES = (
    "rows-",
    "checkpoints",
    "metrics",
    "timing",
    "responses-",
    "stage.json",
    "run.json",
    "model",
    "export",
    "report",
)


@fault("F9", "the disk is full")
def full(bench: Bench) -> Outcome:
    """At a drawn place of a stage: its rows, checkpoints, metrics, answers, record, weights, or the report after it."""
    namespace, disk = ["unshare", "--map-root-user", "--mount"], bench.new("f9")
    disk.mkdir()
    mount = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise unittest.SkipTest("nobody may mount a small disk of their own here (unshare --map-root-user --mount)")
    asked = [
        (stage, bench.random.randrange(sum(file.stat().st_size for file in _files(bench.undisturbed / stage))))
        for stage in bench.random.choices(("corpus", "target", "responses", "export"), k=2 * bench.effort)
    ]
    child = [*namespace, sys.executable, "-m", "tests.faults.full_disk"]
    told = json.dumps([str(bench.undisturbed), str(disk), asked])
    run = subprocess.run(child, input=told, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    bad = [f"{stage}: {'; '.join(wrong)}" for (stage, _), (_, *wrong) in zip(asked, found, strict=True) if wrong]
    met = sorted({name for name in PLACES for said, *_ in found if name in said.partition("/")[2]})
    return Outcome(len(asked), len(asked) - len(bad), "; ".join(bad) or f"met at {', '.join(met)}")


def _labels(workdir: Path, steps: int) -> list[set[int]]:
    """Tokens that are labels in each batch of the stage ``pretrain``."""
    rows = {"corpus": PackedRows(workdir / "corpus")}
    batches = Batches(rows, batch_size=10, seed=0)
    return [set(batches[step]["tokens"].reshape(-1).tolist()) for step in range(steps)]


@fault("F8", "one batch whose loss, or gradient, is not a number")
def bad_batch(bench: Bench) -> Outcome:
    """Its update is skipped and counted, the state stays bit-equal, and a run that stopped around it ends the same."""
    bad, kinds = [], [(step, how) for step in range(1, 5) for how in ("false", "true")]
    labels = _labels(bench.undisturbed, 6)
    done = min(bench.effort, len(kinds))
    for step, in_gradient in bench.random.sample(kinds, done):
        others = set().union(*labels[:step], *labels[step + 1 :])
        token = min(token for token in labels[step] - others if token > 16)  # the smaller ones, a loss is tried on
        workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f8")))
        shutil.rmtree(workdir / "pretrain")
        command = _own(workdir, token, f"pretrain.loss.in_gradient={in_gradient}")
        code, said = called(*command)
        lines = read_jsonl(workdir / "pretrain" / "metrics.jsonl")
        where = f"step {step + 1}, in_gradient {in_gradient}"
        if code or [line["step"] for line in lines if line.get("skipped")] != [step + 1]:
            bad.append(f"{where}: exit {code}, {said[-300:]!r}")
            continue
        nulls = [name for name, value in lines[step].items() if value is None]
        before, after = (_arrays(workdir / "pretrain" / "checkpoints" / str(number)) for number in (step, step + 1))
        differing = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        if nulls != ["grad_norm" if in_gradient == "true" else "loss"] or len(differing) != 1:
            bad.append(f"{where}: null are {nulls}, of the state's arrays {differing} changed")  # its step has to
        made, last = hashes(workdir), bench.random.choice((step, step + 1))
        for number in range(last + 1, 7):  # as a kill leaves it that comes after this save
            shutil.rmtree(workdir / "pretrain" / "checkpoints" / str(number))
            (workdir / "pretrain" / "checkpoints" / f"{number}.json").unlink()
        (workdir / "pretrain" / "model" / "config.json").unlink()
        code, said = called(*command)
        if code or hashes(workdir) != made:
            bad.append(f"{where}, gone on from {last}: exit {code}, {said[-300:]!r}")
    return Outcome(done, done - len(bad), "; ".join(bad))


@fault("F8", "every batch is bad", slow=True)
def bad_batches(bench: Bench) -> Outcome:
    """Three skipped updates in a row end the run, which names their steps and rows; what was saved stays finite."""
    bad, labels = [], _labels(bench.undisturbed, 6)
    token = min(token for token in set.intersection(*labels) if token > 16)
    rows = Batches({"corpus": PackedRows(bench.undisturbed / "corpus")}, batch_size=10, seed=0).rows
    for in_gradient in ("false", "true")[: bench.effort]:
        workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f8")))
        shutil.rmtree(workdir / "pretrain")
        code, said = called(*_own(workdir, token, f"pretrain.loss.in_gradient={in_gradient}"))
        steps = [f"step {step + 1}, rows {', '.join(f'corpus {row}' for _, row in rows(step))}" for step in range(3)]
        again, _ = called(*_own(workdir, token, f"pretrain.loss.in_gradient={in_gradient}"))
        whole = [folder.name for folder in (workdir / "pretrain" / "checkpoints").glob("*") if folder.is_dir()]
        is_finite = True
        with Checkpoints(workdir / "pretrain" / "checkpoints") as kept:
            for step in kept.steps:
                is_finite &= all_finite(kept.restore(_abstract(bench.undisturbed), step))
        if (code, again) != (1, 1) or not all(words in said for words in steps) or not is_finite or not whole:
            bad.append(f"exit {code} and {again}, {said[-500:]!r}, checkpoints {whole}, finite: {is_finite}")
    return Outcome(min(2, bench.effort), min(2, bench.effort) - len(bad), "; ".join(bad))


def _own(workdir: Path, token: int, *settings: str) -> list[str]:
    """Pretraining with a loss that cannot bear a token; every step is kept."""
    chosen = ["pretrain.loss=tests.faults.bad_loss:BadLabel", f"pretrain.loss.token={token}", *settings]
    chosen += ["pretrain.save_every=1", "pretrain.keep_every=1"]
    command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", "pretrain"]
    return [*command, *(word for setting in chosen for word in ("--set", setting))]


def _arrays(checkpoint: Path) -> list[int]:
    """The fingerprint of each of its arrays."""
    return json.loads((checkpoint / "meta" / "metadata").read_text())["fingerprint"]
