"""Learned and hand-crafted optimizers; each is a `metaopt.LearnedOptimizer`."""

from metaopt.optimizers.adversaries import ADVERSARIES as ADVERSARIES
from metaopt.optimizers.bases import BASES as BASES
from metaopt.optimizers.bases import Base as Base
from metaopt.optimizers.handcrafted import adam as adam
from metaopt.optimizers.handcrafted import adamw as adamw
from metaopt.optimizers.handcrafted import cosine_decay as cosine_decay
from metaopt.optimizers.handcrafted import handcrafted as handcrafted
from metaopt.optimizers.handcrafted import head_only as head_only
from metaopt.optimizers.handcrafted import power_decay as power_decay
from metaopt.optimizers.handcrafted import sgd as sgd
from metaopt.optimizers.l3rs import L3RS as L3RS
from metaopt.optimizers.l3rs import L3RSState as L3RSState
from metaopt.optimizers.l3rs import l3rs as l3rs
from metaopt.optimizers.lstm import LSTM as LSTM
from metaopt.optimizers.lstm import LSTMState as LSTMState
from metaopt.optimizers.lstm import lstm as lstm
from metaopt.optimizers.table import OPTIMIZERS as OPTIMIZERS
from metaopt.optimizers.table import Settings as Settings
from metaopt.optimizers.velo import VeLO as VeLO
from metaopt.optimizers.velo import VeloState as VeloState
from metaopt.optimizers.velo import velo as velo
from metaopt.optimizers.velo_import import load_velo as load_velo
from metaopt.optimizers.velo_import import velo_theta_from_named as velo_theta_from_named
