"""Optional packages: a missing one is an error of one line that names the extra to install."""

import contextlib
from collections.abc import Iterator


class MissingExtra(ImportError):
    """A package that belongs to an extra of ``metaopt-jax`` is not installed."""


@contextlib.contextmanager
def optional_imports(name: str, *, needed_by: str) -> Iterator[None]:
    """Guards the imports of the optional packages of the extra `name`.

    Args:
      name: the extra that installs the packages, e.g. ``"report"``.
      needed_by: what the user called, for the message.

    Raises:
      MissingExtra: a package is not installed. An ImportError inside an installed package, or
        inside metaopt, is raised unchanged.

    Examples:
      >>> with optional_imports("report", needed_by="my_figures"):
      ...     import a_missing_package
      Traceback (most recent call last):
        ...
      MissingExtra: my_figures needs a_missing_package: pip install 'metaopt-jax[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "metaopt"):
            raise
        message = f"{needed_by} needs {package}: pip install 'metaopt-jax[{name}]'"
        raise MissingExtra(message, name=error.name) from None
