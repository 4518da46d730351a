"What older versions lack, also where the versions at hand have it"

import pytest, torch
from fastai.callback.core import Callback
from fastcore.script import anno_parser
from learners import bits, body_and_head, make_learner, same
from torch import nn
from torch.torch_version import TorchVersion

from bnfreeze_fastai.cli import COMMANDS, main
from bnfreeze_fastai.compat import parsed, rewrites_stats, uncompiled
from bnfreeze_fastai.core import hold_bn_mode, set_bn_mode
from bnfreeze_fastai.freeze.recalibrate import BatchNormRecalibrate
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift


def rounding(cls):
    "An instance norm that changes the last bits of its statistics in evaluation mode, as PyTorch before 2.11 does"

    class Rounding(cls):
        def forward(self, x):
            out = super().forward(x)
            if not self.training:
                self.running_mean.mul_(1 + 1e-6)
                self.running_var.mul_(1 + 1e-6)
            return out

    return Rounding(4, affine=True, track_running_stats=True)


CASES = [(nn.InstanceNorm1d, (7, 4, 6)), (nn.InstanceNorm2d, (7, 4, 3, 3)), (nn.InstanceNorm3d, (7, 4, 2, 2, 2))]


@pytest.fixture
def before_2_11(monkeypatch):
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.10.1+cu128'))


@pytest.mark.parametrize('how', ['hold', 'set'])
@pytest.mark.parametrize('mode', ['frozen', 'affine-only'])
@pytest.mark.parametrize('cls,shape', CASES)
def test_statistics_that_instance_norm_rounds_stay_bit_for_bit(cls, shape, mode, how, before_2_11):
    model = nn.Sequential(rounding(cls))
    model(torch.randn(shape))
    before = bits(model.buffers())

    def passes():
        for training in (True, False, True):
            model.train(training)(torch.randn(shape))
            assert same(before, model.buffers()) and model[0].training == training

    if how == 'set':
        set_bn_mode(model, mode)
        passes()
    else:
        with hold_bn_mode(model, mode):
            passes()


def test_statistics_that_instance_norm_rounds_in_a_validation_are_given_back(before_2_11):
    learn, trained = make_learner(body_and_head(lambda n: rounding(nn.InstanceNorm2d))), []
    note = Callback(after_train=lambda cb: trained.append(bits(learn.model.buffers())))
    learn.fit(2, cbs=[BatchNormRecalibrate(), note])
    assert same(trained[1], learn.model.buffers())


@pytest.mark.parametrize('cls,shape', CASES)
def test_instance_norm_itself(cls, shape):
    model = nn.Sequential(cls(4, track_running_stats=True))
    for _ in range(3):
        model(torch.randn(shape))
    before = bits(model.buffers())
    with hold_bn_mode(model, 'frozen'):
        for _ in range(5):
            model.train()(torch.randn(shape))
            assert same(before, model.buffers())


def test_a_forward_pass_that_breaks_puts_them_back(before_2_11):
    layer = rounding(nn.InstanceNorm1d)
    before = bits(layer.buffers())
    layer.register_forward_hook(lambda *_: 1 / 0)
    with hold_bn_mode(layer, 'frozen'), pytest.raises(ZeroDivisionError):
        layer(torch.randn(7, 4, 6))
    assert same(before, layer.buffers())


def test_what_rounds():
    assert not rewrites_stats(nn.BatchNorm1d(4)) and not rewrites_stats(nn.LayerNorm(4))
    assert rewrites_stats(nn.InstanceNorm1d(4, track_running_stats=True)) == (torch.__version__ < (2, 11))


@pytest.mark.parametrize('part', ['a layer', 'in place'])
@pytest.mark.parametrize('measure', [recalibrate_bn, bn_shift])
def test_compiled_layers_before_2_6(part, measure, monkeypatch):
    monkeypatch.delattr(torch.compiler, 'set_stance', raising=False)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), torch.randn(8, 3)
    measure(torch.compile(model, backend='eager'), [x], progress=False)
    if part == 'a layer':
        model[0] = torch.compile(model[0], backend='eager')
    else:
        model.compile(backend='eager')
    before = bits(model.buffers())
    with pytest.raises(ValueError, match=r'compiled.*2\.6'):
        measure(model, [x], progress=False)
    assert same(before, model.buffers()) and model.training


def test_the_switch_is_used_where_there_is_one():
    if not hasattr(torch.compiler, 'set_stance'):
        pytest.skip('it came with PyTorch 2.6')
    calls = []
    compiled = torch.compile(lambda x: calls.append(torch.compiler.is_compiling()) or x + 1, backend='eager')
    with uncompiled():
        compiled(torch.ones(2))
    assert calls == [False]


WITH_DASHES = ['--valid-pct', '--skip-unreadable', '--freeze-to']


@pytest.mark.parametrize('spell', [lambda o: o, lambda o: o.replace('-', '_').replace('__', '--', 1)], ids=['dashes', 'underscores'])
def test_options_have_dashes_and_take_underscores(spell, capsys):
    args = ['my_data-set', spell('--freeze-to'), '-2', f'{spell("--valid-pct")}=0.25', spell('--skip-unreadable'), '--out', 'my_out']
    options = parsed(anno_parser(COMMANDS['compare']), args)
    assert (options.data, options.freeze_to, options.valid_pct, options.out) == ('my_data-set', -2, 0.25, 'my_out')
    assert options.skip_unreadable is True
    with pytest.raises(SystemExit):
        main(['compare', '--help'])
    told = capsys.readouterr().out
    assert all(option in told for option in WITH_DASHES) and '_to ' not in told and '--valid_pct' not in told


def test_a_beginning_of_an_option_will_do():
    options = parsed(anno_parser(COMMANDS['compare']), ['data', '--skip', '--freeze', '0', '--valid_p', '0.5', '--weights=my_file.pth'])
    assert (options.skip_unreadable, options.freeze_to, options.valid_pct, options.weights) == (True, 0, 0.5, 'my_file.pth')


def test_what_follows_two_dashes_is_no_option():
    assert parsed(anno_parser(COMMANDS['compare']), ['--freeze_to', '0', '--', '--my_data']).data == '--my_data'


@pytest.mark.parametrize('option', ['--freeze_to', '--freeze-to'])
def test_errors_name_the_option_as_the_help_does(option, capsys):
    with pytest.raises(SystemExit) as e:
        main(['compare', 'data', option, 'many'])
    assert e.value.code == 2 and '--freeze-to' in capsys.readouterr().err
