"""Recipe files: found by path or name, read, and overridden from the command line.

A recipe file is Python and defines one function, ``recipe``, whose keyword arguments are what its users are meant to
change::

    def recipe(*, target: HFModel, text: Text, scale: str = "small") -> Recipe:
        ...
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.overrides import Change, apply, parse
from jaxdraft.recipe import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of a file in ``configs/``.

    What begins with an underscore there is no recipe: recipes import it.

    Raises:
      ConfigError: there is none.
    """
    known = {path.stem: path for path in sorted(CONFIGS.glob("[!_]*.py"))}
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    raise ConfigError(unknown_name("recipe file or name", name, list(known)))


def load_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``NAME=VALUE`` assignments.

    A name's first part is an argument of the file's ``recipe`` function, else a stage, else a field of the recipe.

    Raises:
      ConfigError: the file fails or defines no recipe, or an assignment names or holds something that does not fit.
    """
    path = find_recipe(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a recipe is a Python file")
    # Losses, tasks and sources of the user's own lie beside the recipe or where the command is given.
    sys.path[:0] = [str(folder) for folder in (path.parent, Path.cwd()) if str(folder) not in sys.path]
    module = importlib.util.module_from_spec(spec)
    with _told_with_its_place(path):
        spec.loader.exec_module(module)
    make: Callable[..., Any] | None = getattr(module, "recipe", None)
    if not callable(make):
        raise ConfigError(f"{path}: defines no function recipe(...) that returns a Recipe")

    changes = [parse(assignment) for assignment in assignments]
    hints = typing.get_type_hints(make)
    arguments = {}
    for parameter in inspect.signature(make).parameters.values():
        own = [change.below for change in changes if change.path[0] == parameter.name]
        hint = hints.get(parameter.name, Any)
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = _required(path, parameter.name, hint, own)
        arguments[parameter.name] = apply(default, hint, own)
    rest = [change for change in changes if change.path[0] not in arguments]
    with _told_with_its_place(path):
        made = make(**arguments)
    if not isinstance(made, Recipe):
        raise ConfigError(f"{path}: recipe(...) returns a {type(made).__name__}: it has to return a Recipe")
    return _override(made, rest, list(arguments))


@contextlib.contextmanager
def _told_with_its_place(path: Path) -> Iterator[None]:
    """An error that a recipe file's own code raises is its writer's, who is told the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
        where = f"{path}, line {lines[-1]}" if lines else str(path)  # a SyntaxError says its line itself
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


def _required(path: Path, name: str, kind: type, changes: Sequence[Change]) -> Any:
    """An argument without default, from the change that gives its first field, which must be there."""
    field = dataclasses.fields(kind)[0].name
    given = [change.text for change in changes if change.path == (field,)]
    if not given:
        raise ConfigError(f"{path}: this recipe needs --set {name}.{field}=…")
    return kind(**{field: given[-1]})


def _override(recipe: Recipe, changes: Sequence[Change], arguments: list[str]) -> Recipe:
    fields = [field.name for field in dataclasses.fields(recipe) if field.name != "stages"]
    stages = [stage.name for stage in recipe.stages]
    for change in changes:
        if change.path[0] not in (*stages, *fields):
            known = list(dict.fromkeys([*arguments, *fields, *stages]))
            raise change.wrong(unknown_name("setting", change.path[0], known))
        if change.path[0] in stages and len(change.path) == 1:
            raise change.wrong(f"name a field of stage {change.path[0]!r}, as in {change.path[0]}.FIELD=VALUE")
    # A stage may bear a field's name: python_target's target is a stage, and Recipe.target only names it.
    to_stages = [change for change in changes if change.path[0] in stages]
    to_fields = [change for change in changes if change.path[0] not in stages]
    whole = [*to_fields, *(change._replace(path=("stages", *change.path)) for change in to_stages)]
    return apply(recipe, Recipe, whole)
