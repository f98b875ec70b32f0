"""Exported optimizers from the Hugging Face hub (the extra ``metaopt-jax[hub]``).

Without a network, use a copy instead: an export is a folder of two files, and `metaopt.load` takes
its path.
"""

import re
from pathlib import Path

from metaopt.core.extras import optional_imports
from metaopt.core.files import cache_folder, read_plain
from metaopt.zoo.exports import SPEC, WEIGHTS, CheckpointError, write

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OFFLINE = (
    "Without a network, copy the export folder (spec.json, theta.safetensors) to this machine and "
    "give metaopt.load its path."
)


def fetch(repo_id: str, revision: str = "main", *, into: Path | None = None) -> Path:
    """Downloads an export and returns its folder: ``metaopt.load(hub.fetch("owner/name"))``.

    It downloads only the two files of an export, both from one commit. They are data, and
    they are checked as `metaopt.load` does before they are written; nothing executes them.

    Args:
      repo_id: ``"owner/name"`` on the hub. The files are at the top of that repository.
      revision: a branch, a tag, or a commit. A branch may move: give the 40 digits of a commit
        to make a run repeatable.
      into: the folder to write, a new one or that of an export; by default one per repository and
        commit below ``METAOPT_CACHE_DIR`` (or ``~/.cache/metaopt``).

    Returns:
      The folder, which holds plain files only. Without a network, an export that was downloaded
      before comes from the hub's own cache.

    Raises:
      MissingExtra: when ``huggingface_hub`` is not installed. An export folder that is copied to
        this machine needs no hub: give `metaopt.load` its path.
      CheckpointError: when `repo_id` is not a name on the hub, the hub or the revision cannot be
        reached, the repository holds no export that `metaopt.load` accepts, or `into` holds files
        but no export. What is in the folder stays as it is.
    """
    who = f"hub.fetch({repo_id!r}, revision={revision!r})"
    if not isinstance(repo_id, str) or not NAME.fullmatch(repo_id):
        raise CheckpointError(f"{who}: repo_id must be 'owner/name'. {OFFLINE}")
    with optional_imports("hub", needed_by="metaopt.zoo.hub.fetch"):
        from huggingface_hub import snapshot_download
    try:
        snapshot = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[SPEC, WEIGHTS])
        )
    except Exception as error:  # the hub, HTTP and sockets raise errors of many kinds
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{who}: {type(error).__name__}: {cause}. {OFFLINE}") from error
    if missing := [name for name in (SPEC, WEIGHTS) if not (snapshot / name).is_file()]:
        raise CheckpointError(
            f"{who}: the repository has no {' and no '.join(missing)} at its top, so it holds no "
            "export of metaopt."
        )
    # The hub's cache holds links to its files; an export holds plain files only.
    spec, weights = (read_plain((snapshot / name).resolve()) for name in (SPEC, WEIGHTS))
    if into is None:
        into = cache_folder() / "hub" / repo_id.replace("/", "--") / snapshot.name
    return write(Path(into), spec, weights, caller=who)
