"""Typed overrides: ``distill.learning_rate=3e-4`` lands in a frozen dataclass, or says what it did not understand."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from jaxdraft.errors import ConfigError
from jaxdraft.losses import Loss, resolve_loss


def split_assignment(assignment: str) -> tuple[list[str], str]:
    """``"a.b=c"`` as ``(["a", "b"], "c")``.

    Raises:
      ConfigError: there is no ``=``.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment}: write NAME=VALUE, as in --set seed=1 or --set pretrain.steps=100")
    return path.strip().split("."), text


def apply_all(value: Any, path: Sequence[str], text: str, assignment: str) -> Any:
    """``value`` with the field at ``path`` replaced by what ``text`` says.

    A step into a tuple is an index, or the ``name`` of an element; a step into a dict is a key.

    Raises:
      ConfigError: no such field (with the nearest one), or text that its type cannot take.
    """
    head, rest = path[0], path[1:]
    if isinstance(value, tuple):
        names = [getattr(item, "name", str(i)) for i, item in enumerate(value)]
        index = int(head) if head.isdigit() and int(head) < len(value) else _index(names, head, assignment)
        inner = value[index]
        new = apply_all(inner, rest, text, assignment) if rest else coerce(text, type(inner), inner, assignment)
        return (*value[:index], new, *value[index + 1 :])
    if isinstance(value, dict):
        if head not in value or rest:
            raise ConfigError(f"--set {assignment}: " + unknown_name("key", ".".join(path), list(value)))
        return {**value, head: coerce(text, type(value[head]), value[head], assignment)}
    if not dataclasses.is_dataclass(value):
        raise ConfigError(f"--set {assignment}: {type(value).__name__} has no field {head!r}")
    hints = {f.name: typing.get_type_hints(type(value)).get(f.name, Any) for f in dataclasses.fields(value)}
    if head not in hints:
        raise ConfigError(f"--set {assignment}: " + unknown_name(f"field of {type(value).__name__}", head, list(hints)))
    old = getattr(value, head)
    new = apply_all(old, rest, text, assignment) if rest else coerce(text, hints[head], old, assignment)
    return dataclasses.replace(value, **{head: new})  # type: ignore[type-var]


def coerce(text: str, hint: Any, old: Any, assignment: str) -> Any:
    """``text`` as a value of the type ``hint``; ``Any`` means the type of the value it replaces.

    Raises:
      ConfigError: it cannot be read as one.
    """
    try:
        return _coerce(text, type(old) if hint is Any else hint)
    except (ValueError, SyntaxError) as error:
        if isinstance(error, ConfigError):
            raise
        wanted = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"--set {assignment}: cannot read {text!r} as {wanted}") from None


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """``no stage 'distil'; did you mean 'distill'? There are: …``"""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no {kind} {name!r}; {hint}There are: {', '.join(known) or 'none'}"


def _coerce(text: str, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(text, option)
            except (ValueError, SyntaxError):
                continue
        raise ValueError(text)
    if origin is Literal:
        for option in args:
            if text == str(option):
                return option
        raise ValueError(text)
    if hint is str:
        return text
    if hint is bool:
        return {"true": True, "1": True, "false": False, "0": False}[_known_bool(text)]
    if hint in (int, float):
        return hint(text.replace("_", ""))
    if isinstance(hint, type) and issubclass(hint, Loss):
        return resolve_loss(text)()
    if (origin or hint) in (tuple, list, dict):
        return _literal(text, origin or hint, args)
    raise ValueError(text)


def _literal(text: str, kind: type, args: tuple[Any, ...]) -> Any:
    """A Python literal, or for a tuple the shorter ``3,5``."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if kind is not tuple:
            raise
        value = text.split(",")
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError(text)
        return value
    items = value if isinstance(value, tuple | list) else (value,)
    return kind(_coerce(str(item), args[0]) for item in items) if args else kind(items)


def _known_bool(text: str) -> str:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower()


def _index(names: list[str], name: str, assignment: str) -> int:
    if name not in names:
        raise ConfigError(f"--set {assignment}: " + unknown_name("element", name, names))
    return names.index(name)
