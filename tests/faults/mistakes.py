"""What people get wrong: F7, F10, F11, F13, F14."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.bench import RECIPE, Bench, Outcome, called, fault, hashes, start

# Whoever reaches for a device fails in this process, which is asked for platforms that do not exist.
WITHOUT_DEVICES = {"JAX_PLATFORMS": "none"}
ONE_AFTER_ANOTHER = """
import json, sys, time
from tests.faults.bench import called
for line in sys.stdin:
    began = time.process_time()
    try:
        answer = called(*json.loads(line))
    except Exception as error:
        answer = None, repr(error)
    print(json.dumps([*answer, time.process_time() - began]), flush=True)
"""
SECONDS = 3.0  # of a core


class Answer(NamedTuple):
    """What a command said.

    Attributes:
      code: its exit code; ``None`` where it was no answer but an error of ours.
      said: on both streams.
      seconds: of a core.
    """

    code: int | None
    said: str
    seconds: float


def answered(commands: list[list[str]], **environment: str) -> list[Answer]:
    """What commands say, one after another in one process with that environment."""
    text = "".join(json.dumps(arguments) + "\n" for arguments in commands)
    child, known = [sys.executable, "-c", ONE_AFTER_ANOTHER], {**os.environ, **environment}
    run = subprocess.run(child, input=text, env=known, stdout=subprocess.PIPE, text=True, check=True)
    return [Answer(*json.loads(line)) for line in run.stdout.splitlines()]


def judged(asked: list[tuple[list[str], str]], answers: list[Answer], note: str = "") -> Outcome:
    """Every answer is to be a refusal (2) that holds the words asked for, in time; ``note`` where they all are."""
    bad = [
        f"{' '.join(arguments)}: exit {code}, {seconds:.1f} s, {said!r}"
        for (arguments, words), (code, said, seconds) in zip(asked, answers, strict=True)
        if code != 2 or words not in said or seconds > SECONDS
    ]
    return Outcome(len(asked), len(asked) - len(bad), "; ".join(bad) or note)


RECIPES = {
    "syntax": "def recipe(:\n",
    "imports": "import nothing_like_it\n",
    "no_recipe": "x = 1\n",
    "no_Recipe": "def recipe():\n    return 3\n",
    "keyword": "from jaxdraft.recipe import Export\n\n\ndef recipe():\n    return Export('export', draught='x')\n",
    "fails": "def recipe(*, scale: int = 1):\n    return 1 / (scale - 1)\n",
}
SETTINGS = {  # what is said must hold the thing and, where there is one, the nearest right name
    "distil.steps=1": "no setting 'distil': did you mean 'distill'",
    "distill.step=1": "no field of Train 'step': did you mean 'steps'",
    "distill.loss=TVDPlus": "did you mean 'TVDPlusPlus'",
    "distill.loss.temprature=1": "did you mean 'temperature'",
    "distill.data.corpuss=1": "did you mean 'corpus'",
    "distill.init=pretrian": "did you mean 'pretrain'",
    "distill.probe=corpus": "distill.probe: no earlier Generate stage 'corpus'",
    "distill.steps=many": "cannot read 'many' as int",
    "distill.remat=some": "cannot read 'some' as one of none, dots, full",
    "distill.steps=0": "distill: steps is 0",
    "distill.learning_rate=inf": "distill: learning_rate is inf",
    "distill.learning_rate=-1": "distill: learning_rate is -1",
    "distill.clip_norm=0": "distill: clip_norm is 0",
    "distill.b2=1": "distill: b1 and b2 are 0.9 and 1.0",
    "distill.warmup_steps=6": "distill: warmup_steps is 6",
    "distill.accumulate=3": "accumulate divides batch_size",
    "distill.save_every=0": "distill: save_every",
    "distill.seed=-1": "distill: seed is -1",
    "distill.reference=pretrain": "distill: reference is 'pretrain'",
    "distill.loss.temperature=0": "temperature must be positive, got 0",
    "distill.batch_size=8": "batch_size=8 cannot hold the mix",
    "distill.data.corpus=0.7": "weights must be positive and sum to 1",
    "corpus.length=32": "rows of different lengths cannot be mixed",
    "corpus.tokens=1": "corpus: tokens is 1",
    "corpus.sources.0.part=nothing": "cannot read 'nothing' as one of text, code, instructions",
    "responses.top_p=1.5": "responses: top_p is 1.5",
    "responses.temperatures=0,0": "give none twice",
    "responses.writer=distill": "responses.writer: no earlier Train stage 'distill'",
    "responses.keep_logits.k=0": "k is 0",
    "responses.max_new_tokens=99999": "responses: max_new_tokens is 99999: the target has only 2048 positions",
    "evaluate.tasks.open.max_new_tokens=9999": "task open: max_new_tokens is 9999: the target has only 2048 positions",
    "evaluate.tasks.gredy.top_p=1": "did you mean 'greedy'",
    "evaluate.block_sizes=0": "block_sizes",
    "evaluate.stop_below=2": "evaluate: stop_below is 2",
    "evaluate.drafts=distil": "did you mean 'distill'",
    "vocabulary.size=401": "vocabulary: size is 401, the target's vocabulary 400",
    "vocabulary.size=0": "vocabulary: size is 0",
    "export.block_size=0": "export: block_size is 0",
    "export.evaluation=evalute": "did you mean 'evaluate'",
    "draft.vocab_size=17": "draft.vocab_size is 17, the target's 400",
    "draft.hiden_size=8": "did you mean 'hidden_size'",
    "draft.num_kv_heads=3": "num_heads (2) must be a multiple of num_kv_heads (3)",
    "draft.rope_theta=-1": "rope_theta is -1",
    "mesh.data=0": "mesh.data is 0",
    "seed=-1": "seed is -1",
    "seed": "write NAME=VALUE",
    "distill=3": "name a field of stage 'distill'",
}


def mistakes(bench: Bench) -> list[tuple[list[str], str]]:
    """Command lines that are wrong in one thing, and words that the answer must hold."""
    folder, run = bench.new("f10"), bench.undisturbed
    folder.mkdir()
    files = {name: folder / f"{name}.py" for name in RECIPES}
    for name, path in files.items():
        path.write_text(RECIPES[name])
    prompts, broken, empty = (folder / f"{name}.jsonl" for name in ("prompts", "broken", "empty"))
    prompts.write_text('{"prompt": "a"}\n')
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    empty.write_text('{"id": "a"}\n')
    target, draft, out = str(run / "target" / "model"), str(run / "export"), str(folder / "out")

    def recipe(name: object, *settings: str) -> list[str]:
        chosen = [word for setting in settings for word in ("--set", setting)]
        return ["run", str(name), "--workdir", str(folder / "run"), *chosen]

    tiny = recipe(RECIPE)
    story = ["target.path=nowhere", "text.path=text.txt"]
    evaluate = ["evaluate", "--target", target, "--draft", draft, "--out", out, "--prompts"]
    sample = ["sample", "--target", target, "--draft", draft, "--prompt", "a"]
    export = ["export", "--run", str(run), "--out", out]
    untrained = ["export", "--untrained", "--target", target, "--out", out]
    inspect, plan = ["inspect", str(run)], ["plan", str(RECIPE)]
    return [
        *((recipe(RECIPE, setting), answer) for setting, answer in SETTINGS.items()),
        (recipe("quickstrat"), "did you mean 'quickstart'"),
        (recipe("quickstart", "distill-kl.stepps=5"), "did you mean 'steps'"),
        (recipe("tinystories"), "needs --set target.path="),
        (recipe("tinystories", *story), "nowhere is neither a folder here nor a hub repository"),
        (recipe("tinystories", f"target.path={folder}", story[1]), "config.json does not exist"),
        (recipe(files["syntax"]), "line 1"),
        (recipe(files["imports"]), "line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        (recipe(files["no_recipe"]), "defines no function recipe"),
        (recipe(files["no_Recipe"]), "returns a int"),
        (recipe(files["keyword"]), "line 5: TypeError: Export.__init__() got an unexpected keyword argument 'draught'"),
        (recipe(files["fails"], "scale=1"), "line 2: ZeroDivisionError"),
        (recipe(prompts), "a recipe is a Python file"),
        (recipe(RECIPE, "pretrain.init=subclone", "draft.num_layers=3"), "num_layers is 3, larger than the target's 2"),
        (recipe(RECIPE, "distill.target_logits=stored", "responses.keep_logits=none"), "'responses' stores none"),
        ([*tiny, "--only", "exprot"], "did you mean 'export'"),
        ([*tiny, "--profile", "20:10"], "as in 10:20"),
        (["run", str(RECIPE), "--workdir", str(prompts)], "is a file"),
        (["run", str(RECIPE), "--workdir", "s3://bucket/run"], "gs://"),
        (["rnu", str(RECIPE)], "'rnu'"),
        ([*tiny, "--nonsense"], "--nonsense"),
        (evaluate[:-1], "nothing to measure on"),
        ([*evaluate, "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([*evaluate, str(broken)], "line 2"),
        ([*evaluate, str(empty)], "needs exactly one of prompt, messages, tokens"),
        ([*evaluate, str(prompts), "--block-sizes", "3,x"], "--block-sizes"),
        ([*evaluate, str(prompts), "--top-p", "2"], "--top-p"),
        ([*evaluate, str(prompts), "--max-new-tokens", "99999"], "only 2048 positions"),
        ([*evaluate, str(prompts), "--stop-below", "7"], "stop_below is 7"),
        ([*evaluate[:-1], "--task", "doly"], "did you mean 'dolly'"),
        ([*evaluate, str(prompts), "--draft", draft], "two drafts are called export"),
        ([*evaluate, str(prompts), "--out", str(prompts)], "is a file"),
        ([*sample, "--block-size", "0"], "--block-size"),
        ([*sample, "--temperature", "-1"], "--temperature"),
        ([*sample, "--system", "Be brief."], "no chat template"),
        ([*sample, "--target", "nowhere"], "nowhere is neither"),
        (export, "--run and --stage"),
        ([*export, "--stage", "distil"], "no finished Train stage 'distil'; it has: distill"),
        ([*export, "--stage", "distill", "--evaluation", "evalute"], "'evalute'"),
        ([*untrained, "--shape", "fastdraft_phi3_50"], "did you mean 'fastdraft_phi3_50m'"),
        ([*untrained, "--shape", "500M"], "the target has 33,440 parameters"),
        (["check", "--target", target, "--draft", draft, "--engine", "vlm"], "'vlm'"),
        ([*plan, "--hardware", "8xH1000"], "did you mean 'H100'"),
        ([*plan, "--topology", "v9:4"], "v9:4"),
        ([*plan, "--json", "/nowhere/plan.json"], "there is no folder /nowhere"),
        ([*inspect, "--stage", "corpsu"], "did you mean 'corpus'"),
        ([*inspect, "--rows", "3"], "name the stage with --stage"),
        (["inspect", str(folder)], "neither config.json"),
        (["verify", str(folder)], "is not a run directory"),
        (["verify", str(run), "--stage", "corpsu"], "did you mean 'corpus'"),
        (["diff", str(run), str(folder)], "is not a run directory"),
        (["replay", str(run), "--stage", "distil"], "did you mean 'distill'"),
        (["replay", str(run), "--stage", "corpus"], "corpus"),
    ]


@fault("F10", "a wrong command line, setting, recipe file or folder")
def wrong(bench: Bench) -> Outcome:
    """Every one in one process, some drawn ones each in its own; ``effort`` of these."""
    asked = mistakes(bench)
    drawn = bench.random.sample(asked, min(bench.effort, len(asked)))
    environment = os.environ | WITHOUT_DEVICES
    answers = answered([arguments for arguments, _ in asked], **WITHOUT_DEVICES)
    alone = [_alone(arguments, environment) for arguments, _ in drawn]
    slowest = max(answer.seconds for answer in alone)
    note = f"{len(asked)} mistakes; {len(drawn)} in processes of their own, {slowest:.1f} s at most"
    return judged([*asked, *drawn], [*answers, *alone], note)


def _alone(arguments: list[str], environment: dict[str, str]) -> Answer:
    """A command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "jaxdraft.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(done.returncode, done.stdout + done.stderr, seconds)


def _edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def _larger(draft: Path) -> None:
    _edited(draft / "config.json", lambda config: config.update(vocab_size=401))


def _swapped(draft: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        *_, a, b = vocabulary
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    _edited(draft / "tokenizer.json", change)


def _shorter(draft: Path) -> None:
    _edited(draft / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].popitem())


def _other_bos(draft: Path) -> None:
    _edited(draft / "tokenizer_config.json", lambda config: config.update(bos_token="<unk>"))


def _other_eos(draft: Path) -> None:
    _edited(draft / "tokenizer_config.json", lambda config: config.update(eos_token="<unk>"))


@fault("F7", "a draft with another vocabulary or tokenizer than its target")
def another_tokenizer(bench: Bench) -> Outcome:
    """Size, pieces, BOS and EOS are held against the target's without a device, and without the weights, which are not
    there."""
    asked, target = [], bench.undisturbed / "target" / "model"

    def pair(damage: Callable[[Path], None]) -> list[str]:
        draft = Path(shutil.copytree(bench.undisturbed / "export", bench.new("f7")))
        damage(draft)
        return ["--target", str(target), "--draft", str(draft)]

    for damage, words in (
        (_larger, "a vocabulary of 400 and"),
        (_swapped, "id 398 is "),
        (_shorter, "id 399 is "),
        (_other_bos, "BOS is 1 in the target and 0"),
        (_other_eos, "EOS is 2 in the target and 0"),
    ):
        both = pair(damage)
        Path(both[-1], "model.safetensors").write_bytes(b"")
        asked.append((["sample", *both, "--prompt", "a"], words))
        asked.append((["evaluate", *both, "--task", "dolly", "--out", f"{both[-1]}-out"], words))
    return judged(asked, answered([arguments for arguments, _ in asked], **WITHOUT_DEVICES))


@fault("F11", "a mesh that does not fit devices or heads")
def meshes(bench: Bench) -> Outcome:
    """Of eight devices; nothing is written."""
    workdir = bench.new("f11")
    shapes = {
        ("mesh.data=3",): "mesh.data=3 does not fit 8 devices",
        ("mesh.data=8", "mesh.fsdp=8"): "mesh.data=8, mesh.fsdp=8 does not fit 8 devices",
        ("mesh.tensor=3",): "mesh.tensor is 3: it must divide 8 devices",
        ("mesh.tensor=8",): "mesh.tensor is 8: it must divide 8 devices and the numbers of heads, [2]",
        ("mesh.decode_tensor=4",): "mesh.decode_tensor is 4: it must divide 8 devices and the numbers of heads, [2]",
        ("mesh.fsdp=16",): "mesh.fsdp=16 does not fit 8 devices",
    }
    asked = [
        (["run", str(RECIPE), "--workdir", str(workdir), *(word for x in chosen for word in ("--set", x))], words)
        for chosen, words in shapes.items()
    ]
    answers = answered([arguments for arguments, _ in asked], JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8")
    outcome = judged(asked, answers)
    return outcome if not workdir.exists() else outcome._replace(held=0, note=f"{workdir} was written to")


@fault("F14", "a second run in a directory where one is at work")
def second_writer(bench: Bench) -> Outcome:
    """It is told whose the directory is, again and again; the first one ends as if nothing had been."""
    expected = bench.expected
    workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f14")))
    for stage in ("distill", "export"):
        shutil.rmtree(workdir / stage)
    first = start(workdir)
    while not (workdir / "distill" / "stage.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    bad, count = [], 0
    while count < bench.effort and first.poll() is None:
        count, began = count + 1, time.process_time()
        code, said = called("run", str(RECIPE), "--workdir", str(workdir))
        seconds = time.process_time() - began
        if code != 75 or f"process {first.pid} " not in said or str(workdir) not in said or seconds > SECONDS:
            bad.append(f"exit {code} after {seconds:.1f} s, {said!r}")
    _, said = first.communicate()
    if first.returncode or hashes(workdir) != expected:
        return Outcome(count, 0, f"the first run: exit {first.returncode}, {said[-500:]!r}")
    return Outcome(count, count - len(bad), "; ".join(bad))


def _stopped(workdir: Path, stage: str) -> None:
    """Makes a finished stage one that was killed after its last save but one, or with one shard still to be written."""
    folder = workdir / stage
    record = json.loads((folder / "stage.json").read_text())
    begun = {key: value for key, value in record.items() if key not in ("outputs", "output", "summary")}
    (folder / "stage.json").write_text(json.dumps({**begun, "status": "running"}))
    if stage == "responses":
        for path in [folder / "manifest.json", *folder.glob("rows-*"), *folder.glob("responses-00002-*")]:
            path.unlink()
        return
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "6")
    (folder / "checkpoints" / "6.json").unlink()


OTHERWISE = {
    "pretrain.seed=3": "seed was null and is 3",
    "pretrain.batch_size=8": "batch_size was 10 and is 8",
    "pretrain.learning_rate=2e-3": "learning_rate was 0.001 and is 0.002",
    "pretrain.steps=7": "steps was 6 and is 7",
    "pretrain.loss=KL": "loss was",
    "draft.hidden_size=32": "shape was",
    "corpus.sources.0.limit=59": "input corpus has changed",
    "tokenizer.vocab_size=390": "input tokenizer has changed",
    "responses.max_new_tokens=8": "max_new_tokens was 16 and is 8",
    "responses.temperatures=0": "temperatures was [0.0, 1.0] and is [0.0]",
    "distill.data=corpus": 'data was {"responses": 0.2, "corpus": 0.8} and is "corpus"',
    "distill.draft_vocabulary=none": 'draft_vocabulary was "vocabulary" and is null',
    "distill.init=target-embedding": 'init was "pretrain" and is "target-embedding"',
}


@fault("F13", "an unfinished stage is to go on with another setting, shape, seed, tokenizer or data")
def otherwise(bench: Bench) -> Outcome:
    """Refused with what differs, its folder untouched; with the old ones it goes on to the same bytes."""
    expected, bad = bench.expected, []
    workdir = Path(shutil.copytree(bench.undisturbed, bench.new("f13")))
    drawn = bench.random.sample(list(OTHERWISE), min(4 * bench.effort, len(OTHERWISE)))
    for setting in drawn:
        words, before = OTHERWISE[setting], setting.partition(".")[0]
        stage = before if before in ("pretrain", "responses", "distill") else "pretrain"
        only = [stage] if before not in ("corpus", "tokenizer") else ["tokenizer", "corpus", stage]
        command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", *only]
        _stopped(workdir, stage)
        there = {path: path.read_bytes() for path in (workdir / stage).rglob("*") if path.is_file()}
        code, said = called(*command, "--set", setting)
        same = there == {path: path.read_bytes() for path in (workdir / stage).rglob("*") if path.is_file()}
        if code != 2 or words not in said or f"delete {workdir}/{stage} to begin anew" not in said or not same:
            bad.append(f"{setting}: exit {code}, {said[-300:]!r}, the folder the same: {same}")
        code, said = called(*command)
        if code or hashes(workdir) != expected:
            bad.append(f"set back from {setting}: exit {code}, {said[-300:]!r}")
            shutil.rmtree(workdir)
            shutil.copytree(bench.undisturbed, workdir)
    return Outcome(len(drawn), len(drawn) - len(bad), "; ".join(bad))
