"""Code of the user's own that a setting names: ``my_package.module:MyLoss``."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from jaxdraft.errors import ConfigError


def user_module(what: str, name: str, module_name: str) -> ModuleType:
    """The module of a name; it is looked for where the command is given, too.

    Args:
      what: kind of thing that is named, for messages.
      name: as the user wrote it, for messages.
      module_name: of the module.

    Raises:
      ConfigError: there is no such module, or it fails.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{what} {name!r}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?"
        ) from error
    except Exception as error:
        raise ConfigError(f"{what} {name!r}: {module_name!r} fails with {type(error).__name__}: {error}") from error
