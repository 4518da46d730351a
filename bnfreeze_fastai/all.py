"Everything for a notebook: `from bnfreeze_fastai.all import *`"
from .callback import *
from .compare import *
from .core import *
from .differences import *
from .distances import Snapshot, bn_drift, moved, snapshot, symmetric_kl
from .drift import *
from .find import *
from .fixed import *
from .fuse import *
from .fuse_callback import *
from .learner import *
from .measure import layers_with_stats
from .plots import *
from .policy import *
from .recalibrate import *
from .shift import *
