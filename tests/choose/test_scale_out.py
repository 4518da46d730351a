"Runs on other engines of joblib's: threads that share random numbers, and a dask cluster that loses workers"

import os, signal, threading, time
from functools import partial
from pathlib import Path

import pandas as pd, pytest
from conftest import on_linux
from joblib import parallel_config
from test_compare import get_learner, without_time

from bnfreeze_fastai.choose.compare import bn_compare

pytestmark = pytest.mark.slow

compare = partial(bn_compare, get_learner, epochs=1, fit='fit')


def by_run(df):
    return without_time(df).sort_values(['policy', 'seed', 'epoch'], ignore_index=True)


def test_threads_do_not_mix_random_numbers():
    with parallel_config(backend='threading'):
        threads = compare(['fastai', 'train'], seeds=2, n_jobs=3)
    assert by_run(threads.df).equals(by_run(compare(['fastai', 'train'], seeds=2).df))


def waits(learn):
    "On any but the last go, until the worker is killed"
    Path('started').open('a').write(f'{os.getpid()}\n')
    while len(Path('started').read_text().split()) == 1:
        time.sleep(0.02)
    learn.freeze_to_bn(-1, bn='train')


def kill_the_first():
    "Kill the worker that runs `waits`; its next go finds that it is not the first"
    while not Path('started').exists() or not Path('started').read_text().endswith('\n'):
        time.sleep(0.02)
    os.kill(int(Path('started').read_text()), signal.SIGKILL)


def dies(learn):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def cluster():
    dask, distributed = map(pytest.importorskip, ('dask', 'distributed'))
    settings = {'distributed.worker.multiprocessing-method': 'fork', 'distributed.scheduler.allowed-failures': 1}
    of_two = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with dask.config.set(settings), distributed.LocalCluster(**of_two) as cluster:
        with distributed.Client(cluster), parallel_config(backend='dask'):
            yield distributed


@on_linux
def test_lost_workers(cluster):
    "One that dies costs nothing but time; a run of which each dies is given up; what has finished is kept, and the next start goes on"
    threading.Thread(target=kill_the_first, daemon=True).start()
    policies = {'waits': waits, 'frozen': 'frozen'}
    first = compare(policies, seeds=2, results='runs.csv').final
    assert len(set(Path('started').read_text().split())) > 1  # more than one process had a go
    with pytest.raises(cluster.KilledWorker):
        compare({**policies, 'dies': dies}, seeds=[1, 2], results='runs.csv')
    resumed = compare(policies, seeds=3, results='runs.csv')
    assert resumed.final['seconds'][:4].tolist() == first['seconds'].tolist()
    with parallel_config(backend='sequential'):
        plain = compare({'waits': 'train', 'frozen': 'frozen'}, seeds=3)
    # a thread of dask's may draw a random number in mid-run, which `precompute` takes for one of the data's
    columns = ['seed', 'epoch', 'train_loss', 'valid_loss', 'weights']
    pd.testing.assert_frame_equal(by_run(resumed.df)[columns], by_run(plain.df)[columns], rtol=1e-4)
