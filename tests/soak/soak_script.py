"Run by test_soak.py in a process of its own, which is forked: what does wrong is told, and a kill and a fault of each kind go well"

import os, random, re, shutil, sys, tempfile, warnings
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

from tests.soak import faults, kills
from tests.soak.__main__ import fault, plan, run
from tests.soak.faults import FAULTS, Fault
from tests.soak.kills import Kind, Stage, chain

warnings.filterwarnings('ignore')


def moves_a_fixed_tensor(tell, seed):
    real = kills.under_policy

    def under_policy(learn, case):
        real(learn, case)
        with torch.no_grad():
            learn.model[0][0].weight[0, 0, 0, 0] += 1e-6  # in a group that may be frozen

    kills.under_policy = under_policy
    return kills.training(tell, seed, stored=True)  # its first group is always frozen


def leaves_a_file(tell, seed):
    Path('extra').touch()
    (Path(os.environ['TMPDIR']) / 'orphan').touch()
    return kills.training(tell, seed)


def leaves_out_an_epoch(tell, seed):
    for p in Path('models').glob('model_0.pth'):
        p.rename('models/model_1.pth')
    return kills.training(tell, seed)


def loses_a_run(tell, seed):
    path = Path('runs.csv')
    if path.exists():
        path.write_text(''.join(path.read_text().splitlines(True)[:-2]))
    return kills.runs(tell, seed)


def damages_the_learner(rng):
    learn = faults.prepared(case := faults.draw(rng, precomputes=True))
    before, told = faults.parts(learn.model), faults.world(learn)
    with torch.no_grad():
        learn.model[0][1].running_mean += 1
    return faults.aftermath(learn, case, before, told)


def leaves_random_numbers(rng):
    learn = faults.prepared(case := faults.draw(rng))
    before, told = faults.parts(learn.model), faults.world(learn)
    random.random()
    return faults.aftermath(learn, case, before, told)


def says_nothing_of_use(rng):
    faults.expecting(OSError, 'max_mem', lambda: open('nowhere'))
    return []


SABOTAGED_VICTIMS = [
    (moves_a_fixed_tensor, kills._SAVED, 'group 0 moved'),
    (leaves_a_file, kills._SAVED, 'files left in TMPDIR|orphan'),
    (leaves_out_an_epoch, kills._SAVED, 'the end differs'),
    (loses_a_run, kills._RUNS, 'lost or changed'),
]
SABOTAGED_FAULTS = [
    (damages_the_learner, 'stats of group 0 moved'),
    (leaves_random_numbers, 'generators'),
    (says_nothing_of_use, 'max_mem'),
]


@contextmanager
def scratch():
    "Not `TemporaryDirectory`, which forked processes would remove when they end"
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def check_victims():
    for victim, files, said in SABOTAGED_VICTIMS:
        stage = Stage('added', 'adding') if victim is loses_a_run else Stage('written', 'writing')  # after the first is there
        kind = Kind(victim, {}, files, '', stage, kills.whole_runs if victim is loses_a_run else None, 1)
        with scratch() as folder:
            done = chain(kind, 'x', folder)
        assert done.kills and re.search(said, f'{done.wrong} {done.left_at_end}'), done


def check_faults():
    for act, said in SABOTAGED_FAULTS:
        FAULTS['wrong'] = Fault(act, 1, '')
        with scratch() as folder:
            assert said in str(fault('wrong', 'x', folder)['wrong'])
    del FAULTS['wrong']


def check_one_of_each():
    "But those that start processes of their own, which take a minute each, and Ctrl-C at moments when PyTorch cannot take it"
    rows = run('x', [case for case in plan('x', number=0) if not re.search('process|any moment', case[2])], float('inf'))
    assert len(rows) > 15 and not [row for row in rows if row['wrong']]


if __name__ == '__main__':
    torch.set_num_threads(1)
    check_victims()
    check_faults()
    check_one_of_each()
    print('all told')
