"The repository agrees with itself: modules and README with the notebooks, the notebooks with the house"

import importlib.util, json, platform, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import distributions, metadata, requires, version
from pathlib import Path

import pandas as pd, pytest
from conftest import ROOT, make
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
FLOORS = [
    'core',
    'restore',
    'ranks',
    'folders',
    'moments',
    'batches',
    'observe',
    'in_step',
    'policy',
    'stats',
    'fixed',
    'calls',
    'cut',
    'resume',
    'store',
    'convolution',
    'lazy',
    'fuse',
    'finite',
    'point',
    'guard',
    'callback',
    'loaders',
    'source',
    'drawing',
    'samples',
    'part',
    'fuse_callback',
    'serve',
    'precompute',
    'fold',
    'differences',
    'plots',
    'drift',
    'digits',
    'learner',
    'runs',
    'results',
    'rules',
    'trials',
    'compare',
    'find',
    'images',
    'architectures',
    'cli',
]  # each may import those before it

CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT / 'settings.ini', encoding='utf-8')
SETTINGS = CONFIG['DEFAULT']
PYTHONS = re.findall(r'Python :: (3\.\d+)', SETTINGS['classifiers'])
LOCK = [Requirement(line) for line in (ROOT / 'requirements-dev.txt').read_text(encoding='utf-8').splitlines() if line[0] not in '# ']


def text(folder, *patterns):
    return {p: p.read_text(encoding='utf-8') for pattern in patterns for p in folder.glob(pattern)}


@pytest.fixture
def copy(tmp_path):
    for name in ('nbs', 'bnfreeze_fastai'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'command,patterns', [('nbdev-export', ['bnfreeze_fastai/**/*.py', 'nbs/llms.txt']), ('nbdev-clean', ['nbs/**/*.ipynb'])]
)
def test_exported_and_clean(copy, command, patterns):
    before = text(copy, *patterns)
    subprocess.run([BIN / command], cwd=copy, check=True)
    assert text(copy, *patterns) == before, f'run {command}'


def test_readme_is_made_from_the_index(tmp_path):
    make('readme', tmp_path)
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == (ROOT / 'README.md').read_text(encoding='utf-8'), 'run make readme'


def test_metadata_comes_from_settings():
    cfg, dist = SETTINGS, metadata('bnfreeze_fastai')
    import bnfreeze_fastai

    assert version('bnfreeze_fastai') == bnfreeze_fastai.__version__
    assert dist['Name'] == cfg['lib_name'] and dist['Summary'] == cfg['description'] and dist['Requires-Python'] == f">={cfg['min_python']}"
    assert f"## {bnfreeze_fastai.__version__}" in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_users_get_the_bounds_and_not_the_lock():
    needed = [r for r in map(Requirement, requires('bnfreeze_fastai')) if r.marker is None]
    assert set(map(str, needed)) == {str(Requirement(bound)) for bound in SETTINGS['requirements'].split()}


def locked(python):
    "What the lock has for a Python: the one version of each package"
    environment = dict(python_version=python.rpartition('.')[0], python_full_version=python)
    here = [r for r in LOCK if r.marker is None or r.marker.evaluate(environment)]
    names = [canonicalize_name(r.name) for r in here]
    assert len(set(names)) == len(names) and all(re.fullmatch(r'==[^*,]+', str(r.specifier)) for r in here)
    return {name: str(r.specifier)[2:] for name, r in zip(names, here)}


@pytest.mark.parametrize('python', [f'{p}.{patch}' for p in PYTHONS for patch in (0, 99)])
def test_lock_keeps_every_bound(python):
    versions = locked(python)
    for bound in map(Requirement, (SETTINGS['requirements'] + ' ' + SETTINGS['dev_requirements']).split()):
        assert versions[canonicalize_name(bound.name)] in bound.specifier, f'{bound}: run make upgrade'


def test_environment_is_the_locked_one():
    versions = locked(platform.python_version())
    found = {canonicalize_name(d.name): d.version for d in distributions()}
    assert {name: found.get(name) for name in versions} == versions
    assert found.keys() - versions.keys() <= {'pip', 'bnfreeze-fastai'}


def test_lock_names_no_place():
    assert not re.search(r'://|--|@', (ROOT / 'requirements-dev.txt').read_text(encoding='utf-8'))


def test_modules_import_downwards_only():
    for i, name in enumerate(FLOORS):
        path = ROOT / 'bnfreeze_fastai' / f'{name}.py'
        if not path.exists():
            continue
        text = path.read_text(encoding='utf-8')
        imported = re.findall(r'from (?:bnfreeze_fastai|)\.(\w+) import', text)
        for names in re.findall(r'from (?:\.|bnfreeze_fastai) import (.+)', text):
            imported += names.split(', ')
        assert set(imported) <= set(FLOORS[:i]), name


def test_every_module_has_a_floor():
    modules = {p.stem for p in (ROOT / 'bnfreeze_fastai').glob('*.py')} - {'__init__', '_modidx', 'all'}
    assert modules <= set(FLOORS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_like_a_page(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert re.match(r'# .+\n\n> .+', ''.join(cells[0]['source'])), 'a title and a subtitle'
    assert sum(c['cell_type'] == 'markdown' for c in cells) > len(cells) / 5
    assert path.stem == 'index' or any('## Card' in ''.join(c['source']) for c in cells) or path.stem in ('05_plots', '08_cli')
    for c in cells:
        if c['cell_type'] == 'code':
            assert max(map(len, ''.join(c['source']).splitlines())) <= 140, ''.join(c['source'])


def test_bounds_are_what_was_seen_to_pass():
    bounds = dict(re.findall(r'(\S+?)>=([\d.]+)', SETTINGS['requirements']))
    rows = pd.read_csv(ROOT / 'versions' / 'table.csv', dtype=str).to_dict('records')
    oldest = next(row for row in rows if row['versions'] == 'oldest')
    told = oldest.keys() & bounds.keys()
    assert len(told) > 5 and all(Version(oldest[name]) == Version(bounds[name]) for name in told)
    pythons = {row['python'].rpartition('.')[0] for row in rows}
    assert pythons == set(PYTHONS) and SETTINGS['min_python'] in pythons
    assert f'fastai {bounds["fastai"]}' in (ROOT / 'README.md').read_text(encoding='utf-8')
    assert all(re.fullmatch(r'\d+ passed', row['result']) for row in rows)


def test_quick_tests_are_there():
    spec = importlib.util.spec_from_file_location('noxfile', ROOT / 'noxfile.py')
    spec.loader.exec_module(noxfile := importlib.util.module_from_spec(spec))
    assert all((ROOT / 'tests' / f'test_{name}.py').exists() for name in noxfile.QUICK)


@pytest.mark.parametrize('command', ['format --check', 'check --select F --ignore F401,F403,F405'])
def test_scripts_are_formatted_and_name_what_exists(command):
    places = ['tests', 'docs', 'bench', 'experiments', 'soak', 'sweep', 'noxfile.py']
    result = subprocess.run([BIN / 'ruff', *command.split(), '--no-cache', *places], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
