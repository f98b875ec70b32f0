"""The meta-training methods that `metaopt train` knows by name."""

from typing import Any, ClassVar, Protocol

from jax.sharding import Mesh

from metaopt.core.types import Families, LearnedOptimizer
from metaopt.meta.base import MetaTrainer
from metaopt.meta.devices import Spread
from metaopt.meta.nes import NESConfig
from metaopt.meta.pes import PESConfig
from metaopt.meta.tbptt import TBPTTConfig


class Method(Protocol):
    """Settings of a meta-training method: a frozen dataclass whose fields are plain JSON data.

    Attributes:
      name: of the method on the command line.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]

    @property
    def horizon(self) -> tuple[int, int]:
        """Steps of the shortest and of the longest inner run."""
        ...

    def work(self, groups: int) -> str:
        """What a meta-update does, in words, for tasks of `groups` groups."""
        ...

    def mesh(self) -> Mesh | None:
        """The devices that share the inner runs; None for a single device."""
        ...

    def trainer(self, lopt: LearnedOptimizer, families: Families, spread: Spread) -> MetaTrainer:
        """The method with these settings."""
        ...


# A new method is a file, its test, its section in docs/meta-training.md, and a row here.
METHODS: dict[str, type[Method]] = {
    config.name: config
    for config in (
        NESConfig,
        PESConfig,
        TBPTTConfig,
    )
}
