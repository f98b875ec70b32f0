"""Data sets as arrays in three splits: embedded ones, and those prepared from files.

`load` finds them by name; `metaopt data` lists, prepares and shows them (docs/data.md).
"""

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
