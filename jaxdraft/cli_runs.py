"""``jaxdraft verify``, ``diff`` and ``replay`` on the command line: what can be asked of runs that are there."""

import argparse
import os
from collections.abc import Callable

from jaxdraft.errors import ConfigError

VERIFY_EXAMPLE = """examples:
  jaxdraft verify runs/quickstart
  jaxdraft verify runs/quickstart --stage distill-tvdpp
  jaxdraft verify gs://bucket/run

Exit code 2 if anything is wrong. Inputs from outside the run directory are not looked at: `jaxdraft run … --list`
does that."""


def add_runs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The three verbs; ``verb(name, action, what, example)`` makes the parser of one."""
    verify = verb("verify", _verify, "hash a run directory anew and hold it against its records", VERIFY_EXAMPLE)
    verify.add_argument("run", help="the run directory: a path, or gs://…")
    verify.add_argument("--stage", help="look at this stage only")
    verify.add_argument("--superseded", action="store_true", help="look at what was set aside too")


def _verify(options: argparse.Namespace, command: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # a run may be using the devices
    from jaxdraft.home import open_home
    from jaxdraft.verify import print_checked, verify

    home = open_home(options.run, None)
    found = verify(home, options.stage, options.superseded)
    print_checked(home, found, options.superseded)
    if wrong := sum(len(checked.problems) for checked in found):
        raise ConfigError(f"{home}: {wrong} wrong, see above")
