"""Settings as JSON: what stands in ``recipe.json`` and ``stage.json``, and what a stage's fingerprint is made of."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any


def to_json(value: Any) -> Any:
    """Dataclasses as ``{"type": name, field: …}``, tuples as lists.

    A field that does not compare (``dataclasses.field(compare=False)``) does not change what is made, and is left out.
    A class of the user's own is named with its module and the hash of its source: editing it changes the setting.

    Raises:
      TypeError: a value that has no faithful JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"type": _type_name(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def shortened(value: Any) -> str:
    """A JSON value in a message: at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _type_name(kind: type) -> str:
    if kind.__module__.split(".")[0] == "jaxdraft":
        return kind.__name__
    source = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    return f"{kind.__module__}:{kind.__qualname__} (source {source[:16]})"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two stages' ``settings``, ``shape``, ``seed`` and ``inputs`` differ, a few words for each."""
    flat = lambda record: {
        **record.get("settings", {}),
        "shape": record.get("shape"),
        "recipe's seed": record.get("seed"),
    }
    before, after = flat(old), flat(new)
    found = [
        f"{key} was {shortened(before.get(key))} and is {shortened(after.get(key))}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    were, are = old.get("inputs", {}), new.get("inputs", {})
    found += [f"input {key} has changed" for key in are if were.get(key) != are[key]]
    return found + [f"input {key} is gone" for key in were if key not in are]
