"""Settings as JSON: what stands in ``recipe.json`` and ``stage.json``, and what a stage's fingerprint is made of."""

import dataclasses
from typing import Any


def to_json(value: Any) -> Any:
    """Dataclasses as ``{"type": name, field: …}``, tuples as lists.

    Raises:
      TypeError: a value that has no faithful JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")
