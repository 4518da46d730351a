"Stored features of many samples: seconds and memory by their number, in memory and in a file"

import json, subprocess, sys, threading, time

import torch
from fastai.data.core import DataLoaders
from torch import nn

from bench.measure import memory
from bench.precompute import plain_learner
import bnfreeze_fastai.learner

WIDTH, BATCH = 512, 1024


class Images:
    "Small images that take no memory until they are asked for"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3, 8, 8), i / self.n), i % 10


def peak_of(f):
    "MiB of memory of this process, which is no file's, that `f()` adds at its peak, looked at every few milliseconds"
    before, seen, over = memory('RssAnon'), [0], threading.Event()

    def watch():
        while not over.wait(0.005):
            seen.append(memory('RssAnon') - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    f()
    over.set()
    watcher.join()
    return max(seen)


def measure(n, in_memory):
    "Seconds to store the features of `n` samples, seconds of an epoch on them, and MiB at the peak"
    body = nn.Sequential(nn.Conv2d(3, WIDTH, 8), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Flatten())
    dls = DataLoaders.from_dsets(Images(n), Images(BATCH), bs=BATCH, num_workers=0, device='cpu')
    learn = plain_learner(dls, nn.Sequential(body, nn.Linear(WIDTH, 10)), lambda m: [list(part.parameters()) for part in m])
    learn.recalibrate_bn(n_batches=1)
    learn.freeze_to_bn(-1)
    took, kept = [], (n + BATCH) * (4 * WIDTH + 8)  # bytes of features and labels, also for validation

    def run():
        start = time.perf_counter()
        with learn.precompute(max_mem=kept if in_memory else 0):
            stored = time.perf_counter()
            learn.fit(1)
            took.extend((stored - start, time.perf_counter() - stored))

    peak = peak_of(run)
    return dict(zip(('stored in, s', 'epoch, s'), took)) | {'peak, MiB': peak}


def in_processes(n):
    "In memory and in a file, each in a process of its own"
    row = {'features, MiB': 4 * n * WIDTH / 2**20}
    for place in ('memory', 'file'):
        command = [sys.executable, '-m', 'bench.scale', str(n), place]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row |= {f'{place}: {name}': value for name, value in found.items()}
    return row


TABLES = {f'Stored features of many samples, {WIDTH} for each, batches of {BATCH}': in_processes}

if __name__ == '__main__':
    n, place = sys.argv[1:]
    print(json.dumps(measure(int(n), place == 'memory')))
