"The command `bnfreeze`, as a user types it"

import subprocess, sys
from pathlib import Path

import pytest
from bnfreeze_fastai.cli import main

COMMAND = Path(sys.executable).parent / 'bnfreeze'


def run(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True)


def test_demo():
    res = run('demo', '--seeds', '2', '--images', '32', '--epochs', '1', '--out', 'plot.png')
    assert res.returncode == 0, res.stderr
    for word in [
        'fastai freeze()',
        'train',
        'stats-only',
        'affine-only',
        'frozen',
        'statistics moved',
        'affine moved',
        'the same in every seed',
    ]:
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
