"""Where prepared data sets lie, and how a set gets there whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from metaopt.core.files import one_at_a_time

INFO = "dataset_info.json"  # TensorFlow Datasets writes it last
NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9][a-z0-9_]*)?")


def data_root() -> Path:
    """``METAOPT_DATA_DIR``, or else ``metaopt/data`` in the user's cache folder."""
    if chosen := os.environ.get("METAOPT_DATA_DIR"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "metaopt" / "data"


def check_name(name: str) -> None:
    """Raises `ValueError` unless `name` can be a folder of the data root."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"data set {name!r}: use lower-case letters, digits and _, beginning with a letter."
        )


def find(root: Path, name: str) -> Path | None:
    """The prepared folder ``root/NAME/VERSION`` of the newest version, or None."""
    if not NAME.fullmatch(name):
        return None
    found = [info.parent for info in (root / name).glob(f"[0-9]*/{INFO}") if _version(info.parent)]
    return max(found, key=_version, default=None)


def _version(folder: Path) -> tuple[int, ...]:
    whole = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", folder.name)
    return tuple(map(int, whole.groups())) if whole else ()


def prepared(root: Path) -> list[str]:
    """Names of all sets under `root`, sorted."""
    if not root.is_dir():
        return []
    infos = [*root.glob(f"*/[0-9]*/{INFO}"), *root.glob(f"*/*/[0-9]*/{INFO}")]
    names = {i.parent.parent.relative_to(root).as_posix() for i in infos if _version(i.parent)}
    return sorted(name for name in names if NAME.fullmatch(name))


def lock(root: Path, name: str) -> AbstractContextManager[None]:
    """One process at a time works on a set."""
    return one_at_a_time(root / f".{_flat(name)}.lock")


@contextmanager
def workplace(root: Path, name: str) -> Iterator[Path]:
    """A fresh folder beside the prepared ones, removed afterwards; hold the `lock`.

    What a killed process left behind is removed first: nobody else can be at work on it.
    """
    prefix = f".{_flat(name)}.part-"
    for leftover in root.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as folder:
        yield Path(folder)


def publish(made: Path, target: Path, aside: Path) -> None:
    """Renames the whole folder `made` to `target`; an older one is moved to `aside` first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(aside)
    made.rename(target)


def _flat(name: str) -> str:
    return name.replace("/", "-")
