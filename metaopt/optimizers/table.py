"""The learned optimizers that commands and exports know by name."""

from typing import Any, ClassVar, Protocol

from metaopt.core.types import LearnedOptimizer
from metaopt.optimizers.adafac_mlp import AdafacMLP
from metaopt.optimizers.celo import Celo, CeloAdam
from metaopt.optimizers.celo2 import Celo2
from metaopt.optimizers.l3rs import L3RS
from metaopt.optimizers.lstm import LSTM
from metaopt.optimizers.velo import VeLO


class Settings(Protocol):
    """Settings of a learned optimizer: a frozen dataclass whose fields are plain JSON data.

    Attributes:
      name: of the optimizer on the command line and in exports.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        ...


# A new optimizer is a file, its test, its page in docs/optimizers, and a row here.
OPTIMIZERS: dict[str, type[Settings]] = {
    settings.name: settings
    for settings in (
        L3RS,
        LSTM,
        VeLO,
        Celo,
        CeloAdam,
        Celo2,
        AdafacMLP,
    )
}
