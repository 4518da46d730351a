"The versions that users have, in the lists beside this file: installing this package replaces none of them"

import json, os, re, subprocess, sys, sysconfig, venv
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT / 'settings.ini', encoding='utf-8')
BOUNDS = {canonicalize_name(r.name): r for r in map(Requirement, CONFIG['DEFAULT']['requirements'].split())}
LISTS = {path.stem: path.read_text(encoding='utf-8') for path in sorted(Path(__file__).parent.glob('*.txt'))}
HOSTED = [name for name in LISTS if name != 'oldest']


def required(text):
    return {canonicalize_name(r.name): r for r in map(Requirement, re.sub('#.*', '', text).split())}


def pins(text):
    return {name: Version(str(r.specifier)[2:]) for name, r in required(text).items() if str(r.specifier).startswith('==')}


@pytest.mark.parametrize('name', LISTS)
def test_it_tells_its_python_and_where_it_is_from(name):
    head = [line for line in LISTS[name].splitlines() if line.startswith('#')]
    python = re.fullmatch(r'# Python (3\.\d+)', head[-1])[1]
    assert f'Python :: {python}\n' in CONFIG['DEFAULT']['classifiers'] + '\n'
    assert re.search(r'github\.com/\w+/[\w-]+', ' '.join(head)) or name == 'oldest'


@pytest.mark.parametrize('name', HOSTED)
def test_bounds_admit_what_is_there(name):
    there = pins(LISTS[name])
    assert not {n: v for n, v in there.items() if n in BOUNDS and v not in BOUNDS[n].specifier}
    assert not there or BOUNDS.keys() <= there.keys()


def test_the_oldest_are_the_bounds():
    lowest = {name: Version(re.search(r'>=([\d.]+)', str(r.specifier))[1]) for name, r in BOUNDS.items()}
    assert pins(LISTS['oldest']) == lowest
    assert f"# Python {CONFIG['DEFAULT']['min_python']}\n" in LISTS['oldest']


def with_packages(folder, versions):
    "The interpreter of an environment in which pip finds these versions, though nothing is installed"
    venv.create(folder)
    paths = sysconfig.get_paths(scheme='nt' if os.name == 'nt' else 'posix_prefix', vars=dict(base=str(folder), platbase=str(folder)))
    for name, version in versions.items():
        info = Path(paths['purelib']) / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    return next(Path(paths['scripts']).glob('python*'))


def dry_run(python, requirements):
    "What pip would install there without looking for anything elsewhere, or None if it would have to"
    command = [sys.executable, '-m', 'pip', '--python', python, 'install', '--dry-run', '--quiet', '--no-index', '--report', '-']
    result = subprocess.run([*command, *map(str, requirements)], capture_output=True, text=True)
    return json.loads(result.stdout)['install'] if result.returncode == 0 else None


@pytest.mark.parametrize('name', [name for name in HOSTED if pins(LISTS[name])])
def test_pip_would_install_nothing_but_this_package(name, tmp_path):
    python = with_packages(tmp_path, pins(LISTS[name]))
    assert dry_run(python, BOUNDS.values()) == []
    assert dry_run(python, ['fastai>=2.8.12']) is None


def solved(name, more=()):
    "What an installer would install, by name"
    python = re.search(r'^# Python (.+)$', LISTS[name], flags=re.M)[1]
    uv = Path(sys.executable).parent / 'uv'
    command = [uv, 'pip', 'compile', '--quiet', '--python-version', python, '--no-header', '--no-annotate', '-']
    result = subprocess.run(command, input='\n'.join([LISTS[name], *more]), capture_output=True, text=True)
    if result.returncode and re.search('Failed to fetch|error sending request', result.stderr):
        pytest.skip('the package index cannot be reached')
    assert result.returncode == 0, result.stderr
    return pins(result.stdout)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', HOSTED)
def test_installing_replaces_nothing(name):
    there = solved(name)
    after = solved(name, map(str, BOUNDS.values()))
    assert pins(LISTS[name]).items() <= there.items() <= after.items()
    assert after.keys() - there.keys() <= {'xxhash', 'tabulate'}  # which AutoGluon does not bring
