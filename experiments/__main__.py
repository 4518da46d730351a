"""Which mode when? Every policy on real networks and images."""

import argparse, json, platform, random, signal, sys, time, traceback, warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd, torch
from joblib import Parallel, delayed

from bnfreeze_fastai.compare import bn_compare

from .grid import EPOCHS, FIT, POLICIES, RATES, get_learner
from .measures import measures

NETWORKS = ('mobilenet_v2', 'efficientnet_lite0')
DATA = {'bccd_cells': 64, 'fashion_mnist': 64, 'ants_bees_160': 96, 'traffic_signs_32': 64, 'digits': 64,
        'bccd_cells+faded': 64, 'ants_bees_160+blurred': 96, 'traffic_signs_32+warm': 64}
PAIRS = [(n, bs) for n in (32, 128, 512) for bs in (4, 16, 32)]
KEYS = ['network', 'data', 'size', 'n_images', 'bs', 'trains', 'rate']


def cells():
    rng = random.Random(0)
    res = []
    for turn in range(3):
        for network in NETWORKS:
            for trains in FIT:
                pairs = rng.sample(PAIRS, len(PAIRS))
                for data, size in DATA.items():
                    fits = lambda p: not ('ants' in data and p[0] == 512 or 'signs' in data and p[0] == 32)
                    pair = next(p for p in pairs if fits(p))
                    pairs.remove(pair)
                    rate = 1 if turn == 0 else rng.choice([1, 1, 3, 1 / 3])
                    res.append(dict(zip(KEYS, (network, data, size, *pair, trains, round(rate, 3)))))
                    if not any(fits(p) for p in pairs): pairs = rng.sample(PAIRS, len(PAIRS))
    seen = []
    for turn in range(3):
        part = res[turn * len(res) // 3:(turn + 1) * len(res) // 3]
        rng.shuffle(part)
        seen += [c for c in part if c not in seen]
    return seen


def name_of(cell): return '-'.join(str(v) for v in cell.values()).replace('+', '_')


def run_cell(cell, images, out, device, seeds, deadline):
    warnings.filterwarnings('ignore')
    left = deadline - time.time()
    if left < 8: return 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(left))
    start = time.time()
    path = cell['data'] if cell['data'].startswith('digits') else str(Path(images) / cell['data'].replace('+', '.zip+') if '+' in cell['data'] else Path(images) / f"{cell['data']}.zip")
    how = dict(cell, data=path); rate = how.pop('rate')
    get = partial(get_learner, device=device, **how)
    fit, freeze_to = FIT[cell['trains']]
    try:
        part = Path(out) / f'{name_of(cell)}.csv'
        with open(part.with_suffix('.log'), 'w') as log:
            sys.stdout = log
            for seed in range(seeds):
                m = part.with_name(f'{name_of(cell)}-{seed}.measures')
                if not m.exists():
                    learn = get(seed)
                    learn.model.to(device)
                    t = time.time()
                    x, y = learn.all_train; vx, vy = learn.all_valid
                    found = measures(learn, x.to(device), y, vx.to(device), vy, cell['bs'])
                    m.write_text(json.dumps(dict(cell, seed=seed, **found, seconds=time.time()-t)))
            compared = bn_compare(get, POLICIES[cell['trains']], EPOCHS[cell['n_images']], seeds, fit, freeze_to, RATES[cell['trains']] * rate, results=part,
                                  settings=cell)
    except KeyboardInterrupt: pass
    except BaseException: (Path(out) / f'{name_of(cell)}.err').write_text(traceback.format_exc())
    finally:
        signal.alarm(0)
        sys.stdout = sys.__stdout__
    return time.time() - start


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--images', default='../shared/real'); p.add_argument('--out', default='experiments/parts'); p.add_argument('--device', default='cpu')
    p.add_argument('--jobs', type=int, default=1); p.add_argument('--seconds', type=float, default=1e9); p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--first', type=int, default=0); p.add_argument('--last', type=int, default=10_000); p.add_argument('--where', default=None)
    a = p.parse_args()
    deadline = time.time() + a.seconds
    Path(a.out).mkdir(parents=True, exist_ok=True)
    todo = cells()[a.first:a.last]
    if a.where: todo = [c for c in todo if eval(a.where, {}, c)]
    took = Parallel(n_jobs=a.jobs)(delayed(run_cell)(c, a.images, a.out, a.device, a.seeds, deadline) for c in todo)
    print(len(todo), 'cells', sum(took), 'seconds of processes')


if __name__ == '__main__':
    main()
