"""Faults injected into one process: each has to give an error with a name, and to leave a Learner that goes on under its policy"""

import contextlib, errno, io, os, random, resource, signal, time, warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd, torch
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback

from bnfreeze_fastai.choose.compare import bn_compare

from .aftermath import ALL, LOOKS, TRAINS, aftermath, draw_op, expecting, places, prepared, trip, world
from .kills import by_run
from .training import N_TRAIN, draw, new_learner, parts, wrong_moves

warnings.filterwarnings('ignore')
NOBODY = 65534


class Missed(Exception):
    "The fault did not come"


# one function for each kind of fault: draws what it needs, and returns what is wrong


def raising(rng, errors):
    "An error at a random call: a sample, a forward pass, an event of a callback"
    op, case = draw_op(rng)
    place, order, error = rng.choice(places(op)), rng.choice([-1000, 0, 1000]), rng.choice(errors)
    count = trip(error, armed=False)
    ALL[op](prepared(case, place, count, order=order))
    assert count.calls, (op, place)
    learn = prepared(case, place, trip(error, rng.randint(1, count.calls), armed=False), order=order)
    before, told = parts(learn.model), world(learn) if op in LOOKS else None
    refused = () if isinstance(error, (OSError, MemoryError, KeyboardInterrupt)) else (ValueError,)  # a model that fails cannot be cut
    expecting((type(error), *refused), 'no luck', lambda: ALL[op](learn))
    return [f'{op}, {type(error).__name__} in the {place}: {w}' for w in aftermath(learn, case, before, told)]


def interrupt(_, frame):
    "Ctrl-C, but not while something is being left: Python cannot see to it that this is done in full, nor can torch's own `no_grad`"
    names = [frame.f_code.co_name]
    while frame := frame.f_back:
        names.append(frame.f_code.co_name)
    if names[0] == '__enter__' or {'__exit__', '__del__'} & set(names):
        signal.setitimer(signal.ITIMER_REAL, 0.001)
    else:
        raise KeyboardInterrupt('no luck')


def any_moment(rng):
    "Ctrl-C between any two instructions"
    op, case = draw_op(rng)
    twin = prepared(case)
    start = time.perf_counter()
    ALL[op](twin)
    seconds = time.perf_counter() - start
    learn = prepared(case)
    before, told = parts(learn.model), world(learn) if op in LOOKS else None
    signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds * rng.random() * 0.8))
        ALL[op](learn)
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Missed
    except KeyboardInterrupt:
        return [f'{op}: {w}' for w in aftermath(learn, case, before, told)]


def dead_worker(rng):
    "A process of the loader that is killed"
    op, case = draw_op(rng)
    main, k = os.getpid(), rng.randrange(N_TRAIN * 3 // 4)

    def dies(i):
        if os.getpid() != main and i >= k:
            os.kill(os.getpid(), signal.SIGKILL)

    learn = prepared(case, num_workers=1)
    for dl in learn.dls.loaders:
        dl.dataset.on_read = dies
    before, told = parts(learn.model), world(learn) if op in LOOKS else None
    errors = RuntimeError, ConnectionError, EOFError, FileNotFoundError  # the last three from PyTorch if it was about to hand a batch over
    expecting(errors, 'DataLoader worker|[Cc]onnection|^$|No such file', lambda: ALL[op](learn))
    return [f'{op}: {w}' for w in aftermath(learn, case, before, told)]


def nan_data(rng):
    "A sample that is not a number"
    op, case = draw_op(rng, [o for o in ALL if o != 'lr_find'])
    learn, k = prepared(case), rng.randrange(N_TRAIN)
    x = learn.dls.train.dataset.x
    kept = x[k].clone()
    x[k] = rng.choice([float('nan'), float('inf')])
    before = parts(learn.model)
    if op in LOOKS and op != 'precompute':
        told = world(learn)
        expecting((ValueError, RuntimeError), 'not finite|diverged', lambda: LOOKS[op](learn))
    else:
        told = None
        diverges(rng, learn, TRAINS.get(op, TRAINS['fit in precompute']), case, before)
    x[k] = kept
    return [f'{op}: {w}' for w in aftermath(learn, case, before, told)]


def diverges(rng, learn, train, case, before):
    "A fit whose losses are no numbers, after which a checkpoint is loaded"
    learn.save('before')
    stops = rng.random() < 0.5
    train(learn, [TerminateOnNaNCallback()] if stops else [])
    assert not (wrong := wrong_moves(before, learn.model, case)), wrong
    n = len(learn.recorder.losses)
    assert stops == (n < 8), f'{n} batches, TerminateOnNaN: {stops}'
    learn.load('before')


def nan_loss(rng):
    "A loss that is no number from some batch on"
    op, case = draw_op(rng, [o for o in TRAINS if o != 'lr_find'] + ['bn_find'])
    learn, calls = prepared(case), trip(None)
    plain, at = learn.loss_func, 1 if op == 'bn_find' else rng.randint(1, 8)

    def loss(pred, y):
        calls()
        return plain(pred, y) * (float('nan') if calls.calls >= at else 1)

    learn.loss_func = loss
    before, told = parts(learn.model), world(learn) if op in LOOKS else None
    if op == 'bn_find':
        expecting(RuntimeError, 'diverged', lambda: LOOKS[op](learn))
    else:
        diverges(rng, learn, TRAINS[op], case, before)
    learn.loss_func = plain
    return [f'{op}: {w}' for w in aftermath(learn, case, before, told)]


@contextlib.contextmanager
def file_limit(n_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_space(at):
    step, real = trip(OSError(errno.ENOSPC, 'No space left on device'), at), os.posix_fallocate

    def allocate(*args):
        step()
        real(*args)

    os.posix_fallocate = allocate
    try:
        yield
    finally:
        os.posix_fallocate = real


def full_disk(rng):
    "No space for the features"
    case = draw(rng, precomputes=True)
    learn = prepared(case)
    full = file_limit(rng.randint(0, 500)) if rng.random() < 0.5 else no_space(rng.randint(1, 4))
    before, told = parts(learn.model), world(learn)
    with full:
        expecting(OSError, 'max_mem.*TMPDIR', lambda: learn.precompute(max_mem=0).__enter__())
    left = os.listdir(os.environ['TMPDIR'])
    return [f'files left: {left}'] * bool(left) + aftermath(learn, case, before, told)


def full_disk_for_results(rng):
    "No space for finished runs: those in the file stay, and the next start goes on"
    case, path = draw(rng), Path('runs.csv')
    compare = partial(bn_compare, partial(new_learner, case), epochs=1, seeds=2, fit='fit', results=path)
    with contextlib.redirect_stdout(io.StringIO()):
        compare(['frozen'])
        kept = path.read_text()
        with file_limit(len(kept) + rng.randint(-100, 10)):
            expecting(OSError, 'runs', lambda: compare(['frozen', 'train']))
        wrong = ['finished runs were lost'] * (path.read_text() != kept)
        wrong += [f'files left: {os.listdir()}'] * (set(os.listdir()) != {'runs.csv', 'runs.json'})
        whole = compare(['frozen', 'train'])
    return wrong + ['the next start did not go on'] * (len(whole.final) != 4 or not path.read_text().startswith(kept))


@contextlib.contextmanager
def unprivileged():
    "As somebody who may not write everywhere, but who gets to the temporary folder, wherever that is"
    root, closed = os.getuid() == 0, {}
    for folder in Path(os.environ['TMPDIR']).resolve().parents:
        if root and (mode := folder.stat().st_mode) & 0o011 != 0o011:  # the group stays what it is
            closed[folder] = mode
    try:
        for folder, mode in closed.items():
            folder.chmod(mode | 0o011)
        if root:
            os.setresuid(NOBODY, NOBODY, 0)
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
        for folder, mode in closed.items():
            folder.chmod(mode)


def read_only(rng):
    "A model folder that cannot be written to"
    op, case = draw_op(rng, [*ALL, 'save', 'fit that saves', 'fit that saves'])
    Path('ro').mkdir(mode=0o555)
    Path(os.environ['TMPDIR']).chmod(0o777)
    learn = prepared(case)
    learn.path = Path('ro')
    before = parts(learn.model)
    saves = {'save': lambda: learn.save('model'), 'lr_find': lambda: ALL[op](learn)}
    saves['fit that saves'] = lambda: learn.fit(2, cbs=SaveModelCallback(every_epoch=True))
    with unprivileged():
        if op in saves:
            expecting((OSError, RuntimeError), 'ro|ermission|directory', saves[op])
        elif op == 'precompute':
            with learn.precompute(max_mem=0):
                learn.fit(1)
        else:
            ALL[op](learn)
    if 'recalibrate' in op:  # went well
        before = parts(learn.model)
    learn.path = Path('.')
    return [f'{op}: {w}' for w in aftermath(learn, case, before)]


def results_read_only(rng):
    "Results that cannot be written: told before anything is trained"
    case, trained = draw(rng), trip(None)
    Path('ro').mkdir(mode=0o555)
    Path('a_file').write_text('')
    Path(os.environ['TMPDIR']).chmod(0o777)
    path = rng.choice(['ro/runs.csv', 'ro/new/runs.csv', 'a_file/runs.csv'])
    compare = partial(bn_compare, partial(new_learner, case, on_read=trained), ['frozen', 'train'], 1, 1, 'fit', results=path)
    with unprivileged(), contextlib.redirect_stdout(io.StringIO()):
        expecting((OSError, ValueError), path.split('/')[0], compare)
    return [f'{trained.calls} samples were read before'] * (trained.calls > 0)


def no_cuda(rng):
    "Data that is to go to a GPU that is not there"
    op, case = draw_op(rng, [o for o in ALL if o != 'bn_shift'])
    learn = prepared(case)
    devices = [dl.device for dl in learn.dls.loaders]
    before, told = parts(learn.model), world(learn) if op in LOOKS else None
    for dl in learn.dls.loaders:
        dl.device = torch.device('cuda')
    expecting((RuntimeError, AssertionError), 'CUDA|NVIDIA', lambda: ALL[op](learn))
    for dl, device in zip(learn.dls.loaders, devices):
        dl.device = device
    return [f'{op}: {w}' for w in aftermath(learn, case, before, told)]


def cut_off(rng):
    "A checkpoint of which a part is missing"
    case = draw(rng)
    learn = prepared(case)
    path = Path(learn.save('model'))
    path.write_bytes((whole := path.read_bytes())[: rng.randrange(len(whole))])
    before, told = parts(learn.model), world(learn)
    expecting((RuntimeError, EOFError, OSError, ValueError), '', lambda: learn.load('model'))
    return aftermath(learn, case, before, told)


def comparison(rng):
    "A run of a comparison that fails, or Ctrl-C in it: what is finished stays, and the next start goes on"
    no_reason = [e for e in ERRORS if not isinstance(e, (ValueError, OSError))]  # to train without stored features
    case, error = draw(rng), rng.choice([*no_reason, *INTERRUPTS])
    compare = partial(bn_compare, policies=['frozen', 'train', 'fastai'], epochs=1, seeds=2, fit='fit', results='runs.csv')
    with contextlib.redirect_stdout(io.StringIO()):
        bn_compare(partial(new_learner, case, on_read=(count := trip(None))), ['frozen', 'train', 'fastai'], 1, 2, 'fit')
        broken = partial(new_learner, case, on_read=trip(error, rng.randint(1, count.calls)))
        if isinstance(error, KeyboardInterrupt):
            compared = compare(broken)
            assert compared.unfinished == 6 - len(compared.final) > 0, repr(compared)
        else:
            expecting(RuntimeError, "run of policy '.*' with seed . failed: .*no luck", lambda: compare(broken))
        kept = Path('runs.csv').read_text() if Path('runs.csv').exists() else ''
        compare(partial(new_learner, case))
        whole = bn_compare(partial(new_learner, case), ['frozen', 'train', 'fastai'], 1, 2, 'fit').df
    now = pd.read_csv('runs.csv')
    wrong = ['finished runs were lost'] * (not Path('runs.csv').read_text().startswith(kept))
    return wrong + ['other runs than without the fault'] * (by_run(now) != by_run(whole[now.columns]))


def nan_comparison(rng):
    "A comparison in which a policy diverges"
    case = draw(rng)

    def nan(pred, y):
        return pred.sum() * float('nan')

    def diverging(learn):
        learn.freeze_to_bn(-1)
        learn.loss_func = nan

    with contextlib.redirect_stdout(io.StringIO()):
        compared = bn_compare(partial(new_learner, case), {'a': diverging, 'b': 'train'}, 1, 2, 'fit', results='runs.csv')
        again = bn_compare(partial(new_learner, case), {'a': diverging, 'b': 'train'}, 1, 2, 'fit', results='runs.csv')
    wrong = ['not told'] * (compared.differences['verdict'].tolist() != ['no number in a run'])
    return wrong + ['run again'] * (not again.df.equals(compared.df))


def dies_once(learn):
    learn.freeze_to_bn(-1)
    if not Path('died').exists():
        Path('died').touch()
        os.kill(os.getpid(), signal.SIGKILL)


def dead_joblib_process(rng):
    "A process of joblib's that is killed, as by the kernel when memory is short"
    case = draw(rng)
    policies = {'train': 'train', 'dies': dies_once}
    compare = partial(bn_compare, partial(new_learner, case), policies, 1, 2, 'fit', n_jobs=2, results='runs.csv')
    with contextlib.redirect_stdout(io.StringIO()):
        expecting(RuntimeError, 'terminated', compare)
        whole = compare()
    return ['the next start did not go on'] * (len(whole.final) != 4 or bool(whole.unfinished))


class Fault(NamedTuple):
    "A kind of fault"

    act: Callable  # Of a `random.Random`; returns what is wrong
    times: int
    asked: str


ERRORS = [ZeroDivisionError('no luck'), OSError('no luck'), MemoryError('no luck'), ValueError('no luck')]
INTERRUPTS = [KeyboardInterrupt('no luck')]
_USABLE = 'fixed tensors bitwise unmoved, the Learner trains on under its policy, and is plain fastai once the callback is gone'
FAULTS = {
    'exception': Fault(partial(raising, errors=ERRORS), 40, f'the error itself; {_USABLE}'),
    'Ctrl-C at a call': Fault(partial(raising, errors=INTERRUPTS), 40, 'the same'),
    'Ctrl-C at any moment': Fault(any_moment, 30, 'the same'),
    'loader process killed': Fault(dead_worker, 16, "PyTorch's error that names the process; the same"),
    'NaN or infinity in the data': Fault(nan_data, 24, 'statistics refused by name, losses NaN; the same after a load'),
    'NaN loss': Fault(nan_loss, 16, 'the same; `bn_find` says that all diverged'),
    'full disk, precompute': Fault(full_disk, 12, '`OSError` that names `max_mem` and TMPDIR; no file left; usable as above'),
    'full disk, results': Fault(full_disk_for_results, 8, '`OSError` that names the file; finished runs kept, the next start goes on'),
    'read-only model folder': Fault(read_only, 16, 'an error where something is saved, none elsewhere; usable as above'),
    'results not writable': Fault(results_read_only, 6, 'an error that names the folder before anything is trained'),
    'no CUDA': Fault(no_cuda, 12, 'an error that names CUDA; usable as above'),
    'checkpoint cut off': Fault(cut_off, 8, 'an error; the Learner as it was'),
    'failing comparison': Fault(comparison, 10, 'the run is named; finished runs kept, the next start goes on to the same end'),
    'NaN in a comparison': Fault(nan_comparison, 4, "told as 'no number in a run'"),
    "joblib's process killed": Fault(dead_joblib_process, 1, 'an error that says so; the next start goes on'),
}


def inject(tell, name, seed):
    "One fault, in a process of its own"
    try:
        wrong = FAULTS[name].act(random.Random(seed))
    except Missed:
        return False
    except AssertionError as e:
        wrong = [str(e)]
    for w in wrong:
        tell('wrong', w)
    return True
