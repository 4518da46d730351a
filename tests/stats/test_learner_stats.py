"Running statistics through a Learner: `recalibrate_bn`, `bn_shift`, snapshots, drift and its record"

import gc, pickle, random

import fastai.callback.schedule
import numpy as np, pandas as pd, pytest, torch
from conftest import Body
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed, TensorImage, TensorMask, trainable_params
from learners import bits, body_and_head, image, label, make_learner, OPTIMIZERS, same
from torch import nn

from bnfreeze_fastai.freeze.drift import BatchNormDrift
from bnfreeze_fastai.layers import affine_params, bn_layers
from bnfreeze_fastai.plots import plot_bn_drift

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:`load_learner`', 'ignore:load_learner')
DRIFT = ['layer', 'mean_shift', 'log_var_ratio', 'kl']


def trained(**kwargs):
    learn = make_learner(**kwargs)
    learn.fit(1)
    return learn


def pooled(x):
    return x.double().transpose(0, 1).flatten(1)


def whole(learn):
    "Everything that looking at data has to leave alone"
    rng = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), learn.dls.train.rng.getstate()
    flags = [m.training for m in learn.model.modules()]
    return bits(learn.model.state_dict().values()), rng, flags, list(learn.cbs), learn.opt


def as_before(before, learn):
    tensors, *rest = whole(learn)
    return same(before[0], tensors) and rest == list(before[1:])


def test_statistics_of_the_learners_own_data():
    learn = trained()
    drift = learn.recalibrate_bn(ds_idx=1)
    first = learn.model[0][1]
    with torch.no_grad():
        x = pooled(learn.model[0][0](torch.cat([b[0] for b in learn.dls.valid])))
    torch.testing.assert_close(first.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.running_var.double(), x.var(1), rtol=1e-5, atol=0)
    assert list(drift.columns) == DRIFT and drift.layer.tolist() == ['0.1', '0.4', '1.2'] and (drift.kl > 0).all()


def test_mean_only_and_prior():
    learn = trained()
    first = learn.model[0][1]
    mean, var = first.running_mean.clone(), first.running_var.clone()
    learn.recalibrate_bn(ds_idx=1, stats='mean', prior=1)
    n = len(learn.dls.valid)
    with torch.no_grad():
        x = pooled(learn.model[0][0](torch.cat([b[0] for b in learn.dls.valid])))
    torch.testing.assert_close(first.running_mean, ((x.mean(1) * n + mean) / (n + 1)).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(first.running_var, var)


def test_in_a_with_for_its_block_only():
    learn = trained(opt_func=OPTIMIZERS['ranger'])
    before = whole(learn)
    with learn.recalibrate_bn(preserve=True, method='sequential') as drift:
        assert (drift.kl > 0).all() and not as_before(before, learn)
    assert as_before(before, learn)
    slow = {p: s for group, slows in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, s in zip(group, slows)}
    assert all(torch.equal(slow[p], p) for l in bn_layers(learn.model) for p in affine_params(l))


def test_what_is_left_alone():
    learn = trained()
    before = whole(learn)
    learn.bn_shift(), learn.bn_snapshot(), learn.bn_drift(learn.bn_snapshot())
    assert as_before(before, learn)
    learn.recalibrate_bn(layers='1.*', method='sequential')
    changed = {
        k for k, a, b in zip(learn.model.state_dict(), before[0], learn.model.state_dict().values(), strict=True) if not torch.equal(a, b)
    }
    assert changed <= {f'1.2.{k}' for k in ('running_mean', 'running_var', 'num_batches_tracked')} and whole(learn)[1:] == before[1:]


def test_training_goes_on_with_the_same_shuffle():
    a, b = trained(), trained()
    set_seed(1)
    a.bn_shift()
    a.fit(1)
    set_seed(1)
    b.fit(1)
    assert same(bits(a.model.state_dict().values()), b.model.state_dict().values())


def test_loaders_of_any_sort():
    learn = trained()
    batches = list(learn.dls.valid)
    torch_loader = torch.utils.data.DataLoader([(x, 0) for x in torch.cat([b[0] for b in batches])], 8)
    shifts = [learn.bn_shift(dl=dl).kl.tolist() for dl in (learn.dls.valid, batches, torch_loader, iter(batches), [b[0] for b in batches])]
    np.testing.assert_allclose(shifts, [shifts[0]] * len(shifts))
    assert learn.bn_shift(dl=learn.dls.test_dl(range(8), with_labels=False)).kl.notna().all()
    with pytest.raises(ValueError, match='DataLoader'):
        learn.recalibrate_bn(dl=iter(batches), method='sequential', max_mem=0)
    learn.recalibrate_bn(dl=iter(batches), method='sequential')
    assert int(learn.model[0][1].num_batches_tracked) == len(batches)


@pytest.mark.parametrize(
    'kwargs,said',
    [
        (dict(ds_idx=2), 'choose from -2 to 1'),
        (dict(ds_idx='train'), "'train'"),
        (dict(layers='7*'), "'7\\*'"),
        (dict(method='precise'), "'precise'"),
        (dict(n_batches=-1), '-1'),
        (dict(dl=[]), 'yields nothing'),
    ],
)
def test_bad_input_changes_nothing(kwargs, said):
    learn = trained()
    before = whole(learn)
    with pytest.raises(ValueError, match=said):
        learn.recalibrate_bn(**kwargs)
    assert as_before(before, learn)


def test_any_integer():
    learn = trained()
    learn.recalibrate_bn(ds_idx=np.int64(-1), n_batches=np.int64(1))
    assert int(learn.model[0][1].num_batches_tracked) == 1


def test_inputs_are_plain_tensors_as_in_a_fit():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, a, b):
            assert type(a) is type(b) is torch.Tensor
            return self.bn(a) + b

    items = [(TensorImage(image(i, 8)), TensorMask(image(i, 8)), label(i)) for i in range(8)]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=4, num_workers=0), Plain(), loss_func=CrossEntropyLossFlat())
    assert type(learn.dls.one_batch()[1]) is TensorMask
    for dl in (None, iter(list(learn.dls.train))):
        learn.recalibrate_bn(dl=dl)
    assert int(learn.model.bn.num_batches_tracked) == 2


def test_the_learner_knows_how_many_inputs_there_are():
    learn = trained()
    learn.dls.n_inp = 1
    learn.recalibrate_bn(dl=[(torch.randn(4, 3, 8, 8), torch.zeros(4), torch.zeros(4))])
    assert int(learn.model[0][1].num_batches_tracked) == 1


def test_generators_of_samplers_are_given_back():
    learn, data = trained(), [(x, 0) for x in torch.randn(12, 3, 8, 8)]
    for batches in (False, True):
        g = torch.Generator().manual_seed(0)
        sampler = torch.utils.data.RandomSampler(data, generator=g)
        how = dict(batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False)) if batches else dict(batch_size=4, sampler=sampler)
        before = g.get_state()
        learn.bn_shift(dl=torch.utils.data.DataLoader(data, **how))
        assert torch.equal(g.get_state(), before)


def test_models_and_learners_without_parameters_or_loaders():
    learn = Learner(None, nn.BatchNorm2d(3, affine=False), loss_func=CrossEntropyLossFlat())
    learn.recalibrate_bn(dl=[torch.randn(4, 3, 2, 2)])
    assert int(learn.model.num_batches_tracked) == 1
    with pytest.raises(ValueError, match='0 datasets'):
        learn.recalibrate_bn()


def test_a_training_loader_that_drops_its_only_batch():
    learn = trained()
    learn.dls = DataLoaders(learn.dls.train.new(bs=64, drop_last=True), learn.dls.valid)
    with pytest.raises(ValueError, match='drop_last'):
        learn.recalibrate_bn()


def test_n_batches_and_the_progress_bar(capsys):
    learn = trained()
    learn.recalibrate_bn(n_batches=2)
    assert not capsys.readouterr().out and int(learn.model[0][1].num_batches_tracked) == 2
    learn.add_cb(ProgressCallback())
    learn.recalibrate_bn()
    assert '[3/3' in capsys.readouterr().out
    with learn.no_bar():
        learn.bn_shift()
    assert not capsys.readouterr().out


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_frozen_statistics_stay_as_re_estimated(opt):
    learn = trained(opt_func=OPTIMIZERS[opt]).freeze_to_bn(-1)
    learn.recalibrate_bn(layers='0.*')
    body = Body(learn.model[0])
    learn.fit(2)
    assert not body.moved()
    drift = learn.bn_drift().set_index('layer')
    assert (drift.loc[['0.1', '0.4']] > 0).all(axis=None)


def test_preserve_under_lookahead():
    "Its slow weights would pull weight and bias back half way"
    model = body_and_head()
    model[0].append(nn.GroupNorm(2, 4))
    learn = make_learner(model, opt_func=OPTIMIZERS['ranger'], wd=0.0).freeze_to_bn(0, bn_above='affine-only')
    learn.fit(2, lr=0.1)
    slow = {p: s for group, slows in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, s in zip(group, slows)}
    group_norm = [slow[p].add_(1).clone() for p in model[0][-1].parameters()]
    with torch.no_grad():
        for l in bn_layers(model):
            slow[l.weight].copy_(l.weight)
    x = torch.randn(4, 3, 8, 8)
    y = model.eval()(x)
    learn.recalibrate_bn(preserve=True)
    assert same(group_norm, [slow[p] for p in model[0][-1].parameters()])
    assert all(torch.equal(slow[p], p) for l in bn_layers(model) for p in affine_params(l))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_drift_since_the_policy_was_set_or_a_snapshot():
    learn = trained()
    with pytest.raises(ValueError, match='bn_snapshot'):
        learn.bn_drift()
    start = learn.bn_snapshot()
    learn.fit(1)
    learn.freeze_to_bn(0, bn_above='train')
    assert (learn.bn_drift().kl == 0).all() and (learn.bn_drift(start).kl > 0).all()
    learn.fit(1)
    summary = learn.bn_summary().df
    np.testing.assert_array_equal(learn.bn_drift().kl, summary.stats_moved)
    learn.model[0][1].running_mean += 2 * learn.model[0][1].running_var.sqrt()
    assert learn.bn_drift(learn.bn_snapshot()).kl.sum() == 0


class Shifting(Callback):
    "Brighter images in every epoch"

    def before_batch(self):
        self.learn.xb = (self.x + self.epoch,)


def test_drift_is_recorded_in_each_epoch_of_all_fits():
    record = BatchNormDrift()
    learn = trained(cbs=[Shifting()])
    learn.add_cb(record)
    learn.validate()
    assert not record.start, 'the start is the first fit'
    learn.freeze_to_bn(-1, bn={'0.1': 'frozen', '*': 'stats-only'})
    start = learn.bn_snapshot()
    learn.fine_tune(2, freeze_epochs=1)
    learn.lr_find(num_it=12, show_plot=False)
    learn.validate(), learn.get_preds()
    df = record.df
    assert list(df.columns) == [*DRIFT, 'epoch'] and df.epoch.unique().tolist() == [1, 2, 3] and len(df) == 9
    kl = df.pivot(index='layer', columns='epoch', values='kl')
    assert kl.loc['0.1', 1] == 0 and (kl.loc[['0.4', '1.2']] > 0).all(axis=None)
    pd.testing.assert_frame_equal(df.query('epoch == 3')[DRIFT].reset_index(drop=True), learn.bn_drift(start))


def test_drift_of_one_fit():
    learn, record = trained(), BatchNormDrift()
    with pytest.raises(ValueError, match='cbs=BatchNormDrift'):
        record.df
    learn.fit(2, cbs=record)
    assert not any(cb is record for cb in learn.cbs) and len(record.epochs) == 2
    assert len(record.plot_bn_drift().lines) == 2


def test_a_record_goes_on_in_its_learner_and_begins_anew_in_another():
    record, first, second = BatchNormDrift(), trained(), trained()
    first.fit(1, cbs=record)
    first.fit(1, cbs=record)
    assert len(record.epochs) == 2
    start = second.bn_snapshot()
    second.fit(1, cbs=record)
    pd.testing.assert_frame_equal(record.df[DRIFT], second.bn_drift(start))
    del first, second
    gc.collect()
    third = trained()
    third.fit(1, cbs=record)
    assert len(record.epochs) == 1
    third.add_cb(record)
    third.export('e.pkl')
    loaded = load_learner('e.pkl')
    assert len(loaded.batch_norm_drift.epochs) == 1


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_a_failing_lr_find_or_fit_does_not_stop_the_record(error):
    class Fails(Callback):
        on = True

        def after_batch(self):
            if self.on and self.training:
                self.on = False
                raise error('disk')

    learn = make_learner(cbs=[BatchNormDrift()])
    learn.add_cb(Fails())
    with pytest.raises(error):
        learn.lr_find(num_it=12, show_plot=False)
    start = learn.bn_snapshot()
    learn.fit(2)
    record = learn.batch_norm_drift
    assert record.df.epoch.max() == 2 and (record.df.query('epoch == 2').kl.to_numpy() == learn.bn_drift(start).kl.to_numpy()).all()


class ValidatesWithin(Callback):
    def after_batch(self):
        if self.training and self.iter == 1:
            self.learn.validate()


def test_a_validation_within_does_not_end_or_start_a_record():
    learn = trained(cbs=[BatchNormDrift()])
    learn.add_cb(ValidatesWithin())
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert len(learn.batch_norm_drift.epochs) == 1
    learn.fit(1)
    assert len(learn.batch_norm_drift.epochs) == 2


def test_another_model_begins_another_record_and_one_added_in_a_fit_waits():
    learn = trained(cbs=[BatchNormDrift()])
    learn.model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn.splitter = trainable_params
    learn.create_opt()
    learn.fit(1)
    assert learn.batch_norm_drift.df.layer.tolist() == ['1']

    class Adds(Callback):
        def before_epoch(self):
            self.learn.add_cb(BatchNormDrift())

    learn = trained()
    learn.fit(1, cbs=Adds())
    assert not learn.batch_norm_drift.epochs
    learn.fit(1)
    assert len(learn.batch_norm_drift.epochs) == 1


def test_several_records():
    learn = trained(cbs=[BatchNormDrift()])
    learn.fit(1)
    learn.add_cb(late := BatchNormDrift())
    assert len(learn.plot_bn_drift().lines) == 2
    learn.fit(1)
    assert len(learn.plot_bn_drift().lines) == len(late.epochs) == 1


def test_names_of_many_layers_are_thinned():
    drift = pd.DataFrame(dict(layer=[f'l{i}' for i in range(100)], kl=range(100)))
    ax = plot_bn_drift(drift)
    assert len(ax.get_xticks()) <= 25 and ax.get_yscale() == 'symlog' and ax.get_ylim()[1] > 99
    plot_bn_drift(drift.assign(kl=drift.kl * 100), ax=ax)
    assert ax.get_ylim()[1] > 9900


def test_plot_of_the_learner():
    learn = trained()
    with pytest.raises(ValueError, match='bn_snapshot'):
        learn.plot_bn_drift()
    start = learn.bn_snapshot()
    learn.add_cb(BatchNormDrift())
    learn.fit(3)
    ax = learn.plot_bn_drift()
    assert len(ax.lines) == 3 and [t.get_text() for t in ax.get_xticklabels()] == ['0.1', '0.4', '1.2']
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), learn.bn_drift(start).kl)
    one = learn.plot_bn_drift(start, value='mean_shift', ax=ax.figure.add_subplot())
    np.testing.assert_allclose(one.lines[0].get_ydata(), learn.bn_drift(start).mean_shift)
    with pytest.raises(ValueError, match="'mean_shift', 'log_var_ratio', 'kl'"):
        learn.plot_bn_drift(value='variance')


def test_plot_of_layers_that_did_not_move_or_do_not_exist():
    learn = trained().freeze_to_bn(-1)
    assert learn.plot_bn_drift().lines[0].get_ydata().tolist() == [0, 0, 0]
    plain = Learner(learn.dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loss_func=learn.loss_func).freeze_to_bn(0)
    assert plain.bn_drift().empty and not plain.plot_bn_drift().lines


def test_the_record_goes_with_its_learner():
    learn = trained(cbs=[BatchNormDrift()])
    learn.fit(1)
    pickle.loads(pickle.dumps(learn.batch_norm_drift.epochs))
    learn.export('l.pkl')
    again = load_learner('l.pkl')
    assert len(again.batch_norm_drift.epochs) == 2 and again.batch_norm_drift.df.equals(learn.batch_norm_drift.df)


def test_a_fit_that_fails_leaves_the_record_usable():
    class Fails(Callback):
        order = 5

        def after_batch(self):
            if self.epoch == 1:
                raise OSError('disk')

    learn, record = trained(), BatchNormDrift()
    with pytest.raises(OSError):
        learn.fit(3, cbs=[record, Fails()])
    assert len(record.epochs) == 1
    learn.fit(1, cbs=record)
    assert record.df.epoch.max() == 2


@pytest.mark.parametrize('n_workers', [0, 2])
def test_fastai_loaders_with_workers(n_workers):
    learn = trained()
    learn.dls = DataLoaders(
        DataLoader([(x, 0) for x in torch.randn(12, 3, 8, 8)], bs=4, shuffle=True, num_workers=n_workers), learn.dls.valid
    )
    state = learn.dls.train.rng.getstate()
    learn.recalibrate_bn(method='sequential')
    assert learn.dls.train.rng.getstate() == state and int(learn.model[0][1].num_batches_tracked) == 3
