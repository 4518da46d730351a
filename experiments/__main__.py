"""Which mode when? Every policy on a grid of digit tasks, and what `bn_find` suggests: `python -m experiments`, or `make experiments`.

Finished runs are kept in `experiments/parts/`, and a second start goes on from there. At the end `runs.csv` and `finds.csv` are written."""

import json, time, warnings
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar
from joblib import Parallel, delayed

from bnfreeze_fastai.compare import bn_compare
from bnfreeze_fastai.digits import ValidateLast, colour, digit_learner, pretrain
from bnfreeze_fastai.results import write_whole

from .networks import NETWORKS

HERE = Path(__file__).parent
PARTS = HERE / 'parts'
SHIFTS = {'none': lambda x: x.expand(-1, 3, -1, -1), 'colour': colour}
FREEZE_TO = {'head': -1, 'all': 0}  # what trains
LR = {'head': 1e-2, 'all': slice(1e-3, 1e-2)}
EPOCHS = {32: 16, 128: 8, 512: 3}  # by training images
BATCH_SIZES = (4, 32)
N_SEEDS = 3
N_JOBS = 2
FIND_SEEDS = (10,)  # of the Learners that search: other heads, images and batches than those of the runs
COSTS = (0.25, 0.5)
CELLS = list(product(NETWORKS, SHIFTS, FREEZE_TO, EPOCHS, BATCH_SIZES))
KEYS = ['network', 'shift', 'trains', 'n_images', 'bs']


def learner(seed, pretrained, shift, n_images, bs):
    torch.set_num_threads(1)  # so that the results do not depend on the machine's number of cores
    learn = digit_learner(pretrained, seed, n_images, bs, SHIFTS[shift])
    return learn.add_cb(ValidateLast())


def compare(cell, get_learner):
    _, _, trains, n_images, _ = cell
    how = dict(epochs=EPOCHS[n_images], seeds=N_SEEDS, fit='fit_one_cycle', freeze_to=FREEZE_TO[trains], lr=LR[trains])
    part = PARTS / f'{"-".join(map(str, cell))}.csv'
    return bn_compare(get_learner, **how, n_jobs=N_JOBS, results=part, settings=dict(zip(KEYS, cell))).final


def find(cell, get_learner, seed, cost):
    "What `bn_find` says to a Learner with the data and the head of `seed`"
    import bnfreeze_fastai.find  # patches `bn_find` in, in each of joblib's processes

    warnings.filterwarnings('ignore')
    _, _, trains, n_images, _ = cell
    learn = get_learner(seed=seed)
    learn.freeze_to(FREEZE_TO[trains])
    start = time.perf_counter()
    try:
        with learn.no_bar():
            found = learn.bn_find(EPOCHS[n_images], cost, lr=LR[trains], plot=False)
    except ValueError:  # too few batches to divide
        return dict(asked=cost, seed=seed, suggestion=None, confident=False, cost=0.0, seconds=0.0)
    told = {k: getattr(found, k) for k in ('suggestion', 'confident', 'cost')}
    return dict(asked=cost, seed=seed, **told, seconds=time.perf_counter() - start)


def finds(cell, get_learner):
    part = PARTS / f'{"-".join(map(str, cell))}-find.json'
    if not part.exists():
        rows = Parallel(n_jobs=N_JOBS)(delayed(find)(cell, get_learner, *job) for job in product(FIND_SEEDS, COSTS))
        write_whole(part, json.dumps(rows))
    return pd.DataFrame(json.loads(part.read_text(encoding='utf-8')))


def main():
    PARTS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    pretrained = {name: pretrain(build=build) for name, build in NETWORKS.items()}
    print('Accuracy on the source task:', {name: round(accuracy, 3) for name, (_, accuracy) in pretrained.items()})
    tables = dict(runs=[], finds=[])
    for cell in progress_bar(CELLS):
        network, shift, _, n_images, bs = cell
        get_learner = partial(learner, pretrained=pretrained[network][0], shift=shift, n_images=n_images, bs=bs)
        for name, f in dict(runs=compare, finds=finds).items():
            tables[name].append(f(cell, get_learner).assign(**dict(zip(KEYS, cell))))
    for name, parts in tables.items():
        df = pd.concat(parts, ignore_index=True)
        df = df[[*KEYS, *(c for c in df.columns if c not in (*KEYS, 'weights', 'epoch'))]]
        write_whole(HERE / f'{name}.csv', df.to_csv(index=False, float_format='%.6g'))


if __name__ == '__main__':
    main()
