"""Typed overrides: ``distill.learning_rate=3e-4`` lands in a frozen dataclass, or says what it did not understand."""

import ast
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.losses import Loss, Weights, resolve


class Change(NamedTuple):
    """One override: where it goes, what it says, and the whole of it for messages."""

    path: tuple[str, ...]
    text: str
    assignment: str

    @property
    def below(self) -> "Change":
        """The same for the value that the first step of the path leads to."""
        return self._replace(path=self.path[1:])

    def wrong(self, why: str) -> ConfigError:
        return ConfigError(f"--set {self.assignment}: {why}")


def parse(assignment: str) -> Change:
    """``"a.b=c"`` as a change.

    Raises:
      ConfigError: there is no ``=``.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment}: write NAME=VALUE, as in --set seed=1 or --set pretrain.steps=100")
    return Change(tuple(path.strip().split(".")), text, assignment)


def apply(value: Any, hint: Any, changes: Sequence[Change]) -> Any:
    """``value``, of type ``hint``, with all changes made at once, so that they are checked together.

    A step into a tuple is an index, or the ``name`` of an element; a step into a dict is a key.

    Raises:
      ConfigError: no such field (with the nearest one), or text that its type cannot take.
    """
    whole = [change for change in changes if not change.path]
    if whole:
        value = _read(whole[-1], type(value) if hint is Any else hint)
    changes = [change for change in changes if change.path]
    if not changes:
        return value
    if isinstance(value, tuple):
        names = [getattr(item, "name", str(i)) for i, item in enumerate(value)]
        indices = [_index(names, change) for change in changes]
        return tuple(
            apply(item, Any, [c.below for c, index in zip(changes, indices, strict=True) if index == i])
            for i, item in enumerate(value)
        )
    if isinstance(value, dict):
        children = {key: (item, Any) for key, item in value.items()}
        return {**value, **_changed(children, "key", changes)}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise changes[0].wrong(f"{type(value).__name__} has no field {changes[0].path[0]!r}")
    hints = typing.get_type_hints(type(value))
    children = {f.name: (getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **_changed(children, f"field of {type(value).__name__}", changes))


def _changed(children: dict[str, tuple[Any, Any]], kind: str, changes: Sequence[Change]) -> dict[str, Any]:
    grouped: dict[str, list[Change]] = {}
    for change in changes:
        if change.path[0] not in children:
            raise change.wrong(unknown_name(kind, change.path[0], list(children)))
        grouped.setdefault(change.path[0], []).append(change.below)
    return {name: apply(*children[name], below) for name, below in grouped.items()}


def _index(names: list[str], change: Change) -> int:
    step = change.path[0]
    if step.isdigit() and int(step) < len(names):
        return int(step)
    if step not in names:
        raise change.wrong(unknown_name("element", step, names))
    return names.index(step)


def _read(change: Change, hint: Any) -> Any:
    for kind in (Loss, Weights):
        if any(isinstance(option, type) and issubclass(option, kind) for option in (hint, *get_args(hint))):
            if change.text.lower() in ("none", "null") and type(None) in get_args(hint):
                return None
            return _made(change, resolve(change.text, kind))
    try:
        return _coerce(change.text, hint)
    except ConfigError as error:
        raise change.wrong(str(error)) from None
    except (ValueError, SyntaxError):
        choices = ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else ""
        wanted = f"one of {choices}" if choices else getattr(hint, "__name__", str(hint))
        raise change.wrong(f"cannot read {change.text!r} as {wanted}") from None


def _made(change: Change, kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise change.wrong(f"{error}: give every field of {kind.__name__} a default, then set it by its name") from None


def _coerce(text: str, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in args:
            return None
        # A string can be anything: whatever else the type allows is tried first, but for what would take a string too.
        for option in sorted((a for a in args if a is not type(None)), key=lambda a: (_is_settings(a), a is str)):
            try:
                return _by_first_field(text, option) if _is_settings(option) else _coerce(text, option)
            except ConfigError:  # read, and refused for what it says
                raise
            except (ValueError, SyntaxError):
                continue
        raise ValueError(text)
    if origin is Literal:
        return {str(option): option for option in args}[text] if text in map(str, args) else _refuse(text)
    if hint is str:
        return text
    if hint is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        return known[text.lower()] if text.lower() in known else _refuse(text)
    if hint in (int, float):
        return hint(text.replace("_", ""))
    if (origin or hint) in (tuple, list, dict):
        return _literal(text, origin or hint, args)
    return _refuse(text)


def _by_first_field(text: str, kind: Any) -> Any:
    first, *rest = dataclasses.fields(kind)
    if any(field.default is field.default_factory is dataclasses.MISSING for field in rest):
        return _refuse(text)
    return kind(**{first.name: _coerce(text, typing.get_type_hints(kind)[first.name])})


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _literal(text: str, kind: type, args: tuple[Any, ...]) -> Any:
    """A Python literal, or for a tuple the shorter ``3,5``."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if kind is not tuple:
            raise
        value = text.split(",")
    if kind is dict:
        return value if isinstance(value, dict) else _refuse(text)
    items = value if isinstance(value, tuple | list) else (value,)
    return kind(_coerce(str(item), args[0]) for item in items) if args else kind(items)


def _refuse(text: str) -> Any:
    raise ValueError(text)
