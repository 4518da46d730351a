"""Kills and faults at random moments: `python -m tests.soak [seed [kind [number]]]`, or `make soak`. Linux only.

A kind, and the number of a case in it, repeat what went wrong. The table of a run over all kinds is kept in `tests/soak/table.csv`."""

import os

os.environ |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')  # before torch is there: victims are forked, and have no GPU

import random, shutil, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(Path(tempfile.gettempdir()) / 'torchinductor_soak'))  # no file of the victims

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar

from bnfreeze_fastai.choose.results import write_whole

from .faults import FAULTS, inject
from .kills import KINDS, chain
from .processes import Victim, in_shm, left_behind

LONGEST = 15 * 60  # seconds; nothing is started in the last of them
MARGIN = 120
LEAST = 200  # kills and faults of a run that is not cut short
CHAINS = {'training': 14, 'checkpoint write': 8, 'precompute': 12, 'comparison': 7, 'comparison, 2 processes': 2, 'search': 4}
LONG = 'comparison, 2 processes', "joblib's process killed"  # joblib's processes import everything anew
TABLE = Path(__file__).parent / 'table.csv'


def kill(name, seed, folder):
    "One chain, as a row of the table"
    done = chain(KINDS[name], seed, folder)
    wrong = done.wrong + [f'left at the end: {done.left_at_end}'] * bool(done.left_at_end)
    return dict(times=done.kills, wrong=wrong, left_by_kill=done.left, left_at_end=len(done.left_at_end), **done.noted)


def fault(name, seed, folder):
    "One fault, as a row of the table"
    before = in_shm()
    victim = Victim(inject, name, seed, folder=folder)
    came = victim.end()
    left = left_behind(Path(folder), victim.pids, before)
    ours = [p for p in left if not p.startswith('tmp/pymp-')]  # Python's own, of a loader process that was killed
    wrong = victim.all('wrong') + victim.all('error') + [f'left at the end: {left}'] * bool(ours or len(left) > 1)
    return dict(times=int(came is not False), wrong=wrong, left_at_end=len(left))


def plan(seed, kind=None, number=None):
    "All cases in random order, but the long ones first: what makes a row, a title, the kind and the number"
    cases = [(kill, 'SIGKILL: ', k, i) for k, n in CHAINS.items() for i in range(n)]
    cases += [(fault, '', k, i) for k, f in FAULTS.items() for i in range(f.times)]
    random.Random(seed).shuffle(cases)
    cases.sort(key=lambda c: c[2] not in LONG)
    return [c for c in cases if kind in (None, c[2]) and number in (None, c[3])]


def run(seed, cases, until):
    "The rows of all cases that could be started in time"
    rows, scratch = [], Path(tempfile.mkdtemp(prefix='soak_'))
    scratch.chmod(0o755)  # for the faults of somebody who may not write
    try:
        for make, title, kind, i in progress_bar(cases):
            if time.monotonic() > until:
                continue
            start = time.monotonic()
            row = make(kind, f'{seed} {kind} {i}', scratch / 'case')
            rows.append(dict(kind=title + kind, seconds=time.monotonic() - start, **row))
            shutil.rmtree(scratch / 'case')
            for wrong in row['wrong']:
                print(f"\nWRONG, again by `python -m tests.soak {seed} '{kind}' {i}`: {wrong}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def table(rows):
    "One row per kind"
    df = pd.DataFrame(rows)
    asked = {f'SIGKILL: {k}': v.asked for k, v in KINDS.items()} | {k: v.asked for k, v in FAULTS.items()}
    df = df.assign(cases=1, wrong=df['wrong'].map(len)).fillna(0)
    most = ['left_by_kill', 'left_at_end']
    notes = ['cut-off checkpoint', *(f'kill while {k.within.begin}' for k in KINDS.values() if k.within)]
    notes = [c for c in dict.fromkeys(notes) if c in df]
    sums = df.groupby('kind')[['cases', 'times', 'wrong', 'seconds', *notes]].sum()
    res = sums.join(df.reindex(columns=['kind', *most]).fillna(0).groupby('kind').max()).reindex([k for k in asked if k in set(df['kind'])])
    told = lambda row: ', '.join(f'{c}: {int(row[c])}' for c in notes if row[c])
    res = res.assign(seen=res.apply(told, axis=1), asked=res.index.map(asked)).reset_index()
    whole = ['cases', 'times', 'wrong', *most]
    res[whole] = res[whole].astype(int)
    return res[['kind', *whole, 'seconds', 'seen', 'asked']].round({'seconds': 1})


def main(seed=0, kind=None, number=None):
    torch.set_num_threads(1)
    start = time.monotonic()
    cases = plan(seed, kind, number)
    rows = run(seed, cases, start + LONGEST - MARGIN)
    res = table(rows)
    print(f'\n\n{res.drop(columns="asked").to_string(index=False)}\n')
    times, wrong = res['times'].sum(), res['wrong'].sum()
    left_out, seconds = len(cases) - len(rows), time.monotonic() - start
    print(f'Seed {seed}: {times} kills and faults in {seconds:.0f} seconds, {wrong} wrong, {left_out} cases not started')
    if kind is None:
        write_whole(TABLE, res.to_csv(index=False))
    return int(wrong > 0 or kind is None and times < LEAST)


if __name__ == '__main__':
    seed, kind, number = (sys.argv[1:] + [None] * 3)[:3]
    sys.exit(main(int(seed or 0), kind, None if number is None else int(number)))
