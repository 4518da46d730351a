"Comparisons of full runs: the same weights and batches for all, nothing lost, nothing mixed up"

import errno, json, os, random, shutil, signal, time
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, warm
from conftest import on_linux
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.data.core import DataLoaders
from fastai.learner import ValueMetric
from fastai.metrics import accuracy
from learners import make_dls, make_learner
from torch.utils.data import DataLoader

from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.choose.policies import in_words
from bnfreeze_fastai.choose.results import COLUMNS, Results
from bnfreeze_fastai.choose.runs import FITS, run_policy
from bnfreeze_fastai.digits import ValidateLast
from bnfreeze_fastai.head import store
from bnfreeze_fastai.layers import MODES
from bnfreeze_fastai.utils import batches

pytestmark = pytest.mark.slow

get_learner = partial(make_learner, wd=0.01, lr=0.01)  # seeds its own weights: the same for all seeds


class At(Callback):
    "Calls a function of the Learner at an event"

    def __init__(self, event, function):
        setattr(self, event, lambda: function(self.learn))


def without_time(df):
    return df.drop(columns='seconds')


class Batches(Callback):
    "Keeps all inputs of training"

    seen = []

    def before_batch(self):
        if self.training:
            self.seen.append(self.xb[0].clone())


@pytest.mark.parametrize('fit', FITS)
def test_every_policy_sees_the_same_batches(fit):
    seen = {}
    for policy in ['fastai', *MODES]:
        Batches.seen = []
        bn_compare(lambda: get_learner(cbs=Batches()), policy, 2, [3], fit, precompute=False)
        seen[policy] = torch.stack(Batches.seen)
    first = seen.pop('fastai')
    assert len(first) == (3 if fit == 'fine_tune' else 2) * 3 and all(torch.equal(first, other) for other in seen.values())
    Batches.seen = []
    bn_compare(lambda: get_learner(cbs=Batches()), 'train', 2, [4], fit, precompute=False)
    assert not torch.equal(first, torch.stack(Batches.seen))


@pytest.mark.parametrize('kind', ['fastai', 'torch', 'torch with a generator'])
def test_a_loader_that_runs_share_starts_anew(kind):
    dls = make_dls()
    if kind != 'fastai':
        generator = torch.Generator() if 'generator' in kind else None
        loaders = [DataLoader(ds, 8, shuffle=i == 0, generator=generator) for i, ds in enumerate(([*dls.train_ds], [*dls.valid_ds]))]
        dls = DataLoaders(*loaders)

    def shared():
        learn = get_learner()
        learn.dls = dls
        return learn

    a, b = (bn_compare(shared, ['train', 'frozen'], 2, 2, 'fit', precompute=False).df for _ in range(2))
    assert (
        without_time(a).equals(without_time(b)) and a.query('seed == 0')['train_loss'].iloc[0] != a.query('seed == 1')['train_loss'].iloc[0]
    )


def test_fastai_is_fastai():
    learn = get_learner()
    from bnfreeze_fastai.utils.restore import reseed

    reseed(5, *learn.dls.loaders)
    learn.fine_tune(2)
    ours = bn_compare(get_learner, 'fastai', 2, [5]).final
    assert [ours['train_loss'].item(), ours['valid_loss'].item()] == list(learn.final_record)


def test_identical_seeds_give_identical_rows_in_one_process_and_in_two():
    one = bn_compare(get_learner, ['fastai', 'affine-only', 'frozen'], 2, 2)
    again = bn_compare(get_learner, ['fastai', 'affine-only', 'frozen'], 2, 2)
    two = bn_compare(get_learner, ['fastai', 'affine-only', 'frozen'], 2, 2, n_jobs=2)
    assert without_time(one.df).equals(without_time(again.df)) and without_time(one.df).equals(without_time(two.df))
    assert list(one.df['policy'].unique()) == ['fastai', 'affine-only', 'frozen'] and list(one.df['seed'].unique()) == [0, 1]


def test_random_numbers_outside_go_on_as_they_would():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    bn_compare(get_learner, 'train', 1, 1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize(
    'policy,fit,used',
    [
        ('frozen', 'fit_one_cycle', True),
        ('frozen', 'fit', True),
        ('frozen', 'fine_tune', False),
        ('stats-only', 'fit', False),
        ('fastai', 'fit', False),
        (dict(bn='frozen', bn_above='affine-only'), 'fit', True),
    ],
)
def test_features_are_used_where_they_are_exact(policy, fit, used):
    fast, plain = (bn_compare(get_learner, {'a': policy}, 2, 1, fit, precompute=p).df for p in (True, False))
    assert fast['precomputed'].tolist() == [used] * len(fast) and not plain['precomputed'].any()
    losses = ['train_loss', 'valid_loss']
    torch.testing.assert_close(torch.tensor(fast[losses].values), torch.tensor(plain[losses].values), rtol=1e-4, atol=1e-6)


def test_what_moves_is_what_the_mode_says():
    final = bn_compare(get_learner, None, 2, 1, 'fit').final.set_index('policy')
    for mode, (stats, affine) in MODES.items():
        assert (final.loc[mode, 'stats_moved'] > 0, final.loc[mode, 'affine_moved'] > 0) == (stats, affine)


def test_ctrl_c_gives_what_is_done():
    done = []

    def stop(learn):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)

    compared = bn_compare(get_learner, {'a': stop, 'b': 'train'}, 1, 4, 'fit', results='runs.csv')
    assert len(compared.final) == 4 and compared.unfinished == 4 and '4 runs are missing' in repr(compared)
    done.clear(), done.extend([1, 1, 1])
    whole = bn_compare(get_learner, {'a': stop, 'b': 'train'}, 1, 4, 'fit', results='runs.csv')
    assert len(whole.final) == 8 and not whole.unfinished and len(done) == 5


def test_a_run_that_fails_is_named_and_the_others_are_kept():
    def fails(learn):
        raise ZeroDivisionError('no luck')

    with pytest.raises(RuntimeError, match="policy 'bad' with seed 0 failed: ZeroDivisionError: no luck"):
        bn_compare(get_learner, {'good': 'train', 'bad': fails}, 1, 1, results='runs.csv')
    assert pd.read_csv('runs.csv')['policy'].unique().tolist() == ['good']


def test_nan_losses_are_told():
    def diverges(learn):
        learn.freeze_to_bn(-1)
        learn.loss_func = lambda pred, y: pred.sum() * float('nan')

    compared = bn_compare(get_learner, {'a': diverges, 'b': 'train'}, 1, 2, 'fit', results='runs.csv')
    assert compared.differences['verdict'].tolist() == ['no number in a run']
    again = bn_compare(get_learner, {'a': diverges, 'b': 'train'}, 1, 2, 'fit', results='runs.csv')
    assert again.df.equals(compared.df)


def test_finished_runs_are_not_run_again():
    first = bn_compare(get_learner, ['train'], 2, 2, results='runs.csv')
    before = Path('runs.csv').read_bytes()

    class Never(Callback):
        def before_batch(self):
            raise AssertionError('this run was there')

    same = bn_compare(lambda: get_learner(cbs=Never()), ['train'], 2, 2, results='runs.csv')
    assert same.df.equals(first.df) and Path('runs.csv').read_bytes() == before
    more = bn_compare(get_learner, ['train', 'frozen'], 2, 3, results='runs.csv')
    assert (
        len(more.final) == 6 and more.final.query("policy == 'train' and seed < 2")['seconds'].tolist() == first.final['seconds'].tolist()
    )
    anew = bn_compare(get_learner, ['train'], 2, 2, results='runs.csv', resume=False)
    assert len(pd.read_csv('runs.csv')) == len(anew.df) and anew.final['seconds'].tolist() != first.final['seconds'].tolist()


def test_numbers_come_back_to_the_last_bit(monkeypatch):
    "Also where pandas itself reads a number as its neighbour, as it does before version 3 unless told otherwise"
    rng = np.random.default_rng(0)
    hard = [5e-324, 1e-310, 1.7976931348623157e308, 0.1 + 0.2, 1 / 3, float('inf'), float('-inf'), float('nan'), 1e22, 123456789.12345679]
    numbers = [*hard, *(rng.random(1000) * 10.0 ** rng.integers(-20, 20, 1000)), *np.float32(rng.random(10)).tolist()]
    row = {**dict.fromkeys(COLUMNS, 0.0), 'policy': 'nan', 'seed': 0, 'precomputed': True, 'weights': 'ab'}
    results = Results('runs.csv', dict(policies={'nan': 'frozen'}))
    results.add([dict(row, epoch=i, valid_loss=v, seconds=-v) for i, v in enumerate(numbers)])

    def read(*args, float_precision=None, **kwargs):
        df = read_csv(*args, **kwargs)
        floats = df.select_dtypes('float').columns
        return df if float_precision == 'round_trip' else df.assign(**{c: np.nextafter(df[c], 0) for c in floats})

    read_csv = pd.read_csv
    for reader in (read_csv, read):
        monkeypatch.setattr(pd, 'read_csv', reader)
        pd.testing.assert_frame_equal(Results('runs.csv', results.settings).df, results.df, check_exact=True)


@pytest.mark.parametrize(
    'change,word',
    [
        (dict(epochs=3), 'epochs'),
        (dict(lr=1.0), 'lr'),
        (dict(fit='fit'), 'fit'),
        (dict(precompute=False), 'precompute'),
        (dict(settings=dict(data='cats')), 'data'),
        (dict(policies={'train': 'frozen'}), 'policy train'),
    ],
)
def test_runs_of_other_kinds_are_not_mixed(change, word):
    kwargs = dict(policies=['train'], epochs=1, seeds=1, results='runs.csv', settings=dict(data='dogs'))
    bn_compare(get_learner, **kwargs)
    before = {p: Path(p).read_bytes() for p in ('runs.csv', 'runs.json')}
    with pytest.raises(ValueError, match=word):
        bn_compare(get_learner, **{**kwargs, **change})
    assert before == {p: Path(p).read_bytes() for p in before}


def test_other_weights_are_found_out():
    bn_compare(get_learner, ['train'], 1, 1, results='runs.csv')
    before = Path('runs.csv').read_bytes()

    def other():
        learn = get_learner()
        with torch.no_grad():
            learn.model[0][0].weight[0] += 1e-6
        return learn

    for policies, seeds in ((['train', 'frozen'], 1), (['train'], 2), (['train'], 1)):
        with pytest.raises(RuntimeError, match='did not start from the same weights'):
            bn_compare(other, policies, 1, seeds, results='runs.csv')
    assert Path('runs.csv').read_bytes() == before


def seconds(pred, y):
    return pred.mean()


def test_functions_are_given_a_frozen_learner():
    found = {}

    def look(learn):
        found['trains'] = [p.requires_grad for p in learn.model[0].parameters() if p.dim() > 1]

    for n in (-1, 0):
        bn_compare(get_learner, {'a': look}, 1, 1, 'fit', freeze_to=n)
        assert found['trains'] == [n == 0] * 2


def test_a_validation_within_a_run_is_no_epoch():
    def fit(learn, epochs):
        learn.fit(epochs)
        learn.validate()

    plain, then = (bn_compare(partial(get_learner, metrics=accuracy), ['train'], 2, 1, how, 0).df for how in ('fit', fit))
    pd.testing.assert_frame_equal(without_time(then), without_time(plain))


@pytest.mark.parametrize('at', [0, 1])
def test_a_run_that_a_loss_which_is_not_finite_has_ended_counts_as_diverged(at):
    def spoil(learn):
        if learn.epoch == at:
            learn.model[1][-1].weight.data.fill_(float('nan'))

    def learner():
        return get_learner(metrics=accuracy, cbs=[At('before_train', spoil), TerminateOnNaNCallback()])

    compared = bn_compare({'a': learner}['a'], ['train', 'frozen'], 3, 1, 'fit', 0, results='runs.csv')
    assert compared.unfinished == 0 and len(compared.df) == 2 * (at + 1) and compared.final['valid_loss'].isna().all()
    assert compared.differences['verdict'].tolist() == ['no number in a run'] and compared.score == 'accuracy'
    assert bn_compare(learner, ['train', 'frozen'], 3, 1, 'fit', 0, results='runs.csv').df.equals(compared.df)


def test_a_recorder_that_does_not_note_the_time_loses_no_metric():
    def without():
        learn = get_learner(metrics=accuracy)
        learn.recorder.add_time = False
        return learn

    with_time, df = (bn_compare(f, ['train'], 1, 1, 'fit', 0).df for f in (partial(get_learner, metrics=accuracy), without))
    pd.testing.assert_frame_equal(without_time(df), without_time(with_time))


def test_a_run_that_is_cancelled_before_its_first_batch_has_not_diverged():
    class Cancels(Callback):
        def before_train(self):
            if self.epoch == 1:
                raise CancelFitException()

    assert bn_compare(partial(get_learner, cbs=Cancels()), ['train'], 3, 1, 'fit', 0).df['train_loss'].notna().tolist() == [True]


def test_epochs_without_validation_keep_the_columns_in_order():
    compared = bn_compare(partial(get_learner, metrics=accuracy, cbs=ValidateLast()), ['train'], 2, 1, 'fit', 0)
    assert compared.score == 'accuracy' and compared.df['accuracy'].isna().tolist() == [True, False]


def test_functions_of_one_name_are_told_apart():
    def make(value):
        def policy(learn):
            learn.freeze_to(value)

        return policy

    def other(value):
        def policy(learn):
            learn.freeze_to(value + 1)

        return policy

    def args(learn, n):
        learn.freeze_to(n)

    told = [in_words(f) for f in (make(0), make(1), other(0), partial(args, n=0), partial(args, n=1), partial(args, n=object))]
    assert len({*told}) == len(told) and in_words(make(0)) == told[0] and ' at 0x' not in ''.join(told)
    compared = bn_compare(get_learner, {'mine': make(0)}, 1, 1, 'fit', 0, results='runs.csv')
    assert bn_compare(get_learner, {'mine': make(0)}, 1, 1, 'fit', 0, results='runs.csv').df.equals(compared.df)
    with pytest.raises(ValueError, match='other settings: policy mine'):
        bn_compare(get_learner, {'mine': make(1)}, 1, 1, 'fit', 0, results='runs.csv')


@pytest.mark.parametrize('resume', [True, False])
def test_a_file_of_something_else_is_not_replaced(resume):
    for text in ('{"mine": 1}', '[1]', 'no JSON'):
        Path('runs.json').write_text(text)
        with pytest.raises(ValueError, match='file of something else'):
            bn_compare(get_learner, ['train'], 1, 1, 'fit', 0, results='runs.csv', resume=resume)
        assert Path('runs.json').read_text() == text and not Path('runs.csv').exists()


def test_metrics_of_one_name_are_told_apart():
    metrics = [ValueMetric(partial(float, v), name) for v, name in ((0.25, 'always'), (0.5, 'always_2'), (0.75, 'always'))]
    compared = bn_compare(partial(get_learner, metrics=metrics), ['train'], 1, 1, 'fit')
    assert compared.final[['always', 'always_2', 'always_3']].to_numpy().tolist() == [[0.25, 0.5, 0.75]] and compared.score == 'always'


@pytest.mark.parametrize('model_dir', ['models', Path('models').absolute()])
def test_no_run_sees_or_overwrites_what_another_has_saved(model_dir):
    def learner():
        return get_learner(path=Path('.'), model_dir=model_dir, cbs=SaveModelCallback(monitor='train_loss'))

    Path('models').mkdir()
    Path('models/model.pth').write_bytes(b'mine')
    found = []

    def saves(learn, epochs):
        found.append((learn.path / learn.model_dir / 'model.pth').exists())
        learn.fit(epochs)
        found.append((learn.path / learn.model_dir / 'model.pth').exists())

    bn_compare(learner, ['train', 'frozen'], 1, 1, saves, 0)
    assert found == [False, True] * 2 and Path('models/model.pth').read_bytes() == b'mine'


@pytest.mark.parametrize(
    'kwargs,word',
    [
        (dict(policies=3), '`policies`'),
        (dict(seeds=[2**70]), '`seeds`'),
        (dict(lr=float('nan')), '`lr`'),
        (dict(lr=slice(1e-3, 1e-2)), '`lr`'),
        (dict(settings=[1]), '`settings`'),
        (dict(settings=dict(epochs=3)), '`settings`'),
        (dict(policies={'a': lambda learn: None}, results='runs.csv'), 'lambda'),
        (dict(freeze_to=5, fit='fit'), 'out of range'),
        (dict(get_learner=3), 'get_learner'),
        (dict(get_learner=lambda: get_learner(metrics=seconds)), 'Metrics cannot be called seconds'),
        (dict(policies={'a': dict(bn={'nowhere*': 'train'})}), 'nowhere'),
        (dict(results='runs.txt'), '.csv'),
    ],
)
def test_bad_input_is_refused_before_anything_runs(kwargs, word):
    with pytest.raises(ValueError, match=word):
        bn_compare(**{**dict(get_learner=get_learner, epochs=1, seeds=1), **kwargs})
    assert not os.listdir()


def slow(learn):
    time.sleep(0.2)
    learn.freeze_to_bn(-1, bn='train')


def start(n_jobs):
    "The comparison in a session of its own, so that a signal reaches joblib's processes too, as Ctrl-C in a terminal does"
    return warm.Script(Path(__file__).parent / 'compare_script.py', n_jobs)


def wait_for(n_runs, process):
    while process.poll() is None:
        if Path('runs.csv').exists() and len(pd.read_csv('runs.csv')) >= 2 * n_runs:
            return
        time.sleep(0.02)


def clear_shared_memory(pid):
    "Remove what joblib leaves there when all of its processes are killed"
    for p in Path('/dev/shm').glob(f'sem.loky-{pid}-*'):
        p.unlink(missing_ok=True)
    for p in Path('/dev/shm').glob(f'joblib_memmapping_folder_{pid}_*'):
        shutil.rmtree(p)


@on_linux
@pytest.mark.parametrize('n_jobs', [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_process_goes_on_without_loss(n_jobs):
    kept = None
    for n_runs in (1, 4, 6):
        process = start(n_jobs)
        wait_for(n_runs, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        clear_shared_memory(process.pid)
        now = pd.read_csv('runs.csv')
        assert len(now) % 2 == 0 and len(now) >= 2 * n_runs and (kept is None or now[: len(kept)].equals(kept))
        kept = now
    out, err = start(n_jobs).communicate()
    assert 'done' in out, err
    resumed = pd.read_csv('runs.csv')
    assert len(resumed) == 18 and resumed[: len(kept)].equals(kept) and sorted(os.listdir()) == ['runs.csv', 'runs.json']
    policies = {'train': slow, 'frozen': 'frozen', 'affine-only': 'affine-only'}
    whole = bn_compare(get_learner, policies, 2, 3, 'fit').df
    by_run = lambda df: without_time(df).sort_values(['policy', 'seed', 'epoch'], ignore_index=True)
    pd.testing.assert_frame_equal(by_run(resumed), by_run(whole), rtol=1e-6)


@on_linux
@pytest.mark.parametrize('n_jobs', [1, pytest.param(2, marks=pytest.mark.long)])
def test_ctrl_c_from_a_terminal(n_jobs):
    process = start(n_jobs)
    wait_for(2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert 'done' in out and process.returncode == 0, err
    assert 4 <= len(pd.read_csv('runs.csv')) < 18


def test_settings_are_told_exactly():
    bn_compare(get_learner, {'a': dict(bn_above='frozen'), 'b': 'train'}, 1, 1, 'fit', lr=slice(1e-3, 1e-2), results='runs.csv')
    told = json.loads(Path('runs.json').read_text())
    assert told['policies'] == {'a': dict(bn='frozen', bn_above='frozen'), 'b': 'train'} and told['lr'] == 'slice(0.001, 0.01, None)'
    assert [told[k] for k in ('epochs', 'fit', 'freeze_to', 'precompute')] == [1, 'fit', -1, True]


def test_one_run_has_a_row_per_epoch():
    rows = run_policy(get_learner, 'train', 0, 3, 'fine_tune')
    assert [row['epoch'] for row in rows] == [0, 1, 2, 3] and all(row['seconds'] > 0 for row in rows)


def test_features_that_find_no_room(monkeypatch):
    "On a full disk a run trains as it would without stored features"

    def full(f, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    compare = partial(bn_compare, get_learner, ['frozen'], 1, 1, 'fit')
    assert compare().df['precomputed'].all()
    monkeypatch.setattr(store, '_reserve', full)
    monkeypatch.setattr(batches, 'free_memory', lambda device: 0)
    assert not compare().df['precomputed'].any()
