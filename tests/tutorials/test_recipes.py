"""Recipes for other libraries: the code blocks that the page of recipes shows and does not run, and what it says of their kin.

What is not installed is skipped: pip install lightning segmentation-models-pytorch peft onnx onnxscript torchao"""

import json, logging, re, subprocess, sys, warnings
from collections import Counter
from contextlib import ExitStack
from copy import deepcopy

import pytest, torch, torch.ao.nn.intrinsic.qat as nniqat, torch.nn.functional as F
from conftest import ROOT
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import params, trainable_params
from learners import make_learner
from torch import nn
from torch.ao.quantization import disable_observer, get_default_qat_qconfig, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import bnfreeze_fastai.all as bnfreeze
from bnfreeze_fastai.all import bn_mode, fused_bn, hold_bn_mode, MODES, norm_layers, set_bn_mode, snapshot
from bnfreeze_fastai.digits import small_resnet
from bnfreeze_fastai.stats.distances import moved

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning', 'ignore:.*reduce_range', 'ignore:.*were never trained', 'ignore:.*frozen by hand'
)


def library(name):
    return pytest.importorskip(name, reason=f'{name} is not installed, which the recipe is for')


NOTEBOOK = json.loads((ROOT / 'nbs' / 'tutorials' / 'recipes.ipynb').read_text(encoding='utf-8'))
CELLS = [''.join(c['source']) for c in NOTEBOOK['cells']]


def code_blocks():
    "What each section of the page shows without running it, by the section's heading"
    sections = re.split(r'^## ', '\n'.join(CELLS), flags=re.M)
    return {s.splitlines()[0]: re.findall(r'^```python\n(.*?)^```', s, flags=re.M | re.S) for s in sections}


SECTIONS = code_blocks()


def run(source, **given):
    "The names that a code block of the page leaves, given those that it takes from the cells before it"
    names = {**{n: getattr(bnfreeze, n) for n in dir(bnfreeze)}, 'torch': torch, 'nn': nn, 'F': F, 'params': params, 'Learner': Learner}
    names |= {'CrossEntropyLossFlat': CrossEntropyLossFlat, **given}
    exec(compile(source, 'recipes', 'exec'), names)
    return names


def trained_once(make, *size):
    "A network whose statistics are not the initial ones"
    torch.manual_seed(0)
    model = make()
    model.train()(torch.randn(16, 3, *size))
    return model


def stats_moved(model, before):
    "Names of norm layers whose statistics moved"
    rows = moved(model, before)
    return {*rows.layer[rows.stats_moved > 0]}


def train(model, steps=2):
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        model.train()(torch.randn(4, 3, 64, 64)).square().mean().backward()
        opt.step()
        opt.zero_grad()


class TestLightning:
    @pytest.fixture
    def lightning(self):
        lightning = library('lightning')
        for name in ('lightning.pytorch', 'lightning.fabric'):
            logging.getLogger(name).setLevel(logging.ERROR)
        return lightning

    @pytest.fixture
    def given(self, lightning):
        torch.manual_seed(1)
        loader = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.randint(5, (32,))), 16)
        return dict(model=trained_once(small_resnet, 16, 16), loader=loader)

    def trainer(self, lightning, **kwargs):
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        return lightning.Trainer(max_epochs=2, accelerator='cpu', **quiet, **kwargs)

    def calls_train(self, lightning):
        "As Lightning before 2.2 did at the start of each epoch"
        return type('CallsTrain', (lightning.Callback,), {'on_train_epoch_start': lambda self, trainer, module: module.train()})()

    def test_block_holds_the_body(self, lightning, given):
        before = snapshot(given['model'])
        trainer = self.trainer(lightning, callbacks=[self.calls_train(lightning)])
        run(SECTIONS['Your own loop or Lightning'][0], trainer=trainer, **given)
        assert stats_moved(given['model'], before) == {'1.2'}
        assert {bn_mode(l) for l in norm_layers(given['model']).values()} == {'train'}

    def test_an_error_in_a_fit_ends_the_hold(self, lightning, given):
        def fails(*args):
            raise KeyError('in training')

        trainer = self.trainer(lightning, callbacks=[type('Fails', (lightning.Callback,), {'on_train_batch_end': fails})()])
        with pytest.raises(KeyError, match='in training'):
            run(SECTIONS['Your own loop or Lightning'][0], trainer=trainer, **given)
        assert {bn_mode(l) for l in norm_layers(given['model']).values()} == {'train'}

    def test_callback_fixes_statistics_from_its_epoch_on(self, lightning, given):
        seen = []

        class Watch(lightning.Callback):
            def on_train_epoch_end(self, trainer, module):
                seen.append(snapshot(module))

        blocks = SECTIONS['Your own loop or Lightning']
        names = run(blocks[0].rpartition('\nwith ')[0] + '\n' + blocks[1], **given)
        start = snapshot(names['task'])
        callbacks = [names['FixStatistics'](1), self.calls_train(lightning), Watch()]
        self.trainer(lightning, callbacks=callbacks).fit(names['task'], given['loader'])
        everywhere = {*norm_layers(names['task'])}
        assert stats_moved(names['task'], start) == everywhere and stats_moved(names['task'], seen[0]) == set()
        assert (moved(names['task'], seen[0]).affine_moved > 0).all()


@pytest.mark.parametrize('encoder', ['resnet18', 'mobilenet_v2', 'tu-efficientnet_lite0'])
def test_segmentation_models(encoder):
    library('segmentation_models_pytorch')
    torch.manual_seed(0)
    items = [(torch.randn(3, 64, 64), torch.randint(2, (64, 64))) for _ in range(8)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0)
    block = SECTIONS['Segmentation models'][0].replace("'resnet18'", repr(encoder))
    found = []

    def watched_train(model):
        before = snapshot(model)
        train(model)
        found.append(stats_moved(model, before))

    names = run(block, dls=dls, train=watched_train)
    assert found == [{n for n in norm_layers(names['model']) if n.startswith('decoder.')}] != [set()]
    rows = names['learn'].bn_summary().df.groupby('group')[['stats_moved', 'affine_moved']].max()
    assert (rows.loc[0] == 0).all() and (rows.loc[1] > 0).all()
    assert all(m.weight.requires_grad for m in names['model'].encoder.modules() if isinstance(m, nn.Conv2d))


class TestLoRA:
    @pytest.fixture
    def difference(self, tmp_path, monkeypatch):
        "By how much the outputs of the adapter that was loaded differ, after a change of the block"
        library('peft')
        monkeypatch.chdir(tmp_path)
        network = trained_once(lambda: resnet18(num_classes=2), 64, 64)

        def difference(*change):
            block = SECTIONS['LoRA with PEFT'][0]
            assert not change or change[0] in block
            block = block.replace(*change) if change else block
            names = run(block, network=deepcopy(network), same_network=deepcopy(network), train=train)
            x = torch.randn(4, 3, 64, 64)
            with torch.no_grad():
                return (names['model'].eval()(x) - names['loaded'].eval()(x)).abs().max().item()

        return difference

    def test_held_statistics_make_the_adapter_whole(self, difference):
        assert difference() == 0

    def test_otherwise_it_is_another_function(self, difference):
        assert difference("set_bn_mode(model, 'frozen')", 'pass') > 0.01

    def test_batch_norm_that_trains_can_be_saved(self, difference):
        saved = "'bn1', 'bn2', 'downsample.1', 'fc'"
        assert any(saved in text for text in CELLS)
        assert difference("modules_to_save=['fc'])", f'modules_to_save=[{saved}])\nset_bn_mode = lambda *_: None') == 0

    def test_learner(self):
        peft = library('peft')
        config = peft.LoraConfig(r=2, target_modules=['conv1', 'conv2'], modules_to_save=['fc'])
        model = peft.get_peft_model(trained_once(lambda: resnet18(num_classes=2), 64, 64), config)
        learn = make_learner(model=model, splitter=trainable_params, size=32)
        before = {n: p.clone() for n, p in learn.model.named_parameters() if p.requires_grad}
        learn.freeze_to_bn(0, bn_above='frozen').fit(1)
        rows = learn.bn_summary().df
        assert {*rows['mode']} == {'frozen'} and (rows[['stats_moved', 'affine_moved']] == 0).all(axis=None)
        assert all(not torch.equal(before[n], p) for n, p in learn.model.named_parameters() if n in before and 'lora_B' in n)


def qat_of(model, x):
    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping(torch.backends.quantized.engine), (x,))


class TestQuantisation:
    @pytest.fixture(scope='class')
    def x(self):
        torch.manual_seed(0)
        return torch.randn(8, 3, 16, 16)

    @pytest.fixture
    def model(self, x):
        model = qat_of(trained_once(small_resnet, 16, 16), x)
        model(x)
        return model

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('lasting', [True, False])
    def test_modes(self, model, x, mode, lasting):
        with ExitStack() as stack:
            set_bn_mode(model, mode) if lasting else stack.enter_context(hold_bn_mode(model, mode))
            before = snapshot(model)
            model.train()(x).square().mean().backward()
            assert bool(stats_moved(model, before)) == MODES[mode].updates_stats
            assert {l.weight.grad is not None for l in norm_layers(model).values()} == {MODES[mode].trains_affine}

    @pytest.mark.parametrize('mode', ['affine-only', 'frozen'])
    @pytest.mark.usefixtures('fused_at_any_size')
    def test_held_it_computes_in_training_what_it_computes_in_evaluation(self, model, x, mode):
        model.apply(disable_observer)
        assert not torch.equal(model.train()(x), model.eval()(x))
        set_bn_mode(model, mode)
        assert torch.equal(model.train()(x), model.eval()(x))
        with fused_bn(model):
            assert torch.equal(model.train()(x), model.eval()(x))

    def test_conversion_after_a_hold(self, model, x):
        set_bn_mode(model, 'frozen')
        model(x)
        int8 = convert_fx(deepcopy(model).eval())
        assert [*norm_layers(int8)] == ['1.2'] and int8(x).shape == (8, 5)

    def test_a_mode_that_pytorchs_own_freeze_defeats_warns(self, model, x):
        model.apply(nniqat.freeze_bn_stats)
        before = snapshot(model)
        with pytest.warns(UserWarning, match=r"\['0.0.bn'.*did not move"), hold_bn_mode(model, 'train'):
            model.train()(x)
        assert stats_moved(model, before) == {'1.2'}

    @pytest.mark.parametrize('kind', [nniqat.ConvBn1d, nniqat.ConvBnReLU1d, nniqat.ConvBn2d, nniqat.ConvBnReLU2d, nniqat.ConvBn3d])
    def test_kinds(self, kind):
        dims = int(kind.__name__[-2])
        layer = kind(2, 3, 1, qconfig=get_default_qat_qconfig(torch.backends.quantized.engine))
        x = torch.randn(4, 2, *[5] * dims)
        assert [*norm_layers(layer)] == ['bn']
        before = snapshot(layer)
        with hold_bn_mode(layer, 'frozen'):
            layer.train()(x)
        assert stats_moved(layer, before) == set()
        layer.train()(x)
        assert stats_moved(layer, before) == {'bn'}

    def test_a_graph_has_no_layers_to_hold(self, x):
        library('torchao')
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        model = trained_once(small_resnet, 16, 16)
        set_bn_mode(model, 'affine-only')
        config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
        graph = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), x86.X86InductorQuantizer().set_global(config))
        by_batch = lambda: [n.args[5] for n in graph.graph.nodes if 'batch_norm' in str(n.target)]
        assert not norm_layers(graph) and Counter(by_batch()) == {True: 9, False: 1}
        move_exported_model_to_eval(graph)
        assert not any(by_batch())


@pytest.mark.distributed
@pytest.mark.long
class TestTwoForwardPasses:
    def launched(self, folder, script):
        (folder / 'script.py').write_text(script, encoding='utf-8')
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'script.py']
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    def script(self):
        return next(text for text in CELLS if text.startswith('script = ')).split("'''")[1]

    def test_without_a_broadcast_gradients_are_those_of_one_process(self, tmp_path):
        res = self.launched(tmp_path, self.script())
        assert res.returncode == 0 and 'gradients as in one process' in res.stdout, res.stderr
        assert re.search('no error$|modified by an inplace operation', res.stdout, flags=re.M)

    @pytest.mark.parametrize('mode', ['train', 'affine-only'])
    def test_statistics_that_move_differ(self, tmp_path, mode):
        script = self.script().partition('pairs = ')
        script = script[0].replace("'affine-only'", repr(mode)) + ''.join(script[1:]).partition('expected')[0] + DIFFERENCE
        res = self.launched(tmp_path, script)
        assert res.stdout == f'level:{mode == "affine-only"};' * 2, res.stderr

    def test_through_fastai(self, tmp_path):
        block = ''.join(f'    {line}\n' for line in SECTIONS['Two forward passes on several GPUs'][0].splitlines())
        block = block.replace('sync_bn=False,', 'sync_bn=False, cpu=True,')
        res = self.launched(tmp_path, THROUGH_FASTAI.format(tests=str(ROOT / 'tests'), block=block))
        assert res.returncode == 0 and res.stdout.splitlines()[-1] == 'True 0.0', res.stdout + res.stderr


DIFFERENCE = """
in_two_processes(net := network(), broadcast_buffers=False)
both = net[1].running_mean.clone()
dist.all_reduce(both)
print(f'level:{torch.equal(both/2, net[1].running_mean)};', end='')
"""

THROUGH_FASTAI = """
import sys, warnings, torch
sys.path.insert(0, {tests!r})
warnings.filterwarnings('ignore')
from fastai.distributed import *
from fastai.callback.all import *
from fastai.torch_core import rank_distrib
from learners import make_learner
import bnfreeze_fastai.learner
torch.Tensor.cuda = lambda t: t

class Told(Callback):
    order = 50
    def before_batch(self): self.learn.broadcasts = self.learn.model.broadcast_buffers

def main():
    learn = make_learner(cbs=Told())
    learn.model(learn.dls.one_batch()[0])
    learn.freeze_to_bn(-1)
{block}
    if rank_distrib() == 0: print(not learn.broadcasts, learn.bn_summary().df.query('group == 0').stats_moved.max())

if __name__ == '__main__': main()
"""


class TestExport:
    @pytest.fixture
    def given(self):
        torch.manual_seed(0)
        x = torch.randn(8, 3, 8, 8)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        model(x)
        return dict(model=model, x=x)

    @pytest.mark.parametrize('training', ['TRAINING', 'PRESERVE'])
    @pytest.mark.parametrize('mode', MODES)
    def test_block(self, given, tmp_path, monkeypatch, mode, training):
        onnx = library('onnx')
        monkeypatch.chdir(tmp_path)
        before = snapshot(given['model'])
        run(SECTIONS['Export with fixed statistics'][0].replace('affine-only', mode).replace('.TRAINING', f'.{training}'), **given)
        nodes = {n.op_type: n for n in onnx.load('model.onnx').graph.node}
        flag = {a.name: a.i for a in nodes['BatchNormalization'].attribute}['training_mode']
        moves = MODES[mode].updates_stats
        assert (flag, len(nodes['BatchNormalization'].output)) == ((1, 3) if moves else (0, 1)) and 'Dropout' in nodes
        assert bool(stats_moved(given['model'], before)) == moves and given['model'].training

    @pytest.mark.parametrize('mode', ['train', 'frozen'])
    @pytest.mark.parametrize('optimize', [True, False])
    def test_the_newer_exporter_writes_inference(self, given, mode, optimize):
        library('onnx'), library('onnxscript')
        set_bn_mode(given['model'], mode)
        how = dict(dynamo=True, optimize=optimize, verbose=False, training=torch.onnx.TrainingMode.TRAINING)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            nodes = torch.onnx.export(given['model'].train(), (given['x'],), **how).model_proto.graph.node
        norms = [n for n in nodes if n.op_type == 'BatchNormalization']
        assert len(norms) == (not optimize) and not any(a.name == 'training_mode' and a.i for n in norms for a in n.attribute)
