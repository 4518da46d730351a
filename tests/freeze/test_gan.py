"What other callbacks freeze and thaw inside a fit: a GAN's switcher, and any other at any batch"

import warnings

import pytest, torch
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.layers import ConvLayer
from fastai.torch_core import set_seed, trainable_params
from fastai.vision.gan import AdaptiveGANSwitcher, FixedGANSwitcher, GANLearner
from fastcore.basics import noop
from learners import bits, make_learner, same, two_groups
from torch import nn

from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import MODES

NOTHING_FIXED = dict(
    freeze_to_bn=lambda learn: learn.freeze_to_bn(0),
    train=lambda learn: learn.freeze_to_bn(0, bn='train'),
    callback=lambda learn: learn.add_cb(BatchNormFreeze()),
)


def gan_learner(switcher, switch_eval):
    set_seed(0)
    generator = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    critic = nn.Sequential(ConvLayer(3, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    items = [(torch.randn(3, 8, 8), torch.randn(3, 8, 8)) for _ in range(24)]
    dls = DataLoaders.from_dsets(items, items[:8], bs=4, num_workers=0, device='cpu')
    losses = lambda fake, out, target: out.mean() + (out - target).abs().mean(), lambda real, fake: real.mean() - fake.mean()
    learn = GANLearner(dls, generator, critic, *losses, switcher=switcher(), show_img=False, switch_eval=switch_eval, lr=1e-2)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn


class Records(Callback):
    "The state of the model after each epoch"

    def before_fit(self):
        self.states = getattr(self, 'states', [])

    def after_epoch(self):
        if not self.learn.lock.locked():
            self.states.append({k: v.clone() for k, v in self.learn.model.state_dict().items()})


def states(learn):
    learn.add_cb(Records())
    with learn.no_bar():
        for _ in range(2):
            set_seed(1)
            learn.fit(2)
    return learn.records.states


SWITCHERS = dict(fixed=lambda: FixedGANSwitcher(n_crit=1, n_gen=2), adaptive=lambda: AdaptiveGANSwitcher(gen_thresh=2.0, critic_thresh=1.0))


@pytest.mark.parametrize('switch_eval', [False, True])
@pytest.mark.parametrize('switcher', SWITCHERS)
def test_a_gan_trains_bit_for_bit_as_without_the_callback(switcher, switch_eval):
    plain = states(gan_learner(SWITCHERS[switcher], switch_eval))
    moved = [k for k in plain[0] if not torch.equal(plain[0][k], plain[1][k])]
    assert any(k.startswith('generator') for k in moved) and any(k.startswith('critic') for k in moved)
    for name, policy in NOTHING_FIXED.items():
        learn = gan_learner(SWITCHERS[switcher], switch_eval)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            warnings.filterwarnings('ignore', '(?s).*shadowing an attribute')  # fastai's own
            policy(learn)
            ours = states(learn)
        for a, b in zip(plain, ours, strict=True):
            assert same(a.values(), b.values()), name


def test_what_a_policy_fixes_in_a_gan_stays():
    learn = gan_learner(SWITCHERS['fixed'], False)
    learn.fit(1)
    learn.freeze_to_bn(0, bn_above={'generator.1': 'frozen', '*': 'train'})
    before, others = bits(learn.model.generator[1].state_dict().values()), bits(learn.model.generator[0].parameters())
    states(learn)
    assert same(before, learn.model.generator[1].state_dict().values()) and not same(others, learn.model.generator[0].parameters())


class Switches(Callback):
    "Turns parameters off and on again, by the batch"

    order = 20

    def __init__(self, part, on):
        self.part, self.on = part, on

    def switch(self):
        for p in self.part(self.learn.model):
            p.requires_grad_(self.on(self.learn.epoch * 3 + self.learn.train_iter))

    before_epoch = switch

    def before_batch(self):
        if self.training:
            self.switch()


PARTS = dict(
    body=lambda m: list(m[0].parameters()),
    head=lambda m: list(m[1].parameters()),
    convolution=lambda m: list(m[0][3].parameters()),
    norm=lambda m: list(m[0][4].parameters()),
    one=lambda m: [m[0][0].bias],
    everything=lambda m: list(m.parameters())[:-1],
)
TIMES = dict(
    every_other=lambda i: i % 2 == 0,
    from_the_second=lambda i: i > 0,
    an_epoch_off=lambda i: i >= 3,
    off_at_the_end=lambda i: i < 5,
    on_once=lambda i: i == 4,
)


@pytest.mark.parametrize('splitter', [two_groups, trainable_params])
@pytest.mark.parametrize('times', TIMES)
@pytest.mark.parametrize('part', PARTS)
def test_any_callback_that_freezes_and_thaws(part, times, splitter):
    results = []
    for policy in (lambda learn: None, *NOTHING_FIXED.values()):
        learn = make_learner(splitter=splitter, lr=1e-2)
        policy(learn)
        learn.add_cb(Switches(PARTS[part], TIMES[times]))
        results.append(states(learn))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same(a.values(), b.values())


@pytest.mark.parametrize('part', ['body', 'convolution', 'norm', 'one'])
@pytest.mark.parametrize('mode', MODES)
def test_what_the_freeze_point_fixes_is_denied_until_the_next_epoch(part, mode):
    learn = make_learner()
    learn.fit(1)
    learn.freeze_to_bn(-1, bn=mode)
    body = Body(learn.model[0])

    class Thaws(Callback):
        def before_batch(self):
            if self.training:
                for p in PARTS[part](self.learn.model):
                    p.requires_grad_(True)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, cbs=Thaws())
    assert body.moved() <= may_move(mode)
