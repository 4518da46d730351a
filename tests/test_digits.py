"The digits are the same on every system"

import numpy as np, torch
from sklearn.datasets import load_digits

from bnfreeze_fastai import digits
from bnfreeze_fastai.digits import digit_images


def test_labels_are_what_losses_take_where_numpy_has_short_integers(monkeypatch):
    expected = digit_images(range(5, 10))[1]
    x, y = load_digits(return_X_y=True)
    monkeypatch.setattr(digits, 'load_digits', lambda return_X_y: (x, y.astype(np.int32)))
    labels = digit_images(range(5, 10))[1]
    assert labels.dtype == torch.int64 and torch.equal(labels, expected)
