"""Prints the oldest versions that pyproject.toml declares, as constraints for pip."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in declared:
        name, _, rest = re.fullmatch(r"([\w.-]+)(\[.*?\])?(.*)", requirement).groups()
        if lowest := re.search(r">=([\w.]+)", rest):
            print(f"{name}=={lowest[1]}")


if __name__ == "__main__":
    main()
