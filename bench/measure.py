"What the benchmarks share: where and on how much they run, seconds, memory, and processes of their own"

import os, re, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar

SIZE, BATCH, N_BATCHES = 128, 16, 16


class Scale(NamedTuple):
    "Where to measure, and on how much"

    rounds: int
    device: str = 'cpu'
    size: int = SIZE  # pixels along each side
    batch: int = BATCH
    n_batches: int = N_BATCHES


def wait():
    "Until the GPU has done what it was given, if there is one"
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(f, *args):
    """Of the processor where PyTorch uses one thread and no GPU, as other processes do not change that; else of the clock, and not by events
    of the GPU, which would leave out what the processor does last"""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    clock = time.process_time if alone else time.perf_counter
    wait()
    start = clock()
    f(*args)
    wait()
    return clock() - start


def ratios_to(plain, variants):
    "Seconds of each of `variants`, by name, as a ratio to the mean of those of `plain()` just before and just after it"
    before, ratios = seconds(plain), {}
    for name, f in variants.items():
        own, after = seconds(f), seconds(plain)
        ratios[name], before = 2 * own / (before + after), after
    return ratios


def memory(field):
    "MiB of this process, by a field of Linux's /proc/self/status, such as `VmRSS`"
    return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024


def added_memory(f, *args):
    "MiB of resident memory that `f(*args)` adds at its peak to this process"
    Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
    before = memory('VmRSS')
    f(*args)
    return memory('VmHWM') - before


def gpu_memory(f, *args):
    "MiB of a GPU's memory that `f(*args)` adds at its peak; None if nothing runs on one"
    if not torch.cuda.is_initialized():
        f(*args)
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f(*args)
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def medians(variants, plain, rounds):
    "Of the times of `variants`, by name, as ratios to that of `plain` just before and after"
    for f in (plain, *variants.values()):
        f()
    return pd.DataFrame([ratios_to(plain, variants) for _ in progress_bar(range(rounds))]).median().to_dict()


def peaks(variants, plain):
    "The memory that each of `variants` adds at its peak, as a ratio to that of `plain`; nothing where that cannot be told"
    of_plain = gpu_memory(plain)
    return {f'{name}, memory': gpu_memory(f) / of_plain for name, f in variants.items()} if of_plain else {}


def compare_memory(module, arch, names, own, other):
    "What `python -m module arch name` prints for each of `names`, and that of `own` as a ratio to that of `other`"
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}  # what is freed goes back to the system at once

    def run(name):
        cmd = [sys.executable, '-m', module, arch, name]
        return float(subprocess.run(cmd, check=True, capture_output=True, text=True, env=env).stdout)

    added = {name: run(name) for name in names}
    return {**{f'{name}, MiB': mib for name, mib in added.items()}, f'{own} ÷ {other}': added[own] / added[other]}
