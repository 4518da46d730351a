"""The quick tests on the versions that users have: `make versions`, or one cell of its table: `nox -s 'quick(3.12-kaggle-2026.08)'`.

Each list in tests/versions has the versions of one place, for the Python that it names; oldest.txt has the bounds in settings.ini. An
interpreter that is not on the PATH is skipped; environments go when done with. `make oldest` is the least that a change has to pass."""

import csv, re, shutil, subprocess
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import nox

VERSIONS = Path(__file__).parent / 'tests' / 'versions'
TABLE = VERSIONS / 'table.csv'
CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(VERSIONS.parent.parent / 'settings.ini', encoding='utf-8')
PYTHONS = re.findall(r'Python :: (3\.\d+)', CONFIG['DEFAULT']['classifiers'])
LISTS = {p.stem: re.search(r'^# Python (3\.\d+)$', p.read_text(encoding='utf-8'), flags=re.M)[1] for p in sorted(VERSIONS.glob('*.txt'))}
MATRIX = [(LISTS['oldest'], 'oldest'), *((p, name) for name, p in LISTS.items() if name != 'oldest'), *((p, 'newest') for p in PYTHONS)]
SHORT = {(p, 'newest') for p in PYTHONS[:-1]}  # which have a list of their own, so that a part of the tests will do
QUICK = 'not long and not distributed and not browser and not cuda'
OTHERS = [f'--ignore=tests/{folder}' for folder in ('gpu', 'house', 'soak', 'sweep', 'versions')]
PART = [
    *('tests/test_compat.py', 'tests/test_core.py', 'tests/freeze/test_callback.py', 'tests/freeze/test_learner.py', 'tests/stats'),
    *(
        'tests/freeze/test_schedule.py',
        'tests/head/test_cut.py',
        'tests/head/test_fold.py',
        'tests/choose/test_compare.py',
        'tests/test_cli.py',
    ),
]
# What the quick tests need of the dev requirements; IPython, which notebooks have, since fastprogress 1.1.5 needs it and does not say so
TOOLS = ('pytest', 'pytest-xdist', 'hypothesis', 'timm', 'cloudpickle', 'ipython')
TOLD = ('fastai', 'fastcore', 'torch', 'torchvision', 'numpy', 'pandas', 'timm')
FIELDS = ('python', 'versions', 'tests', *TOLD, 'result')

nox.options.default_venv_backend = 'uv'
nox.options.download_python = 'never'
nox.options.error_on_missing_interpreters = False  # nox's default in CI is True
nox.options.sessions = ['quick']


def install(session, versions):
    "The package, of the checkout, and what its tests need"
    constraints = ['--constraint', VERSIONS / f'{versions}.txt'] if versions in LISTS else []
    session.install(*map(str, constraints), '--editable', '.', *TOOLS)


def run_tests(session, tests, *options, **how):
    session.run('pytest', '--numprocesses=2', '--dist=loadgroup', *options, '-m', QUICK, *tests, env={'OMP_NUM_THREADS': '1'}, **how)


def installed(session):
    "The versions in the session's environment: Python's, and those of packages"
    code = 'import platform, sys; from importlib.metadata import version; print(platform.python_version(), *map(version, sys.argv[1:]))'
    return dict(zip(('python', *TOLD), session.run('python', '-c', code, *TOLD, silent=True).split(), strict=True))


def result(report):
    "What pytest's report counts, such as '812 passed, 2 skipped'"
    suite = ElementTree.parse(report).find('testsuite')
    counts = {k: int(suite.get(k)) for k in ('errors', 'failures', 'skipped')}
    counts = {'passed': int(suite.get('tests')) - sum(counts.values()), **counts}
    return ', '.join(f'{n} {k}' for k, n in counts.items() if n)


def write(row):
    "Put `row` into the table, in the place of an older one for the same cell of the matrix"
    key = lambda row: (row['python'].rpartition('.')[0], row['versions'])
    rows = list(csv.DictReader(TABLE.open(encoding='utf-8'))) if TABLE.exists() else []
    rows = {key(r): r for r in [*rows, row]}
    with TABLE.open('w', encoding='utf-8', newline='') as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[cell] for cell in MATRIX if cell in rows)


@nox.session
@nox.parametrize('python,versions', MATRIX, ids=['-'.join(cell) for cell in MATRIX])
def quick(session, versions):
    part = (session.python, versions) in SHORT
    try:
        install(session, versions)
        report = Path(session.create_tmp()).resolve() / 'report.xml'
        tests = PART if part else [*OTHERS, 'tests']
        run_tests(session, tests, f'--junitxml={report}', *session.posargs, success_codes=[0, 1])
        row = dict(versions=versions, tests='part' if part else 'all', **installed(session), result=result(report))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
    write(row)
    if re.search('failures|errors', row['result']):
        session.error(row['result'])


def usable(python):
    "Whether there is such an interpreter that can make environments; a shim of pyenv may be for one that is not switched on"
    found = shutil.which(f'python{python}')
    return found and not subprocess.run([found, '-c', 'import ensurepip'], capture_output=True).returncode


@nox.session(python=next(filter(usable, PYTHONS), PYTHONS[0]), venv_backend='venv')  # pip knows where packages come from
def oldest(session):
    try:
        install(session, 'oldest')
        run_tests(session, PART, *session.posargs)
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
