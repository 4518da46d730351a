"Training on stored features is what training without them is, and leaves nothing behind"

import gc, os, random, signal, subprocess, sys, warnings
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import fastai.callback.schedule
import numpy as np, pytest, torch
from conftest import on_linux, ROOT
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelTrainException,
    FetchPredsCallback,
    GatherPredsCallback,
)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader, SkipItemException
from fastai.data.transforms import ToTensor
from fastai.interpret import ClassificationInterpretation
from fastai.metrics import accuracy
from fastai.torch_basics import ItemTransform, Transform
from fastai.torch_core import params, set_seed, TensorCategory
from fastai.vision.augment import FlipItem, Normalize, Resize
from fastai.vision.core import PILImage
from fastai.vision.learner import create_timm_model, create_unet_model, create_vision_model, model_meta
from heads import dropout_head, small, train
from learners import bits, body_and_head, image, label, make_learner, OPTIMIZERS, same
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader, IterableDataset, WeightedRandomSampler, default_collate
from torchvision import models
from torchvision.transforms import Compose, RandomHorizontalFlip

from bnfreeze_fastai.head.serve import FeatureBatches
from bnfreeze_fastai.layers import bn_layers

pytestmark = pytest.mark.filterwarnings('ignore')  # deprecated torchvision arguments, autocast without a GPU


class FirstBatchOnly(Callback):
    def after_batch(self):
        if self.training:
            raise CancelTrainException


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def assert_same_training(make, **kwargs):
    "Train one Learner without and one with stored features; returns both"
    plain, stored = make(), make()
    without, after = train(plain), generators()
    with stored.precompute(**kwargs):
        within = train(stored)
    assert generators() == after
    np.testing.assert_allclose(within, without, rtol=1e-5)
    torch.testing.assert_close(stored.model.state_dict(), plain.model.state_dict(), rtol=1e-5, atol=1e-6)
    return plain, stored


class CountRows:
    "How many samples pass through a module"

    def __init__(self, module):
        self.rows = 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.rows += len(args[0])


# --- exactness over architectures


def with_three_groups(model, first, second):
    return model, lambda m: [params(first(m)), params(second(m)), params(m[1])]


def fastai_model(arch):
    return create_vision_model(arch, 2, pretrained=False), model_meta[arch]['split']


def mobilenet():
    model = create_vision_model(models.mobilenet_v3_small, 2, pretrained=False)
    return with_three_groups(model, lambda m: m[0][0][:6], lambda m: m[0][0][6:])


def efficientnet():
    model, _ = create_timm_model('efficientnet_b0', 2, pretrained=False, drop_path_rate=0)
    early = lambda m: nn.ModuleList([m[0].model.conv_stem, m[0].model.bn1, m[0].model.blocks[:4]])
    late = lambda m: nn.ModuleList([m[0].model.blocks[4:], m[0].model.conv_head, m[0].model.bn2])
    return with_three_groups(model, early, late)


ARCHS = {
    'resnet18': partial(fastai_model, models.resnet18),
    'mobilenet_v3_small': mobilenet,
    'densenet121': partial(fastai_model, models.densenet121),
    'efficientnet_b0': efficientnet,
}


@pytest.mark.parametrize('n', [-1, -2])
@pytest.mark.parametrize('arch', ARCHS)
def test_architectures_train_as_without(arch, n):
    set_seed(0)
    model, split = ARCHS[arch]()
    make_learner(model=model, splitter=split, size=64).recalibrate_bn()  # statistics to hold

    def make(order=torch.contiguous_format):
        # Adam's first steps have the size of the learning rate whatever that of the gradient, so they would blow up rounding errors
        ours = deepcopy(model).to(memory_format=order)
        return make_learner(model=ours, splitter=split, size=64, opt_func=OPTIMIZERS['sgd']).freeze_to_bn(n, throughout=False)

    plain, stored = make(), make()
    without = train(plain, 2, 1e-3)
    rounding = np.abs(np.divide(train(make(torch.channels_last), 2, 1e-3), without) - 1).max()  # the same sums in another order
    rows = CountRows(bn_layers(stored.model)[0])
    with stored.precompute():
        filled = rows.rows
        within = train(stored, 2, 1e-3)
        assert rows.rows == filled
    assert len(without) == 6
    np.testing.assert_allclose(within, without, rtol=max(1e-5, 2 * rounding))
    torch.testing.assert_close(stored.model.state_dict(), plain.model.state_dict(), rtol=1e-5, atol=1e-6)


# --- loaders of every sort


def tensors(n):
    return [(image(i, 8), label(i)) for i in range(n)]


class Backwards:
    "A custom batch sampler: from the last sample to the first, in batches of changing size"

    def __iter__(self):
        yield [23, 22, 21, 20]
        yield list(range(19, 8, -1))
        yield [torch.tensor(i) for i in range(8, -1, -1)]

    def __len__(self):
        return 3


def fastai_dls(train, dl_type=TfmdDL, **kwargs):
    return DataLoaders(dl_type(train, bs=7, num_workers=0, **kwargs), TfmdDL(tensors(8), bs=5, num_workers=0))


def torch_dls(train, **kwargs):
    return DataLoaders(TorchDataLoader(train, **kwargs), TorchDataLoader(tensors(8), batch_size=5))


LOADERS = {
    'shuffled': lambda: fastai_dls(tensors(24), shuffle=True),
    'drop_last': lambda: fastai_dls(tensors(24), shuffle=True, drop_last=True),
    'plain fastai': lambda: fastai_dls(tensors(24), dl_type=DataLoader, shuffle=True),
    'weighted': lambda: fastai_dls(tensors(24), dl_type=WeightedDL, wgts=np.arange(24), shuffle=True),
    'partial': lambda: fastai_dls(tensors(24), dl_type=PartialDL, partial_n=10),
    'fewer': lambda: fastai_dls(tensors(24), n=13, shuffle=True),
    'own order': lambda: fastai_dls(tensors(24), get_idxs=lambda: [3, 1, 4, 1, 5, 9, 2, 6, -1]),
    'workers': lambda: DataLoaders(TfmdDL(tensors(24), bs=7, shuffle=True, num_workers=1), TfmdDL(tensors(8), bs=5, num_workers=1)),
    'torch': lambda: torch_dls(tensors(24), batch_size=7, shuffle=True),
    'torch weighted': lambda: torch_dls(tensors(24), batch_size=7, sampler=WeightedRandomSampler(np.arange(24.0), 24)),
    'torch generator': lambda: torch_dls(tensors(24), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3)),
    'own order beyond n': lambda: fastai_dls(tensors(24), n=10, get_idxs=lambda: [-1, -2, 20, 3, 4, 5, 6]),
    'one dataset': lambda: (d := tensors(24)) and DataLoaders(TfmdDL(d, n=10, shuffle=True, num_workers=0), TfmdDL(d, num_workers=0)),
    'no validation': lambda: DataLoaders(TfmdDL(tensors(24), bs=7, num_workers=0), TfmdDL([], bs=7, num_workers=0)),
    'torch own batches': lambda: torch_dls(tensors(24), batch_sampler=Backwards()),
}


@pytest.mark.parametrize('name', LOADERS)
def test_batches_are_those_of_the_loader(name):
    def make():
        learn = small()
        set_seed(2)  # the loaders' own generators start from here
        learn.dls = LOADERS[name]()
        return learn

    plain, stored = make(), make()
    without, after = train(plain), generators()
    set_seed(5)
    before = generators()
    rows = CountRows(stored.model[0])
    with stored.precompute():
        assert generators() == before
        rows.rows = 0
        within = train(stored)
        assert generators() == after
    assert rows.rows == 0
    np.testing.assert_allclose(within, without, rtol=1e-5)
    np.testing.assert_allclose(train(stored), train(plain), rtol=1e-4)  # the loaders go on from the same place


def test_each_sample_runs_once():
    learn, ran = small(), Counter()
    by_bytes = {image(i, 8).numpy().tobytes(): i for i in range(24)}
    learn.model[0].register_forward_hook(lambda m, args, out: ran.update(by_bytes[x.numpy().tobytes()] for x in args[0] if x.any()))
    with learn.precompute():
        learn.fit(2)
        learn.validate()
    # 24 for training and 8 of them for validation; the rest are two tries of at most a batch, spread over the data
    assert all(1 <= ran[i] <= 3 for i in range(8, 24))
    assert sum(ran.values()) <= 24 + 8 + 2 * 8
    assert learn.model[0](torch.zeros(1, 3, 8, 8)).shape[0] == 1


# --- what works inside


@pytest.fixture
def pictures(tmp_path):
    "Learner on image files of two classes"
    rng = np.random.default_rng(0)
    for split, n in (('train', 16), ('valid', 6)):
        for kind, low in (('dark', 0), ('light', 120)):
            folder = tmp_path / 'pictures' / split / kind
            folder.mkdir(parents=True)
            for i in range(n):
                PILImage.create(rng.integers(low, low + 130, (20, 14, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    from fastai.vision.data import ImageDataLoaders, imagenet_stats

    set_seed(0)
    tfms = dict(item_tfms=Resize(16, method='squish'), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = ImageDataLoaders.from_folder(tmp_path / 'pictures', bs=8, num_workers=0, device='cpu', **tfms)
    learn = small(cbs=None)
    learn.dls = dls
    learn.fit(1)
    return learn


def test_learner_works_inside_as_outside(pictures):
    learn = pictures
    new = learn.dls.test_dl([learn.dls.valid_ds.items[0]])
    raw = CountRows(learn.model[0])

    def results():
        preds = learn.get_preds(with_loss=True, with_decoded=True)
        item = learn.predict(learn.dls.valid_ds.items[0])
        return [*preds, *learn.get_preds(ds_idx=0), torch.tensor(learn.validate()), torch.tensor(learn.validate(ds_idx=0)), item[2]]

    outside = results()
    inputs = learn.get_preds(with_input=True)[0]
    aug = learn.tta(n=2)[0]
    with learn.precompute():
        for a, b in zip(results(), outside, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(learn.get_preds(with_input=True)[0], inputs)
        raw.rows = 0
        learn.get_preds(dl=new)
        assert raw.rows == 1
        learn.show_results()
        torch.testing.assert_close(learn.tta(n=2)[0], aug)
        learn.summary()
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum() == 12
        learn.lr_find(num_it=20, show_plot=False, suggest_funcs=None)
        assert len(learn.recorder.losses) == 20
        fetch = FetchPredsCallback()
        learn.fit(1, cbs=fetch)
        assert len(fetch.preds[0]) == 12
        learn.recorder.plot_loss()


def test_callbacks_work_inside(pictures):
    learn = pictures
    state = learn.model.state_dict()
    with learn.precompute():
        learn.fit(3, cbs=[SaveModelCallback(fname='best', every_epoch=False), EarlyStoppingCallback(patience=1)])
        assert learn.model.state_dict().keys() == state.keys()
        saved = torch.load(learn.path / learn.model_dir / 'best.pth', weights_only=True)
        saved = saved.get('model', saved)
        assert saved.keys() == state.keys()
        learn.load('best')
        learn.validate()
    assert type(learn.dls.train).__name__ == 'TfmdDL'


def test_mixed_precision_and_optimizers():
    for opt_func in OPTIMIZERS.values():
        assert_same_training(lambda: small(opt_func=opt_func))
    assert_same_training(lambda: small().to_fp16())


def test_validation_within_an_epoch():
    class ValidateInside(Callback):
        def after_batch(self):
            if self.training and self.iter == 1:
                dl = self.learn.dl
                other = self.learn.dls.valid.new(dataset=tensors(5))
                self.results.append(float(self.learn.get_preds(dl=other, inner=True)[0].sum()))
                self.results.append(float(self.learn.get_preds(inner=True)[0].sum()))
                self.learn.dl = dl
                self.learn.model.train()

    losses = []
    for inside in (False, True):
        learn, cb = small(), ValidateInside()
        cb.results = []
        learn.add_cb(cb)
        if inside:
            with learn.precompute():
                losses.append((train(learn), cb.results))
        else:
            losses.append((train(learn), cb.results))
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    np.testing.assert_allclose(losses[0][1], losses[1][1], rtol=1e-4)


def test_copied_model_takes_features():
    learn, outs = small(), []

    class Twin(Callback):
        def before_fit(self):
            self.twin = deepcopy(self.learn.model)

        def after_pred(self):
            if not self.training:
                self.twin.eval()
                self.twin.load_state_dict(self.learn.model.state_dict())
                outs.append((self.twin(*self.xb), self.pred))

    with learn.precompute():
        learn.fit(1, cbs=Twin())
    assert outs and all(torch.equal(a, b) for a, b in outs)


# --- augmentation


def jitter(x: torch.Tensor):
    return x + torch.rand(()) if x.ndim == 4 else x


def test_augmented_versions_take_turns():
    learn = small()
    learn.dls.train.after_batch.add(Transform(jitter))
    seen = []

    class Inputs(Callback):
        def after_pred(self):
            if self.training:
                seen.append(self.x)

    body = CountRows(learn.model[0])
    learn.dls.train.shuffle = False
    with learn.precompute(n_aug=2):
        filled = body.rows
        learn.fit(5, cbs=Inputs())
        assert body.rows == filled
    epochs = torch.stack(seen).view(5, 24, -1)
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[0], epochs[4]) and torch.equal(epochs[1], epochs[3])
    assert not torch.isclose(epochs[0], epochs[1]).all(1).any()


def test_one_augmented_version_of_crops(pictures):
    learn = pictures
    for dl in learn.dls.loaders:
        dl.after_item = type(dl.after_item)([Resize(16), *[t for t in dl.after_item.fs if not isinstance(t, Resize)]])
    with pytest.raises(ValueError, match='Resize.*squish'):
        learn.precompute().__enter__()
    with learn.precompute(n_aug=1):
        learn.fit(1)


# --- memory


@pytest.mark.parametrize('max_mem', [0, 24 * 4 * 4 + 24 * 8])
def test_file_in_place_of_memory(max_mem):
    def make():
        return small()

    plain, stored = make(), make()
    without = train(plain)
    with stored.precompute(max_mem=max_mem):
        in_file = [s.in_file for _, s in stored.serve_features.stores]
        within = train(stored)
    assert in_file == ([True, True] if max_mem == 0 else [False, True])
    np.testing.assert_allclose(within, without, rtol=1e-5)


KILLED = '''
import sys
sys.path.insert(0, {tests!r})
from learners import make_learner
import bnfreeze_fastai.learner
learn = make_learner().freeze_to_bn(-1)
with learn.precompute(max_mem=0):
    print('inside', flush=True)
    time.sleep(60)
'''


@on_linux
def test_nothing_is_left_of_the_file_when_the_process_is_killed(tmp_path):
    script = KILLED.format(tests=str(ROOT / 'tests'))
    process = subprocess.Popen([sys.executable, '-c', script], env={**os.environ, 'TMPDIR': str(tmp_path)}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'inside\n'
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []


@on_linux
def test_the_file_goes_with_the_block():
    learn = small()
    before = Path('/proc/self/maps').read_text().count('(deleted)')
    with learn.precompute(max_mem=0):
        learn.validate()
        assert Path('/proc/self/maps').read_text().count('(deleted)') > before
    gc.collect()
    assert Path('/proc/self/maps').read_text().count('(deleted)') == before


@pytest.mark.parametrize('dtype,rtol', [(torch.float16, 1e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_features(dtype, rtol):
    plain, stored = small(), small()
    without = train(plain)
    with stored.precompute(dtype=dtype):
        kept = stored.serve_features.stores[0][1]
        assert kept.batches[0].dtype == dtype and kept.get(0, [1])[0].dtype == torch.float32
        within = train(stored)
    assert not np.allclose(within, without, rtol=1e-6)
    np.testing.assert_allclose(within, without, rtol=10 * rtol)


def test_features_too_large_for_half_precision():
    learn = small()
    learn.model[0][4].weight.data *= 1e7
    with pytest.raises(ValueError, match='bfloat16'):
        learn.precompute(dtype=torch.float16).__enter__()


# --- every way out


def fingerprint_of(learn):
    "What has to be the same objects, in the same state, after the block"
    return dict(
        model=learn.model,
        modules=list(learn.model.modules()),
        own=[{k: id(v) for k, v in m.__dict__.items()} for m in learn.model.modules()],
        dls=(learn.dls, *learn.dls.loaders, *(dl.dataset for dl in learn.dls.loaders)),
        loaders=[{k: v for k, v in vars(dl).items() if k not in ('rng', 'it') and 'idxs' not in k} for dl in learn.dls.loaders],
        cbs=list(learn.cbs),
        opt=learn.opt,
        names=set(vars(learn)),
        flags=[m.training for m in learn.model.modules()],
        frozen=[id(p) for p in learn.model[0].parameters()],
    )


def outcome(way, learn):
    if way == 'end':
        with learn.precompute():
            learn.fit(1)
    elif way == 'exception':
        with pytest.raises(ZeroDivisionError), learn.precompute():
            1 / 0
    elif way == 'exception in a fit':

        class Fails(Callback):
            def after_pred(self):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), learn.precompute():
            learn.fit(1, cbs=Fails())
    elif way == 'ctrl-c while running':
        calls = Counter()

        def interrupt(*_):
            calls.update(['body'])
            if calls['body'] > 4:  # after two tries, in the pass over the data
                raise KeyboardInterrupt

        handle = learn.model[0].register_forward_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt), learn.precompute():
                pass
        finally:
            handle.remove()
        assert calls['body'] == 5
    elif way == 'refused':
        learn.add_cb(MixUp())
        with pytest.raises(ValueError, match='mix_up'), learn.precompute():
            pass
        learn.remove_cb(MixUp)


@pytest.mark.parametrize('way', ['end', 'exception', 'exception in a fit', 'ctrl-c while running', 'refused'])
def test_all_is_given_back(way):
    learn = small()
    learn.validate()
    before, random_numbers = fingerprint_of(learn), generators()
    outcome(way, learn)
    after = fingerprint_of(learn)
    if way in ('end', 'exception in a fit'):  # a fit leaves its marks: training flags, and what the Learner notes
        before.pop('flags'), after.pop('flags'), before.pop('names'), after.pop('names'), before.pop('own'), after.pop('own')
    else:
        assert generators() == random_numbers
    assert before.keys() == after.keys() and all(before[k] == after[k] for k in before), [k for k in before if before[k] != after[k]]
    assert not isinstance(getattr(learn, 'dl', None), FeatureBatches) and not any('forward' in vars(m) for m in learn.model.modules())
    learn.unfreeze()
    learn.fit(1)


def test_trained_head_stays_and_loaders_too():
    learn = small()
    dls, head, body = learn.dls, bits(learn.model[1].parameters()), bits(learn.model[0].state_dict().values())
    with learn.precompute() as inside:
        assert inside is learn
        learn.fit(1)
    assert learn.dls is dls and not same(head, learn.model[1].parameters()) and same(body, learn.model[0].state_dict().values())


# --- refusals


@pytest.mark.parametrize('name', ['freeze', 'unfreeze', 'export', 'precompute', 'recalibrate_bn', 'fine_tune', 'freeze_to', 'freeze_to_bn'])
def test_what_would_change_the_frozen_part_raises(name):
    learn = small()
    policy = learn.batch_norm_freeze.bn_policy
    args = {'fine_tune': (1,), 'freeze_to': (0,), 'freeze_to_bn': (0, 'train')}.get(name, ())
    with learn.precompute():
        with pytest.raises(RuntimeError, match='leave the block'):
            getattr(learn, name)(*args)
        assert learn.batch_norm_freeze.bn_policy == policy
        learn.fit(1)
    learn.freeze_to_bn(-1)


def with_model(*layers, n=-1, **kwargs):
    learn = make_learner(model=nn.Sequential(nn.Sequential(*layers), dropout_head()), **kwargs)
    learn.fit(1)
    return learn.freeze_to_bn(n)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


class Counts(nn.Module):
    "Keeps a state"

    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


class MixesBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Observes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.n += 1
        return x


class DropPath(nn.Module):
    "As timm writes it"

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class BetweenParts(nn.Module):
    "Does something of its own between body and head, in training only"

    def __init__(self, f):
        super().__init__()
        (self.body, self.head), self.f = body_and_head(), f

    def forward(self, x):
        x = self.body(x)
        return self.head(self.f(x) if self.training else x)


def between(f):
    learn = make_learner(model=BetweenParts(f), splitter=lambda m: [params(m.body), params(m.head)])
    learn.fit(1)
    return learn.freeze_to_bn(-1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = body_and_head()

    def forward(self, x, z):
        return self.head(self.body(x) + self.body(z))


def conv(n_in=4):
    return nn.Conv2d(n_in, 4, 3, padding=1)


def with_dls(dls):
    learn = small()
    learn.dls = dls
    return learn


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tensors(8))


def whitened(x: torch.Tensor):
    return (x - x.mean()) / x.std() if x.ndim == 4 else x


class Flipped(list):
    transform = Compose([RandomHorizontalFlip(0.01)])

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return self.transform(x), y


class Halved(TorchDataLoader):
    def __iter__(self):
        return ((x / 2, y) for x, y in super().__iter__())


def two_input_learner():
    dls = DataLoaders(*[TfmdDL([(x, x, y) for x, y in tensors(8)], bs=4, num_workers=0) for _ in range(2)])
    dls.n_inp = 2
    learn = make_learner(model=TwoInputs(), splitter=lambda m: [params(m.body), params(m.head)])
    learn.dls = dls
    for dl in dls.loaders:
        dl._n_inp = 2
    return learn.freeze_to_bn(-1)


def unet():
    model = create_unet_model(models.resnet18, 2, (64, 64), pretrained=False)
    return make_learner(model=model, splitter=model_meta[models.resnet18]['split'], size=64).freeze_to_bn(-1)


def random_in_torch():
    class Noisy(list):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.rand(()), y

    return with_dls(torch_dls(Noisy(tensors(24)), batch_size=8))


def skipping():
    class Some(list):
        def __getitem__(self, i):
            if i == 3:
                raise SkipItemException
            return super().__getitem__(i)

    return with_dls(fastai_dls(Some(tensors(24))))


def with_transform(event, tfm):
    learn = small()
    getattr(learn.dls.train, event).add(tfm)
    return learn


def without_frozen_statistics():
    body = [conv(3), nn.BatchNorm2d(4, track_running_stats=False)]
    return with_model(*body)


class Unseeded(ItemTransform):
    def encodes(self, o):
        return o[0] + torch.rand(()), o[1]


REFUSED = {
    'mode train': (lambda: small().freeze_to_bn(-1, bn='train'), r"'0\.1': 'train'.*freeze_to_bn"),
    'mode stats-only': (lambda: small().freeze_to_bn(-1, bn='stats-only'), "'0.1': 'stats-only'"),
    'mode affine-only': (lambda: small().freeze_to_bn(-1, bn={'0.4': 'affine-only'}), r"\{'0.4': 'affine-only'\}"),
    'fastai freeze': (lambda: (l := make_learner()).freeze() or l, r"'0\.1': 'train'.*freeze_to_bn"),
    'batch statistics': (without_frozen_statistics, "'0.1'"),
    'nothing frozen': (lambda: small().freeze_to_bn(0), 'freeze_to_bn'),
    'dropout': (lambda: with_model(conv(3), nn.Dropout2d(0.1), conv()), r'0\.1 \(Dropout2d\).*rate to 0'),
    'stochastic depth': (lambda: with_model(conv(3), DropPath(0.1), conv()), r'0\.1 \(DropPath\).*drop_path_rate'),
    'functional dropout': (lambda: with_model(conv(3), FunctionalDropout(), conv()), 'random in training'),
    'state': (lambda: with_model(conv(3), Counts(), conv()), 'from one run to the next'),
    'buffer': (lambda: with_model(conv(3), Observes(), conv()), 'writes to a buffer'),
    'dropout between layers': (lambda: between(nn.functional.dropout), 'BetweenParts'),
    'scale between layers': (lambda: between(lambda x: 2 * x), 'BetweenParts'),
    'whitened batch': (lambda: with_transform('after_batch', Transform(whitened)), 'whitened.*item_tfms'),
    'torchvision': (lambda: with_dls(torch_dls(Flipped(tensors(24)), batch_size=8)), 'RandomHorizontalFlip'),
    'own torch loader': (lambda: with_dls(DataLoaders(Halved(tensors(8)), Halved(tensors(8)))), 'Halved'),
    'no samples': (lambda: with_dls(DataLoaders(TfmdDL([], num_workers=0), TfmdDL([], num_workers=0))), 'no training or validation'),
    'mixes the batch': (lambda: with_model(conv(3), MixesBatch(), conv()), 'mixes the samples'),
    'unet': (unet, 'DynamicUnet.*skip connection'),
    'several inputs': (two_input_learner, '2 inputs'),
    'flip': (lambda: with_transform('after_item', FlipItem()), 'FlipItem.*n_aug'),
    'own item transform': (lambda: with_transform('after_item', Unseeded()), 'Unseeded.*n_aug'),
    'own batch transform': (lambda: with_transform('after_batch', Transform(jitter)), 'jitter.*n_aug'),
    'random dataset': (random_in_torch, 'Noisy.*n_aug'),
    'mixup': (lambda: small(cbs=MixUp()), 'mix_up.*remove_cb'),
    'cutmix': (lambda: small(cbs=CutMix()), 'cut_mix.*remove_cb'),
    'iterable torch': (lambda: with_dls(torch_dls(Stream(), batch_size=4)), 'iterable'),
    'iterable fastai': (lambda: with_dls(fastai_dls(Stream())), 'iterable'),
    'no batch size': (lambda: with_dls(torch_dls(tensors(8), batch_size=None)), 'batch size'),
    'other loader': (lambda: with_dls(DataLoaders(tensors(8), tensors(8))), 'list'),
    'skipped samples': (skipping, 'SkipItemException'),
    'wrapped': (lambda: setattr(l := small(), 'model', nn.DataParallel(l.model)) or l, 'DataParallel.*distrib_ctx'),
    'compiled': (lambda: setattr(l := small(), 'model', torch.compile(l.model)) or l, 'compile'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name_and_nothing_changed(name):
    make, said = REFUSED[name]
    learn = make()
    before, random_numbers = fingerprint_of_any(learn), generators()
    with pytest.raises(ValueError, match=f'(?s){said}'):
        learn.precompute().__enter__()
    assert generators() == random_numbers
    assert fingerprint_of_any(learn) == before


def fingerprint_of_any(learn):
    own = {'n'}  # a layer that counts its calls, as an example of one with a state
    return [
        [{k: id(v) for k, v in vars(m).items() if k not in own} for m in learn.model.modules()],
        list(learn.cbs),
        learn.opt,
        sorted(vars(learn)),
        [m.training for m in learn.model.modules()],
    ]


@pytest.mark.parametrize(
    'bad', [dict(n_aug=0), dict(n_aug=1.5), dict(n_aug=True), dict(max_mem=-1), dict(max_mem='1G'), dict(dtype=torch.int8)]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f'{list(bad.values())[0]!r}'):
        small().precompute(**bad).__enter__()


def test_mixing_callback_in_a_fit_inside():
    learn = small()
    with learn.precompute():
        with pytest.raises(ValueError, match='mix_up'):
            learn.fit(1, cbs=MixUp())
        learn.fit(1)


@pytest.mark.parametrize('change', [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.transpose(-1, -2), lambda x: x[..., :2, :2]])
def test_unknown_callback_that_changes_inputs(change):
    class AddsOne(Callback):
        def before_batch(self):
            self.learn.xb = (change(self.x),)

    learn = with_wide_features()
    with learn.precompute():
        with pytest.raises(RuntimeError, match='adds_one'):
            learn.fit(1, cbs=AddsOne())
        learn.validate()


class SwapTargets(ItemTransform):
    def encodes(self, b):
        return b[0], 1 - b[1]


def targets_changed(event, change, order=0):
    "A callback that calls `change(self)` at `event` of training"

    def at(self):
        if self.training or event == 'before_train':
            change(self)

    return type('Changes', (Callback,), {event: at, 'order': order, '__module__': __name__})()


def replace_targets(cb):
    cb.learn.yb = (1 - cb.y,)


def mix_targets(cb):
    cb.learn.yb = (cb.y[torch.randperm(len(cb.y))],)


def smooth_in_place(cb):
    cb.y.copy_(1 - cb.y)


def add_transform(cb):
    cb.dl.after_batch.add(SwapTargets())


def wrap_loader(cb):
    class Swapped:
        dl = cb.dl

        def __iter__(self):
            return ((x, 1 - y) for x, y in self.dl)

        def __len__(self):
            return len(self.dl)

        def __getattr__(self, k):
            return getattr(self.dl, k)

    cb.learn.dl = Swapped()


TARGETS = {
    'before_batch': [replace_targets, mix_targets, smooth_in_place],
    'after_pred': [replace_targets, mix_targets, smooth_in_place],
    'before_train': [add_transform, wrap_loader],
}


@pytest.mark.parametrize('order', [-100, 0, float('inf')])
@pytest.mark.parametrize('event,change', [(event, f) for event, fs in TARGETS.items() for f in fs])
def test_targets_that_a_callback_changes(event, change, order):
    plain, stored, untouched = small(), small(), small()
    plain.add_cb(targets_changed(event, change, order))
    without, after = train(plain, 1), generators()
    with stored.precompute():
        stored.add_cb(targets_changed(event, change, order))  # behind what serves the features, if both come last
        np.testing.assert_allclose(train(stored, 1), without, rtol=1e-5)
    assert generators() == after
    assert not np.allclose(train(untouched, 1), without, rtol=1e-3)


@pytest.mark.parametrize('order', [-100, 0, 20, float('inf')])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_targets_made_from_inputs(event, order):
    def from_inputs(cb):
        cb.learn.yb = ((cb.x[:, :1].flatten(1).mean(1) > 0).long(),)

    learn = small()
    cb = targets_changed(event, from_inputs, order)
    with learn.precompute():
        with pytest.raises(RuntimeError, match='reads the input.*targets.*changes'):
            learn.fit(1, cbs=cb)
        learn.fit(1, cbs=targets_changed(event, lambda cb: cb.x.mean(), order))  # to look is no change
        learn.fit(1)


@pytest.mark.parametrize('acts', [True, False])
def test_who_leaves_out_batches_by_their_input_is_told_of_it(acts):
    class Skips(Callback):
        def before_batch(self):
            if self.training and (not acts or self.x.mean() > -1e9):
                raise CancelBatchException

    learn = small()
    with learn.precompute(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            learn.fit(2, cbs=Skips())
    told = [str(w.message) for w in caught if 'reads the input of the model' in str(w.message)]
    assert len(told) == 2 * acts and all('skips' in text for text in told)


def test_a_fit_is_not_told_of_what_was_read_before_it():
    learn = small()
    with learn.precompute():
        with pytest.raises(ZeroDivisionError):
            learn.fit(1, cbs=Callback(before_batch=lambda cb: 1 / (0 * cb.x.mean().item())))
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='A callback reads')
            learn.fit(1)


def test_transforms_changed_amid_an_epoch():
    learn = small()
    with learn.precompute(), pytest.raises(RuntimeError, match='amid an epoch.*before_epoch'):
        learn.fit(1, cbs=targets_changed('after_batch', add_transform))


def test_unknown_callback_that_comes_last():
    class AddsOne(Callback):
        order = float('inf')

        def before_batch(self):
            self.learn.xb = (self.x + 1,)

    learn = small()
    with learn.precompute(), pytest.raises(RuntimeError, match='adds_one'):
        learn.fit(1, cbs=AddsOne())


def with_wide_features():
    "Features of 4 × 4 × 4: a trained convolution comes before the pooling"
    learn = make_learner(model=nn.Sequential(body_and_head()[0], nn.Sequential(conv(), dropout_head())))
    learn.fit(1)
    return learn.freeze_to_bn(-1)


def test_fewer_samples_in_a_batch_will_do():
    class Half(Callback):
        def before_batch(self):
            self.learn.xb, self.learn.yb = (self.x[:4],), (self.y[:4],)

    plain, stored = small(cbs=Half()), small(cbs=Half())
    without = train(plain)
    with stored.precompute():
        np.testing.assert_allclose(train(stored), without, rtol=1e-5)


def test_a_cancelled_batch_leaves_nothing_behind():
    class Cancels(Callback):
        def before_batch(self):
            raise CancelFitException

    learn = small()
    with learn.precompute():
        learn.fit(1, cbs=Cancels())
        learn.get_preds(dl=learn.dls.test_dl(range(3)))
        learn.fit(1)


def test_a_thaw_within_a_fit_counts_from_the_next_epoch():
    class Thaws(Callback):
        def after_epoch(self):
            self.opt.freeze_to(0)

    learn = small()
    with learn.precompute(), pytest.raises(RuntimeError, match='thawed'):
        learn.fit(3, cbs=Thaws())


def test_another_model_within():
    learn = small()
    other = deepcopy(learn.model)
    with learn.precompute():
        learn.model = other
        with pytest.raises(RuntimeError, match='enter it again'):
            learn.validate()


def test_loaders_of_the_same_dataset_that_give_something_else():
    learn = small()
    learn.dls = fastai_dls(tensors(24), dl_type=DataLoader)
    double = learn.dls.valid.new(after_batch=Transform(lambda x: 2 * x if x.ndim == 4 else x))
    plain = learn.dls.train.new(after_batch=lambda b: (2 * b[0], b[1]))
    outside = [learn.validate(dl=dl) for dl in (double, plain)]
    with learn.precompute():
        np.testing.assert_allclose([learn.validate(dl=dl) for dl in (double, plain)], outside, rtol=1e-5)


def test_targets_in_a_dict():
    def make():
        learn = small(
            loss_func=lambda out, y: nn.functional.cross_entropy(out, y if isinstance(y, torch.Tensor) else y['a'][0]), metrics=None
        )
        learn.dls = torch_dls([(x, {'a': (y, y), 'b': y}) for x, y in tensors(24)], batch_size=8, shuffle=True)
        learn.dls.loaders[1] = TorchDataLoader([(x, {'a': (y, y), 'b': y}) for x, y in tensors(8)], batch_size=8)
        return learn

    plain, stored = make(), make()
    without = train(plain)
    with stored.precompute():
        np.testing.assert_allclose(train(stored), without, rtol=1e-5)


def test_random_transforms_that_never_act_are_fine():
    learn = small()
    learn.dls.train.after_item.add(FlipItem(p=0))
    with learn.precompute():
        learn.fit(1)


def test_mixing_callbacks_do_not_keep_from_predicting():
    learn = small()
    with learn.precompute():
        learn.add_cb(MixUp())
        learn.get_preds()
        learn.remove_cb(MixUp)


@pytest.mark.parametrize(
    'change',
    [
        lambda learn: learn.model[0][0].weight.data.add_(1),
        lambda learn: learn.model[0][1].running_mean.add_(1),
        lambda learn: learn.model[0].requires_grad_(True),
        lambda learn: learn.remove_cb(learn.batch_norm_freeze),
        lambda learn: learn.load('other'),
    ],
)
def test_stale_features_are_not_served(change):
    learn = small()
    other = small()
    other.model[0][0].weight.data.add_(1)
    other.opt = None
    other.save('other')
    with learn.precompute():
        learn.fit(1)
        change(learn)
        for use in (lambda: learn.fit(1), learn.validate, learn.get_preds):
            with pytest.raises((RuntimeError, ValueError), match='enter it again|frozen'):
                use()


class Doubling:
    def collate(self, samples):
        x, y = default_collate(samples)
        return 2 * x, y


def test_a_bound_method_that_makes_batches():
    plain, stored = small(), small()
    for learn in (plain, stored):
        for dl in learn.dls.loaders:
            dl.create_batch = Doubling().collate
    without = train(plain, 1)
    with stored.precompute():
        np.testing.assert_allclose(train(stored, 1), without, rtol=1e-5)
    assert not np.allclose(train(small(), 1), without, rtol=1e-3)
