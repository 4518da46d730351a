"What the benchmarks share: seconds, resident memory, and processes of their own"

import os, re, subprocess, sys, time
from pathlib import Path

SIZE, BATCH, N_BATCHES = 128, 16, 16


def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def added_memory(f, *args):
    "MiB of resident memory that `f(*args)` adds at its peak to this process; reads Linux's /proc"

    def memory(field):
        return int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024

    Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
    before = memory('VmRSS')
    f(*args)
    return memory('VmHWM') - before


def in_own_process(module, *args):
    "The number that `python -m module args` prints, where memory that is freed goes back to the system at once"
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    return float(subprocess.run([sys.executable, '-m', module, *args], check=True, capture_output=True, text=True, env=env).stdout)
