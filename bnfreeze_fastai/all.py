"Everything for a notebook: `from bnfreeze_fastai.all import *`"
from .callback import *
from .compare import *
from .core import *
from .differences import *
from .drift import *
from .find import *
from .fixed import *
from .fuse import *
from .fuse_callback import *
from .learner import *
from .plots import *
from .policy import *
from .stats import *
