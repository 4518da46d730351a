"""Victims that are killed again and again, and have to come to the end that they would have come to without"""

import random, time, warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback

from bnfreeze_fastai.choose import compare
from bnfreeze_fastai.utils.restore import reseed
from bnfreeze_fastai.choose.results import Results
from bnfreeze_fastai.choose.runs import weights_hash

from .training import bitwise, draw, new_learner, parts, under_policy, wrong_moves
from .processes import Victim, clear_shm, in_shm, left_behind

N_EPOCHS, N_RUNS = 6, 12
BALLAST = 4_000_000  # numbers, so that writing a checkpoint takes a while
warnings.filterwarnings('ignore')


class SeedsEachEpoch(Callback):
    "Random numbers by epoch, so that a fit that was resumed can be compared with one that was not"

    order = -100

    def __init__(self, seed):
        self.seed = seed

    def before_epoch(self):
        reseed((self.seed + self.epoch) % 2**32, *self.dls.loaders)


class SavesTrained(SaveModelCallback):
    "fastai's callback, but for the epochs that `start_epoch` skips: fastai saves these anew, with weights of a later one"

    def __init__(self, tell, start):
        super().__init__(every_epoch=True, with_opt=True)
        self.tell, self.start = tell, start

    def after_epoch(self):
        if self.epoch < self.start:
            return
        self.tell('writing')
        super().after_epoch()
        self.tell('written')


def resume(learn, tell):
    "Load the newest checkpoint that can be read; returns the epoch to go on from"
    saved = sorted((int(p.stem.split('_')[1]) for p in Path('models').glob('model_*.pth')), reverse=True)
    for epoch in saved:
        before = parts(learn.model)
        try:
            with warnings.catch_warnings(record=True) as told:
                learn.load(f'model_{epoch}', with_opt=True)
        except Exception as e:
            tell('cut-off checkpoint', type(e).__name__)
            if not all(map(bitwise, *(sum(p.values(), []) for p in (before, parts(learn.model))))):
                tell('wrong', f'a checkpoint that was cut off changed the Learner: {e!r}')
            continue
        [tell('wrong', str(w.message)) for w in told if 'optimizer' in str(w.message)]
        return epoch + 1
    return 0


def training(tell, seed, ballast=0, stored=False):
    "Train as a fastai user who saves each epoch, and goes on from there"
    rng = random.Random(seed)
    case, fit = draw(rng, precomputes=stored), rng.choice(['fit', 'fit_one_cycle'])
    learn = new_learner(case, ballast=ballast)
    start = parts(learn.model)
    under_policy(learn, case)
    epoch = resume(learn, tell)
    [tell('wrong', f'after epoch {epoch}: {w}') for w in wrong_moves(start, learn.model, case)]
    tell('filling')
    with learn.precompute(max_mem=0) if stored else nullcontext():
        tell('training')
        getattr(learn, fit)(N_EPOCHS, start_epoch=epoch, cbs=[SeedsEachEpoch(case.seed), SavesTrained(tell, epoch)])
    [tell('wrong', f'at the end: {w}') for w in wrong_moves(start, learn.model, case, all_move=epoch < N_EPOCHS)]
    return weights_hash(learn.model)


def slowly(learn):
    time.sleep(0.1)
    learn.freeze_to_bn(-1, bn='train')


def telling(tell):
    "The class that keeps finished runs, and tells when it writes"

    class Telling(Results):
        def add(self, rows):
            tell('adding')
            super().add(rows)
            tell('added')

    return Telling


def runs(tell, seed, n_jobs=1):
    "A comparison that keeps finished runs in a file"
    case = draw(random.Random(seed))
    policies = {'train': slowly, 'frozen': 'frozen', 'affine-only': 'affine-only', 'fastai': 'fastai'}
    compare.Results = telling(tell)
    how = dict(n_jobs=n_jobs, results='runs.csv', settings=dict(seed=seed))
    compare.bn_compare(partial(new_learner, case), policies, 2, N_RUNS // 4, 'fit', **how)
    return by_run(pd.read_csv('runs.csv'))


def by_run(df):
    return df.drop(columns='seconds').sort_values(['policy', 'seed', 'epoch']).to_csv(index=False, float_format='%.6g')


def search(tell, seed):
    "`bn_find`, which keeps what callbacks save in a temporary folder"
    rng = random.Random(seed)
    learn = under_policy(new_learner(case := draw(rng)), case)
    start = parts(learn.model)
    found = learn.bn_find(16, rng.choice(['fine_tune', 'fit_one_cycle']), plot=False)
    [tell('wrong', f'{k} moved') for k, v in parts(learn.model).items() if not all(map(bitwise, v, start[k]))]
    return found.table.to_csv(index=False, float_format='%.6g')


def whole_runs(folder, kept):
    "What is wrong with the runs in the file, and its lines; it began with `kept` before"
    path = folder / 'work' / 'runs.csv'
    lines = path.read_text().splitlines() if path.exists() else []
    wrong = [] if lines[: len(kept or ())] == (kept or []) else ['a finished run was lost or changed']
    epochs = pd.read_csv(path).groupby(['policy', 'seed'])['epoch'].apply(list) if lines else []
    return wrong + ['a run in the file is not whole'] * (not all(e == [0, 1] for e in epochs)), lines


class Stage(NamedTuple):
    "Where kills are to fall"

    begin: str  # what the victim tells at the beginning and at the end of it
    end: str
    aimed: float = 1.0  # part of the kills
    times: int = 1  # how often it comes, at least


class Kind(NamedTuple):
    "A kind of victim"

    victim: Callable  # Of `tell`, the seed, and `kwargs`
    kwargs: dict
    files: set  # what is in its folder at the end
    asked: str
    within: Stage = None  # where kills are aimed; anywhere if not given
    check: Callable = None  # what has to be right after each kill
    most: int = 5  # kills in a row
    folders: int = 0  # that a kill may leave in TMPDIR


_SAVED = {'models', *(f'models/model_{i}.pth' for i in range(N_EPOCHS))}
_RUNS = {'runs.csv', 'runs.json'}
_RESUMES = 'resumed from the newest whole checkpoint; fixed tensors bitwise the pretrained ones; same end as without a kill'
_NO_RUN_LOST, _ONE_FOLDER = 'no finished run lost, changed or run twice', 'each kill leaves one folder in TMPDIR at most'
KINDS = {
    'training': Kind(training, {}, _SAVED, _RESUMES),
    'checkpoint write': Kind(
        training,
        dict(ballast=BALLAST),
        _SAVED,
        f'{_RESUMES}; a checkpoint cut off gives an error and no change',
        Stage('writing', 'written', times=3),
    ),
    'precompute': Kind(training, dict(stored=True), _SAVED, f'{_RESUMES}; no file of features left', Stage('filling', 'training', 0.5)),
    'comparison': Kind(runs, {}, _RUNS, f'{_NO_RUN_LOST}; {_ONE_FOLDER}', Stage('adding', 'added', 0.5, 3), whole_runs, folders=1),
    'comparison, 2 processes': Kind(runs, dict(n_jobs=2), _RUNS, 'the same', Stage('adding', 'added', 0.7, 3), whole_runs, 2, 1),
    'search': Kind(search, {}, set(), f'the same trials as without a kill; {_ONE_FOLDER}', folders=1),
}


class Chain:
    "What becomes of one victim after another"

    def __init__(self, kind):
        self.kind, self.kills, self.wrong, self.left, self.left_at_end = kind, 0, [], 0, []
        self.pids, self.noted, self.lines, self.before = set(), Counter(), None, in_shm()
        self.known = set()  # what earlier kills left, which nobody removes

    def note(self, victim):
        "What every victim tells"
        self.wrong += victim.all('wrong') + victim.all('error')
        self.pids |= victim.pids | {victim.process.pid}
        self.noted['cut-off checkpoint'] += len(victim.all('cut-off checkpoint'))
        if self.kind.check:
            wrong, self.lines = self.kind.check(victim.folder, self.lines)
            self.wrong += wrong

    def new(self, victim):
        "What is left that earlier kills did not leave"
        return set(left_behind(victim.folder, self.pids, self.before)) - self.known

    def killed(self, victim, there):
        "After a kill, or if the victim was not `there` any more: a folder in TMPDIR may be left, and joblib's folder and semaphores"
        self.note(victim)
        self.kills += there
        left = self.new(victim)
        self.left = max(self.left, len(left))
        self.known |= left
        tmp, shm = ([p for p in left if p.startswith(place)] for place in ('tmp/', 'shm/'))
        files = [p for p in tmp if not (victim.folder / p).is_dir()]
        of_joblib = [p for p in shm if p.startswith(('shm/sem.loky-', 'shm/joblib_memmapping_folder_'))]
        self.wrong += [f'files left in TMPDIR: {files}'] * bool(files) + [f'more than a folder: {tmp}'] * (len(tmp) > self.kind.folders)
        self.wrong += [f'left in shared memory: {shm}'] * (shm != of_joblib)
        if there and (stage := self.kind.within):
            self.noted[f'kill while {stage.begin}'] += len(victim.all(stage.begin)) > len(victim.all(stage.end))

    def ended(self, victim, result, expected):
        "After the last, which nobody killed"
        self.note(victim)
        if result != expected:
            told = [str(r)[:1500] for r in (result, expected)]
            self.wrong.append(f'the end differs from that of a run that nobody killed: {told[0]} in place of {told[1]}')
        work = victim.folder / 'work'
        files = {str(p.relative_to(work)) for p in work.rglob('*')}
        self.left_at_end = sorted(self.new(victim)) + sorted(files ^ self.kind.files)


def start(kind, seed, folder):
    return Victim(partial(kind.victim, **kind.kwargs), seed, folder=folder)


def aim(kind, victim, rng, seconds):
    "Wait until the moment to kill has come; returns whether the victim is still there"
    seconds, inside = seconds
    if kind.within is None or rng.random() > kind.within.aimed:
        return victim.wait(seconds=0.6 * seconds * rng.random())
    there = all(victim.wait(kind.within.begin) for _ in range(rng.randint(1, kind.within.times)))
    return there and victim.wait(seconds=inside * rng.random())


def unharmed(kind, seed, folder):
    "A run that nobody kills: the victim, its result, and the seconds of the whole and of the stage to aim at"
    kwargs = {k: v for k, v in kind.kwargs.items() if k != 'n_jobs'}
    victim = start(kind._replace(kwargs=kwargs), seed, folder)
    began = time.monotonic()
    result = victim.end()
    seconds = time.monotonic() - began
    return victim, result, (seconds, victim.seconds_between(kind.within.begin, kind.within.end) if kind.within else 0)


def chain(kind, seed, folder):
    "Kill one victim after another, let the last go to its end, and compare that with a run that nobody killed"
    rng, folder, done = random.Random(seed), Path(folder), Chain(kind)
    whole, expected, seconds = unharmed(kind, seed, folder / 'whole')
    done.wrong += whole.all('wrong') + whole.all('error')
    there = True
    while there and done.kills < kind.most:
        victim = start(kind, seed, folder / 'killed')
        there = aim(kind, victim, rng, seconds)
        victim.kill()
        done.killed(victim, there)
    last = start(kind, seed, folder / 'killed')
    done.ended(last, last.end(), expected)
    clear_shm(p.removeprefix('shm/') for p in done.known if p.startswith('shm/'))
    return done
