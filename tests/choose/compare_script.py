"Run by test_compare.py in a process of its own, which is killed or interrupted"

import sys

from test_compare import bn_compare, get_learner, slow

bn_compare(
    get_learner, {'train': slow, 'frozen': 'frozen', 'affine-only': 'affine-only'}, 2, 3, 'fit', n_jobs=int(sys.argv[1]), results='runs.csv'
)
print('done')
