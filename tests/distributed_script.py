"Run by test_distributed.py on two processes with gloo: fits under every policy on DistributedDataParallel, and what has to raise"

import sys, warnings
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import *
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


if __name__ == '__main__':
    dist.init_process_group('gloo')
    for opt in OPTIMIZERS:
        for mode in MODES:
            check(mode, 'train', False, opt)
    for mode in ('frozen', 'affine-only'):
        check(mode, 'affine-only', True, 'adam')  # SyncBatchNorm in training mode needs a GPU
    check_sabotage()
    dist.barrier()
    if not dist.get_rank():
        print('all ranks agree')
    dist.destroy_process_group()
