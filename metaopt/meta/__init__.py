"""Meta-training methods; each gives a `MetaTrainer`."""

from metaopt.meta.base import MetaTrainer as MetaTrainer
from metaopt.meta.base import inner_run as inner_run
from metaopt.meta.base import starts as starts
from metaopt.meta.nes import NESConfig as NESConfig
from metaopt.meta.nes import nes as nes
from metaopt.meta.tbptt import TBPTTConfig as TBPTTConfig
from metaopt.meta.tbptt import tbptt as tbptt
