"The command `bnfreeze`, as a user types it"

import json, os, re, shlex, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import pandas as pd, pytest, torch, torchvision, warm
from fastai.vision.core import imagenet_stats
from PIL import Image
from conftest import ROOT
from fastcore.script import anno_parser

from bnfreeze_fastai.cli import COMMANDS, main
from bnfreeze_fastai.compat import parsed
from bnfreeze_fastai.vision import find_images, make_model

pytestmark = pytest.mark.slow

COMMAND = Path(sys.executable).parent / 'bnfreeze'


run = partial(warm.run, COMMAND)


def test_demo():
    args = ['demo', '--seeds', '2', '--images', '32', '--epochs', '1', '--out', 'plot.png']
    res = subprocess.run([COMMAND, *args], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    for word in ['fastai', 'train', 'stats-only', 'affine-only', 'frozen', 'stats_moved', 'affine_moved', 'the same in every seed']:
        assert word in res.stdout
    path = Path(res.stdout.split('Plot: ')[1].strip())
    assert path == Path('plot.png').resolve() and path.read_bytes().startswith(b'\x89PNG')
    assert '%' in res.stdout.split('Pretrained')[0]  # the progress bar


@pytest.mark.parametrize(
    'args,words',
    [
        (['--seeds', '0'], 'from 1 up'),
        (['--epochs', '0'], 'from 1 up'),
        (['--images', '5'], 'from 16'),
        (['--images', '5000'], 'to 800'),
        (['--out', 'plot.xyz'], '.png'),
        (['--out', 'nowhere/plot.png'], 'no folder nowhere'),
        (['--out', 'folder.png'], 'is a folder'),
        (['--seeds', 'many'], 'invalid int value'),
        (['--mode', 'frozen'], '--seeds'),
    ],
)
def test_bad_options_say_what_is_allowed(args, words, capsys):
    Path('folder.png').mkdir()
    with pytest.raises(SystemExit) as e:
        main(['demo', *args])
    assert e.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize('args', [[], ['dmeo'], ['--seeds', '3']])
def test_unknown_commands_list_the_known(args, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2 and 'demo' in capsys.readouterr().err


def test_help():
    top, demo = run('--help'), run('demo', '--help')
    assert top.returncode == demo.returncode == 0 and 'demo' in top.stdout
    for option in ['--seeds', '--images', '--epochs', '--out', 'default: 5']:
        assert option in demo.stdout


NETWORK = """
from torch import nn
def net(n_out):
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out)))
"""
SMALL = ['--arch', 'own.py:net', '--weights', 'none', '--size', '8', '--bs', '4']


@pytest.fixture
def pets():
    for part, n in (('train', 16), ('valid', 8)):
        for i, label in enumerate(('cat', 'dog')):
            folder = Path('pets', part, label)
            folder.mkdir(parents=True)
            for j in range(n):
                Image.effect_noise((10, 12), 20 + 60 * i).convert('RGB').save(folder / f'{j}.png')
    Path('own.py').write_text(NETWORK)


def test_compare(pets):
    args = ['compare', 'pets', *SMALL, '--modes', 'fastai,frozen', '--epochs', '1', '--seeds', '2', '--out', 'found/here']
    res = run(*args)
    assert res.returncode == 0, res.stderr
    out = Path('found/here')
    assert sorted(p.name for p in out.iterdir()) == ['plot.png', 'report.md', 'results.csv', 'results.json']
    rows = pd.read_csv(out / 'results.csv')
    assert len(rows) == 2 * 2 * 2 and set(rows['policy']) == {'fastai', 'frozen'} and 'accuracy' in rows
    settings = json.loads((out / 'results.json').read_text())
    told = dict(
        arch='own.py:net', weights='none', size=8, bs=4, epochs=1, images=48, training_images=32, classes=['cat', 'dog'], fit='fine_tune'
    )
    assert told.items() <= settings.items() and settings['data'] == str(Path('pets').resolve()) and 'torch' in settings['versions']
    report = (out / 'report.md').read_text()
    assert all(word in report for word in ('| fastai', '| frozen', 'plot.png', 'own.py:net', 'verdict')) and 'verdict' in res.stdout

    before = (out / 'results.csv').read_bytes()
    again = run(*args)
    assert again.returncode == 0 and (out / 'results.csv').read_bytes() == before
    Path('pets/train/cat/0.png').write_bytes(Path('pets/train/dog/0.png').read_bytes())
    changed = run(*args)
    assert changed.returncode == 2 and 'images_hash' in changed.stderr and (out / 'results.csv').read_bytes() == before
    other = run(*args, '--bs', '8')
    assert other.returncode == 2 and 'bs (4 there, 8 now)' in other.stderr and (out / 'results.csv').read_bytes() == before


@pytest.mark.long
def test_compare_in_two_processes_gives_the_same(pets):
    args = ['compare', 'pets', *SMALL, '--modes', 'train,frozen', '--epochs', '2', '--seeds', '2', '--fit', 'fit_one_cycle']
    tables = []
    for jobs in ('1', '2'):
        res = run(*args, '--jobs', jobs, '--out', jobs)
        assert res.returncode == 0, res.stderr
        tables.append(
            pd.read_csv(Path(jobs) / 'results.csv').drop(columns='seconds').sort_values(['policy', 'seed', 'epoch'], ignore_index=True)
        )
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)


def press_ctrl_c(process):
    "Again if need be: Python loses an interrupt that falls into its own clean-up after a fork, and loaders fork"
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            pass


@pytest.mark.long
def test_compare_is_stopped_and_goes_on(pets):
    args = lambda seeds: ['compare', 'pets', *SMALL, '--epochs', '2', '--seeds', seeds, '--out', 'found']
    process = warm.Script(COMMAND, *args('200'))
    while not Path('found/results.csv').exists() and process.poll() is None:
        time.sleep(0.02)
    out, err = press_ctrl_c(process)
    assert process.returncode == 0 and 'runs are missing' in out, err
    kept = pd.read_csv('found/results.csv')
    assert run(*args('2')).returncode == 0
    whole = pd.read_csv('found/results.csv')
    assert (whole['seed'] < 2).sum() == 5 * 2 * 3 and whole[: len(kept)].equals(kept)


def test_find(pets):
    res = run('find', 'pets', *SMALL, '--epochs', '10', '--fit', 'fit_one_cycle', '--out', 'found')
    assert res.returncode == 0, res.stderr
    assert sorted(p.name for p in Path('found').iterdir()) == ['gains.csv', 'plot.png', 'report.md', 'settings.json']
    assert 'Suggestion' in res.stdout and 'Suggestion' in Path('found/report.md').read_text()
    gains = pd.read_csv('found/gains.csv')
    assert 'fastai' in set(gains['policy']) and (gains['loss'].notna().sum(), len(gains)) == (3, len(gains))
    assert {'fit': 'fit_one_cycle', 'epochs': 10, 'arch': 'own.py:net'}.items() <= json.loads(
        Path('found/settings.json').read_text()
    ).items()


@pytest.mark.parametrize('arch', ['resnet18', 'mobilenetv3_small_050'])
def test_architectures_by_name(pets, arch):
    args = [
        'find',
        'pets',
        '--arch',
        arch,
        '--weights',
        'none',
        '--size',
        '32',
        '--bs',
        '8',
        '--epochs',
        '8',
    ]
    main([*args, '--out', 'found'])
    assert Path('found/report.md').exists()


def test_weights_from_a_file(pets):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, 'right.pth')
    torch.save({k: v for k, v in state.items() if 'layer4.1' not in k}, 'wrong.pth')
    args = ['compare', 'pets', '--arch', 'resnet18', '--size', '32', '--bs', '8', '--epochs', '1', '--seeds', '1', '--modes', 'frozen']
    main([*args, '--weights', 'right.pth', '--out', 'found'])
    res = run(*args, '--weights', 'wrong.pth')
    assert res.returncode == 2 and 'layer4.1.conv1.weight: not in the file' in res.stderr


@pytest.mark.parametrize('classes', [('bus', 'car', 'train'), ('train/bus', 'train/car', 'test/bus')])
def test_a_folder_called_train_without_another_for_validation(classes):
    for label in classes:
        Path('vehicles', label).mkdir(parents=True)
        for j in range(4):
            Image.new('RGB', (4, 4)).save(Path('vehicles', label, f'{j}.png'))
    with pytest.raises(ValueError, match='none called valid'):
        find_images('vehicles')
    found = [p for part in find_images('vehicles', 0.25) for p in part]
    used = [c for c in classes if not c.startswith('test')]
    assert {*found} == {p for c in used for p in Path('vehicles', c).iterdir()}


def test_images_are_scaled_as_the_weights_of_torchvision_want_it(monkeypatch):
    assert make_model('resnet18', 'none', 2)[2] == imagenet_stats
    weights = torchvision.models.EfficientNet_V2_L_Weights  # the one network of torchvision's with others
    monkeypatch.setattr(torchvision.models, 'get_model_weights', lambda arch: weights)
    assert make_model('resnet18', 'none', 2)[2] == ([0.5] * 3, [0.5] * 3)


def unreadable():
    Path('pets/train/cat/3.png').write_bytes(b'no image')


def one_class():
    for part in ('train', 'valid'):
        shutil.rmtree(Path('pets', part, 'dog'))


def file_in_the_way():
    Path('taken').write_text('')


def too_few():
    for p in Path('pets/train').rglob('*'):
        if p.suffix and int(p.stem) > 0:
            p.unlink()


def broken_function():
    Path('own.py').write_text('def net(n_out): return n_out.missing')


@pytest.mark.parametrize(
    'command,args,prepare,words',
    [
        ('compare', ['pest'], None, 'there is pets'),
        ('compare', ['pets/train'], None, 'say how much to hold back'),
        ('compare', ['pets', '--valid-pct', '0.2'], None, 'own validation images'),
        ('compare', ['pets', '--arch', 'resnet43'], None, 'did you mean'),
        ('find', ['pets', '--arch', 'resnet43'], None, 'did you mean'),
        ('compare', ['pets', '--arch', 'own.py:ent'], None, 'has no function ent'),
        ('compare', ['pets', '--weights', 'nowhere.pth'], None, 'no file of weights'),
        ('compare', ['pets', '--modes', 'frozen,thawed'], None, "'thawed' is no policy"),
        ('compare', ['pets', '--fit', 'fit_sgdr'], None, 'fit_one_cycle'),
        ('compare', ['pets', '--freeze-to', '0'], None, 'another `fit`'),
        ('compare', ['pets', '--fit', 'fit', '--freeze-to', '7'], None, 'out of range'),
        ('find', ['pets', '--fit', 'fit', '--freeze-to', '7'], None, 'out of range'),
        ('compare', ['pets', '--epochs', '0'], None, 'from 1 up'),
        ('compare', ['pets', '--seeds', '0'], None, 'from 1 up'),
        ('compare', ['pets', '--size', '0'], None, 'from 8 up'),
        ('compare', ['pets', '--bs', '0'], None, 'from 1 up'),
        ('compare', ['pets', '--jobs', '0'], None, 'from 1 up'),
        ('find', ['pets', '--fit', 'fit_sgdr'], None, 'fit_one_cycle'),
        ('find', ['pets', '--freeze-to', '0'], None, 'another `fit`'),
        ('find', ['pets', '--lr', '-1'], None, '`lr`'),
        ('compare', ['pets'], unreadable, '3.png'),
        ('find', ['pets'], unreadable, '3.png'),
        ('compare', ['pets'], one_class, 'one class only, cat'),
        ('compare', ['pets', '--out', 'taken'], file_in_the_way, 'give a folder'),
        ('find', ['pets', '--out', 'taken'], file_in_the_way, 'give a folder'),
        ('compare', ['pets', '--out', 'taken/below'], file_in_the_way, 'give a folder'),
        ('compare', ['pets', '--modes', 'frozen'], too_few, 'smaller batch size'),
        ('find', ['pets'], too_few, 'smaller batch size'),
        ('find', ['pets'], broken_function, 'failed with 2 classes'),
        ('compare', ['pets', '--lr', 'nan'], None, '`lr`'),
        ('compare', [''], None, 'DATA is empty'),
    ],
)
def test_bad_input_says_what_is_wrong_before_anything_runs(pets, command, args, prepare, words, capsys):
    if prepare is not None:
        prepare()
    before = sorted(Path('.').rglob('*'))
    with pytest.raises(SystemExit) as e:
        main([command, *SMALL, *args])
    assert e.value.code == 2 and words in capsys.readouterr().err
    assert sorted(p for p in Path('.').rglob('*') if '__pycache__' not in str(p)) == before


def test_unreadable_images_are_skipped_on_request(pets, capsys):
    unreadable()
    main(['compare', 'pets', *SMALL, '--epochs', '1', '--seeds', '1', '--modes', 'frozen', '--skip-unreadable', '--out', 'found'])
    assert '3.png' in capsys.readouterr().out and json.loads(Path('found/results.json').read_text())['images'] == 47


ON_A_PAGE = re.compile(r'`bnfreeze ((?:find|compare|demo)[^`]*)`|^bnfreeze ((?:find|compare|demo).*)$', flags=re.M)


@pytest.mark.parametrize('page', sorted((ROOT / 'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_commands_on_pages_can_be_given(page):
    text = '\n'.join(''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    for command in (a or b for a, b in ON_A_PAGE.findall(text)):
        name, *args = shlex.split(command)
        if args:
            parsed(anno_parser(COMMANDS[name]), args)


def relabelled(folder):
    "The folder of images under a name with a colon, a space and an umlaut, as are the classes"
    shutil.move('pets', folder)
    for path in folder.glob('*/cat'):
        path.rename(path.with_name('Käse – ±'))
    (folder / 'own net.py').write_text(NETWORK, encoding='utf-8')
    (folder / 'train' / 'dog' / 'ü.png').write_bytes(b'no image')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
@pytest.mark.parametrize('command', ['compare', 'find'])
def test_awkward_names_on_a_console_that_cannot_print_them(pets, command, encoding):
    folder = Path('bilder ü' if sys.platform == 'win32' else 'C:bilder ü')
    relabelled(folder)
    args = [
        folder,
        '--arch',
        f'{folder / "own net.py"}:net',
        *SMALL[2:],
        '--epochs',
        '1',
        '--skip-unreadable',
        '--out',
        folder / 'found',
    ]
    args += ['--seeds', '1', '--modes', 'fastai,frozen'] if command == 'compare' else ['--fit', 'fit_one_cycle', '--epochs', '10']
    env = dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8='0', OMP_NUM_THREADS='1')
    res = subprocess.run([COMMAND, command, *args], capture_output=True, env=env)
    assert res.returncode == 0, res.stderr.decode(encoding, 'replace')
    out = res.stdout.decode(encoding)
    assert ('?.png' if encoding == 'ascii' else 'ü.png') in out and 'Report: ' in out
    report = (folder / 'found' / 'report.md').read_text(encoding='utf-8')
    assert 'Käse – ±' in report and 'own net.py' in report


def test_the_console_is_as_it_was_after_the_command(capsys):
    before = sys.stdout.errors
    with pytest.raises(SystemExit):
        main(['demo', '--seeds', '0'])
    main(['--help'])
    assert sys.stdout.errors == before
