"""Meta-training methods; each gives a `MetaTrainer`."""

from metaopt.meta.base import MetaTrainer as MetaTrainer
from metaopt.meta.base import held_out_loss as held_out_loss
from metaopt.meta.base import inner_run as inner_run
from metaopt.meta.base import loss_unit as loss_unit
from metaopt.meta.base import starts as starts
from metaopt.meta.nes import NESConfig as NESConfig
from metaopt.meta.nes import nes as nes
from metaopt.meta.pes import PESConfig as PESConfig
from metaopt.meta.pes import pes as pes
from metaopt.meta.search import Found as Found
from metaopt.meta.search import search as search
from metaopt.meta.table import METHODS as METHODS
from metaopt.meta.table import Method as Method
from metaopt.meta.tbptt import TBPTTConfig as TBPTTConfig
from metaopt.meta.tbptt import tbptt as tbptt
from metaopt.meta.validation import validation as validation
