"""``jaxdraft inspect``, ``verify``, ``diff`` and ``replay`` on the command line: what can be asked of what is there."""

import argparse
import os
from collections.abc import Callable, Sequence

from jaxdraft.arguments import positive, seed, whole
from jaxdraft.errors import ConfigError

DIFFERENT = 1
INSPECT_EXAMPLE = """examples:
  jaxdraft inspect MODEL_FOLDER
  jaxdraft inspect runs/quickstart
  jaxdraft inspect runs/quickstart --stage corpus --rows 2
  jaxdraft inspect gs://bucket/run --stage responses --seed 7

With --stage you read what the draft will read: packed rows, or what the target answered, decoded with the special
tokens. Dimmed, or between ‹ and ›, stand prompts and whatever else is no label. The same seed shows the same rows."""
VERIFY_EXAMPLE = """examples:
  jaxdraft verify runs/quickstart
  jaxdraft verify runs/quickstart --stage distill-tvdpp
  jaxdraft verify gs://bucket/run

Exit code 2 if anything is wrong. Inputs from outside the run directory are not looked at: `jaxdraft run … --list`
does that."""

DIFF_EXAMPLE = """example:
  jaxdraft diff runs/mine runs/again

Exit code 0 if the runs are identical, times apart; 1 if they differ; 2 if they cannot be compared."""
REPLAY_EXAMPLE = """examples:
  jaxdraft replay runs/quickstart --stage distill-tvdpp
  jaxdraft replay runs/quickstart --stage distill-tvdpp --from 400 --steps 10

The recipe is that of the command in run.json, given where that was given. Exit code 0 if every byte repeats, else 1."""


def add_runs(
    verb: Callable[..., argparse.ArgumentParser], parse: Callable[[Sequence[str]], argparse.Namespace]
) -> None:
    """The four verbs.

    Args:
      verb: makes the parser of one: of its name, what it calls, what it does and an example.
      parse: reads a whole command line.
    """
    inspect = verb("inspect", _inspect, "say what a model folder or a run directory holds", INSPECT_EXAMPLE)
    inspect.add_argument("folder", help="a model folder, owner/name[@revision] on the hub, or a run directory")
    inspect.add_argument("--stage", help="of a run directory: a stage that made rows or answers, to read some of them")
    inspect.add_argument("--rows", type=positive, help="with --stage: how many, chosen at random (default: 3)")
    inspect.add_argument("--seed", type=seed, help="with --stage: of the choice (default: 0)")
    verify = verb("verify", _verify, "hash a run directory anew and hold it against its records", VERIFY_EXAMPLE)
    verify.add_argument("run", help="the run directory: a path, or gs://…")
    verify.add_argument("--stage", help="look at this stage only")
    verify.add_argument("--superseded", action="store_true", help="look at what was set aside too")

    diff = verb("diff", _diff, "say where two runs part: the first step, field and token", DIFF_EXAMPLE)
    diff.add_argument("first", help="a run directory: a path, or gs://…")
    diff.add_argument("second", help="another one")

    replay = verb("replay", _replay, "repeat some steps of a Train stage and compare them to the byte", REPLAY_EXAMPLE)
    replay.add_argument("run", help="the run directory")
    replay.add_argument("--stage", required=True, help="a Train stage of it")
    replay.add_argument(
        "--from", dest="start", type=whole, metavar="STEP", help="a checkpoint's, or 0 (default: the last but one)"
    )
    replay.add_argument("--steps", type=positive, help="how many (default: to the next checkpoint)")
    replay.add_argument("--recipe", help="of a run that no command line began: its recipe file or name")
    replay.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="with --recipe")
    replay.set_defaults(parse=parse)


def _inspect(options: argparse.Namespace, command: list[str]) -> None:
    if options.stage is not None:
        from jaxdraft.home import open_home
        from jaxdraft.inspect_rows import inspect_stage

        inspect_stage(open_home(options.folder, None), options.stage, options.rows or 3, options.seed or 0)
        return
    if options.rows is not None or options.seed is not None:
        raise ConfigError("--rows and --seed choose among a stage's rows: name the stage with --stage")
    from jaxdraft.inspect import inspect
    from jaxdraft.models.hub import model_folder

    inspect(model_folder(options.folder))


def _verify(options: argparse.Namespace, command: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # a run may be using the devices
    from jaxdraft.home import open_home
    from jaxdraft.verify import print_checked, verify

    home = open_home(options.run, None)
    found = verify(home, options.stage, options.superseded)
    print_checked(home, found, options.superseded)
    if wrong := sum(len(checked.problems) for checked in found):
        raise ConfigError(f"{home}: {wrong} wrong, see above")


def _diff(options: argparse.Namespace, command: list[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxdraft.diff import diff, print_compared
    from jaxdraft.home import open_home

    return DIFFERENT * (not print_compared(diff(open_home(options.first, None), open_home(options.second, None))))


def _replay(options: argparse.Namespace, command: list[str]) -> int:
    from jaxdraft.home import open_home
    from jaxdraft.recipe_file import load_recipe
    from jaxdraft.replay import replay
    from jaxdraft.untrusted import read_json

    home = open_home(options.run, None)
    home.fetch_records()
    recipe, assignments = options.recipe, options.set
    if recipe is None:
        if not (given := read_json(home.folder / "run.json").get("command")):
            raise ConfigError(f"{home}: run.json names no command: give --recipe")
        ran = options.parse(given[1:])
        recipe, assignments = ran.recipe, ran.set
    done = replay(load_recipe(recipe, assignments), home, options.stage, options.start, options.steps)
    steps = done.end - done.start
    print(f"{options.stage}, after step {done.start}: {done.repeated} of {steps} steps repeat to the byte")
    if done.difference:
        print(f"first difference: {done.difference}")
        return DIFFERENT
    if done.has_state:
        print(f"the state after step {done.end} has the fingerprint of its checkpoint")
    return 0
