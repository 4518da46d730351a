"A policy that changes in the midst of a fit"

from fractions import Fraction
from math import ceil

import pytest, torch
from conftest import Body, may_move
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import lr_find
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from learners import make_dls, make_learner, OPTIMIZERS

from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import MODES


class ByBatch(Callback):
    "The layers of the model's body that a training batch moved, by half"

    run_valid = False

    def before_fit(self):
        if not self.learn.lock.locked():  # else a validation in a fit
            self.moved = []

    def before_batch(self):
        self.body = Body(self.learn.model[0])

    def after_batch(self):
        self.moved.append(self.body.moved(self.learn.model[0]))


def scheduled(schedule, bn_above='train', n=0, **kwargs):
    learn = make_learner(cbs=[BatchNormFreeze(bn_above=bn_above, schedule=schedule), ByBatch()], lr=1e-2, **kwargs)
    learn.freeze_to(n)
    return learn


@pytest.mark.parametrize('at,epochs', [(at, n) for at in (0.01, 1 / 3, 0.5, 0.7, 0.99) for n in (1, 3, 10)] + [(5 / 6, 2)])
def test_from_which_batch_on(at, epochs):
    learn = scheduled({at: dict(bn_above='affine-only')})
    learn.fit(epochs)
    total = epochs * 3
    first = ceil(total * at - 1e-6)
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * first + [False] * (total - first)
    assert all('affine' in moved for moved in learn.by_batch.moved)
    assert learn.batch_norm_freeze.schedule_log == ({at: divmod(first, 3)} if first < total else {})


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('start,end', [(a, b) for a in MODES for b in MODES])
def test_every_change_of_mode(start, end, opt):
    learn = scheduled({0.5: dict(bn_above=end)}, start, opt_func=OPTIMIZERS[opt])
    learn.fit(2)
    before, after = learn.by_batch.moved[:3], learn.by_batch.moved[3:]
    assert all(moved == may_move(start) | {'others'} for moved in before)
    assert all(moved == may_move(end) | {'others'} for moved in after)
    learn.fit(1)
    assert learn.by_batch.moved[0] == may_move(start) | {'others'}


def test_stages_add_up_and_each_fit_starts_anew():
    learn = scheduled({0.75: dict(bn='stats-only'), 0.25: dict(bn='affine-only'), 0.5: dict(bn_above='frozen')}, n=1)
    expected = [{*()}] * 3 + [{'affine'}] * 6 + [{'stats'}] * 3
    for _ in range(2):
        learn.fit(4)
        assert learn.by_batch.moved == expected
        assert learn.batch_norm_freeze.modes() == {'0.1': 'frozen', '0.4': 'frozen', '1.2': 'train'}
        assert [p.requires_grad for p in learn.model[0][1].parameters()] == [False, False]
        assert learn.batch_norm_freeze.schedule_log == {0.25: (1, 0), 0.5: (2, 0), 0.75: (3, 0)}
    learn.fine_tune(2, freeze_epochs=2)
    assert learn.batch_norm_freeze.schedule_log == {0.25: (0, 2), 0.5: (1, 0), 0.75: (1, 2)}


def test_globs_and_both_sides():
    learn = scheduled({0.5: dict(bn='affine-only', bn_above={'1.*': 'frozen'})}, n=1)
    head = []

    class Head(Callback):
        def after_batch(self):
            if self.training:
                head.append([t.clone() for t in self.learn.model[1][2].state_dict().values()])

    learn.fit(2, cbs=Head())
    moves = [[not torch.equal(*pair) for pair in zip(a, b)] for a, b in zip(head, head[1:])]
    assert moves == [[True] * 5] * 2 + [[False] * 5] * 3
    assert learn.by_batch.moved == [{*()}] * 3 + [{'affine'}] * 3


class MovesMean(Callback):
    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            self.learn.model[0][1].running_mean.add_(1)


@pytest.mark.parametrize('start,end,at,raises', [
    ('frozen', 'train', (0, 1), True),
    ('frozen', 'train', (1, 1), False),
    ('train', 'frozen', (0, 1), False),
    ('train', 'frozen', (1, 2), True),
    ('affine-only', 'frozen', (0, 1), True),
])  # fmt: skip
def test_what_was_fixed_is_checked_on_each_side_of_the_change(start, end, at, raises):
    learn = scheduled({0.3: dict(bn_above=end)}, start)  # in batch 2 of the first of two epochs
    if not raises:
        return learn.fit(2, cbs=MovesMean(*at))
    with pytest.raises(RuntimeError, match='0.1.running_mean'):
        learn.fit(2, cbs=MovesMean(*at))
    learn.fit(1)


def test_freed_and_fixed_again_is_checked_against_what_it_is_then():
    learn = scheduled({0.3: dict(bn_above='train'), 0.6: dict(bn_above='frozen')}, 'frozen')
    learn.fit(3)
    assert [bool(moved - {'others'}) for moved in learn.by_batch.moved] == [False] * 3 + [True] * 3 + [False] * 3


def test_lr_find_keeps_the_first_stage():
    learn = scheduled({0.1: dict(bn_above='frozen')})
    learn.fit(1)
    learn.lr_find(num_it=12, show_plot=False)
    assert learn.batch_norm_freeze.schedule_log == {}  # of the last fit
    assert learn.by_batch.moved and all('stats' in moved for moved in learn.by_batch.moved)


def test_a_fit_that_goes_on_from_a_later_epoch():
    learn = scheduled({0.5: dict(bn_above='affine-only')})
    learn.fit(4, start_epoch=1)
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * 3 + [False] * 6
    learn.fit(4, start_epoch=3)
    assert ['stats' in moved for moved in learn.by_batch.moved] == [False] * 3


class Stops(Callback):
    def __init__(self, error):
        self.error = error

    def before_step(self):
        if self.training and self.epoch == 1:
            raise self.error


@pytest.mark.parametrize('error', [KeyboardInterrupt('x'), ValueError('x'), CancelFitException()])
def test_a_fit_that_ends_early_leaves_nothing_behind(error):
    learn = scheduled({0.3: dict(bn_above='frozen')})
    try:
        learn.fit(2, cbs=Stops(error))
    except (KeyboardInterrupt, ValueError):
        pass
    learn.fit(1)
    assert learn.by_batch.moved == [{'stats', 'affine', 'others'}] + [{'others'}] * 2
    learn.remove_cb(BatchNormFreeze)
    learn.fit(1)
    assert all(moved == {'stats', 'affine', 'others'} for moved in learn.by_batch.moved)


def test_with_accumulated_gradients():
    learn = scheduled({0.6: dict(bn_above='frozen')})
    learn.fit(3, cbs=GradientAccumulation(n_acc=32))  # steps in batches 3 and 7, the change before batch 6
    everything = {'stats', 'affine', 'others'}
    assert learn.by_batch.moved == [{'stats'}] * 3 + [everything] + [{'stats'}] * 2 + [{*()}, {'others'}, {*()}]


def test_one_given_to_fit_wins_with_its_schedule():
    learn = scheduled({0.1: dict(bn_above='frozen')})
    learn.fit(2, cbs=BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')}))
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * 3 + [False] * 3
    assert all('affine' in moved for moved in learn.by_batch.moved)


def test_summary_tells_schedule_and_when():
    learn = scheduled({0.5: dict(bn_above='affine-only')})
    told = repr(learn.bn_summary())
    assert "bn_above='train'; from 0.5 of a fit bn_above='affine-only'; 0 of 2" in told
    modes = []

    class Looks(Callback):
        def after_batch(self):
            if self.training:
                modes.append(set(learn.bn_summary().df['mode']))

    learn.fit(1, cbs=Looks())
    assert modes == [{'train'}] * 2 + [{'affine-only'}]
    assert "bn_above='affine-only' (in the last fit from epoch 0, batch 2); 0 of 2" in repr(learn.bn_summary())
    assert set(learn.bn_summary().df['mode']) == {'train'}


def test_export_and_load():
    learn = scheduled({0.5: dict(bn_above='affine-only')})
    learn.export('x.pkl')
    loaded = load_learner('x.pkl')
    loaded.dls = make_dls()
    loaded.remove_cb(loaded.by_batch)
    loaded.add_cb(ByBatch())
    loaded.fit(2)
    assert ['stats' in moved for moved in loaded.by_batch.moved] == [True] * 3 + [False] * 3


def test_freeze_to_bn_keeps_the_schedule():
    learn = scheduled({0.5: dict(bn_above='frozen')})
    learn.freeze_to_bn(0, bn_above='affine-only')
    learn.fit(2)
    assert learn.by_batch.moved == [{'affine', 'others'}] * 3 + [{'others'}] * 3


def test_compiled_model():
    learn = make_learner(cbs=[BatchNormFreeze(schedule={0.5: dict(bn_above='frozen')}), ByBatch()])
    learn.model.compile(backend='eager')
    learn.fit(2)
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * 3 + [False] * 3


@pytest.mark.parametrize('name', ['precompute', 'fold_frozen'])
def test_what_needs_a_frozen_part_that_stays_refuses_a_schedule_that_moves_it(name):
    learn = make_learner(cbs=BatchNormFreeze(schedule={0.5: dict(bn='stats-only')}))
    learn.freeze()
    with pytest.raises(ValueError, match='schedule'):
        getattr(learn, name)().__enter__()
    learn = make_learner(cbs=[BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')})])
    learn.freeze()
    with getattr(learn, name)():
        learn.fit(2)
        with pytest.raises(ValueError, match='schedule'):
            learn.fit(1, cbs=BatchNormFreeze(schedule={0.5: dict(bn='train')}))


def test_comparisons_leave_it_out():
    get_learner = lambda seed: make_learner(cbs=BatchNormFreeze(verify=False, schedule={0.1: dict(bn='frozen', bn_above='frozen')}))
    rows = bn_compare(get_learner, {'train': 'train'}, 2, 1, 'fit_one_cycle', freeze_to=0).df
    assert (rows.query('epoch == 1')['stats_moved'].to_numpy() > rows.query('epoch == 0')['stats_moved'].to_numpy()).all()


@pytest.mark.parametrize('schedule,words', [
    ({70: dict(bn='frozen')}, '70 in `schedule` is no fraction'),
    ({0: dict(bn='frozen')}, 'between 0 and 1'),
    ({1.0: dict(bn='frozen')}, 'between 0 and 1'),
    ({'0.7': dict(bn='frozen')}, "'0.7' in `schedule`"),
    ({True: dict(bn='frozen')}, 'no fraction'),
    ({float('nan'): dict(bn='frozen')}, 'no fraction'),
    ({0.7: 'frozen'}, "'bn', 'bn_above' or both"),
    ({0.7: {}}, "'bn', 'bn_above' or both"),
    ({0.7: dict(below='frozen')}, 'below'),
    ({0.7: dict(bn='forzen')}, 'stats-only'),
    ([(0.7, dict(bn='frozen'))], 'takes a dict'),
])  # fmt: skip
def test_bad_schedules(schedule, words):
    with pytest.raises(ValueError, match=words):
        BatchNormFreeze(schedule=schedule)


def test_the_callers_schedule_is_copied():
    schedule = {0.7: dict(bn_above={'0.*': 'frozen'})}
    cb = BatchNormFreeze(schedule=schedule)
    schedule[0.7]['bn_above']['0.*'] = 'train'
    assert cb.schedule == {0.7: dict(bn_above={'0.*': 'frozen'})}


class Validates(Callback):
    "In the midst of a fit; puts back what the fit goes on with, but not where it is"

    def __init__(self, event, at):
        self.at = at
        setattr(self, event, self.look)

    def look(self):
        if self.learn.lock.locked() or (self.epoch, self.iter) != self.at or not getattr(self, 'training', True):
            return
        kept = {k: getattr(self.learn, k) for k in ('dl', 'xb', 'yb', 'training', 'epoch', 'iter') if hasattr(self.learn, k)}
        self.learn.validate()
        for k, v in kept.items():
            setattr(self.learn, k, v)
        self.learn.model.train()


@pytest.mark.parametrize('at', [(0, 0), (1, 1), (2, 0), (3, 0)])
def test_a_validation_in_the_midst_of_a_fit(at):
    learn = scheduled({0.5: dict(bn_above='affine-only')})
    learn.fit(4, cbs=Validates('after_step', at))
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * 6 + [False] * 6
    assert learn.batch_norm_freeze.schedule_log == {0.5: (2, 0)}


class ValidatesBeforeEpochs(Callback):
    def before_epoch(self):
        if not self.learn.lock.locked():
            self.learn.validate()


def test_a_validation_before_each_epoch():
    learn = scheduled({0.7: dict(bn_above='affine-only')})
    moved = []

    class Looks(Callback):
        def before_batch(self):
            self.body = Body(self.learn.model[0])

        def after_batch(self):
            if self.training:
                moved.append('stats' in self.body.moved())

    learn.fit(10, cbs=[ValidatesBeforeEpochs(), Looks()])
    assert moved == [True] * 21 + [False] * 9


def test_a_loader_that_gives_more_than_it_says():
    learn = scheduled({0.6: dict(bn_above='affine-only')})
    learn.dls.train.__class__ = type('Short', (type(learn.dls.train),), {'__len__': lambda self: 1})
    learn.fit(2)
    assert ['stats' in moved for moved in learn.by_batch.moved] == [True] * 2 + [False] * 4


class Freezes(Callback):
    def before_batch(self):
        if self.training and self.epoch == self.iter == 0:
            self.learn.model[0][1].weight.requires_grad = self.learn.model[0][1].bias.requires_grad = False


@pytest.mark.parametrize('schedule', [{0.6: dict(bn='affine-only')}, {0.6: dict(bn_above={'1.*': 'frozen', '*': 'train'})}])
def test_what_another_callback_froze_stays_frozen(schedule):
    learn = scheduled(schedule)
    learn.fit(3, cbs=Freezes())
    assert [p.requires_grad for p in learn.model[0][1].parameters()] == [False, False]
    assert all('affine' in moved for moved in learn.by_batch.moved)  # of the other layer


def test_a_later_stage_after_an_error():
    learn = scheduled({0.5: dict(bn_above='affine-only')})
    with pytest.raises(ValueError, match='x'):
        learn.fit(2, cbs=Stops(ValueError('x')))
    learn.batch_norm_freeze.schedule = {}
    assert set(learn.bn_summary().df['mode']) == {'affine-only'}
    learn.lr_find(num_it=12, show_plot=False)
    assert set(learn.bn_summary().df['mode']) == {'train'}


def test_fractions_of_any_kind():
    cb = BatchNormFreeze(schedule={Fraction(1, 3): dict(bn='train')})
    assert 'from 0.3333 of a fit' in repr(make_learner(cbs=cb).bn_summary())


@pytest.mark.usefixtures('fused_at_any_size')
@pytest.mark.filterwarnings('error:There was nothing to fuse')
@pytest.mark.parametrize('end,epochs', [('affine-only', 1), ('affine-only', 2), ('frozen', 3)])
def test_fusion_starts_with_the_stage(end, epochs):
    learns = [scheduled({0.5: dict(bn_above=end)}) for _ in range(2)]
    learns[1].fuse_bn()
    for learn in learns:
        set_seed(1)
        learn.dls.train.rng.seed(1)
        learn.fit(epochs)
    fused = learns[1].batch_norm_fuse.pairs
    assert fused.batch_norm.tolist() == ['0.1', '0.4']
    for p, q in zip(learns[1].model.parameters(), learns[0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
