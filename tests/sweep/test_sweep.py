"The checks of `python -m tests.sweep` see what they are there to see; every network has a row, whatever becomes of its process"

import importlib, multiprocessing, os, time

import pandas as pd, pytest, torch
from learners import body_and_head
from fastai.callback.core import Callback
from torchvision import models

import bnfreeze_fastai.fusion.convolution, bnfreeze_fastai.head.store, bnfreeze_fastai.learner
from bnfreeze_fastai.freeze.summary import BatchNormSummary
from tests.sweep import checks, rows
from tests.sweep.networks import Network, classifier, two_groups

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.slow]  # deprecated torchvision arguments
SIZE = 8
sweep = importlib.import_module('tests.sweep.__main__')


def small():
    torch.manual_seed(0)
    return checks.prepare(body_and_head(), SIZE)


def test_all_is_right():
    model = checks.prepare(models.mobilenet_v3_small(num_classes=2), 64)
    assert checks.check_summary(model, 64) == checks.check_modes(model, 64) == 'right'
    assert checks.check_precompute(model, 64) == 'refused: code between the layers of MobileNetV3'
    assert checks.check_fusion(model, 64) == '34 pairs exact, 0 left'
    assert (
        checks.check_remedies(Network('torchvision', 'mobilenetv3', 'mobilenet_v3_small'), model, {}, 64, '') == 'exact in vision_learner'
    )


def test_of_a_small_model():
    model = small()
    assert classifier(model) is model[1]
    assert checks.check_modes(model, SIZE) == 'right'
    assert checks.check_precompute(model, SIZE) == 'exact'
    assert checks.check_fusion(model, SIZE) == '2 pairs exact, 1 left'


class WritesFixed(Callback):
    "After the package's own check, so that only the sweep can see it"

    def after_fit(self):
        self.model[0][1].running_mean[0] += 1e-7


class TrainsFixed(Callback):
    def after_fit(self):
        self.model[0][0].weight.data[0] *= 1 + 1e-6


class TakesGradient(Callback):
    def before_step(self):
        self.model[0][1].weight.grad = None


class StopsStatistics(Callback):
    def before_batch(self):
        self.model[0][1].eval()


class Thaws(Callback):
    def after_fit(self):
        self.model[0][3].weight.requires_grad = False


SABOTAGE = {
    WritesFixed: r'wrong: affine-only, freeze_to\(0\), SGD: moved: 0.1.running_mean',
    TrainsFixed: r'wrong: train, freeze_to\(-1\), SGD: moved: 0.0.weight',
    TakesGradient: r'wrong: train, freeze_to\(0\), SGD: did not move: 0.1.weight',
    StopsStatistics: r'wrong: train, freeze_to\(0\), SGD: did not move: 0.1.num_batches_tracked',
    Thaws: r'wrong: train, freeze_to\(0\), SGD: did not move: 0.3.weight',
}


@pytest.mark.parametrize('cb', SABOTAGE, ids=lambda cb: cb.__name__)
def test_wrong_modes_are_seen(cb):
    assert pd.Series(checks.check_modes(small(), SIZE, cbs=cb())).str.fullmatch(SABOTAGE[cb]).all()


def altered(monkeypatch, owner, name, change):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def test_wrong_features_are_seen(monkeypatch):
    altered(monkeypatch, bnfreeze_fastai.head.store.Store, 'get', lambda batch: (batch[0] * 1.01, *batch[1:]))
    assert checks.check_precompute(small(), SIZE).startswith('wrong: off by ')


@pytest.mark.parametrize(
    'name,change',
    [
        ('scale_and_shift', lambda st: (st[0], st[1] + 1e-6)),
        ('scale_and_shift', lambda st: (st[0] * (1 + 1e-6), st[1])),
        ('channel_sums', lambda sums: sums * (1 + 1e-6)),
        ('_scaled', lambda dweight: dweight * (1 + 1e-6)),
    ],
)
def test_wrong_fusion_is_seen(monkeypatch, name, change):
    altered(monkeypatch, bnfreeze_fastai.fusion.convolution, name, change)
    assert checks.check_fusion(small(), SIZE).startswith('wrong: off by ')


def test_a_missing_row_of_the_summary_is_seen(monkeypatch):
    altered(monkeypatch, bnfreeze_fastai.learner, 'summarise', lambda shown: BatchNormSummary(shown.df[1:], shown.title))
    assert checks.check_summary(small(), SIZE) == 'wrong: 2 rows'


def crashes(network, pipe):
    pipe.send(dict(pixels=64, summary='right'))
    os._exit(3)


def hangs(network, pipe):
    pipe.send(dict(pixels=64, summary='right'))
    time.sleep(60)


def ends(network, pipe):
    pipe.send(dict(pixels=64, summary='right', modes='right'))


@pytest.mark.parametrize('work,told', [(crashes, 'crashed: exit code 3'), (hangs, 'out of time: 1 s'), (ends, 'right')])
def test_a_row_whatever_becomes_of_the_process(monkeypatch, work, told):
    for k, v in dict(CONTEXT=multiprocessing.get_context('fork'), SECONDS=1, work=work).items():
        monkeypatch.setattr(rows, k, v)
    row = rows.find_row(Network('timm', 'family', 'name'))
    assert row.pop('seconds') < 10
    assert row == dict(source='timm', family='family', network='name', pixels=64, summary='right', modes=told)


def test_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    plan, found = [Network('timm', name, f'{name}_s') for name in 'abc'], []

    def find(network):
        found.append(network.family)
        if len(found) == 2:
            raise KeyboardInterrupt
        told = 'right' if network.family == 'a' or len(found) > 4 else 'wrong: b'
        return dict(source='timm', family=network.family, network=network.name, modes=told)

    for k, v in dict(TABLE=tmp_path / 'table.csv', all_networks=lambda progress: plan, find_row=find).items():
        monkeypatch.setattr(sweep, k, v)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(set())
    for again in ((), (), ('failed',), ('a_s',)):
        sweep.main(set(again))
    assert ''.join(found) == 'cb' + 'ba' + '' + 'cb' + 'a'
    assert list(pd.read_csv(tmp_path / 'table.csv').family) == list('abc')
    assert 'wrong: b' in capsys.readouterr().out


def test_two_groups_are_the_model():
    model = models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=2)
    body, head = two_groups(model)
    assert set(head) == set(model.classifier.parameters()) and {*body, *head} == set(model.parameters())
