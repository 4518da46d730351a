"Small Learners with a frozen body and a head with dropout, and their losses step by step"

from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from learners import body_and_head, make_learner
from torch import nn


class StepLosses(Callback):
    "Every training loss as the optimizer sees it"

    def before_fit(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            self.seen.append(self.loss.item())


def dropout_head(n=4):
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(n), nn.Dropout(0.3), nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def small(**kwargs):
    "A small Learner with trained statistics, frozen up to a head with dropout"
    set_seed(0)
    learn = make_learner(model=nn.Sequential(body_and_head()[0], dropout_head()), **{'metrics': accuracy, 'lr': 1e-2, **kwargs})
    learn.fit(1)
    return learn.freeze_to_bn(-1)


def train(learn, n_epoch=3, lr=1e-2):
    set_seed(1)
    losses = StepLosses()
    learn.fit_one_cycle(n_epoch, lr, cbs=losses)
    return losses.seen
