"""The folder of prepared data sets: where it is, how sets are found, locked and published."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from metaopt.core.files import make_writable, one_at_a_time, user_cache

INFO = "dataset_info.json"  # the file that TensorFlow Datasets writes last
REPLACED = "replaced"  # folder of a staging folder, for sets that are replaced
NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9][a-z0-9_]*)?")


def data_root() -> Path:
    """The folder of prepared sets.

    Returns:
      ``METAOPT_DATA_DIR``, or else ``metaopt/data`` in the user's cache folder.
    """
    chosen = os.environ.get("METAOPT_DATA_DIR")
    return Path(chosen) if chosen else user_cache(None) / "data"


def check_name(name: str) -> None:
    """Checks that a set of this name can have a folder under the root.

    Args:
      name: of the set.

    Raises:
      ValueError: when it cannot.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"data set {name!r}: use lower-case letters, digits and _, beginning with a letter."
        )


def find(root: Path, name: str) -> Path | None:
    """Finds a prepared set.

    Args:
      root: the folder of prepared sets.
      name: of the set.

    Returns:
      The folder ``root/NAME/VERSION`` of the newest version, or None.
    """
    if not NAME.fullmatch(name):
        return None
    folders = [info.parent for info in (root / name).glob(f"[0-9]*/{INFO}")]
    return max(filter(_version, folders), key=_version, default=None)


def _version(folder: Path) -> tuple[int, ...]:
    """The version that a folder is named after; () when its name is not a version."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", folder.name)
    return tuple(map(int, match.groups())) if match else ()


def list_prepared(root: Path) -> list[str]:
    """The names of all prepared sets under `root`, sorted."""
    if not root.is_dir():
        return []
    infos = [*root.glob(f"*/[0-9]*/{INFO}"), *root.glob(f"*/*/[0-9]*/{INFO}")]
    folders = [info.parent for info in infos if _version(info.parent)]
    names = {folder.parent.relative_to(root).as_posix() for folder in folders}
    return sorted(filter(NAME.fullmatch, names))


def lock(root: Path, name: str) -> AbstractContextManager[None]:
    """A context in which only one process at a time works on a set.

    Args:
      root: the folder of prepared sets.
      name: of the set.

    Returns:
      The context.

    Raises:
      OSError: when `root` cannot be made or written.
    """
    make_writable(root, "the folder of prepared sets", "METAOPT_DATA_DIR")
    return one_at_a_time(root / f".{_flat(name)}.lock")


@contextmanager
def staging_folder(root: Path, name: str) -> Iterator[Path]:
    """A temporary folder on the same disk as the prepared sets, from which a set is published.

    Enter it with the `lock` held: folders that killed processes left behind are removed first. A
    set that such a process had moved aside, and not replaced yet, is moved back.

    Args:
      root: the folder of prepared sets.
      name: of the set.

    Yields:
      The folder, which is removed on exit.
    """
    prefix = f".{_flat(name)}.part-"
    for leftover in root.glob(f"{prefix}*"):
        replaced = leftover / REPLACED
        for info in replaced.glob(f"**/[0-9]*/{INFO}"):
            target = root / info.parent.relative_to(replaced)
            if not target.exists():
                info.parent.rename(target)
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as folder:
        yield Path(folder)


def publish(folder: Path, target: Path, staging: Path, root: Path) -> None:
    """Moves a complete folder to its final place, by renaming it.

    Args:
      folder: the complete folder.
      target: its final place.
      staging: the `staging_folder`, to which an older `target` is moved.
      root: the folder of prepared sets.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        aside = staging / REPLACED / target.relative_to(root)
        aside.parent.mkdir(parents=True)
        target.rename(aside)
    folder.rename(target)


def _flat(name: str) -> str:
    return name.replace("/", "-")
