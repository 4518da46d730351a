"Loads what an exported Learner left in a file, where this package cannot be imported"

import sys

import torch

sys.modules['bnfreeze_fastai'] = None  # an import of it fails, as where it is not installed
torch.load(sys.argv[1], weights_only=False)  # as in `load_learner`, which hides what went wrong
