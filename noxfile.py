"""The quick tests on the oldest and the newest versions that settings.ini admits: `make versions`, or one: `nox -s 'quick(3.10-oldest)'`.

The oldest are the bounds in settings.ini themselves. An interpreter that is not on the PATH is skipped; environments go when done with."""

import csv, re, shutil
from pathlib import Path
from xml.etree import ElementTree

import nox

MATRIX = [('3.10', 'oldest'), ('3.10', 'newest'), ('3.11', 'newest'), ('3.12', 'newest'), ('3.13', 'newest')]
RESOLUTION = {'oldest': 'lowest-direct', 'newest': 'highest'}
QUICK = 'not slow and not distributed and not browser and not cuda'
TOOLS = ('pytest', 'pytest-xdist', 'hypothesis', 'timm')  # what the quick tests need of the dev requirements
TOLD = ('fastai', 'fastcore', 'torch', 'torchvision', 'numpy', 'pandas', 'timm')
FIELDS = ('python', 'versions', *TOLD, 'result')
TABLE = Path('tests/versions/table.csv')

nox.options.default_venv_backend = 'uv'
nox.options.download_python = 'never'
nox.options.error_on_missing_interpreters = False  # nox's default in CI is True


def installed(session):
    "The versions in the session's environment: Python's, and those of packages"
    code = 'import platform, sys; from importlib.metadata import version; print(platform.python_version(), *map(version, sys.argv[1:]))'
    return dict(zip(('python', *TOLD), session.run('python', '-c', code, *TOLD, silent=True).split(), strict=True))


def result(report):
    "What pytest's report counts, such as '812 passed'"
    suite = ElementTree.parse(report).find('testsuite')
    counts = {k: int(suite.get(k)) for k in ('errors', 'failures', 'skipped')}
    counts = {'passed': int(suite.get('tests')) - sum(counts.values()), **counts}
    return ', '.join(f'{n} {k}' for k, n in counts.items() if n)


def write(row):
    "Put `row` into the table, in the place of an older one for the same cell of the matrix"
    key = lambda row: (row['python'].rpartition('.')[0], row['versions'])
    rows = list(csv.DictReader(TABLE.open(encoding='utf-8'))) if TABLE.exists() else []
    rows = {key(r): r for r in [*rows, row]}
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open('w', encoding='utf-8', newline='') as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[cell] for cell in MATRIX if cell in rows)


@nox.session
@nox.parametrize('python,versions', MATRIX, ids=['-'.join(cell) for cell in MATRIX])
def quick(session, versions):
    try:
        session.install('--resolution', RESOLUTION[versions], '--editable', '.')
        session.install(*TOOLS)
        report = Path(session.create_tmp()).resolve() / 'report.xml'
        tests = ['-m', QUICK, '--ignore=tests/house', 'tests']
        session.run('pytest', '--numprocesses=2', f'--junitxml={report}', *session.posargs, *tests, success_codes=[0, 1])
        row = dict(versions=versions, **installed(session), result=result(report))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
    write(row)
    if re.search('failures|errors', row['result']):
        session.error(row['result'])
