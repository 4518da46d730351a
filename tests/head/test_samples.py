"What differs by time, place or company is refused by name before anything is trained on it, and what changes later is noticed"

import random
from functools import partial

import numpy as np, pytest, torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.torch_basics import Transform
from fastai.vision.core import TensorBBox
from fastai.vision.data import bb_pad
from learners import image, label
from heads import small, train
from test_precompute import fastai_dls, generators, tensors, torch_dls, with_dls
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader as TorchDataLoader, Subset, TensorDataset
from torchvision.transforms import Compose, Lambda, RandomApply, RandomErasing, TrivialAugmentWide, v2

from bnfreeze_fastai.head.drawing import random_transforms
from bnfreeze_fastai.head.samples import spread

pytestmark = pytest.mark.filterwarnings('ignore')

N = 300  # more than the samples looked at one by one, so that rare ones have to be found otherwise
RARE = 137  # not among those


class Data(list):
    "Samples of three classes, sorted by class, some changed by `change(self, i, x, y)`"

    def __init__(self, change=lambda self, i, x, y: (x, y), n=N):
        super().__init__((image(i, 8), torch.tensor(3 * i // n // 2)) for i in range(n))
        self.change, self.count, self.own = change, 0, np.random.default_rng()

    def __getitem__(self, i):
        self.count += 1
        return self.change(self, i, *super().__getitem__(i))


CHANGES = {
    'one class': lambda self, i, x, y: (x + torch.randn_like(x) if y == 1 else x, y),
    'one rare sample, torch': lambda self, i, x, y: (x + torch.rand(()) if i == RARE else x, y),
    'one rare sample, numpy': lambda self, i, x, y: (x + np.random.rand() if i == RARE else x, y),
    'one rare sample, python': lambda self, i, x, y: (x + random.random() if i == RARE else x, y),
    'the label of one rare sample': lambda self, i, x, y: (x, y * int(torch.randint(2, ())) if i == RARE else y),
    'odd indices, by a generator of its own': lambda self, i, x, y: (x + self.own.random() if i % 2 else x, y),
    'the last class, by a generator of its own': lambda self, i, x, y: (x + self.own.random() if y == 1 else x, y),
    'labels by a generator of its own': lambda self, i, x, y: (x, torch.tensor(self.own.integers(2))),
    'counter': lambda self, i, x, y: (x + self.count, y),
}


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize('fastai', [False, True])
@pytest.mark.parametrize('name', CHANGES)
def test_what_differs_in_time_is_refused(name, fastai, workers):
    if workers and not name.startswith('one rare sample'):
        workers = 0  # told before the workers start
    data = Data(CHANGES[name])
    assert RARE not in spread(N, 64)
    if fastai:
        dls = fastai_dls(data)
        dls.loaders[0] = TfmdDL(data, bs=8, num_workers=workers)
    else:
        dls = torch_dls(data, batch_size=8, num_workers=workers)
    learn = with_dls(dls)
    before = generators()
    with pytest.raises(ValueError, match='training samples differ from epoch to epoch.*Data.*n_aug'):
        learn.precompute().__enter__()
    assert generators() == before
    with learn.precompute(n_aug=1):  # as wished
        learn.fit(1)


class NewTarget(list):
    "Only the one sample with this target draws, from a generator of its own"

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x + np.random.default_rng().random(), torch.tensor(1)) if i == RARE else (x, torch.tensor(0))


def test_a_sample_of_each_target_is_looked_at():
    learn = with_dls(torch_dls(NewTarget(tensors(N)), batch_size=8))
    with pytest.raises(ValueError, match='NewTarget'):
        learn.precompute().__enter__()


def test_seeded_by_index_is_no_randomness():
    seeded = lambda self, i, x, y: (x + torch.rand((), generator=torch.Generator().manual_seed(i)) + np.random.default_rng(i).random(), y)
    learn = with_dls(torch_dls(Data(seeded, 40), batch_size=8, shuffle=True))
    with learn.precompute():
        learn.fit(1)


# --- company


def sequences(n_long, n=N):
    "Rows of 8 columns, `n_long` of them of length 6 and then one of 4"
    return [(torch.full((3, 8, 8 if i != n_long else 6), i / n), label(i)) for i in range(n)]


def pad(items, to=None):
    width = to or max(x.shape[-1] for x, _ in items)
    return torch.stack([nn.functional.pad(x, (0, width - x.shape[-1])) for x, _ in items]), torch.stack([y for _, y in items])


def boxes(i):
    "Few samples have two boxes"
    n = 2 if i % 8 == 3 else 1
    return torch.full((3, 8, 8), i / 100), torch.ones(n, 4) * i


def pad_boxes(items):
    most = max(len(b) for _, b in items)
    return torch.stack([x for x, _ in items]), torch.stack([nn.functional.pad(b, (0, 0, 0, most - len(b))) for _, b in items])


def by_first(items):
    x, y = map(torch.stack, zip(*items))
    return x - x[:1], y


def sort_by_label(items):
    x, y = map(torch.stack, zip(*items))
    order = y.argsort(stable=True)
    return x[order], y[order]


def smooth_labels(items):
    x, y = map(torch.stack, zip(*items))
    return x, y - y.float().mean()


def standardised(items):
    x, y = map(torch.stack, zip(*items))
    return (x - x.mean()) / x.std(), y


def rare_company(items):
    x, y = map(torch.stack, zip(*items))
    return x + (x[:, :1, :1, :1] == image(RARE, 8)[0, 0, 0]).any(), y


COLLATES = {
    'longest first': (lambda: [(x[..., : 8 - 2 * (i > 0)], y) for i, (x, y) in enumerate(tensors(40))], pad),
    'one shorter': (lambda: [(x[..., : 8 - 2 * (i == RARE)], y) for i, (x, y) in enumerate(tensors(N))], pad),
    'boxes': (lambda: [boxes(i) for i in range(40)], pad_boxes),
    'first of the batch': (lambda: tensors(40), by_first),
    'sorted by label': (lambda: tensors(40), sort_by_label),
    'labels': (lambda: tensors(40), smooth_labels),
    'statistics of the batch': (lambda: tensors(40), standardised),
    'the company of one': (lambda: tensors(N), rare_company),
}


@pytest.mark.parametrize('n_aug', [None, 2])
@pytest.mark.parametrize('name', COLLATES)
def test_what_differs_by_company_is_refused(name, n_aug):
    make, collate = COLLATES[name]
    dls = torch_dls(make(), batch_size=8, collate_fn=collate)
    learn = with_dls(dls)
    with pytest.raises(ValueError, match='training samples depend on the others in their batch.*' + collate.__name__):
        learn.precompute(n_aug=n_aug).__enter__()
    learn.dls = DataLoaders(TfmdDL(make(), bs=8, num_workers=0, create_batch=collate), TfmdDL(make(), bs=8, num_workers=0))
    with pytest.raises(ValueError, match='training samples depend on the others in their batch.*create_batch'):
        learn.precompute(n_aug=n_aug).__enter__()


def test_in_worker_processes_too():
    make, collate = COLLATES['the company of one']
    learn = with_dls(torch_dls(make(), batch_size=8, collate_fn=collate, num_workers=1))
    with pytest.raises(ValueError, match='depend on the others in their batch.*rare_company'):
        learn.precompute().__enter__()


def test_boxes_of_fastai():
    def item(i):
        n = 2 if i == 3 else 1
        return torch.full((3, 8, 8), i / 100), TensorBBox(torch.tensor([[0.0, 0.0, 4.0, 4.0]] * n)), torch.arange(n) + 1

    dls = DataLoaders(
        *[TfmdDL([item(i) for i in range(40)], bs=8, num_workers=0, before_batch=partial(bb_pad, pad_idx=0)) for _ in range(2)]
    )
    learn = with_dls(dls)
    dls.n_inp = 1
    with pytest.raises(ValueError, match='depend on the others in their batch'):
        learn.precompute().__enter__()


def test_to_one_size_is_no_dependence():
    def make():
        samples = [(x[..., : 8 - i % 3], y) for i, (x, y) in enumerate(tensors(40))]
        return with_dls(torch_dls(samples, batch_size=8, shuffle=True, collate_fn=partial(pad, to=8)))

    plain, stored = make(), make()
    without = train(plain)
    with stored.precompute():
        np.testing.assert_allclose(train(stored), without, rtol=1e-5)


def test_a_collate_function_that_takes_its_samples_apart():
    def popping(items):
        y = torch.stack([o.pop('y') for o in items])
        return torch.stack([o.pop('x') for o in items]), y

    data = [{'x': x, 'y': y} for x, y in tensors(24)]

    class Copies(list):
        def __getitem__(self, i):
            return dict(super().__getitem__(i))

    learn = with_dls(torch_dls(Copies(data), batch_size=8, collate_fn=popping))
    with learn.precompute():
        learn.fit(1)


def test_order_of_access():
    class Previous(list):
        last = 0

        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            x, self.last = x + self.last, i
            return x, y

    with pytest.raises(ValueError, match='Previous'):
        with_dls(torch_dls(Previous(tensors(40)), batch_size=8)).precompute().__enter__()


# --- known by what they are


def wrap(f):
    return lambda x: f(x)


class Own(Transform):
    def __init__(self, aug):
        self.aug = aug

    def encodes(self, x: torch.Tensor):
        return self.aug(x)


class Flip:
    "As albumentations writes it"

    always_apply = False

    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        return x


erase = RandomErasing(0.01)
DRAWING = {
    'composed': (Compose([erase]), 'RandomErasing'),
    'applied at times': (RandomApply([Lambda(lambda x: x)], p=0.1), 'RandomApply'),
    'closure': (wrap(Compose([erase])), 'RandomErasing'),
    'partial': (partial(lambda f, x: f(x), erase), 'RandomErasing'),
    'in a module': (nn.Sequential(nn.Identity(), v2.RandomErasing(0.01)), 'RandomErasing'),
    'version 2': (v2.Compose([v2.GaussianBlur(3, (0.1, 2))]), 'GaussianBlur'),
    'policy': (TrivialAugmentWide(), 'TrivialAugmentWide'),
    'probability': (Flip(0.5), 'Flip'),
}


@pytest.mark.parametrize('name', DRAWING)
def test_known_to_draw(name):
    tfm, said = DRAWING[name]

    class Transformed(list):
        transform = None

    data = Transformed(tensors(8))
    data.transform = tfm
    for dataset in (data, Subset(data, range(4)), ConcatDataset([data, data])):
        assert any(said in n for n in random_transforms(TorchDataLoader(dataset)))
    if not isinstance(tfm, nn.Sequential):
        for t in (tfm, Own(tfm)):
            assert any(said in n for n in random_transforms(TfmdDL(tensors(8), num_workers=0, after_item=[t])))


@pytest.mark.parametrize('tfm', [Compose([RandomErasing(0)]), RandomApply([erase], p=0), v2.GaussianBlur(3, (1, 1)), Flip(0), Flip(1)])
def test_known_not_to_draw(tfm):
    class Transformed(list):
        transform = tfm

    assert random_transforms(TorchDataLoader(Transformed(tensors(8)))) == []


# --- at what cost


@pytest.mark.parametrize('n', [24, 60])
@pytest.mark.parametrize('bs', [4, 8])
def test_two_passes_of_a_batch_beside_one_over_the_data(n, bs):
    learn = with_dls(DataLoaders(TfmdDL(tensors(n), bs=bs, num_workers=0), TfmdDL(tensors(10), bs=bs, num_workers=0)))
    calls = []
    learn.model[0][0].register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    with learn.precompute():
        n_batches = -(-n // bs) + -(-10 // bs)
        assert len(calls) <= n_batches + 2
        assert sum(calls) <= n + 10 + 2 * bs


def test_each_sample_is_not_loaded_again_and_again():
    loaded = []

    class Loads(list):
        def __getitem__(self, i):
            loaded.append(i)
            return super().__getitem__(i)

    learn = with_dls(torch_dls(Loads(tensors(600)), batch_size=50))
    with learn.precompute():
        assert len(loaded) <= 600 + 3 * 66 + 10
        n = len(loaded)
        learn.fit(1)
        assert len(loaded) <= n + 4


# --- changed meanwhile


class Owned(list):
    "A dataset that keeps tensors in an attribute"

    def __init__(self, n=40):
        self.x, self.y = torch.stack([image(i, 8) for i in range(n)]), torch.arange(n) % 2

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Arrays(Owned):
    def __init__(self, n=40):
        super().__init__(n)
        self.x, self.y = self.x.numpy(), self.y.numpy()

    def __getitem__(self, i):
        return torch.tensor(self.x[i]), torch.tensor(self.y[i])


def swap(data, **kwargs):
    vars(data).update(kwargs)


WRITES = {
    'appended': (lambda: tensors(40), lambda d: d.append(d[0])),
    'taken out': (lambda: tensors(40), lambda d: d.pop()),
    'one replaced': (lambda: tensors(40), lambda d: d.__setitem__(17, d[3])),
    'one written to': (lambda: tensors(N), lambda d: d[RARE][0].add_(1)),
    'one label written to': (lambda: tensors(N), lambda d: d[RARE][1].mul_(0)),
    'tensor of all': (Owned, lambda d: d.x.mul_(2)),
    'one row of a tensor': (Owned, lambda d: d.x[17].mul_(2)),
    'one label of a tensor': (Owned, lambda d: d.y.__setitem__(17, 1 - d.y[17])),
    'past the counter': (Owned, lambda d: d.x.data[17].mul_(2)),
    'tensor replaced': (Owned, lambda d: swap(d, y=1 - d.y)),
    'shorter': (Owned, lambda d: swap(d, x=d.x[:30], y=d.y[:30])),
    'array': (Arrays, lambda d: d.y.__setitem__(17, 1 - d.y[17])),
    'tensors of a TensorDataset': (lambda: TensorDataset(Owned().x, Owned().y), lambda d: d.tensors[1].fill_(1)),
    'subset': (lambda: Subset(tensors(40), list(range(30))), lambda d: d.indices.__setitem__(0, 35)),
    'inside a subset': (lambda: Subset(Owned(), list(range(30))), lambda d: d.dataset.y.fill_(1)),
}


@pytest.mark.parametrize('fastai', [False, True])
@pytest.mark.parametrize('name', WRITES)
def test_data_changed_inside_is_not_served_stale(name, fastai):
    make, write = WRITES[name]
    data = make()
    learn = with_dls(fastai_dls(data) if fastai else torch_dls(data, batch_size=7))
    with learn.precompute():
        learn.fit(1)
        write(data)
        for use in (lambda: learn.fit(1), partial(learn.validate, ds_idx=0)):
            with pytest.raises(RuntimeError, match='training data are no longer.*enter it again'):
                use()
    learn.dls = fastai_dls(data)
    with learn.precompute():
        learn.fit(1)


def test_items_of_fastai_datasets():
    for change in (lambda d: setattr(d.tls[0], 'items', list(range(20, 44))), lambda d: d.tls[1].items.__setitem__(0, 7)):
        learn = small()
        items = [*range(24)]
        learn.dls = Datasets(items, [[partial(image, size=8)], [label]], splits=[range(24), range(8)]).dataloaders(bs=8, num_workers=0)
        with learn.precompute():
            learn.fit(1)
            change(learn.dls.train_ds)
            with pytest.raises(RuntimeError, match='training data are no longer'):
                learn.fit(1)


def test_files_changed_on_disk(tmp_path):
    class Files(list):
        def __getitem__(self, i):
            return torch.load(tmp_path / f'{i}.pt'), label(i)

        def __len__(self):
            return 40

    for i in range(40):
        torch.save(image(i, 8), tmp_path / f'{i}.pt')
    learn = with_dls(torch_dls(Files(), batch_size=8))
    with learn.precompute():
        learn.fit(1)
        for i in range(40):
            torch.save(image(i, 8) * 2, tmp_path / f'{i}.pt')
        with pytest.raises(RuntimeError, match='no longer'):
            learn.fit(1)


def test_a_dataset_may_keep_what_it_loaded():
    class Caches(list):
        def __init__(self, data):
            super().__init__(data)
            self.cache = {}

        def __getitem__(self, i):
            return self.cache.setdefault(i, super().__getitem__(i))

    plain, stored = [with_dls(torch_dls(Caches(tensors(24)), batch_size=8, shuffle=True)) for _ in range(2)]
    without, after = train(plain), generators()
    with stored.precompute():
        within = train(stored)
    assert generators() == after
    np.testing.assert_allclose(within, without, rtol=1e-5)
