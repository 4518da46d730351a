"Run by test_distributed.py on two processes with gloo: the whole contract through fastai's own `distrib_ctx`"

import sys, warnings
from pathlib import Path

import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import MODES
from torch import nn
from conftest import Body, may_move
from learners import bits, make_dls, make_learner, same
from fastai.callback.core import Callback
import torch
from distributed_script import rank0
from fastai.distributed import DistributedTrainer
from fastai.learner import load_learner
from torch.nn.parallel import DistributedDataParallel

warnings.filterwarnings('ignore')

# What stands in the way without a GPU: fastai moves the order of samples there to share it, and PyTorch's wrapper refuses SyncBatchNorm
torch.Tensor.cuda = lambda t, *args, **kwargs: t
DistributedDataParallel._passing_sync_batchnorm_handle = lambda *args: None


def by_rank_learner(**kwargs):
    "Trained, other weights and statistics on rank 1, the same data"
    learn = make_learner(**kwargs)
    learn.fit(1)
    for t in learn.model.state_dict().values():
        t.add_(dist.get_rank())
    return learn


def body_of_rank0(learn):
    body = Body(learn.model[0])
    body.before = {k: rank0(v) for k, v in body.before.items()}
    return body


def check_same_on_ranks(tensors):
    tensors = list(tensors)
    assert same(rank0(tensors), tensors), 'ranks differ'


def check_fit(bn, bn_above, sync_bn, fit='fit'):
    learn = by_rank_learner().freeze_to_bn(-1, bn=bn, bn_above=bn_above)
    body, in_body = body_of_rank0(learn), bn if fit == 'fit' else bn_above
    with learn.distrib_ctx(sync_bn=sync_bn, cpu=True):
        getattr(learn, fit)(2)
        check_same_on_ranks([torch.tensor(learn.validate())])
    moved = body.moved(learn.model[0])
    assert moved == may_move(in_body) | ({'others'} if fit == 'fine_tune' else set()), (bn, bn_above, sync_bn, dist.get_rank(), moved)
    check_same_on_ranks(learn.model.parameters())
    assert any(isinstance(m, nn.SyncBatchNorm) for m in learn.model.modules()) == sync_bn
    assert set(learn.bn_summary().df['mode'][:2]) == {in_body}
    return learn


def check_drift():
    learn = by_rank_learner().freeze_to_bn(-1, bn={'0.1': 'frozen', '0.4': 'train'}, bn_above='affine-only')
    start = learn.bn_snapshot()
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(1)
    drift = learn.bn_drift(start).set_index('layer')['kl']
    assert (drift[['0.1', '1.2']] == 0).all() == (dist.get_rank() == 0)  # fixed are rank 0's values, which the others took over
    assert drift['0.4'] > 0
    learn.recalibrate_bn()
    check_same_on_ranks([*learn.model.buffers()])


class OnRank1(Callback):
    def after_batch(self):
        if dist.get_rank() and self.training:
            self.learn.model.module[0][1].running_mean.add_(1)


def check_raises(error, words, f):
    try:
        f()
    except error as e:
        assert words in str(e), e
    else:
        raise AssertionError(f'no error on rank {dist.get_rank()}')


def check_verify():
    learn = by_rank_learner().freeze_to_bn(-1)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        check_raises(RuntimeError, '0.1.running_mean', lambda: learn.fit(1, cbs=OnRank1()))


class Means(Callback):
    "The running mean of the body after each batch"

    def before_fit(self):
        self.means = []

    def after_batch(self):
        if self.training:
            self.means.append(self.learn.model.module[0][1].running_mean.clone())


def check_schedule():
    learn = make_learner(cbs=[BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')}), Means()])
    learn.dls = make_dls(n=32)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2)
    means = learn.means.means
    moves = [not torch.equal(*pair) for pair in zip(means, means[1:])]
    assert moves == [True, dist.get_rank() == 1, False], moves  # from the third batch on rank 0's, which the wrapper hands out
    check_same_on_ranks(learn.model[0].buffers())
    learn = make_learner(cbs=BatchNormFreeze(schedule={0.5: dict(bn_above='frozen')}))
    before = bits(learn.model.state_dict().values())
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        check_raises(ValueError, "['0.1', '0.4', '1.2']", lambda: learn.fit(2))
    assert same(before, learn.model.state_dict().values())


def check_export():
    learn = check_fit('frozen', 'affine-only', False)
    if not dist.get_rank():
        Path('exported.pkl').unlink(missing_ok=True)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.export('exported.pkl')
    dist.barrier()
    loaded = load_learner('exported.pkl')
    check_same_on_ranks(loaded.model.state_dict().values())
    assert same(bits(learn.model.parameters()), loaded.model.parameters())
    assert not any(isinstance(cb, DistributedTrainer) for cb in learn.cbs)
    body = Body(learn.model[0])
    learn.fit(1)  # in each process by itself
    assert body.moved() == set()


if __name__ == '__main__':
    dist.init_process_group('gloo')
    for mode in MODES:
        check_fit(mode, 'train', False)
    for sync_bn in (False, True):
        check_fit('frozen', 'affine-only', sync_bn, 'fine_tune')
        check_fit('affine-only', 'affine-only', sync_bn)  # SyncBatchNorm in training mode needs a GPU
    check_drift()
    check_verify()
    check_schedule()
    check_export()
    dist.barrier()
    if not dist.get_rank():
        print('all ranks agree')
    dist.destroy_process_group()
