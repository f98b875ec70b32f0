"""Objects of a user's own modules, by name: ``package.module:function``."""

import importlib
import traceback
from pathlib import Path
from typing import Any


def load_named(kind: str, name: str) -> Any:
    """The object that ``package.module:attribute`` names; its module is imported.

    Args:
      kind: what is named, for messages.
      name: the name.

    Raises:
      ValueError: the module or the object does not exist, or the module fails.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {name!r}: {error}. Give package.module:function.") from None
    except (Exception, SystemExit) as error:  # whatever the user's module does
        cause = describe(error)
        raise ValueError(f"{kind} {name!r}: the module cannot be imported: {cause}") from error


def describe(error: BaseException) -> str:
    """An exception of a user's function in one line: kind, message, and place in their files."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    message = f"{kind}{error}".split("\n")[0][:500].rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not {"site-packages", "metaopt"} & set(Path(f.filename).parts)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{message}{place}."
