"The names for a notebook, and the methods of every Learner: `from bnfreeze_fastai.all import *`. Everything else is imported from its room"
from . import learner as _learner # its methods
from .choose.compare import Comparison, bn_compare
from .choose.differences import paired_differences
from .choose.find import Found # and the method `bn_find`
from .core import bn_mode, hold_bn_mode, set_bn_mode
from .freeze.callback import BatchNormFreeze, active_callback
from .freeze.drift import BatchNormDrift
from .freeze.fuse import BatchNormFuse
from .freeze.in_force import modes_in_force
from .freeze.policy import Policy
from .freeze.recalibrate import BatchNormRecalibrate
from .fusion.fuse import fused_bn
from .health import check as _check # the method `bn_check`
from .health.gap import BatchNormGap # and the method `bn_gap`
from .layers import MODES, bn_layers, norm_layers
from .plots import plot_bn_drift, plot_bn_gap, plot_differences, plot_gains, plot_score_curves, plot_scores
from .stats.distances import bn_drift, snapshot
from .stats.momentum import set_bn_momentum
from .stats.recalibrate import convert_bn, recalibrate_bn
from .stats.shift import bn_shift
from .stats.switch import bn_restore, bn_stats, flat_snapshot
from .sync import revert_sync_bn
