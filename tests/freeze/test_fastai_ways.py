"fastai as its own documentation uses it, with the callback among the default callbacks: it runs, and where nothing is fixed, to the same numbers"

import fastai.callback.schedule  # patches Learner
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import defaults
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.rnn import ModelResetter
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.collab import collab_learner, CollabDataLoaders
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.layers import ConvLayer
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import RMSProp
from fastai.tabular.all import Categorify, CategoryBlock, DataBlock, FillMissing, Normalize, tabular_learner, TabularDataLoaders
from fastai.test_utils import synth_learner
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.torch_core import set_seed
from fastai.vision.all import aug_transforms, ImageBlock, PILImage, vision_learner
from learners import two_groups
from torch import nn

from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze

pytestmark = pytest.mark.filterwarnings('ignore')


class Tiny(nn.Module):
    "An architecture for `vision_learner` that is quick"

    def __init__(self, weights=None, progress=False):
        super().__init__()
        self.body = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8, stride=2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 1000)


def tiny(weights=None, pretrained=False):
    return Tiny()


def images(n=16):
    rng = np.random.default_rng(0)
    return [PILImage.create(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)) for _ in range(n)]


def all_images(_):
    return images()


def first_value(image):  # a function with a name, which `export` can pickle in every version
    return int(np.asarray(image)[0, 0, 0]) % 2


def vision(**kwargs):
    set_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_items=all_images, get_y=first_value)
    dls = block.dataloaders(None, bs=4, batch_tfms=aug_transforms(size=12), num_workers=0, device='cpu')
    return vision_learner(dls, tiny, pretrained=False, loss_func=CrossEntropyLossFlat(), splitter=two_groups, **kwargs)


def table():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=64), b=rng.normal(size=64), c=rng.integers(0, 3, 64), y=rng.integers(0, 2, 64)))
    set_seed(0)
    dls = TabularDataLoaders.from_df(
        df, procs=[Categorify, FillMissing, Normalize], cat_names=['c'], cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=16
    )
    return df, tabular_learner(dls, layers=[8, 4], n_out=2)


def one_cycle():
    set_seed(0)
    learn = synth_learner()
    learn.fit_one_cycle(2)
    return learn


def freeze_and_thaw():
    learn = vision()
    learn.freeze()
    learn.fit(1)
    learn.unfreeze()
    learn.fit(1, slice(1e-4, 1e-2))
    return learn


def fine_tune():
    learn = vision(metrics=accuracy)
    learn.fine_tune(1)
    return learn


def find_a_rate():
    learn = vision()
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_flat_cos(1)
    return learn


def mixed():
    learn = vision(cbs=MixUp())
    learn.fit(1)
    return learn


def accumulated():
    learn = vision(cbs=[GradientAccumulation(8), GradientClip(0.1)], opt_func=RMSProp)
    learn.fit(2)
    return learn


def tracked():
    cbs = [SaveModelCallback(with_opt=True), ReduceLROnPlateau(patience=1), EarlyStoppingCallback(patience=1)]
    learn = vision(cbs=cbs, path='.')
    learn.fit(3)
    learn.load('model')
    return learn


def looked_at():
    learn = vision()
    learn.tta(n=2)
    learn.summary()
    learn.show_results(max_n=2)
    learn.fit(1)
    learn.tta(n=2)
    learn.summary()
    Interpretation.from_learner(learn).plot_top_losses(2)
    ClassificationInterpretation.from_learner(learn).confusion_matrix()
    with learn:
        learn.get_preds(inner=True, with_loss=True)
    learn.predict(images(1)[0])
    return learn


def exported():
    learn = vision(path='.')
    learn.fit(1)
    learn.export()
    again = load_learner('export.pkl')
    again.predict(images(1)[0])
    again.tta(dl=learn.dls.valid, n=1)
    again.dls = learn.dls
    again.fit(1)
    return again


def hooked():
    learn = vision(cbs=ActivationStats(with_hist=True))
    learn.fit(1)
    learn.activation_stats.layer_stats(0)
    return learn


def halves():
    learn = vision(cbs=MixedPrecision()).to_fp32()
    learn.fit(1)
    return learn


def tabular():
    df, learn = table()
    learn.fit_one_cycle(2)
    learn.predict(df.iloc[0])
    learn.get_preds(dl=learn.dls.test_dl(df))
    return learn


def collab():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 5, 64), item=rng.integers(0, 5, 64), rating=rng.uniform(0, 5, 64)))
    set_seed(0)
    learn = collab_learner(CollabDataLoaders.from_df(df, bs=16), n_factors=4, use_nn=True, layers=[8], y_range=(0, 5))
    learn.fit(1)
    return learn


def recurrent():
    set_seed(0)
    items = [(torch.randint(0, 10, (7,)), torch.tensor(i % 2)) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items[:4], bs=4, num_workers=0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = AWD_LSTM(10, 4, 4, 1), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

        def reset(self):
            self.rnn.reset()

        def forward(self, x):
            return self.head(self.rnn(x)[:, -1])

    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
    learn.fit(1)
    return learn


def partly_trained():
    learn = vision()
    learn.fit(2, cbs=[ShortEpochCallback(0.5)])
    learn.fit(1, start_epoch=0, reset_opt=True)
    return learn


WAYS = [
    one_cycle, freeze_and_thaw, fine_tune, find_a_rate, mixed, accumulated, tracked, looked_at, exported, hooked, halves, tabular, collab,
    recurrent, partly_trained,
]  # fmt: skip
POLICIES = dict(
    default=BatchNormFreeze,
    nothing_fixed=lambda: BatchNormFreeze('train', 'train'),
    all_frozen=lambda: BatchNormFreeze('frozen', 'frozen'),
    halves=lambda: BatchNormFreeze('stats-only', 'affine-only'),
    scheduled=lambda: BatchNormFreeze('train', schedule={0.5: dict(bn_above='affine-only')}),
)


def run(way, monkeypatch, *cbs):
    "The state of the Learner that `way` ends with"
    monkeypatch.setattr(defaults, 'callbacks', [*[cb for cb in defaults.callbacks if cb is not ProgressCallback], *cbs])
    learn = way()
    return learn, {k: v.clone() for k, v in learn.model.state_dict().items()}


@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__)
def test_it_runs_with_the_callback(way, monkeypatch):
    _, plain = run(way, monkeypatch)
    for name, policy in POLICIES.items():
        with monkeypatch.context() as patch:
            learn, ours = run(way, patch, policy())
        assert active_callback(learn) is not None
        if name == 'nothing_fixed':
            assert plain.keys() == ours.keys() and all(torch.equal(plain[k], ours[k]) for k in plain)
