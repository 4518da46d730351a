"macOS and Windows, without such machines: what Linux alone has is taken away, and what others forbid is forbidden"

import ast, os, re, subprocess, sys
from pathlib import Path

import pytest, yaml
from conftest import on_linux, ROOT
from heads import small

import bnfreeze_fastai.learner
from bnfreeze_fastai.choose.compare import bn_compare

PACKAGE = sorted((ROOT / 'bnfreeze_fastai').rglob('*.py'))
POSIX = {'fcntl', 'grp', 'posix', 'pty', 'pwd', 'resource', 'syslog', 'termios', 'tty'}
AWKWARD = 'mit Leerzeichen ü' if sys.platform == 'win32' else 'C: mit Leerzeichen ü'


def run(script, folder='.', **env):
    "A script in a process of its own; not forked, so that the environment holds from its start"
    Path('script.py').write_text(script, encoding='utf-8')
    command = [sys.executable, '-W', 'ignore', os.path.abspath('script.py')]
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=path) | env
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_imports_what_other_systems_lack():
    for path in PACKAGE:
        nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if hasattr(n, 'module')}
        assert not POSIX & names, path


def test_text_files_are_opened_as_utf_8():
    command = [Path(sys.executable).parent / 'ruff', 'check', '--preview', '--select', 'PLW1514', '--no-cache', 'bnfreeze_fastai', 'docs']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_reports_can_be_printed_anywhere():
    learn = small()
    start = learn.bn_snapshot()
    compared = bn_compare(small, ['fastai', 'frozen'], 1, 2, 'fit')
    for shown in (learn.bn_summary(), learn.bn_shift(), learn.recalibrate_bn(), learn.bn_drift(start), compared):
        assert repr(shown).isascii() and len(repr(shown)) > 100


OTHER_SYSTEM = """
import os, signal, sys
import fastai.vision.all, joblib, matplotlib.pyplot, psutil, scipy.stats, sklearn.datasets # what these do on Linux is theirs

for name in {posix}: sys.modules[name] = None
for name in ('fork', 'forkpty', 'getuid', 'geteuid', 'killpg', 'posix_fallocate', 'sched_getaffinity', 'setsid'): delattr(os, name)
for name in ('SIGALRM', 'SIGHUP', 'SIGKILL', 'SIGUSR1'): delattr(signal, name)
sys.platform = '{platform}'

from bnfreeze_fastai.all import *
from bnfreeze_fastai.cli import main
from bnfreeze_fastai.digits import digit_learner, pretrain

main(['demo', '--seeds', '2', '--images', '32', '--epochs', '1', '--out', 'plot.png'])
learn = digit_learner(pretrain(1)[0], 0, 32)
learn.freeze_to_bn(-1)
learn.recalibrate_bn(method='sequential')
with learn.precompute(max_mem=0): learn.fit(1)
bn_compare(lambda: learn, ['frozen'], 1, 1, 'fit', results='runs.csv')
print('done')
"""


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['darwin', 'win32'])
def test_nothing_needs_what_linux_alone_has(platform):
    out = run(OTHER_SYSTEM.format(posix=sorted(POSIX - {'posix'}), platform=platform))
    assert 'done' in out and b'\r' not in Path('runs.csv').read_bytes() and Path('plot.png').exists()


@pytest.mark.slow
@pytest.mark.long
def test_where_processes_are_spawned():
    out = run((ROOT / 'tests' / 'house' / 'spawn_script.py').read_text(encoding='utf-8'))
    assert out.count('passed') == 5


UNGUARDED = """
import multiprocessing
multiprocessing.set_start_method('spawn', force=True)
print('begins')

import sys
from pathlib import Path
from heads import small
from PIL import Image
from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.vision import find_images

for i in range(8):
    path = Path('images', 'ab'[i % 2], f'{i}.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path)
path.write_bytes(b'no image')
train, valid = find_images('images', 0.5, skip_unreadable=True)
print(len(train) + len(valid), 'images')
print(len(bn_compare(small, ['fastai', 'frozen'], 1, 1, 'fit', n_jobs=2).df), 'runs')
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_run_once():
    "On macOS and Windows a new process begins by running the script again, unless it says `if __name__ == '__main__'`"
    out = run(UNGUARDED)
    assert out.count('begins') == 1 and '7 images' in out and '2 runs' in out


def test_results_go_to_a_folder_of_any_name():
    path = Path(AWKWARD, 'läufe 1.csv')
    first = bn_compare(small, ['frozen'], 1, 1, 'fit', results=path).df
    assert sorted(p.name for p in path.parent.iterdir()) == ['läufe 1.csv', 'läufe 1.json']
    again = bn_compare(small, ['frozen'], 1, 1, 'fit', results=str(path)).df
    assert again.equals(first) and b'\r' not in path.read_bytes() + path.with_suffix('.json').read_bytes()


@pytest.fixture
def opened_files_stay(monkeypatch):
    "As on Windows, a file that is open or mapped can be neither deleted nor replaced"

    def refuse(real):
        def checked(*paths, **kwargs):
            maps = Path('/proc/self/maps').read_text()
            held = {os.path.realpath(p) for p in Path('/proc/self/fd').iterdir()} | set(re.findall(r'/\S.*', maps))
            if held & {os.path.realpath(p) for p in paths}:
                raise PermissionError(13, 'The process cannot access the file because it is being used by another process', str(paths[-1]))
            return real(*paths, **kwargs)

        return checked

    for name in ('unlink', 'remove', 'replace', 'rename'):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))


@on_linux
def test_nothing_deletes_or_replaces_an_open_file(opened_files_stay):
    with open('held', 'w'), pytest.raises(PermissionError):
        os.replace('held', 'other')
    learn = small()
    with learn.precompute(max_mem=0):
        learn.fit(1)
    for resume in (True, True, False):
        assert len(bn_compare(small, ['fastai', 'frozen'], 1, 1, 'fit', results='runs.csv', resume=resume).df) == 2


def test_the_workflow_runs_on_three_systems():
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yml').read_text(encoding='utf-8'))['jobs']
    told = yaml.dump(jobs)
    assert all(system in told for system in ('ubuntu-latest', 'macos-latest', 'windows-latest'))


@pytest.mark.parametrize('path', sorted((ROOT / '.github' / 'workflows').glob('*.yml')), ids=lambda p: p.stem)
def test_actions_are_pinned_by_their_commit(path):
    uses = re.findall(r'uses: (\S+)(.*)', path.read_text(encoding='utf-8'))
    assert uses and all(re.fullmatch(r'[\w./-]+@[0-9a-f]{40}', action) and re.search(r'# v\d', tag) for action, tag in uses)
