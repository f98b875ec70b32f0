"""Prints the oldest versions that pyproject.toml declares, as constraints for pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def constraints() -> list[str]:
    """One line, ``NAME==VERSION``, for each lower bound of the core and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(text for extra in extras for text in extra)]
    bounds = (re.match(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+)", text) for text in requirements)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    print("\n".join(constraints()))
