"What entering `precompute` costs in two processes, of which each runs half of the samples, against one; a thread for each"

import os, subprocess, sys, time

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar

from bench.precompute import make_learner

ROUNDS = 3


def enter(learn):
    with learn.precompute():
        pass


def in_processes(arch, n):
    "Seconds to enter the block in `n` processes: those of the first, which waits for the others"
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', '-m', 'bench.processes', arch]
    res = subprocess.run(cmd, check=True, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return float(res.stdout.split()[-1])


def compare_processes(arch):
    "Median over rounds, and ratios within a round; nothing else may run"
    rounds = pd.DataFrame([{n: in_processes(arch, n) for n in (1, 2)} for _ in progress_bar(range(ROUNDS))])
    ratio = rounds[2] / rounds[1]
    return {'one, seconds': rounds[1].median(), 'two / one': ratio.median(), 'low': ratio.min(), 'high': ratio.max()}


TABLES = {'Stored features in two processes': compare_processes}

if __name__ == '__main__':
    torch.distributed.init_process_group('gloo')
    learn = make_learner(sys.argv[1]).freeze_to_bn(-1)
    enter(learn)
    start = time.perf_counter()  # not the processor's time: they wait for each other
    enter(learn)
    took = time.perf_counter() - start
    if torch.distributed.get_rank() == 0:
        print(took)
    torch.distributed.destroy_process_group()
