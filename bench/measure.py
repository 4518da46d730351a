"What the benchmarks share: seconds, resident memory, and processes of their own"

import os, re, subprocess, sys, time
from pathlib import Path

import torch

SIZE, BATCH, N_BATCHES = 128, 16, 16


def seconds(f, *args):
    "Of the processor where PyTorch uses one thread, as other processes do not change that; else of the clock"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    f(*args)
    return clock() - start


def ratio_to(plain, f):
    "Seconds of `f()` as a ratio to the mean of those of `plain()` just before and just after it"
    before, own, after = seconds(plain), seconds(f), seconds(plain)
    return 2 * own / (before + after)


def ratios_to(plain, variants):
    "`ratio_to` for each of `variants` by name, with one pass of `plain` between two of them"
    before, ratios = seconds(plain), {}
    for name, f in variants.items():
        own, after = seconds(f), seconds(plain)
        ratios[name], before = 2 * own / (before + after), after
    return ratios


def added_memory(f, *args):
    "MiB of resident memory that `f(*args)` adds at its peak to this process; reads Linux's /proc"

    def memory(field):
        return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024

    Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
    before = memory('VmRSS')
    f(*args)
    return memory('VmHWM') - before


def compare_memory(module, arch, names, own, other):
    "What `python -m module arch name` prints for each of `names`, and that of `own` as a ratio to that of `other`"
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}  # what is freed goes back to the system at once

    def run(name):
        cmd = [sys.executable, '-m', module, arch, name]
        return float(subprocess.run(cmd, check=True, capture_output=True, text=True, env=env).stdout)

    added = {name: run(name) for name in names}
    return {**{f'{name}, MiB': mib for name, mib in added.items()}, f'{own} ÷ {other}': added[own] / added[other]}
