"The package as others take it: wheel and sdist, in an environment of their own without the source tree"

import json, os, re, shutil, subprocess, sys, sysconfig, tarfile, venv, zipfile
from pathlib import Path

import pytest, yaml
from conftest import make, ROOT

pytestmark = [pytest.mark.xdist_group('package'), pytest.mark.slow]  # which is built once
PACKAGE = ROOT / 'bnfreeze_fastai'
FILES = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob('*.py')} | {'bnfreeze_fastai/py.typed', 'bnfreeze_fastai/advice.json'}


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "The folder with what `make dist` has built, from a copy, as setuptools builds in the source and takes over what it built before"
    folder, copy = tmp_path_factory.mktemp('dist'), tmp_path_factory.mktemp('source')
    shutil.copytree(ROOT / 'bnfreeze_fastai', copy / 'bnfreeze_fastai', ignore=shutil.ignore_patterns('__pycache__'))
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(file, copy)
    make('dist', folder, copy)
    return folder / 'dist'


@pytest.fixture(scope='module', params=[pytest.param('*.whl', id='wheel'), pytest.param('*.tar.gz', id='sdist', marks=pytest.mark.long)])
def installed(request, dist, tmp_path_factory):
    "The `bin` of an environment with what was built; what that needs is seen from the tests' own environment"
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder)
    run = folder / 'bin' / 'python'
    site = next((folder / 'lib').glob('python*/site-packages'))
    (site / 'libraries.pth').write_text(sysconfig.get_path('purelib'))
    package = next(dist.glob(request.param))
    pip = [sys.executable, '-m', 'pip', '--python', run, 'install', '--quiet']
    subprocess.run([*pip, '--no-deps', '--no-index', '--no-build-isolation', '--ignore-installed', package], check=True, cwd=folder)
    return folder / 'bin'


def printed(command, folder):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_and_sdist_have_all_modules_and_the_licence(dist):
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel, tarfile.open(next(dist.glob('*.tar.gz'))) as sdist:
        for names in (wheel.namelist(), sdist.getnames()):
            assert {n[n.index('bnfreeze_fastai/') :] for n in names if 'bnfreeze_fastai/' in n} >= FILES
            assert any(n.endswith('LICENSE') for n in names)
        assert {Path(n).parts[0].partition('-')[0] for n in wheel.namelist()} == {'bnfreeze_fastai'}


def test_metadata_is_complete(dist):
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel:
        text = wheel.read(next(n for n in wheel.namelist() if n.endswith('METADATA'))).decode()
    for field in ('Summary', 'License-Expression: Apache-2.0', 'License-File', 'Keywords', 'Classifier: Typing :: Typed', 'Project-URL'):
        assert re.search(f'^{field}', text, flags=re.M), field


@pytest.fixture(scope='module')
def said(installed, tmp_path_factory):
    "What a script prints there: what the core alone has loaded, what the first recipe says, and where the package is"
    cells = json.loads((ROOT / 'nbs' / 'tutorials' / 'recipes.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    *lines, last = next(source for source in sources if not source.startswith('#|')).split('\n')
    lines = '\n'.join([*lines, f'print({last})'])
    loaded = "[m for m in sys.modules if m.split('.')[0] in ('fastai', 'fastcore', 'pandas')]"
    script = f'import sys, bnfreeze_fastai.core\nprint({loaded})\n{lines}\nimport bnfreeze_fastai.all as m\nprint(m.__file__)'
    return printed([installed / 'python', '-W', 'ignore', '-c', script], tmp_path_factory.mktemp('empty'))


def test_it_comes_from_the_environment(said, installed):
    assert said.splitlines()[-1].startswith(str(installed.parent))


def test_the_first_recipe(said):
    assert re.search(r'0\s+frozen\s+0\.0+\s+0\.0+\n', said)


def test_core_costs_no_fastai(said):
    assert said.startswith('[]\n')


def test_the_demo(installed, tmp_path):
    assert 'affine-only' in printed([installed / 'bnfreeze', 'demo', '--seeds', '1', '--images', '32', '--epochs', '1'], tmp_path)


WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_call_the_targets_of_the_makefile(path):
    jobs = yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values()
    runs = [step['run'] for job in jobs for step in job['steps'] if 'run' in step]
    targets = re.findall(r'\bmake ([a-z-]+)', '\n'.join(runs))
    assert targets and set(targets) <= set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), flags=re.M))


def test_workflows_test_every_python_of_the_classifiers():
    assert [p.stem for p in WORKFLOWS] == ['docs', 'release', 'test']
    matrix = yaml.safe_load(WORKFLOWS[-1].read_text(encoding='utf-8'))['jobs']['test']['strategy']['matrix']['python']
    assert matrix == re.findall(r'Python :: (3\.\d+)', (ROOT / 'settings.ini').read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_keep_downloads_as_long_as_the_lock(path):
    jobs = yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values()
    setups = [step['with'] for job in jobs for step in job['steps'] if step.get('uses', '').startswith('actions/setup-python')]
    assert setups and all(s['cache'] == 'pip' and s['cache-dependency-path'] == 'requirements-dev.txt' for s in setups)
