"What a held mode withstands, and what it leaves behind: checkpointing, copies, threads, conversion, tools that write statistics"

import copy, io, pickle, subprocess, sys, threading, warnings

import pytest, timm, torch, torch.nn.functional as F
from learners import bits, body_and_head, same
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bnfreeze_fastai.core import bn_mode, held_stats, hold_bn_mode, set_bn_mode
from bnfreeze_fastai.layers import bn_layers, MODES, norm_layers, stats_buffers
from bnfreeze_fastai.sync import revert_sync_bn

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
FIXED, MOVING = (['affine-only', 'frozen'], ['train', 'stats-only'])


def batches(n=3, shape=(6, 3, 8, 8)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def trained(model=None, size=(6, 3, 8, 8)):
    torch.manual_seed(0)
    model = body_and_head() if model is None else model
    model(torch.randn(size))
    return model


class Checkpointed(nn.Module):
    "`inner` in one checkpoint, or nested ones"

    def __init__(self, inner, use_reentrant, nested=False):
        super().__init__()
        self.inner, self.use_reentrant, self.nested = inner, use_reentrant, nested

    def forward(self, x):
        run = lambda f, x: checkpoint(f, x, use_reentrant=self.use_reentrant)
        if not self.nested:
            return run(self.inner, x)
        return run(lambda x: self.inner[1](run(self.inner[0], x)), x)


def steps(model, n=3):
    losses = []
    for x in batches(n):
        loss = model(x.requires_grad_()).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses


class TestARecomputedPassIsNoNewBatch:
    @pytest.mark.guarantee(9)
    @pytest.mark.parametrize('use_reentrant', [True, False])
    @pytest.mark.parametrize('nested', [False, True])
    @pytest.mark.parametrize('how,mode', [*(('hold', m) for m in MODES), *(('set', m) for m in MODES if m != 'train')])
    def test_equals_the_run_without(self, mode, use_reentrant, nested, how):
        plain, other = trained(), trained()
        wrapped = Checkpointed(other, use_reentrant, nested)
        results = []
        for model, bare in ((plain, plain), (wrapped, other)):
            if how == 'set':
                set_bn_mode(bare, mode)
                results.append(steps(model))
            else:
                with hold_bn_mode(model, mode):
                    results.append(steps(model))
        assert results[0] == results[1] and same(bits(plain.buffers()), other.buffers())
        grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (plain, other)]
        assert len(grads[0]) and same(*grads)

    def test_plain_pytorch_counts_twice(self):
        "The fault that is mended; if PyTorch mends it, the guard can go"
        model = Checkpointed(trained(), False)
        steps(model)
        assert model.inner[0][1].num_batches_tracked == 1 + 2 * 3

    @pytest.mark.parametrize('kind', ['momentum_none', 'instance', 'half', 'shared'])
    def test_kinds_of_layers(self, kind):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                return self.bn(self.bn(self.conv(x)))

        make = {
            'momentum_none': lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)),
            'instance': lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)),
            'half': lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
            'shared': Twice,
        }[kind]
        torch.manual_seed(0)
        plain = make()
        other = copy.deepcopy(plain)
        for model in (plain, Checkpointed(other, False)):
            with hold_bn_mode(model, 'train'):
                steps(model)
        assert same(bits(plain.buffers()), other.buffers())

    @pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0'])
    def test_timm(self, name):
        torch.manual_seed(0)
        plain = timm.create_model(name, num_classes=2, drop_rate=0, drop_path_rate=0)
        other = copy.deepcopy(plain)
        other.set_grad_checkpointing()
        for model in (plain, other):
            with hold_bn_mode(model, 'train'):
                for x in batches(2, (2, 3, 32, 32)):
                    model(x).sum().backward()
        assert same(bits(plain.buffers()), other.buffers())

    def test_checkpoint_sequential(self):
        plain, other = trained(), trained()
        with hold_bn_mode(plain, 'train'):
            plain[0](batches(1)[0]).sum().backward()
        with hold_bn_mode(other, 'train'):
            checkpoint_sequential(other[0], 3, batches(1)[0].requires_grad_(), use_reentrant=False).sum().backward()
        assert same(bits(plain[0].buffers()), other[0].buffers())

    def test_an_interrupted_recomputation_leaves_a_usable_model(self):
        model = trained()
        wrapped = Checkpointed(model, False)
        with hold_bn_mode(wrapped, 'train'):
            out = wrapped(batches(1)[0].requires_grad_())
            handle = model[1][3].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                out.sum().backward()
            handle.remove()
            tracked = model[0][1].num_batches_tracked.item()
            steps(wrapped, 1)
        assert model[0][1].num_batches_tracked == tracked + 1


class ParametrizedShift(nn.Module):
    def forward(self, w):
        return w + 0.5


def parametrized():
    model = body_and_head()
    parametrize.register_parametrization(model[0][1], 'weight', ParametrizedShift())
    return model


def pickled(model, module=pickle):
    return pickle.loads(module.dumps(model))


def saved_and_loaded(model):
    torch.save(model, f := io.BytesIO())
    return torch.load(io.BytesIO(f.getvalue()), weights_only=False)


def python_pickled(model):
    f = io.BytesIO()
    pickle._Pickler(f).dump(model)
    return pickle.loads(f.getvalue())


def cloudpickled(model):
    import cloudpickle

    return pickle.loads(cloudpickle.dumps(model))


COPIES = dict(
    deepcopy=copy.deepcopy,
    pickle=pickled,
    python_pickle=python_pickled,
    cloudpickle=cloudpickled,
    torch_save=saved_and_loaded,
    averaged=lambda m: AveragedModel(m).module,
    twice=lambda m: copy.deepcopy(copy.deepcopy(m)),
)


def traces(model):
    "What a layer of `model` has that is none of PyTorch's"
    own = {k for l in norm_layers(model).values() for k in vars(l)} & {'_bn_holds', '__reduce_ex__', '__deepcopy__', 'reset_running_stats'}
    return own | {type(h) for m in model.modules() for h in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]}


class TestCopies:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('how', COPIES)
    def test_carry_no_hold(self, how, mode):
        model = trained()
        with hold_bn_mode(model, mode):
            copied = COPIES[how](model)
            copied_layer = copy.deepcopy(model[0][1])
        assert not traces(copied) and not traces(copied_layer) and not traces(model)
        before = bits(copied.buffers())
        copied.train()(batches(1)[0])
        assert not any(torch.equal(a, b) for a, b in zip(before, copied.buffers()))
        assert [l.training for l in bn_layers(copied)] == [True] * 3

    @pytest.mark.parametrize('how', COPIES)
    def test_take_along_what_was_set_for_good(self, how):
        model = trained()
        set_bn_mode(model, 'frozen')
        with hold_bn_mode(model, 'stats-only'):
            copied = COPIES[how](model)
        for m in (copied, model):
            before = bits(m.buffers())
            m.train()(batches(1)[0])
            assert same(before, m.buffers()) and {bn_mode(l) for l in bn_layers(m)} == {'frozen'}
            set_bn_mode(m, 'train')
            m(batches(1)[0])
            assert not same(before, m.buffers()) and not traces(m)

    def test_of_parametrized_layers(self):
        model = trained(parametrized())
        with hold_bn_mode(model, 'frozen'):
            copied = copy.deepcopy(model)
        assert not traces(copied) and isinstance(copied[0][1], nn.BatchNorm2d)
        set_bn_mode(model, 'frozen')
        with hold_bn_mode(model, 'train'):
            copied = copy.deepcopy(model)
        before = bits(copied.buffers())
        copied(batches(1)[0])
        assert same(before, copied.buffers())

    def test_others_hooks_stay(self):
        model, calls = trained(), []
        handle = model[0][1].register_forward_hook(lambda *_: calls.append(1))
        with hold_bn_mode(model, 'frozen'):
            inside = model[0][1].register_forward_pre_hook(lambda *_: calls.append(2))
            copied = copy.deepcopy(model)
        copied(batches(1)[0])
        assert sorted(calls) == [1, 2]
        for h in (handle, inside):
            h.remove()
        model(batches(1)[0])
        assert sorted(calls) == [1, 2]

    def test_load_without_this_package(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        with hold_bn_mode(model, 'frozen'):
            torch.save(model, tmp_path / 'model.pth')
            (tmp_path / 'copy.pkl').write_bytes(pickle.dumps(copy.deepcopy(model)))
        code = """
import pickle, sys, torch
sys.modules['bnfreeze_fastai'] = None
for model in (torch.load('model.pth', weights_only=False), pickle.load(open('copy.pkl', 'rb'))):
    model(torch.randn(2, 3, 4, 4))
    assert model[1].num_batches_tracked == 1
"""
        subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)

    @pytest.mark.filterwarnings('ignore:`torch.jit')
    def test_a_copy_can_be_scripted(self):
        model = trained()
        with hold_bn_mode(model, 'frozen'):
            scripted = torch.jit.script(copy.deepcopy(model))
        assert torch.equal(scripted.eval()(batches(1)[0]), model.eval()(batches(1)[0]))


class Slow(nn.BatchNorm2d):
    "Lets another thread in while it runs"

    def forward(self, x):
        barrier.wait()
        out = super().forward(x)
        barrier.wait()
        return out


barrier = threading.Barrier(2)


@pytest.mark.parametrize('how', ['hold', 'set'])
def test_threads_in_one_layer_leave_its_flag(how):
    model = nn.Sequential(Slow(3))
    model[0].running_mean += 1
    before = bits(model.buffers())

    def run():
        for _ in range(20):
            threads = [threading.Thread(target=model, args=(batches(1)[0],)) for _ in range(2)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert model[0].training and same(before, model.buffers())

    if how == 'set':
        set_bn_mode(model, 'frozen')
        run()
    else:
        with hold_bn_mode(model, 'frozen'):
            run()


def test_replicas_of_data_parallel_are_held():
    "As `DataParallel` makes them, one for each device, and runs them in threads"
    model = trained()
    with hold_bn_mode(model, 'frozen'):
        layer = model[0][1]
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
        replica.running_mean, replica.running_var = layer.running_mean.clone(), layer.running_var.clone()
        before = replica.running_mean.clone()
        replica(torch.randn(2, 4, 5, 5))
        assert torch.equal(replica.running_mean, before) and replica.training and layer.training


class TestSyncBatchNorm:
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('copied', [False, True])
    def test_a_set_mode_goes_along_there_and_back(self, mode, copied):
        model = trained()
        set_bn_mode(model, mode)
        if copied:
            model = copy.deepcopy(model)
        tensors, state = {id(t) for t in (*model.parameters(), *model.buffers())}, copy.deepcopy(model.state_dict())
        for convert, kinds in (
            (nn.SyncBatchNorm.convert_sync_batchnorm, {nn.SyncBatchNorm}),
            (revert_sync_bn, {nn.BatchNorm1d, nn.BatchNorm2d}),
        ):
            converted = convert(model)
            assert converted is model and {type(l) for l in bn_layers(model)} == kinds
            assert {bn_mode(l) for l in bn_layers(model)} == {mode}
            assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
        assert [type(l) for l in bn_layers(model)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
        before = bits(model.buffers())
        model.train()(batches(1)[0])
        assert same(before, model.buffers()) == (mode in FIXED)
        assert list(state) == list(model.state_dict())

    def test_what_a_layer_is_comes_back(self):
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        layers = [
            (nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, eps=1e-3, momentum=None)),
            (nn.ConvTranspose2d(2, 3, 1), nn.BatchNorm2d(3, affine=False)),
            (nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3, track_running_stats=False)),
            (nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.3)),
        ]
        model = nn.ModuleList(nn.Sequential(*pair) for pair in layers)
        model[0][1].eval()
        look = lambda: [(type(l), l.eps, l.momentum, l.affine, l.track_running_stats, l.training) for l in bn_layers(model)]
        before = look()
        revert_sync_bn(nn.SyncBatchNorm.convert_sync_batchnorm(model))
        assert look() == before and {type(l) for l in bn_layers(model)} == set(kinds)

    def test_the_model_itself_and_shared_layers(self):
        layer = trained(nn.BatchNorm2d(3))
        set_bn_mode(layer, 'frozen')
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        back = revert_sync_bn(sync)
        assert type(back) is nn.BatchNorm2d and back.weight is layer.weight and bn_mode(back) == 'frozen'
        shared = nn.SyncBatchNorm(3)
        model = revert_sync_bn(nn.ModuleDict(dict(a=shared, b=nn.Sequential(shared))))
        assert model['a'] is model['b'][0] and type(model['a']) is nn.BatchNorm2d

    def test_a_model_that_flattens_in_code_of_its_own_is_told_by_an_input(self):
        class Flattens(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norms = nn.Conv2d(3, 4, 3), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm1d(4)])

            def forward(self, x):
                return self.norms[1](self.norms[0](self.conv(x)).mean((2, 3)))

        model, x = Flattens(), batches(1)[0]
        out = model.eval()(x)
        model.train()
        model.conv.eval()
        flags = [m.training for m in model.modules()]
        revert_sync_bn(nn.SyncBatchNorm.convert_sync_batchnorm(model), x)
        assert [type(l) for l in model.norms] == [nn.BatchNorm2d, nn.BatchNorm1d]
        assert flags == [m.training for m in model.modules()] and torch.equal(model.eval()(x), out)
        assert not traces(model)

    def test_two_children_that_are_one_layer(self):
        sync = nn.SyncBatchNorm(3)
        model = revert_sync_bn(nn.Sequential(sync, sync))
        assert model[0] is model[1] and type(model[0]) is nn.BatchNorm2d

    def test_refused_while_a_mode_is_held(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(trained()).eval()
        with hold_bn_mode(model, 'frozen'), pytest.raises(ValueError, match='leave the fit or the `with` block'):
            revert_sync_bn(model)
        assert {type(l) for l in bn_layers(model)} == {nn.SyncBatchNorm}

    def test_a_mode_set_back_to_train_is_not_taken_along(self):
        model = trained()
        set_bn_mode(model, 'frozen')
        set_bn_mode(model, 'train')
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert {bn_mode(l) for l in bn_layers(model)} == {'train'} and not traces(model)


def head_first():
    "A model whose batch norm in front is not the one that is held"
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def lightning_like(loader, model):
    "Re-estimation as other libraries write it: new buffers, and a plain average"
    layers = [(l, l.momentum) for l in bn_layers(model)]
    for l, _ in layers:
        l.running_mean, l.running_var = torch.zeros_like(l.running_mean), torch.ones_like(l.running_var)
        l.num_batches_tracked *= 0
        l.momentum = None
    model.train()
    for x in loader:
        model(x)
    for l, momentum in layers:
        l.momentum = momentum


class TestToolsThatReestimate:
    @pytest.mark.parametrize('tool', [update_bn, lightning_like])
    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('copied', [False, True])
    def test_work_on_a_model_with_modes_set(self, tool, mode, copied):
        plain, model = trained(), trained()
        set_bn_mode(model, mode)
        if copied:
            model = AveragedModel(model)
        tool(batches(), plain)
        tool(batches(), model)
        assert same(bits(plain.buffers()), bn_buffers(model))
        before = bits(bn_buffers(model))
        model.train()(batches(1)[0])
        assert same(before, bn_buffers(model)) == (mode in FIXED)

    @pytest.mark.parametrize('mode', FIXED)
    @pytest.mark.parametrize('make', [body_and_head, head_first])
    @pytest.mark.parametrize('held', ['all', 'last'])
    def test_raise_before_anything_is_lost_while_held(self, mode, make, held):
        model = trained(make())
        modes = {l: 'train' for l in bn_layers(model)} if held == 'last' else {}
        modes |= {l: mode for l in bn_layers(model)[-1 if held == 'last' else 0 :]}
        before, momenta = bits(model.buffers()), [l.momentum for l in bn_layers(model)]
        with held_stats(modes):
            with pytest.raises(RuntimeError, match=r'held.*recalibrate_bn\(model, batches\)'):
                update_bn(batches(), model)
            assert same(before, model.buffers()) and momenta == [l.momentum for l in bn_layers(model)]
        update_bn(batches(), model)
        assert not same(before, model.buffers())

    def test_work_where_a_hold_lets_everything_move(self):
        plain, model = trained(), trained()
        update_bn(batches(), plain)
        with hold_bn_mode(model, 'stats-only'):
            update_bn(batches(), model)
        assert same(bits(plain.buffers()), model.buffers())

    def test_raise_where_a_plain_average_tells_nothing(self):
        "With `momentum=None` a held layer cannot see that it is re-estimated"
        model = trained(nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
        set_bn_mode(model, 'frozen')
        for m in (model, copy.deepcopy(model)):
            before = bits(m.buffers())
            with pytest.raises(RuntimeError, match='recalibrate_bn'):
                update_bn(batches(), m)
            assert same(before, m.buffers())


def bn_buffers(model):
    return [b for l in bn_layers(model) for b in stats_buffers(l).values()]


class NormEval(nn.Module):
    "Puts its own batch norm in eval mode, as mmdetection's backbones do with `norm_eval=True`"

    def __init__(self):
        super().__init__()
        self.inner = body_and_head()

    def forward(self, x):
        return self.inner(x)

    def train(self, mode=True):
        super().train(mode)
        if mode:
            for l in bn_layers(self.inner[0]):
                l.eval()
        return self


class RoundTheHooks(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        bn, x = self.bn, self.conv(x)
        if self.how == 'forward':
            return bn.forward(x)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)


class TestWhatAModelDoesByItselfIsTold:
    @pytest.mark.parametrize('mode', MODES)
    def test_its_train_puts_batch_norm_in_eval(self, mode):
        model = trained(NormEval()).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with hold_bn_mode(model, mode):
                model.train()(batches(1)[0])
                model.eval()(batches(1)[0])
        told = [str(w.message) for w in caught if 'did not move as their mode says' in str(w.message)]
        assert len(told) == (mode in MOVING) and all("['inner.0.1', 'inner.0.4']" in t for t in told)

    @pytest.mark.parametrize('how', ['forward', 'functional'])
    @pytest.mark.parametrize('mode', MODES)
    def test_it_goes_round_the_hooks(self, how, mode):
        model = trained(RoundTheHooks(how))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with hold_bn_mode(model, mode):
                model(batches(1)[0])
        told = [str(w.message) for w in caught if 'moved though they were held' in str(w.message)]
        assert len(told) == (mode in FIXED) and all("['bn']" in t and 'call `layer(x)`' in t for t in told)

    @pytest.mark.parametrize('mode', MODES)
    def test_nothing_is_told_of_an_ordinary_model(self, mode):
        model = trained()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with hold_bn_mode(model, mode):
                for train in (True, False, True):
                    model.train(train)(batches(1)[0])
            with hold_bn_mode(model, mode):
                model.eval()(batches(1)[0])
            with hold_bn_mode(model, mode):
                pass

    def test_nothing_is_told_where_an_inner_hold_lets_statistics_move(self):
        model = trained()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with hold_bn_mode(model, 'frozen'), hold_bn_mode(model, 'train'):
                model(batches(1)[0])


class TestStatisticsThatCannotDoWhatTheModeSays:
    @pytest.mark.parametrize('mode', MODES)
    def test_tracking_switched_off_by_hand(self, mode):
        model = trained()
        model[0][1].track_running_stats = False
        assert [bn_mode(l) for l in bn_layers(model)] == ['affine-only', 'train', 'train']
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            set_bn_mode(model, mode)
        told = [str(w.message) for w in caught if 'track_running_stats' in str(w.message)]
        assert len(told) == (mode in MOVING) and all("['0.1']" in t for t in told)
        before = bits(model[0][1].buffers())
        model.train()(batches(1)[0])
        assert same(before, model[0][1].buffers()) and not MODES[bn_mode(model[0][1])].updates_stats

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    @pytest.mark.parametrize('buffer', ['running_mean', 'running_var'])
    def test_not_finite(self, mode, value, buffer):
        model = trained()
        getattr(model[0][4], buffer)[2] = value
        with pytest.warns(UserWarning, match=r"\['0.4'\] are not finite"):
            set_bn_mode(model, mode)


def test_layers_can_be_made_while_a_group_norm_has_a_mode():
    norm = nn.GroupNorm(2, 4)
    set_bn_mode(norm, 'frozen')
    assert bn_mode(nn.BatchNorm2d(3)) == 'train' and bn_mode(norm) == 'frozen'


class Holder:
    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    'act',
    [
        lambda m: set_bn_mode(m, 'frozen'),
        lambda m: hold_bn_mode(m, 'frozen').__enter__(),
        bn_layers,
        norm_layers,
        revert_sync_bn,
        lambda m: set_bn_mode([m], 'frozen'),
    ],
)
@pytest.mark.parametrize(
    'wrap,words',
    [
        (Holder, 'Holder: give its `.model`'),
        (lambda m: 3, r'int \(3\)'),
        (lambda m: None, 'NoneType'),
        (lambda m: type(m), 'the class Sequential'),
    ],
)
def test_something_else_than_a_model(act, wrap, words):
    model = trained()
    with pytest.raises(ValueError, match=f'Expected a model.*{words}'):
        act(wrap(model))
    assert not traces(model) and all(p.requires_grad for p in model.parameters())
