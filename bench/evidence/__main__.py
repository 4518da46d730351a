"""Which policy when, on real networks and images: `python -m bench.evidence`, or `make experiments`.

Without arguments, one cell of each kind is run again, and compared with the rows in `rows.csv`. `--all --images DIR` runs every cell
of the rows anew, from archives in DIR, and goes on where it was stopped; `--own FOLDER` runs the policies on images of your own."""

import platform
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar

from bnfreeze_fastai.choose.compare import bn_compare

from .grid import EPOCHS, FITS, KEYS, POLICIES, get_learner, learning_rate

HERE = Path(__file__).parent
ROWS = HERE / 'rows.csv'
TOLERANCE = 0.05  # in accuracy, for another processor's rounding
CHECKED = [  # cells that ran on a CPU
    ('mobilenet_v2', 'digits', 64, 32, 16, 'head', 1),
    ('mobilenet_v2', 'digits', 64, 32, 16, 'fine_tune', 1),
    ('mobilenet_v2', 'digits', 64, 32, 4, 'full', 1),
]


def path_of(data, folder):
    "`digits`, or the archive or folder of that name in `folder`; with the shift after a plus"
    name, plus, shift = data.partition('+')
    found = [p for p in (Path(folder) / f'{name}.zip', Path(folder) / name) if p.exists()]
    if name != 'digits' and not found:
        raise FileNotFoundError(
            f'There is no {name} or {name}.zip in {folder}: see the page "Which mode when?" for where the images are from.'
        )
    return (name if name == 'digits' else str(found[0])) + plus + shift


def run_cell(cell, policies, seeds, options, results=None):
    "The last epoch of every run of a cell"
    how = {k: cell[k] for k in KEYS[:5]} | dict(data=path_of(cell['data'], options.images), weights=options.weights, device=options.device)
    how['thirds'] = cell['trains'].endswith('thirds')
    fit, freeze_to, _ = FITS[cell['trains']]
    train = dict(epochs=EPOCHS[cell['n_images']], fit=fit, freeze_to=freeze_to, lr=learning_rate(cell['trains'], cell['rate']))
    runs = bn_compare(partial(get_learner, **how), {p: POLICIES[p] for p in policies}, seeds=seeds, results=results, settings=cell, **train)
    return runs.final.assign(**cell, machine=f'{options.device}, {platform.machine()}', torch=torch.__version__)


def check(options):
    "Run one cell of each kind again"
    rows = pd.read_csv(ROWS).set_index(KEYS)
    for key in CHECKED:
        old = rows.loc[[key]].query('seed == 0').set_index('policy')['accuracy']
        new = run_cell(dict(zip(KEYS, key)), list(old.index), [0], options).set_index('policy')['accuracy']
        print(f'\n{dict(zip(KEYS, key))}\n{pd.DataFrame(dict(rows=old, now=new)).round(3).to_string()}')
        if far := [p for p in old.index if abs(old[p] - new[p]) > TOLERANCE]:
            raise SystemExit(f'{far} differ from the rows by more than {TOLERANCE}.')


def run_all(options):
    "Every cell of the rows anew, each in a file of its own"
    for key, part in progress_bar(list(pd.read_csv(ROWS).groupby(KEYS, sort=False))):
        name = '-'.join(map(str, key)).replace('+', '-')
        run_cell(
            dict(zip(KEYS, key)), part['policy'].unique(), sorted(part['seed'].unique().tolist()), options, HERE / 'parts' / f'{name}.csv'
        )


def own(options):
    "What the rule is about, on a folder of images with a folder for each class"
    options.images, name = Path(options.own).parent, Path(options.own).name
    for trains, policies in {'fine_tune': ('fastai', 'affine-only', 'converted'), 'full': ('fastai', 'stats-only', 'converted')}.items():
        cell = dict(zip(KEYS, (options.network, name, 64, 128, 16, trains, 1)))
        print(trains, run_cell(cell, policies, 2, options).groupby('policy')['accuracy'].mean().round(3).to_dict())


def main():
    parser = ArgumentParser(prog='python -m bench.evidence', description=__doc__)
    parser.add_argument('--all', action='store_true', help='run every cell of the rows anew')
    parser.add_argument('--images', default='.', help='folder of the archives or folders of images')
    parser.add_argument('--weights', help='file of the CIFAR-10 ResNet-20')
    parser.add_argument('--own', help='a folder of images of your own, with `train` and `valid`')
    parser.add_argument('--network', default='mobilenet_v2', help='for --own')
    parser.add_argument('--device', default='cpu')
    options = parser.parse_args()
    (run_all if options.all else own if options.own else check)(options)


if __name__ == '__main__':
    main()
