"Arguments of the wrong kind: what was given, what is taken, and the remedy, before anything has changed"

import matplotlib.pyplot as plt, pandas as pd, pytest, torch
from fastai.learner import Learner
from learners import bits, make_dls, make_learner, same
from torch import nn
from torch.utils.data import TensorDataset

from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.cli import compare, demo
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.freeze.policy import Policy
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes
from bnfreeze_fastai.head.fold import fold_frozen
from bnfreeze_fastai.head.precompute import precomputed
from bnfreeze_fastai.plots import plot_bn_drift, plot_differences, plot_gains, plot_score_curves, plot_scores
from bnfreeze_fastai.stats.distances import bn_drift, moved, snapshot
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
X = [torch.randn(8, 3, 8, 8) for _ in range(2)]


def everything(learn):
    model = learn.model
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    return bits(model.state_dict().values()), flags, list(learn.cbs), learn.opt


def refused(learn, said, f):
    before = everything(learn)
    with pytest.raises((ValueError, TypeError), match=said):
        f()
    after = everything(learn)
    assert same(before[0], after[0]) and before[1:] == after[1:]


def entering(block):
    with block:
        pass


PLAIN = {
    'a Learner': (lambda l: recalibrate_bn(l, X), 'Learner.*give its `.model`'),
    'a Learner, shift': (lambda l: bn_shift(l, X), 'Learner.*give its `.model`'),
    'a Learner, snapshot': (lambda l: snapshot(l), 'Learner.*give its `.model`'),
    'a Learner, drift': (lambda l: bn_drift(l, {}), 'Learner.*give its `.model`'),
    'a Learner, fusion': (lambda l: entering(fused_bn(l)), 'Learner.*give its `.model`'),
    'a class': (lambda l: recalibrate_bn(nn.BatchNorm2d, X), 'class BatchNorm2d'),
    'batches first': (lambda l: recalibrate_bn(X, l.model), 'Expected a model, not list'),
    'DataLoaders': (lambda l: recalibrate_bn(l.model, l.dls), r'`batches` .* not a DataLoaders: .*`dls.train`'),
    'a model for batches': (lambda l: recalibrate_bn(l.model, l.model), '`batches` .* not a Sequential'),
    'a Learner for batches': (lambda l: bn_shift(l.model, l), '`batches` .* not a Learner'),
    'one batch': (lambda l: recalibrate_bn(l.model, X[0]), r'`batches` .* not a Tensor: give `\[x\]`'),
    'a dict': (lambda l: bn_shift(l.model, dict(x=X[0])), '`batches` .* not a dict'),
    'a dataset': (lambda l: bn_shift(l.model, TensorDataset(X[0])), '`batches` .* not a TensorDataset: give a DataLoader'),
    'a dataset of fastai': (lambda l: bn_shift(l.model, l.dls.train_ds), '`batches` .*: give a DataLoader of this dataset'),
    'a path': (lambda l: bn_shift(l.model, 'images'), "`batches` .* not 'images'"),
    'None': (lambda l: recalibrate_bn(l.model, None), '`batches` .* not None'),
    'names': (lambda l: recalibrate_bn(l.model, X, layers=['0.1']), r"`layers` has to be a glob .* not \['0.1'\]"),
    'a layer': (lambda l: recalibrate_bn(l.model, X, layers=l.model[0][1]), '`layers` has to be a glob .* not a BatchNorm2d'),
    'all layers': (lambda l: recalibrate_bn(l.model, X, layers=None), '`layers` has to be a glob .* not None'),
    'no method': (lambda l: recalibrate_bn(l.model, X, method=None), "None: choose one of 'batch', 'sequential'"),
    'method for preserve': (lambda l: recalibrate_bn(l.model, X, preserve='sequential'), "`preserve` .* not 'sequential'"),
    'a Learner, what is kept': (lambda l: kept_bytes(l, X[0]), 'Learner.*give its `.model`'),
    'half a batch': (lambda l: recalibrate_bn(l.model, X, n_batches=2.5), '`n_batches` is 2.5'),
    'true': (lambda l: bn_shift(l.model, X, n_batches=True), '`n_batches` is True'),
    'text': (lambda l: bn_shift(l.model, X, n_batches='2'), "`n_batches` is '2'"),
    'no input': (lambda l: recalibrate_bn(l.model, X, n_inp=0), '`n_inp` is 0'),
    'inputs': (lambda l: recalibrate_bn(l.model, X, n_inp='all'), "`n_inp` is 'all'"),
    'no snapshot': (lambda l: bn_drift(l.model, None), '`since` has to be a snapshot.* not None: .*bn_snapshot'),
    'the model': (lambda l: bn_drift(l.model, l.model), '`since` has to be a snapshot.* not a Sequential'),
    'a drift': (lambda l: bn_drift(l.model, bn_drift(l.model, snapshot(l.model))), '`since` .* not a DataFrame'),
    'numbers': (lambda l: bn_drift(l.model, {'0.1': 1.0}), '`since` has to be a snapshot.* not a dict'),
    'a state_dict': (lambda l: bn_drift(l.model, l.model.state_dict()), '`since` has to be a snapshot.* not a OrderedDict'),
    'lists': (lambda l: moved(l.model, {'0.1': dict(running_mean=[0.0])}), '`since` has to be a snapshot'),
}


@pytest.mark.parametrize('case', PLAIN)
def test_plain_functions(case):
    f, said = PLAIN[case]
    learn = make_learner()
    refused(learn, said, lambda: f(learn))


METHODS = {
    'a loader first': (lambda l: l.recalibrate_bn(l.dls.valid), '`ds_idx` .* not a TfmdDL: give a loader as `dl=…`'),
    'a loader first, shift': (lambda l: l.bn_shift(X), '`ds_idx` has to be the number of a dataset .*: give a loader as `dl=…`'),
    'true': (lambda l: l.bn_shift(True), '`ds_idx` .* not True'),
    'half': (lambda l: l.bn_shift(0.5), '`ds_idx` .* not 0.5'),
    'DataLoaders': (lambda l: l.recalibrate_bn(dl=l.dls), r'`dl` .* not a DataLoaders: .*`dls.train`'),
    'a name': (lambda l: l.recalibrate_bn(dl='valid'), "`dl` .* not 'valid'"),
    'a number': (lambda l: l.bn_shift(dl=1), '`dl` .* not 1'),
    'one batch': (lambda l: l.bn_shift(dl=X[0]), '`dl` .* not a Tensor'),
    'layers': (lambda l: l.recalibrate_bn(layers=list(l.model)), '`layers` has to be a glob'),
    'method': (lambda l: l.recalibrate_bn(method=None), "None: choose one of 'batch'"),
    'batches': (lambda l: l.recalibrate_bn(n_batches=2.5), '`n_batches` is 2.5'),
    'since': (lambda l: l.bn_drift(0), '`since` .* not 0: give a snapshot'),
    'since for the plot': (lambda l: l.plot_bn_drift(l.model), '`since` .* not a Sequential: give a snapshot'),
    'value': (lambda l: l.plot_bn_drift(snapshot(l.model), value=None), "None: choose one of 'mean_shift'"),
    'values': (lambda l: l.plot_bn_drift(snapshot(l.model), value=['kl', 'mean_shift']), "choose one of 'mean_shift'"),
    'a figure': (lambda l: l.plot_bn_drift(snapshot(l.model), ax=plt.figure()), '`ax` has to be Axes .* not a Figure'),
    'epochs': (lambda l: l.bn_find(epochs='3'), "`epochs` .* not '3'"),
    'no epochs': (lambda l: l.bn_find(epochs=0), '`epochs` .* not 0'),
    'a fit that is none': (lambda l: l.bn_find(fit='fit_sgdr'), "'fit_one_cycle'.*not 'fit_sgdr'"),
    'a fit of a function': (lambda l: l.bn_find(fit=len), 'see `bn_compare`'),
    'a rate below 0': (lambda l: l.bn_find(lr=-1), '`lr` .* not -1'),
    'rates for fine_tune': (lambda l: l.bn_find(lr=slice(1e-3)), 'has to be a number for `fine_tune`'),
    'memory': (lambda l: entering(l.precompute(max_mem='1GB')), "`max_mem` .* not '1GB'"),
    'versions': (lambda l: entering(l.precompute(n_aug=True)), '`n_aug` .* not True'),
    'type': (lambda l: entering(l.precompute(dtype='float16')), "'float16': choose one of"),
}


@pytest.mark.parametrize('case', METHODS)
def test_methods_of_the_learner(case):
    f, said = METHODS[case]
    learn = make_learner()
    refused(learn, said, lambda: f(learn))


def never():
    raise AssertionError('no Learner is needed to see that')


COMPARED = {
    'a model': (dict(get_learner=nn.Linear(1, 1)), '`get_learner` has to be a function .* not a Linear: .*lambda'),
    'DataLoaders': (dict(get_learner=make_dls()), '`get_learner` has to be a function .* not a DataLoaders'),
    'one policy': (dict(policies=Policy()), '`policies` is one policy'),
    'one policy as a dict': (dict(policies=dict(bn='frozen', bn_above='train')), '`policies` is one policy'),
    'a number': (dict(policies=3), '`policies` is a list'),
    'a Learner as a policy': (dict(policies={'a': make_learner()}), 'Learner .* is no policy'),
    'a callback as a policy': (dict(policies={'a': BatchNormFreeze()}), 'BatchNormFreeze.* is no policy'),
    'a layer as a policy': (dict(policies={'a': nn.BatchNorm2d(3)}), 'BatchNorm2d.* is no policy'),
    'numbers as a policy': (dict(policies={'a': torch.zeros(2)}), 'tensor.* is no policy'),
    'a Learner as a fit': (dict(fit=make_learner()), "`fit` is one of .* not .*Learner"),
    'a method of a Learner': (dict(fit=make_learner().fit), "`fit` is one of .* not .*Learner"),
    'a class': (dict(get_learner=Learner), '`get_learner` is called with nothing, but: missing.*dls'),
    'a function of data': (dict(get_learner=lambda dls: dls), '`get_learner` is called with nothing, but: missing.*dls.*lambda:'),
    'a function of seed and data': (dict(get_learner=lambda dls, seed: dls), '`get_learner` is called with `seed`, but: missing'),
    'a method of a Learner for one': (dict(get_learner=make_learner().fit), '`get_learner` has to be a function'),
    'none': (dict(policies=[]), 'no policy to run'),
    'unknown': (dict(policies='freeze'), "'freeze' is no policy"),
    'seeds': (dict(seeds=True), '`seeds` .* not True'),
    'seeds among others': (dict(seeds=[0, True]), '`seeds` .* not'),
    'seeds as text': (dict(seeds='12'), "`seeds` .* not '12'"),
    'no epochs': (dict(epochs=0), '`epochs` .* not 0'),
    'epochs': (dict(epochs='3'), "`epochs` .* not '3'"),
    'freeze point': (dict(freeze_to=True, fit='fit'), '`freeze_to` has to be an integer, not True'),
    'processes': (dict(n_jobs='2'), "`n_jobs` .* not '2'"),
    'no processes': (dict(n_jobs=0), '`n_jobs` .* not 0'),
    'results': (dict(results=5), '`results` has to be the path of a CSV file, or None, not 5'),
    'results of a run': (dict(results=pd.DataFrame()), '`results` has to be the path .* not a DataFrame'),
    'rate': (dict(lr='0.1'), "`lr` .* not '0.1'"),
}


@pytest.mark.parametrize('case', COMPARED)
def test_comparisons(case):
    kwargs, said = COMPARED[case]
    with pytest.raises((ValueError, TypeError), match=said):
        bn_compare(**{'get_learner': never, 'policies': ['train'], 'epochs': 1, 'seeds': 1, **kwargs})


def test_a_learner_in_place_of_a_function():
    learn = make_learner()
    refused(
        learn, '`get_learner` has to be a function that makes a new Learner each time, not a Learner: .*lambda', lambda: bn_compare(learn)
    )


@pytest.mark.parametrize('plot', [plot_scores, plot_differences, plot_score_curves, plot_gains, plot_bn_drift])
def test_plots(plot):
    for wrong, said in (
        (None, 'DataFrame.* not None'),
        (make_learner(), 'DataFrame.* not a Learner'),
        (pd.DataFrame(dict(a=[1])), 'no column'),
    ):
        with pytest.raises(ValueError, match=said):
            plot(wrong)


@pytest.mark.parametrize(
    'f, kwargs, said',
    [
        (demo, dict(seeds='3'), "--seeds '3': give a whole number"),
        (demo, dict(epochs=2.5), '--epochs 2.5'),
        (compare, dict(data='x', modes=['train']), r'--modes \[.train.\]'),
        (compare, dict(data='x', seeds=None), '--seeds None'),
        (compare, dict(data='x', freeze_to=True, fit='fit'), 'not True'),
    ],
)
def test_commands(f, kwargs, said):
    with pytest.raises(ValueError, match=said):
        f(**kwargs)


@pytest.mark.parametrize('block', [precomputed, fold_frozen])
@pytest.mark.parametrize('wrap', [lambda learn: learn.model, lambda learn: learn.dls, lambda learn: None])
def test_blocks_of_a_learner(block, wrap):
    learn = make_learner().freeze_to_bn(-1)
    refused(learn, '`learn` has to be a Learner, not', lambda: block(wrap(learn)).__enter__())
