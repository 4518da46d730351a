"Run by test_shared_work.py on two processes with gloo: a head trained on stored features, as by the whole model, and as in one process"

import sys, warnings
from functools import partial
from pathlib import Path

import torch, torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / 'freeze'), str(Path(__file__).parent)]
import bnfreeze_fastai.learner
from bnfreeze_fastai.head.samples import Samples
from distrib_ctx_script import check_raises, rank0
from distributed_script import Wraps
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from learners import image, label, make_dls, pretrained, same
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader, DistributedSampler

warnings.filterwarnings('ignore')


class Seen(Callback):
    "The losses of this rank, and how many samples the body ran on"

    def before_fit(self):
        self.losses, self.ran = [], []
        body = getattr(self.learn.model, 'module', self.learn.model)[0]
        self.hook = body[0].register_forward_hook(lambda m, xs, y: self.ran.append(len(xs[0])))

    def after_batch(self):
        if self.training:
            self.losses.append(self.learn.loss.item())

    def after_fit(self):
        self.hook.remove()


def weights_of(learn):
    return torch.cat([p.detach().flatten() for p in learn.model[1].parameters()])


def new_learner(n=26, **kwargs):
    learn = pretrained(**kwargs)
    learn.dls = make_dls(n=n, bs=4)
    return learn.freeze_to_bn(-1, bn_above='affine-only')


def fit(learn, stored, way, epochs=2):
    "Losses and the head's weights"
    set_seed(3)
    learn.dls.train.rng.seed(3)
    inside = learn.precompute if stored else learn.no_bar
    with way(learn), inside():
        learn.fit(epochs, 0.1, cbs=(seen := Seen()))
        valid = learn.validate()
    assert bool(seen.ran) != stored, 'the body ran'
    return torch.tensor([*seen.losses, *valid]), weights_of(learn)


def by_fastai(learn, sync_bn=False):
    return learn.distrib_ctx(sync_bn=sync_bn, cpu=True)


def by_hand(learn):
    return learn.added_cbs(Wraps(False))


def check_same(a, b, rtol=1e-4):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-5)


def check_fits(way, make=new_learner):
    stored, plain = (fit(make(), stored, way) for stored in (True, False))
    check_same(stored, plain)
    assert same(rank0(stored[1:]), stored[1:]), 'ranks differ'
    return stored


def check_one_process(two, n=26):
    "A step of one process takes what both take: 4 of the first half of the order, and 4 of the second"
    learn, half = new_learner(n), n // 2
    dl = learn.dls.train
    shuffled = partial(type(dl).get_idxs, dl)

    def both(self=None):
        idxs = shuffled()
        return [i for k in range(0, half, 4) for r in (0, half) for i in idxs[r + k : min(r + k + 4, r + half)]]

    dl.get_idxs, dl.bs = both, 8
    set_seed(3)
    dl.rng.seed(3)
    learn.fit(2, 0.1, cbs=(seen := Seen()))
    mean = two[0][: len(seen.losses)].clone()
    dist.all_reduce(mean)
    check_same([torch.tensor(seen.losses), weights_of(learn)], [mean / 2, two[1]], rtol=1e-3)


def check_shares(n):
    "Each rank runs its part of the samples, and has the features of all"
    learn, made = new_learner(n), []
    learn.model[0][0].register_forward_hook(lambda m, xs, y: made.append(len(xs[0])))
    with by_fastai(learn):
        with learn.precompute():
            (samples, store), (valid, _) = learn.serve_features.stores
            assert [len(samples.share), samples.passes] == [(n + dist.get_rank()) // 2, 1]
            features = [store.batches[0], store.batches[1]]
            assert same(rank0(features), features)
            with torch.no_grad():
                whole = torch.cat([learn.serve_features.part.features(b) for b in learn.dls.train.new(shuffle=False, drop_last=False)])
            torch.testing.assert_close(store.batches[0][0], whole.as_subclass(torch.Tensor))


def own_values():
    "Data of the same size and shape, with other values on each rank, all drawn"
    learn = new_learner(24)
    rank = dist.get_rank()
    xs = [torch.full((3, 8, 8), float(rank + 1)) for _ in range(24)]
    items = [(x, torch.tensor(i % 2)) for i, x in enumerate(xs)]
    learn.dls = DataLoaders(*(DataLoader(items, bs=4, shuffle=s) for s in (True, False)), device='cpu')
    with learn.precompute(n_aug=2):
        (samples, store), _ = learn.serve_features.stores
        assert len(samples.share) == 24
        with torch.no_grad():
            mine = learn.serve_features.part.features((torch.stack(xs), None))
        torch.testing.assert_close(store.batches[0], mine.expand(2, *mine.shape))


def check_torch_loaders():
    learn = new_learner()
    items = [(image(i, 8), label(i)) for i in range(24)]
    sampler = DistributedSampler(items, shuffle=False)
    learn.dls = DataLoaders(TorchDataLoader(items, 4, sampler=sampler), TorchDataLoader(items, 4), device='cpu')
    with by_fastai(learn):
        check_raises(ValueError, 'loaders of its own', lambda: learn.precompute().__enter__())
    with learn.precompute(), by_hand(learn):
        learn.fit(1, 0.1, cbs=(seen := Seen()))
    assert not seen.ran and len(seen.losses) == 3


class FailsOnRank1:
    "Makes images, up to one"

    def __init__(self):
        self.calls, self.last = 0, float('inf')

    def __call__(self, i):
        self.calls += 1
        if dist.get_rank() and self.calls > self.last:
            raise OSError(f'no sample {i}')
        return image(i, 8)


def check_errors():
    learn, makes = new_learner(), FailsOnRank1()
    learn.dls = Datasets(range(24), [[makes], [label]], splits=[range(24), range(8)]).dataloaders(bs=4, num_workers=0, device='cpu')
    makes.calls, before = 0, list(learn.cbs)
    with learn.precompute():
        n_calls = makes.calls
    for last in (1, n_calls // 2, n_calls - 12, n_calls - 1):  # when samples are looked at, stored, looked at again
        makes.calls, makes.last = 0, last
        check_raises((OSError, RuntimeError), 'no sample', lambda: learn.precompute().__enter__())
        assert list(learn.cbs) == before
    learn = new_learner()
    with torch.no_grad():
        learn.model[0][0].weight.add_(dist.get_rank())
    for block in (learn.precompute, learn.fold_frozen):
        check_raises(ValueError, "learn.load('same')", lambda: block().__enter__())
    learn = new_learner()
    with by_fastai(learn), learn.precompute():
        check_raises(RuntimeError, 'no longer what it was', lambda: learn.fit(1, cbs=OnRank1()))


class OnRank1(Callback):
    def before_epoch(self):
        if dist.get_rank():
            self.learn.model.module[0][0].weight.data.add_(1)


def check_folded():
    learn, plain = new_learner(), new_learner()
    found = []
    for l, block in ((learn, learn.fold_frozen), (plain, plain.no_bar)):
        set_seed(3)
        l.dls.train.rng.seed(3)
        with by_fastai(l), block():
            l.fit(2, 0.1)
        found.append([p.detach() for p in l.model[1].parameters()])
    check_same(*found, rtol=1e-3)


def outside(learn):
    "`precompute` before `distrib_ctx`: each process runs all"
    set_seed(3)
    learn.dls.train.rng.seed(3)
    with learn.precompute(), by_fastai(learn):
        learn.fit(2, 0.1, cbs=(seen := Seen()))
        valid = learn.validate()
    assert not seen.ran
    return torch.tensor([*seen.losses, *valid]), weights_of(learn)


if __name__ == '__main__':
    dist.init_process_group('gloo')
    two = check_fits(by_fastai)
    check_same(outside(new_learner()), two)
    check_one_process(two)
    check_fits(partial(by_fastai, sync_bn=True))
    check_fits(by_hand)
    for n in (24, 25):
        check_shares(n)
    own_values()
    check_torch_loaders()
    check_folded()
    check_errors()
    dist.barrier()
    if not dist.get_rank():
        print('all ranks agree')
    dist.destroy_process_group()
