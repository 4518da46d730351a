"""Two processes on one device: `torch.distributed.run --nproc_per_node=2 -m bench.ranks gloo cuda`. Prints one line of JSON.

NCCL refuses two ranks on one GPU. gloo takes tensors of a GPU through the memory of the processor, and `SyncBatchNorm` knows it."""

import json, os, sys
from datetime import timedelta

import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.utils.tensors import fingerprints

N = 6  # samples of a rank


def task(device):
    "A small model, the same on all ranks, and the data of each rank"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    batches = [torch.randn(N, 3, 8, 8).add_(i).to(device) for i in range(dist.get_world_size())]
    return model.to(device), batches


def wrapped(model):
    return DistributedDataParallel(model, device_ids=[0] if next(model.parameters()).is_cuda else None)


def same_on_all(tensors):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprints(tensors))
    return all(f == found[0] for f in found)


def fixed(device):
    "A step with statistics fixed: they stay, and the gradients are the same on both"
    model, batches = task(device)
    before, ddp = fingerprints(model.buffers()), wrapped(model)
    with hold_bn_mode(ddp, 'affine-only'):
        ddp(batches[dist.get_rank()]).square().sum().backward()
    assert fingerprints(model.buffers()) == before, 'statistics moved'
    assert same_on_all(p.grad for p in model.parameters()), 'gradients differ'


def pooled(device):
    "Statistics re-estimated from the data of both are those of all data"
    model, batches = task(device)
    recalibrate_bn(wrapped(model), [batches[dist.get_rank()]], progress=False)
    mean = model[0](torch.cat(batches)).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-3, atol=1e-4)
    assert same_on_all(model.buffers()), 'statistics differ'


def synced(device):
    "A step of `SyncBatchNorm` in training: its statistics are those of both"
    model, batches = task(device)
    mean = model[0](torch.cat(batches)).mean((0, 2, 3))
    ddp = wrapped(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # afterwards, as the wrapper refuses such layers on a CPU
    ddp(batches[dist.get_rank()]).square().sum().backward()
    torch.testing.assert_close(model[1].running_mean, 0.1 * mean, rtol=1e-3, atol=1e-4)
    before = fingerprints(model.buffers())
    with hold_bn_mode(ddp, 'frozen'):
        ddp(batches[dist.get_rank()])
    assert fingerprints(model.buffers()) == before, 'statistics moved'


def outcome(f, device):
    try:
        f(device)
    except Exception as e:
        return f'{type(e).__name__}: {str(e)[:300]}'
    return 'right'


if __name__ == '__main__':
    backend, device = sys.argv[1:]
    dist.init_process_group(backend, timeout=timedelta(seconds=45))
    found = {f.__name__: outcome(f, device) for f in (fixed, pooled, synced)}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)  # a process group that has refused may not let itself be ended
