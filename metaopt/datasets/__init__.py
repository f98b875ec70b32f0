"""Data sets as arrays in three splits: embedded ones, and those prepared from files.

`load` finds them by name; `metaopt data` lists, prepares and shows them (docs/data.md). Names are
imported when they are first used, so that sets are listed without JAX.
"""

from typing import TYPE_CHECKING

from metaopt.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from metaopt.datasets.catalog import Spec as Spec
    from metaopt.datasets.catalog import specs as specs
    from metaopt.datasets.catalog import state as state
    from metaopt.datasets.dataset import Dataset as Dataset
    from metaopt.datasets.dataset import check as check
    from metaopt.datasets.dataset import check_classes as check_classes
    from metaopt.datasets.dataset import only_classes as only_classes
    from metaopt.datasets.dataset import resized as resized
    from metaopt.datasets.dataset import split_in_three as split_in_three
    from metaopt.datasets.dataset import union as union
    from metaopt.datasets.dataset import with_fewer_held_out as with_fewer_held_out
    from metaopt.datasets.embedded import breast_cancer as breast_cancer
    from metaopt.datasets.embedded import circles as circles
    from metaopt.datasets.embedded import digits as digits
    from metaopt.datasets.embedded import moons as moons
    from metaopt.datasets.embedded import spirals as spirals
    from metaopt.datasets.loading import hold_out as hold_out
    from metaopt.datasets.loading import load as load
    from metaopt.datasets.preparation import PreparedSet as PreparedSet
    from metaopt.datasets.preparation import prepare as prepare
    from metaopt.datasets.store import data_root as data_root
    from metaopt.datasets.text import Text as Text
    from metaopt.datasets.text import from_file as text_from_file  # noqa: F401
    from metaopt.datasets.text import from_string as text_from_string  # noqa: F401
    from metaopt.datasets.text import python_topics as python_topics

_NAMES = {  # name -> module and name in it
    "Spec": ("catalog", "Spec"),
    "specs": ("catalog", "specs"),
    "state": ("catalog", "state"),
    "Dataset": ("dataset", "Dataset"),
    "check": ("dataset", "check"),
    "check_classes": ("dataset", "check_classes"),
    "only_classes": ("dataset", "only_classes"),
    "resized": ("dataset", "resized"),
    "split_in_three": ("dataset", "split_in_three"),
    "union": ("dataset", "union"),
    "with_fewer_held_out": ("dataset", "with_fewer_held_out"),
    "breast_cancer": ("embedded", "breast_cancer"),
    "circles": ("embedded", "circles"),
    "digits": ("embedded", "digits"),
    "moons": ("embedded", "moons"),
    "spirals": ("embedded", "spirals"),
    "hold_out": ("loading", "hold_out"),
    "load": ("loading", "load"),
    "PreparedSet": ("preparation", "PreparedSet"),
    "prepare": ("preparation", "prepare"),
    "data_root": ("store", "data_root"),
    "Text": ("text", "Text"),
    "text_from_file": ("text", "from_file"),
    "text_from_string": ("text", "from_string"),
    "python_topics": ("text", "python_topics"),
}

__getattr__, __dir__ = lazy_attributes(__name__, _NAMES)
