"Run by test_compare.py in a process of its own, which is killed or interrupted"

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_compare import get_learner, slow

from bnfreeze_fastai.choose.compare import bn_compare

bn_compare(
    get_learner, {'train': slow, 'frozen': 'frozen', 'affine-only': 'affine-only'}, 2, 3, 'fit', n_jobs=int(sys.argv[1]), results='runs.csv'
)
print('done')
