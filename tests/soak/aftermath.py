"""A Learner to which something is done that fails, and what has to be right afterwards"""

import random, re
from functools import partial

import numpy as np, torch
from fastai.callback.core import Callback
from fastcore.basics import noop
from torch.nn.modules.batchnorm import _BatchNorm

from bnfreeze_fastai.all import BatchNormFreeze, BatchNormFuse
from bnfreeze_fastai.utils.restore import _generators, reseed
from bnfreeze_fastai.choose.runs import weights_hash

from .training import bitwise, draw, in_groups, new_learner, parts, under_policy, wrong_moves


def in_block(block, learn, cbs=()):
    with getattr(learn, block)():
        learn.fit(2, cbs=list(cbs))


# what is under way when a fault comes: training, which may move what trains; and what has to leave no trace if it fails
TRAINS = {
    'fit': lambda learn, cbs=(): learn.fit(2, cbs=list(cbs)),
    'fit in precompute': partial(in_block, 'precompute'),
    'fit in fold_frozen': partial(in_block, 'fold_frozen'),
    'fit after fuse_bn': lambda learn, cbs=(): learn.fuse_bn().fit(2, cbs=list(cbs)),
    'lr_find': lambda learn, cbs=(): learn.lr_find(num_it=12, show_plot=False),
}
LOOKS = {
    'precompute': lambda learn: learn.precompute(max_mem=0).__enter__(),
    'recalibrate_bn': lambda learn: learn.recalibrate_bn(),
    'recalibrate_bn, sequential': lambda learn: learn.recalibrate_bn(method='sequential', preserve=True),
    'bn_shift': lambda learn: learn.bn_shift(),
    'bn_find': lambda learn: learn.bn_find(16, plot=False),
}
ALL = TRAINS | LOOKS
NEEDS_FROZEN = ('fit in precompute', 'fit in fold_frozen', 'precompute')


def trip(error, at=None, armed=True):
    "A function that raises `error` when it is called for the `at`th time since it was armed"

    def step(*args, **kwargs):
        step.calls += step.armed
        if step.calls == at:
            raise error

    step.calls, step.armed = 0, armed
    return step


EVENTS = 'fit epoch train batch pred loss backward step validate'.split()


class TripsAnywhere(Callback):
    def __init__(self, step, order):
        self.order = order
        for event in EVENTS:
            for when in ('before', 'after'):
                setattr(self, f'{when}_{event}', step)


def prepared(case, place=None, step=trip(None), num_workers=0, order=0, **kwargs):
    "A Learner under its policy, with `step` called at `place`"
    learn = under_policy(new_learner(case, on_read=step if place == 'loader' else noop, num_workers=num_workers, **kwargs), case)
    if place == 'model':
        learn.model[0][0].register_forward_pre_hook(step)
    if place == 'callback':
        learn.add_cb(TripsAnywhere(step, order))
    learn.validate()  # makes what a Learner makes only once
    learn.model.train()
    reseed(1, *learn.dls.loaders)
    step.armed = True
    return learn


def disarm(learn):
    learn.remove_cb(TripsAnywhere)
    for dl in learn.dls.loaders:
        dl.dataset.on_read = noop
    learn.model[0][0]._forward_pre_hooks.clear()


def world(learn):
    "What has to be as it was when something failed that is no training"
    plain = lambda g: g.getstate() if isinstance(g, random.Random) else g
    return dict(
        generators=(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        loaders=[plain(g) for dl in learn.dls.loaders for *_, g in _generators(dl)],
        flags=[m.training for m in learn.model.modules()],
        cbs=list(map(id, learn.cbs)),
        opt=id(learn.opt),
        own=sorted(vars(learn)),
    )


def expecting(errors, said, act):
    "An error of one of these types that says so; anything else is wrong"
    try:
        act()
    except errors as e:
        assert re.search(f'(?s){said}', str(e)), f'{type(e).__name__} does not say {said!r}: {e}'
        return
    except BaseException as e:
        raise AssertionError(f'{type(e).__name__} in place of {errors}: {e}') from e
    raise AssertionError(f'nothing was raised in place of {errors}')


def aftermath(learn, case, before, told=None, place=None):
    "What is wrong after a fault; `told` is the `world` before something that has to leave no trace"
    wrong = wrong_moves(before, learn.model, case)
    if told is not None:
        wrong += [f'{k} changed' for k, v in parts(learn.model).items() if not all(map(bitwise, v, before[k]))]
        now = world(learn)
        wrong += [f'{k} are not as they were: {str(told[k])[:200]} then, {str(now[k])[:200]} now' for k in told if told[k] != now[k]]
    disarm(learn)
    now = parts(learn.model)
    learn.fit(1)
    wrong += as_fastai_has_it(learn)
    wrong += [f'in the next fit: {w}' for w in wrong_moves(now, learn.model, case, all_move=True)]
    if told is not None:
        untouched = prepared(case)
        untouched.fit(1)
        if weights_hash(untouched.model) != weights_hash(learn.model):
            wrong.append('the next fit is not that of a Learner that nothing happened to')
    return wrong + after_removal(learn, case)


def as_fastai_has_it(learn):
    wrong = ['the lock is held'] * learn.lock.locked()
    wrong += ['a `forward` of its own'] * any('forward' in vars(m) for m in learn.model.modules())
    own = [
        cb.name for cb in learn.cbs if type(cb).__module__.startswith('bnfreeze') and not isinstance(cb, (BatchNormFreeze, BatchNormFuse))
    ]
    return wrong + [f'callbacks are left: {own}'] * bool(own)


def after_removal(learn, case):
    "What is not plain fastai once the callback is gone"
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, BatchNormFuse)])
    learn.remove_cb(BatchNormFreeze)
    held = [n for n, m in learn.model.named_modules() if m._forward_hooks or m._forward_pre_hooks or vars(m).get('_bn_holds')]
    wrong = [f'after the removal: hooks on {held}'] * bool(held)
    for i, m in enumerate(in_groups(learn.model)):
        trains = lambda o: i >= case.n or isinstance(o, _BatchNorm)
        odd = [k for k, o in m.named_modules() for p in o.parameters(recurse=False) if p.requires_grad != trains(o)]
        wrong += [f'after the removal: requires_grad in group {i} at {odd}'] * bool(odd)
    now, plain = parts(learn.model), case._replace(bn='train', bn_above='train')
    learn.fit(1)
    wrong += [f'without the callback: {w}' for w in wrong_moves(now, learn.model, plain, all_move=True) if 'did not' in w]
    return wrong


def draw_op(rng, ops=None):
    "What is under way, and a case for it"
    op = rng.choice(list(ops or ALL))
    return op, draw(rng, precomputes=op in NEEDS_FROZEN)


def places(op):
    return ['loader', 'model', 'callback'] if op in TRAINS or op == 'bn_find' else ['loader', 'model']
