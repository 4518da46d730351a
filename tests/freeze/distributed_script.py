"Run by test_distributed.py on two processes with gloo: fits under every policy, statistics of data that ranks share, and what has to raise"

import sys, warnings
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.freeze.recalibrate import BatchNormRecalibrate
from bnfreeze_fastai.fusion import lazy
from bnfreeze_fastai.layers import MODES, norm_layers, stats_buffers
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift
from torch import nn
from conftest import Body, may_move
from learners import OPTIMIZERS, bits, body_and_head, make_dls, make_learner, same
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import set_seed
import torch
from torch.nn.parallel import DistributedDataParallel

warnings.filterwarnings('ignore')


class Wraps(Callback):
    "Wraps the model for the length of a fit, as fastai's `DistributedTrainer` does; that one needs a GPU"

    order = 11

    def __init__(self, sync_bn):
        self.sync_bn = sync_bn

    def before_fit(self):
        self.learn.model = DistributedDataParallel(self.learn.model)
        if self.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model.module)  # only now: the wrapper refuses such layers on a CPU

    def after_fit(self):
        self.learn.model = self.learn.model.module


def ranked_learner(sync_bn=False, **kwargs):
    learn = make_learner(**kwargs)
    learn.fit(1)
    if dist.get_rank():  # other weights, statistics and data than rank 0
        for t in learn.model.state_dict().values():
            t.add_(1)
        learn.dls = make_dls(n=24, size=9)
    learn.add_cb(Wraps(sync_bn))
    return learn


def rank0(tensors):
    "What the tensors are on rank 0"
    res = [t.detach().clone() for t in tensors]
    for t in res:
        dist.broadcast(t, 0)
    return res


def check(mode, bn_above, sync_bn, opt):
    learn = ranked_learner(sync_bn, opt_func=OPTIMIZERS[opt]).freeze_to_bn(-1, bn=mode, bn_above=bn_above)
    body = Body(learn.model[0])
    body.before = {k: rank0(v) for k, v in body.before.items()}
    learn.fit(2)
    assert body.moved(learn.model[0]) == may_move(mode), (mode, bn_above, sync_bn, opt, dist.get_rank(), body.moved(learn.model[0]))
    parts = [t for v in Body.parts(learn.model[0]).values() for t in v if t.requires_grad or not MODES[mode].updates_stats]
    assert same(rank0(parts), parts), 'ranks differ'
    assert any(isinstance(m, nn.SyncBatchNorm) for m in learn.model.modules()) == sync_bn


def check_sabotage():
    class OnRank1(Callback):
        def after_batch(self):
            if dist.get_rank():
                self.learn.model.module[0][1].bias.data.add_(1)

    learn = ranked_learner().freeze_to_bn(-1)
    try:
        learn.fit(1, cbs=OnRank1())
    except RuntimeError as e:
        assert '0.1.bias' in str(e), e
    else:
        raise AssertionError('no error')


def check_fusion(sync_bn):
    lazy.pays, learns = lambda *_: True, []  # also layers this small
    for fuse in (False, True):
        learn = ranked_learner(sync_bn, opt_func=OPTIMIZERS['sgd']).freeze_to_bn(0, bn_above='affine-only')
        if fuse:
            learn.fuse_bn()
        set_seed(1)
        learn.dls.train.rng.seed(1)
        learn.fit(2, 1e-2)
        learns.append(learn)
    plain, fused = learns
    assert fused.batch_norm_fuse.pairs.batch_norm.tolist() == ['0.1', '0.4']
    for p, q in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)
    assert same(rank0(fused.model.parameters()), list(fused.model.parameters())), 'ranks differ'


def share(rank):
    "Batches of one rank: sizes and values differ"
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, 8, 8, generator=g) * (2 + rank) + 3 * rank for n in ([8, 8, 3], [5])[rank]]


def first_layer_inputs(model):
    x = torch.cat([x for rank in (0, 1) for x in share(rank)])
    with torch.no_grad():
        return model[0][0](x).double().transpose(0, 1).flatten(1)


def check_recalibration(method, preserve, sync_bn, prior=None):
    set_seed(0)
    model = body_and_head()
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model[0][1].running_mean += dist.get_rank()  # as after training: each rank has its own
    wrapped = model if sync_bn else DistributedDataParallel(model, broadcast_buffers=False)
    y = rank0([model.eval()(share(0)[0])])[0]
    drift = recalibrate_bn(wrapped, share(dist.get_rank()), method=method, preserve=preserve, progress=False, prior=prior)
    x, w = first_layer_inputs(model), (prior or 0) / ((prior or 0) + 4)  # rank 0 has a mean of 0 and a variance of 1
    torch.testing.assert_close(model[0][1].running_mean.double(), (1 - w) * x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0][1].running_var.double(), (1 - w) * x.var(1) + w, rtol=1e-5, atol=0)
    state = [*model.state_dict().values(), torch.tensor(drift.kl.to_numpy())]
    assert same(rank0(state), state), 'ranks differ'
    assert int(model[0][1].num_batches_tracked) == 4
    if preserve:
        torch.testing.assert_close(model(share(0)[0]), y, rtol=1e-4, atol=1e-4)


def check_failing_rank(batches, said):
    model = body_and_head()
    before = bits(model.state_dict().values())
    try:
        recalibrate_bn(model, batches, progress=False)
    except (ValueError, RuntimeError) as e:
        assert said[dist.get_rank()] in str(e), e
    else:
        raise AssertionError('no error')
    assert same(before, model.state_dict().values())


def check_statistics():
    for method in ('batch', 'sequential'):
        for preserve in (False, True):
            for sync_bn in (False, True):
                check_recalibration(method, preserve, sync_bn)
        check_recalibration(method, False, False, prior=2)
    rank = dist.get_rank()
    check_failing_rank([x * float('nan') if rank else x for x in share(rank)], ['rank 1: ValueError: Batch 1', 'Batch 1'])
    check_failing_rank([], ['yields nothing'] * 2)
    model, batches = body_and_head(), share(0)
    model[0][1].running_mean += rank
    by_one = bn_shift(model, [] if rank else batches, progress=False)  # a rank without data has its say too
    by_both = bn_shift(model, batches[2:] if rank else batches[:2], progress=False)
    assert by_one.kl.notna().all() and by_one.equals(by_both)
    kl = [torch.tensor(by_one.kl.to_numpy())]
    assert same(rank0(kl), kl), 'ranks differ'
    learn = make_learner()
    learn.recalibrate_bn()
    state = list(learn.model.buffers())
    assert same(rank0(state), state) and int(learn.model[0][1].num_batches_tracked) == 6


class Seen(Callback):
    "Statistics after the training part of an epoch, and in its validation"

    order = 1000

    def after_train(self):
        self.trained = bits(self.stats())

    def before_validate(self):
        self.validated = bits(self.stats())

    def stats(self):
        return [b for l in norm_layers(self.learn.model).values() for b in stats_buffers(l).values()]


def check_recalibrated(keep):
    learn = ranked_learner(cbs=BatchNormFreeze(accumulate=True))
    learn.fit(2, cbs=[BatchNormRecalibrate(keep=keep), GradientAccumulation(16), seen := Seen()])
    seen.learn = learn
    assert same(rank0(seen.validated), seen.validated), 'ranks differ'
    assert same(seen.validated if keep else seen.trained, seen.stats()) and not same(seen.validated, seen.trained)


if __name__ == '__main__':
    dist.init_process_group('gloo')
    for keep in (False, True):
        check_recalibrated(keep)
    for opt in OPTIMIZERS:
        for mode in MODES:
            check(mode, 'train', False, opt)
    for mode in ('frozen', 'affine-only'):
        check(mode, 'affine-only', True, 'adam')  # SyncBatchNorm in training mode needs a GPU
    check_sabotage()
    for sync_bn in (False, True):
        check_fusion(sync_bn)
    check_statistics()
    dist.barrier()
    if not dist.get_rank():
        print('all ranks agree')
    dist.destroy_process_group()
