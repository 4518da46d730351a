"What hands other than the callback's do to a Learner's layers, and what is said of it"

import warnings

import fastai.callback.schedule
import pytest, timm, torch
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.torch_core import params, set_seed, trainable_params
from fastai.vision.learner import create_body, create_head
from learners import bits, body_and_head, make_learner, same, two_groups
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torchvision.models import resnet18

from bnfreeze_fastai.core import bn_mode
from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.freeze.drift import BatchNormDrift
from bnfreeze_fastai.freeze.fuse import BatchNormFuse
from bnfreeze_fastai.layers import bn_layers, MODES, norm_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:load_learner')


def trained(**kwargs):
    learn = make_learner(**kwargs)
    learn.fit(1)
    return learn


def modes(learn):
    return dict(learn.bn_summary().df[['layer', 'mode']].to_numpy())


def told(act):
    "Texts of the warnings of `act`"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        act()
    return [str(w.message) for w in caught if 'never trained' not in str(w.message) and 'load_learner' not in str(w.message)]


class TestThawedByHandBelowTheFreezePoint:
    @pytest.mark.parametrize('thaw', [lambda m: m[0][0], lambda m: m[0][3]])
    @pytest.mark.parametrize('remake', [lambda l: None, lambda l: l.create_opt()])
    @pytest.mark.parametrize('mode', MODES)
    def test_a_layer_trains_and_no_neighbour_changes(self, mode, remake, thaw):
        learn = trained().freeze_to_bn(-1, bn=mode)
        remake(learn)
        before, body = modes(learn), Body(learn.model[0])
        layer = thaw(learn.model)
        layer.requires_grad_(True)
        weight = bits(layer.parameters())
        assert modes(learn) == before
        texts = told(lambda: learn.fit(2)) + told(lambda: learn.fit(1))
        name = next(n for n, m in learn.model.named_modules() if m is layer)
        assert len(texts) == 1 and f"'{name}.weight'" in texts[0] and 'thawed by hand' in texts[0]
        assert modes(learn) == before and not same(weight, layer.parameters())
        assert body.moved() - {'others'} == may_move(mode)
        assert f'Thawed by hand below the freeze point: {name}.weight' in repr(learn.bn_summary())

    def test_a_whole_group_counts_as_trained_and_that_is_said(self):
        learn = trained().freeze_to_bn(-1, throughout=False)
        for i in (0, 3):
            learn.model[0][i].requires_grad_(True)
        texts = told(lambda: learn.fit(1))
        assert len(texts) == 1 and '[0] were thawed by hand' in texts[0]
        assert set(modes(learn).values()) == {'train'} and 'Parameter groups thawed by hand' in repr(learn.bn_summary())

    def test_fastais_own_methods_are_no_hands(self):
        learn = trained(cbs=BatchNormFreeze())
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            warnings.filterwarnings('ignore', '.*(never trained|pickle)')
            learn.freeze()
            learn.fit(1)
            learn.create_opt()
            learn.unfreeze()
            learn.fit(1)
            learn.freeze_to_bn(-1)
            learn.fine_tune(1)
            learn.freeze_to(1)
            learn.fit(1)


def flat():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2),
    )  # fmt: skip


def resnet():
    return nn.Sequential(create_body(resnet18(), pretrained=False), create_head(512, 2, lin_ftrs=[4], concat_pool=False, ps=0))


def plain_resnet():
    model = resnet18(num_classes=2)
    model.fc = nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 2))
    return model


NETS = dict(
    flat=(flat, lambda m: m[:7]),
    two=(body_and_head, lambda m: m[0]),
    resnet=(resnet, lambda m: m[0]),
    stem_in_the_root=(plain_resnet, lambda m: nn.ModuleList([c for n, c in m.named_children() if n != 'fc'])),
    timm=(
        lambda: timm.create_model('efficientnet_b0', num_classes=2, drop_rate=0),
        lambda m: nn.ModuleList([m.conv_stem, m.bn1, m.blocks]),
    ),
)


class TestABodyFrozenByHand:
    @pytest.mark.parametrize('net', NETS)
    @pytest.mark.parametrize('splitter', [trainable_params, lambda m: list(m.parameters())])
    def test_is_held_and_that_is_said(self, net, splitter):
        make, part = NETS[net]
        torch.manual_seed(0)
        model = make()
        model.train()(torch.randn(4, 3, 32, 32))
        body = part(model)
        body.requires_grad_(False)
        learn = make_learner(model=model, splitter=splitter, size=32, cbs=BatchNormFreeze(), lr=1e-3)
        inside = {n for n, l in norm_layers(model).items() if any(l is m for m in body.modules())}
        before, shown = bits([*body.parameters(), *body.buffers()]), modes(learn)
        assert shown == {n: 'frozen' if n in inside else 'train' for n in norm_layers(model)}
        texts = told(lambda: learn.fit(1))
        assert len(texts) == 1 and 'frozen by hand' in texts[0] and all(repr(n) in texts[0] for n in inside)
        assert same(before, [*body.parameters(), *body.buffers()]) and modes(learn) == shown
        assert {bn_mode(norm_layers(model)[n]) for n in inside} <= {'stats-only', 'train'}  # outside a fit nothing holds
        assert 'Frozen by hand, so in the mode of the frozen part' in repr(learn.bn_summary())
        assert not told(lambda: learn.fit(1))

    def test_another_mode_for_it(self):
        model = body_and_head()
        model[0].requires_grad_(False)
        learn = make_learner(model=model, splitter=trainable_params, cbs=BatchNormFreeze(bn='stats-only'))
        body = Body(model[0])
        learn.fit(1)
        assert body.moved() == {'stats'}

    def test_thawed_again(self):
        model = body_and_head()
        model[0].requires_grad_(False)
        learn = make_learner(model=model, splitter=lambda m: list(m.parameters()), cbs=BatchNormFreeze())
        learn.fit(1)
        model[0].requires_grad_(True)
        body = Body(model[0])
        learn.fit(1)
        assert body.moved() == {'stats', 'affine', 'others'}

    @pytest.mark.parametrize('layer', [lambda m: m[0][0], lambda m: m[0][1]])
    def test_one_layer_changes_no_other(self, layer):
        model = body_and_head()
        layer(model).requires_grad_(False)
        learn = make_learner(model=model, splitter=trainable_params, cbs=BatchNormFreeze())
        assert set(modes(learn).values()) <= {'train', 'stats-only'}
        learn.fit(1)
        assert set(modes(learn).values()) <= {'train', 'stats-only'}


class TestLayersThatTheOptimizerDoesNotKnow:
    def test_a_new_head(self):
        learn = trained().freeze_to_bn(-1)
        learn.model[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        assert modes(learn)['1.2'] == 'train' and '1.2.weight, 1.2.bias' in repr(learn.bn_summary())
        texts = told(lambda: learn.fit(1))
        assert len(texts) == 1 and "'1.3.weight'" in texts[0] and 'learn.create_opt()' in texts[0]
        learn.create_opt()
        before = bits(learn.model[1].parameters())
        assert not told(lambda: learn.fit(1)) and not any(map(torch.equal, before, learn.model[1].parameters()))
        assert modes(learn) == {'0.1': 'frozen', '0.4': 'frozen', '1.2': 'train'}

    def test_weights_assigned(self):
        learn = trained().freeze_to_bn(-1)
        state = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.model.load_state_dict(state, assign=True)
        assert modes(learn) == {'0.1': 'frozen', '0.4': 'frozen', '1.2': 'train'}
        assert any('learn.create_opt()' in text for text in told(lambda: learn.fit(1)))

    def test_a_splitter_that_leaves_parameters_out_is_no_news(self):
        learn = make_learner(splitter=lambda m: [params(m[0]), list(m[1][3].parameters())], cbs=BatchNormFreeze())
        assert not told(lambda: learn.fit(1))


class Own(nn.Module):
    "Keeps a running average and is none of PyTorch's norm layers"

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer('running_var', torch.ones(n))

    def forward(self, x):
        if self.training:
            self.running_var.lerp_(x.detach().var((0, 2, 3)), 0.1)
        return x * (self.weight / self.running_var.sqrt())[:, None, None]


class TestBuffersThatNoModeGoverns:
    @pytest.mark.parametrize(
        'make,name',
        [
            (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Own(4)), '0.1.running_var'),
            (lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), '0.0.weight_u'),
            (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), '0.0.parametrizations.weight.0._u'),
            (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.EvoNorm2dB0(4)), '0.1.running_var'),
        ],
    )  # fmt: skip
    def test_named_in_the_summary_and_once_in_a_fit(self, make, name):
        model = nn.Sequential(make(), body_and_head()[1])
        learn = trained(model=model).freeze_to_bn(-1)
        for shown in (repr(learn.bn_summary()), learn.bn_summary()._repr_html_()):
            assert name in shown and 'no mode governs' in shown
        texts = told(lambda: learn.fit(2)) + told(lambda: learn.fit(1))
        assert len([t for t in texts if name in t and 'no mode governs' in t]) == 1 == len(texts)

    def test_nothing_is_said_of_those_that_train_or_stand_still(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(Own(4), body_and_head()[1]))
        model[0].register_buffer('scale', torch.ones(3))
        learn = trained(model=model).freeze_to_bn(-1)
        assert 'governs' not in repr(learn.bn_summary()) and not told(lambda: learn.fit(1))


class TestVerifyLooksToTheEnd:
    @pytest.mark.parametrize('event', ['after_train', 'before_validate', 'after_validate'])
    @pytest.mark.parametrize('tensor', [lambda m: m[0][1].running_mean, lambda m: m[0][1].bias, lambda m: m[0][0].weight])
    @pytest.mark.parametrize('epochs', [1, 2])
    def test_what_is_written_after_the_training_part_of_the_last_epoch(self, event, tensor, epochs):
        class Writes(Callback):
            order = 100

            def write(self):
                if self.epoch == epochs - 1:
                    tensor(self.learn.model).data.add_(1e-3)

        setattr(Writes, event, Writes.write)
        learn = trained().freeze_to_bn(-1)
        with pytest.raises(RuntimeError, match='fixed by the policy or the freeze point, but changed'):
            learn.fit(epochs, cbs=Writes())
        learn.fit(1)

    @pytest.mark.guarantee(10)
    def test_a_tool_that_reestimates_statistics_after_a_fit_works(self):
        class Swa(Callback):
            def after_fit(self):
                if not self.learn.lock.locked():
                    torch.optim.swa_utils.update_bn(self.learn.dls.train, self.learn.model)

        learn = trained().freeze_to_bn(-1)
        learn.fit(1, cbs=Swa())
        assert all(l.num_batches_tracked == 3 and l.running_mean.any() for l in bn_layers(learn.model))

    @pytest.mark.guarantee(10)
    def test_within_a_fit_it_raises_before_anything_is_lost(self):
        class Swa(Callback):
            def after_epoch(self):
                torch.optim.swa_utils.update_bn(self.learn.dls.train, self.learn.model)

        learn = trained().freeze_to_bn(-1)
        before = Body(learn.model[0])
        with pytest.raises(RuntimeError, match='a reset would lose them'):
            learn.fit(1, cbs=Swa())
        assert before.moved() == set()

    def test_a_model_that_goes_round_the_hooks_is_blamed(self):
        class Round(nn.Sequential):
            def forward(self, x):
                x = self[0][0](x)
                return self[1](self[0][1].forward(x))

        model = Round(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), body_and_head()[1])
        learn = trained(model=model).freeze_to_bn(-1)
        with pytest.raises(RuntimeError, match=r'the model calls `layer.forward\(x\)` or `F.batch_norm` itself'):
            learn.fit(1)

    def test_a_model_whose_train_puts_batch_norm_in_eval(self):
        class NormEval(nn.Sequential):
            def train(self, mode=True):
                super().train(mode)
                self[0][1].eval()
                return self

        model = NormEval(*body_and_head())
        learn = trained(model=model).freeze_to_bn(-1, bn='stats-only')
        texts = told(lambda: learn.fit(2))
        assert len(texts) == 1 and "['0.1'] did not move as their mode says" in texts[0]
        assert not told(lambda: learn.freeze_to_bn(-1, bn='frozen').fit(1))


class SkipsBadSteps(Callback):
    "As a gradient scaler does"

    def before_step(self):
        from fastai.callback.core import CancelStepException

        if any(p.grad is not None and not p.grad.isfinite().all() for p in self.learn.model.parameters()):
            raise CancelStepException


class Spoils(Callback):
    order = 50

    def __init__(self, value, at):
        self.value, self.at = value, at

    def before_batch(self):
        if self.training and (self.epoch, self.iter) in self.at:
            x = self.learn.xb[0].clone()
            x[0, 0, 0, 0] = self.value
            self.learn.xb = (x,)


class TestNoPoison:
    @pytest.mark.guarantee(8)
    @pytest.mark.parametrize('value', [float('inf'), float('nan'), 3e38])
    @pytest.mark.parametrize('mode', ['train', 'stats-only'])
    @pytest.mark.parametrize('at', [[(0, 1)], [(0, 0), (0, 2), (1, 1)]])
    def test_a_batch_with_infinite_moments_counts_for_nothing(self, value, mode, at):
        learn = trained().freeze_to_bn(-1, bn=mode, bn_above=mode)
        texts = told(lambda: learn.fit(2, cbs=[SkipsBadSteps(), Spoils(value, at)]))
        first = [t for t in texts if t.startswith(f'Batch {at[0][1]} of epoch {at[0][0]}')]
        reached = ['0.1'] if value == 3e38 else list(norm_layers(learn.model))  # whose variance alone is not finite
        assert len(first) == 1 and all(f"'{n}'" in first[0] for n in reached)
        assert texts[-1].startswith(f'{len(at)} of 6 training batches') and len(texts) == 2
        assert all(b.isfinite().all() for b in learn.model.buffers()) and torch.isfinite(torch.tensor(learn.validate()[0]))
        assert {int(norm_layers(learn.model)[n].num_batches_tracked) for n in reached} == {3 + 6 - len(at)}

    @pytest.mark.guarantee(8)
    def test_statistics_that_are_nan_already_are_named_when_they_are_held(self):
        learn = trained()
        learn.model[0][4].running_var[1] = float('nan')
        assert any("['0.4'] are not finite" in t for t in told(lambda: learn.freeze_to_bn(-1)))

    def test_plain_fastai_is_poisoned(self):
        learn = trained()
        learn.fit(1, cbs=[SkipsBadSteps(), Spoils(float('inf'), [(0, 1)])])
        assert not all(b.isfinite().all() for b in learn.model.buffers())


class TestOneCallbackInTwoLearners:
    def test_each_learner_goes_by_its_own_freeze_point(self):
        cb = BatchNormFreeze()
        a, b = trained(cbs=cb), trained(cbs=cb)
        a.freeze()
        bodies = Body(a.model[0]), Body(b.model[0])
        b.fit(1)
        a.fit(1)
        b.fit(1)
        assert bodies[0].moved() == set() and bodies[1].moved() == {'stats', 'affine', 'others'}
        assert set(modes(a).values()) == {'frozen', 'train'} and set(modes(b).values()) == {'train'}
        assert active_callback(a) is not active_callback(b) is cb and a.batch_norm_freeze is active_callback(a)

    @pytest.mark.parametrize('make', [BatchNormFreeze, BatchNormFuse, BatchNormDrift])
    def test_folds_one_after_the_other_and_back(self, make):
        cb, learns = make(), []
        for _ in range(3):
            learns.append(make_learner(cbs=cb))
            learns[-1].fit(1)
        for learn in [*learns, *learns[::-1]]:
            learn.fit(1)
        assert len({id(c) for learn in learns for c in learn.cbs if isinstance(c, make)}) == 3
        assert all(c.learn is learn for learn in learns for c in learn.cbs if isinstance(c, make))
        for learn in learns:
            learn.remove_cb(make)
            assert learn.splitter is two_groups and not any(isinstance(c, make) for c in learn.cbs)

    def test_a_record_of_drift_stays_with_its_learner(self):
        cb = BatchNormDrift()
        a = make_learner(cbs=cb)
        a.fit(2)
        b = make_learner(cbs=cb)
        b.fit(1)
        a.fit(1)
        assert (len(a.batch_norm_drift.epochs), len(b.batch_norm_drift.epochs)) == (3, 1)


class TestCheckpointing:
    @pytest.mark.guarantee(9)
    @pytest.mark.parametrize('use_reentrant', [True, False])
    @pytest.mark.parametrize('mode', MODES)
    def test_a_fit_equals_the_one_without(self, mode, use_reentrant):
        from torch.utils.checkpoint import checkpoint

        class Checkpointed(nn.Sequential):
            def forward(self, x):
                return self[1](checkpoint(self[0], x.requires_grad_(), use_reentrant=use_reentrant))

        results = []
        for make in (nn.Sequential, Checkpointed):
            torch.manual_seed(0)
            learn = make_learner(model=make(*body_and_head())).freeze_to_bn(0, bn_above=mode)
            set_seed(0)
            learn.fit(2)
            results.append(learn.model.state_dict().values())
        assert same(*results)


def test_a_summary_tells_the_truth_of_statistics_switched_off():
    learn = trained().freeze_to_bn(0)
    learn.model[0][1].track_running_stats = False
    assert modes(learn) == {'0.1': 'affine-only', '0.4': 'train', '1.2': 'train'}
    assert any('`track_running_stats` was switched off' in t for t in told(lambda: learn.freeze_to_bn(0)))
