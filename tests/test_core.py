"Every kind of norm layer in every mode, in plain PyTorch"

import copy, pickle, subprocess, sys, warnings

import pytest, torch
from learners import bits, body_and_head, same
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNorm2d, SplitBatchNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.core import bn_mode, hold_bn_mode, set_affine, set_bn_mode
from bnfreeze_fastai.layers import affine_params, bn_layers, MODES, norm_layers, stats_buffers


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Shared(nn.Module):
    "One batch norm under two names, used twice"

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm2d(4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


KINDS = dict(
    bn=lambda: nn.BatchNorm2d(4),
    affineless=lambda: nn.BatchNorm2d(4, affine=False),
    cumulative=lambda: nn.BatchNorm2d(4, momentum=None),
    no_stats=lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lazy=nn.LazyBatchNorm2d,
    own=lambda: OwnBatchNorm(4),
    shared=Shared,
    instance=lambda: nn.InstanceNorm2d(4),
    instance_stats=lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    lazy_instance=lambda: nn.LazyInstanceNorm2d(affine=True, track_running_stats=True),
    timm_act=lambda: BatchNormAct2d(4),
    timm_split=lambda: SplitBatchNorm2d(4, num_splits=2),
    timm_group=lambda: GroupNormAct(4, num_groups=2),
    timm_layer=lambda: LayerNorm2d(4),
    group=lambda: nn.GroupNorm(2, 4),
    layer=lambda: nn.LayerNorm([4, 6, 6]),
    in_sequence=lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
)
SHAPES = {nn.BatchNorm1d: [(8, 4), (8, 4, 5)], nn.BatchNorm2d: [(8, 4, 6, 6)], nn.BatchNorm3d: [(4, 4, 3, 3, 3)]}


def tensors(model):
    layers = [l for l in norm_layers(model).values()]
    return [b for l in layers for b in stats_buffers(l).values()], [p for l in layers for p in affine_params(l)]


def step(model, x):
    for p in model.parameters():
        p.grad = None
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', ['set', 'hold'])
@pytest.mark.filterwarnings('ignore:.*(running statistics|Lazy modules)')
def test_every_kind_in_every_mode(kind, mode, how):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1), KINDS[kind]()), torch.randn(8, 4, 6, 6, requires_grad=True)
    model(x)
    stats, affine = tensors(model)
    before = bits(stats), bits(affine)

    def check():
        for train in (model.train, model.eval, model.train):
            train()
            assert {bn_mode(l) for l in norm_layers(model).values()} == {mode}
        step(model, x)
        assert same(before[0], stats) == (not stats or not MODES[mode].updates_stats)
        assert same(before[1], affine) == (not affine or not MODES[mode].trains_affine)

    if how == 'hold':
        with hold_bn_mode(model, mode):
            check()
    else:
        set_bn_mode(model, mode)
        check()
        set_bn_mode(model, 'train')
    assert {bn_mode(l) for l in norm_layers(model).values()} == {'train'}
    before = bits(stats)
    step(model, x)
    assert not stats or not same(before, stats)
    assert all('_bn_hold' not in l.__dict__ and not l._forward_pre_hooks and not l._forward_hooks for l in bn_layers(model))


@pytest.mark.parametrize('cls', SHAPES)
def test_dimensions(cls):
    for shape in SHAPES[cls]:
        layer, x = cls(4), torch.randn(shape)
        layer(x)
        mean = layer.running_mean.clone()
        with hold_bn_mode(layer, 'frozen'):
            layer.train()
            out = layer(x)
        assert torch.equal(layer.running_mean, mean) and torch.equal(out, layer.eval()(x))


def test_sync_batch_norm_in_eval():
    layer = nn.SyncBatchNorm(4).eval()
    layer.running_mean += 1
    set_bn_mode(layer, 'frozen')
    before = bits(layer.state_dict().values())
    layer(torch.randn(8, 4, 6, 6))
    assert same(before, layer.state_dict().values()) and bn_mode(layer) == 'frozen'


@pytest.mark.parametrize('cls', [FrozenBatchNorm2d, FrozenBatchNormAct2d])
@pytest.mark.parametrize('mode', MODES)
def test_frozen_by_construction(cls, mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls(4))
    before, flags = bits(model[1].state_dict().values()), model[1].__dict__.keys()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        set_bn_mode(model, mode)
    assert norm_layers(model) == {'1': model[1]} and bn_layers(model) == [] and bn_mode(model[1]) == 'frozen'
    assert same(before, model[1].state_dict().values()) and model[1].__dict__.keys() == flags


def test_round_trips_lose_nothing():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4, affine=False)
    )
    model(torch.randn(4, 3, 5, 5))
    look = lambda: (
        [(id(p), p.requires_grad) for p in model.parameters()]
        + [(type(l), l.momentum, l.affine, l.training, *map(float, l.num_batches_tracked[None])) for l in bn_layers(model)]
    )
    state, before = copy.deepcopy(model.state_dict()), look()
    for mode in [*MODES, 'frozen', 'train']:
        set_bn_mode(model, mode)
    assert look() == before and same(state.values(), model.state_dict().values())


def test_set_mode_travels_with_copies_and_a_hold_does_not():
    model = body_and_head()
    model(torch.randn(4, 3, 8, 8))
    pickled = lambda m: pickle.loads(pickle.dumps(m))
    set_bn_mode(model, 'frozen')
    for copied in (copy.deepcopy(model), pickled(model)):
        before = bits(copied.buffers())
        copied.train()(torch.randn(4, 3, 8, 8))
        assert same(before, copied.buffers()) and bn_mode(copied[0][1]) == 'frozen'
        set_bn_mode(copied, 'train')
        copied(torch.randn(4, 3, 8, 8))
        assert not same(before, copied.buffers()) and bn_mode(model[0][1]) == 'frozen'
    set_bn_mode(model, 'train')
    with hold_bn_mode(model, 'frozen'):
        for copied in (copy.deepcopy(model), pickled(model)):
            before = bits(copied.buffers())
            copied.train()(torch.randn(4, 3, 8, 8))
            assert (
                not same(before, copied.buffers()) and bn_mode(copied[0][1]) == 'stats-only'
            )  # `requires_grad` is copied, the hold is not


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_hold_is_undone_on_every_way_out(error):
    model, x = body_and_head(), torch.randn(4, 3, 8, 8)
    model(x)
    set_bn_mode(model[1], 'stats-only')
    modes = lambda: {n: bn_mode(l) for n, l in norm_layers(model).items()}
    before = modes()
    with pytest.raises(error), hold_bn_mode(model, 'affine-only'):
        assert set(modes().values()) == {'affine-only'}
        raise error
    assert modes() == before and all(m.training for m in model.modules())


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_interrupted_forward_leaves_the_flag(error):
    class Broken(nn.BatchNorm2d):
        def forward(self, x):
            raise error

    model = nn.Sequential(Broken(3))
    model[0].running_mean += 1
    with pytest.raises(error), hold_bn_mode(model, 'frozen'):
        model(torch.randn(4, 3, 8, 8))
    assert model[0].training


def test_hold_inside_hold_and_inside_set():
    model, x = body_and_head(), torch.randn(4, 3, 8, 8)
    model(x)
    set_bn_mode(model, 'frozen')
    with hold_bn_mode(model, 'train', layers='0.*'):
        with hold_bn_mode(model, 'affine-only', layers='0.1'):
            assert [bn_mode(model[0][i]) for i in (1, 4)] == ['affine-only', 'train'] and bn_mode(model[1][2]) == 'frozen'
        before = bits(model[0].buffers())
        model(x)
        assert not same(before, model[0].buffers())
    assert {bn_mode(l) for l in norm_layers(model).values()} == {'frozen'}


def test_flag_is_what_train_and_eval_said():
    model = body_and_head()
    model(torch.randn(4, 3, 8, 8))
    with hold_bn_mode(model, 'frozen'):
        model.eval()
        model(torch.randn(4, 3, 8, 8))
    assert not any(m.training for m in model.modules())


def test_gradient_checkpointing_and_mixed_precision():
    model, x = body_and_head(), torch.randn(4, 3, 8, 8, requires_grad=True)
    model(x)
    before = bits(model.buffers())
    with hold_bn_mode(model, 'affine-only'), torch.autocast('cpu', dtype=torch.bfloat16):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert same(before, model.buffers()) and model[0][1].weight.grad is not None


def test_compiled_model_follows_every_mode_set_before_its_first_call():
    torch.compiler.reset()
    model, x = body_and_head(), torch.randn(4, 3, 8, 8)
    model(x)
    set_bn_mode(model, 'frozen')
    compiled, before = torch.compile(model, backend='eager'), bits(model.buffers())
    compiled.train()(x)
    assert same(before, model.buffers()) and list(norm_layers(compiled)) == ['0.1', '0.4', '1.2']


def test_wrappers_names_inside_the_model():
    inner = nn.Sequential(nn.BatchNorm2d(3))
    model = nn.ModuleDict(dict(module=nn.DataParallel(inner), body=torch.compile(body_and_head())))
    assert list(norm_layers(model)) == ['module.0', 'body.0.1', 'body.0.4', 'body.1.2']


def test_a_norm_layer_as_the_model():
    layer = nn.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    assert norm_layers(layer) == {'': layer}
    set_bn_mode(layer, 'frozen')
    before = bits(layer.buffers())
    layer.train()(torch.randn(4, 3))
    assert same(before, layer.buffers())


@pytest.mark.parametrize('opt', [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_torch_optimizer_passes_by_what_is_fixed(opt):
    model, x = body_and_head(), torch.randn(4, 3, 8, 8)
    optimizer = opt(model.parameters(), lr=0.1, weight_decay=0.1, **(dict(momentum=0.9) if opt is torch.optim.SGD else {}))

    def train():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as fastai's does

    train()
    set_bn_mode(model[0], 'frozen')
    before = bits([t for i in (1, 4) for t in model[0][i].state_dict().values()])
    train()
    assert same(before, [t for i in (1, 4) for t in model[0][i].state_dict().values()])


def test_tied_weight_is_fixed_if_either_layer_fixes_it():
    a, b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    b.weight = a.weight
    set_affine({a: 'train', b: 'frozen'})
    assert not a.weight.requires_grad and a.bias.requires_grad
    set_affine({b: 'frozen', a: 'train'})
    assert not a.weight.requires_grad and a.bias.requires_grad


@pytest.mark.parametrize('bad', ['eval', 'Train', '', None, 3, ['train']])
def test_unknown_mode(bad):
    model = body_and_head()
    for act in (lambda: set_bn_mode(model, bad), lambda: hold_bn_mode(model, bad).__enter__()):
        with pytest.raises(ValueError, match="'train', 'stats-only', 'affine-only', 'frozen'"):
            act()
    assert {bn_mode(l) for l in bn_layers(model)} == {'train'}


def test_bad_layers_change_nothing():
    model = body_and_head()
    with pytest.raises(ValueError, match="'0.1', '0.4', '1.2'"), hold_bn_mode(model, 'frozen', layers='1.7'):
        pass
    with pytest.raises(ValueError, match='Expected a model'):
        set_bn_mode([model[0][1], 'head'], 'frozen')
    with pytest.raises(ValueError, match='Linear is no norm layer'):
        bn_mode(nn.Linear(2, 2))
    assert {bn_mode(l) for l in bn_layers(model)} == {'train'}


def test_layers_can_be_given_as_a_list_or_a_dict():
    model = body_and_head()
    model(torch.randn(4, 3, 8, 8))
    set_bn_mode(bn_layers(model[0]), 'frozen')
    assert [bn_mode(l) for l in bn_layers(model)] == ['frozen', 'frozen', 'train']
    set_bn_mode(norm_layers(model), 'stats-only')
    assert {bn_mode(l) for l in bn_layers(model)} == {'stats-only'}


def test_model_without_norm_layers():
    model = nn.Linear(2, 2)
    set_bn_mode(model, 'frozen')
    with hold_bn_mode(model, 'frozen'):
        pass
    assert bn_layers(model) == [] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('mode,warned', [(m, not MODES[m].updates_stats) for m in MODES])
def test_promises_that_cannot_be_kept_are_told(mode, warned):
    for layer, words in (
        (nn.BatchNorm2d(3, track_running_stats=False), 'No running statistics to hold in'),
        (nn.BatchNorm2d(3), 'never trained'),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            set_bn_mode(nn.Sequential(layer), mode)
        assert [words in str(w.message) and "['0']" in str(w.message) for w in caught] == [True] * warned


def test_core_needs_no_fastai():
    code = 'import sys, bnfreeze_fastai.core, bnfreeze_fastai.freeze.stages, bnfreeze_fastai.freeze.guard; assert not {"fastai", "pandas"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
