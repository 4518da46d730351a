"Tutorials on Colab and Kaggle: the cell that installs this package there, and the links that lead there"

import json, os, re, shutil, subprocess
from pathlib import Path

import pytest
from conftest import on_linux, ROOT

from docs.hosted import install, links, NEED_A_CLONE, UNKNOWN, write_hosted
from docs.pages import markdown

TUTORIALS = sorted((ROOT / 'nbs' / 'tutorials').glob('*.ipynb'))
ADDRESS = 'https://github.com/owner/bnfreeze_fastai'


@pytest.fixture
def nbs(tmp_path):
    shutil.copytree(ROOT / 'nbs' / 'tutorials', tmp_path / 'nbs' / 'tutorials', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    return tmp_path / 'nbs'


def content(nbs):
    return {p.name: p.read_bytes() for p in sorted((nbs / 'tutorials').glob('*.ipynb'))}


def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def test_cells_are_those_that_are_made(nbs):
    write_hosted(nbs)
    assert content(nbs) == content(ROOT / 'nbs'), 'run python -m docs hosted .'


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_the_package_is_installed_before_anything_is_imported(path):
    code = [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code']
    installs = ['pip install' in source for source in code]
    assert installs == [path.stem not in NEED_A_CLONE] + [False] * (len(code) - 1)
    if installs[0]:
        assert code[0].startswith('#| hide\n#| eval: false\n') and '--constraint' in code[0]


def test_only_what_reads_tables_of_the_repository_needs_a_clone():
    assert NEED_A_CLONE == {p.stem for p in TUTORIALS if any("'../.." in ''.join(c['source']) for c in cells(p))}


def test_links_come_with_the_address_and_go_with_it(nbs):
    before = content(nbs)
    for _ in range(2):
        write_hosted(nbs, ADDRESS)
        for path in sorted((nbs / 'tutorials').glob('*.ipynb')):
            first, second, third = (''.join(c['source']) for c in cells(path)[:3])
            assert first.startswith('# ') and ('Open in Colab' in second) == (path.stem not in NEED_A_CLONE)
            if path.stem not in NEED_A_CLONE:
                assert second == links(path, ADDRESS) and f'"git+{ADDRESS}"' in third
                assert max(map(len, third.splitlines())) <= 140
    write_hosted(nbs, '')
    assert content(nbs) == before or 'git+http' in str(before)


def test_where_links_lead():
    found = re.findall(r'\[(.+?)\]\((\S+?)\)', links(Path('recipes.ipynb'), ADDRESS))
    assert found == [
        ('Open in Colab', 'https://colab.research.google.com/github/owner/bnfreeze_fastai/blob/main/nbs/tutorials/recipes.ipynb'),
        (
            'Open in Kaggle',
            'https://kaggle.com/kernels/welcome?src=https://github.com/owner/bnfreeze_fastai/blob/main/nbs/tutorials/recipes.ipynb',
        ),
    ]
    for elsewhere in ('', 'https://gitlab.com/owner/bnfreeze_fastai'):  # neither takes notebooks from there
        assert links(Path('recipes.ipynb'), elsewhere) == ''


def test_the_site_shows_links_and_not_the_installing():
    text = markdown(ROOT / 'nbs' / 'tutorials' / 'recipes.ipynb')[0]
    assert 'pip list' not in text and UNKNOWN not in text


@on_linux
@pytest.mark.parametrize('place', ['content', 'kaggle', 'at home'])
def test_the_cell_on_a_hosted_machine(place, tmp_path):
    "Its commands, with folders and a pip of our own in place of the real ones"
    (tmp_path / place).mkdir()
    (tmp_path / 'bin').mkdir()
    pip = tmp_path / 'bin' / 'pip'
    pip.write_text('#!/bin/sh\necho "$@" >> calls\n[ "$1" = list ] && echo torch==2.11.0+cu128\nexit 0\n')
    pip.chmod(0o755)
    for line in install(ADDRESS).splitlines():
        if line.startswith('! '):
            command = re.sub(r'/(content|kaggle)', rf'{tmp_path}/\1', line[2:])
            subprocess.run(['sh', '-c', command], env=dict(os.environ, PATH=f'{pip.parent}:{os.environ["PATH"]}'))
    if place == 'at home':
        assert not Path('calls').exists() and sorted(os.listdir()) == ['at home', 'bin']
    else:
        assert Path('are_here.txt').read_text() == 'torch==2.11.0+cu128\n'
        assert Path('calls').read_text().splitlines() == [
            'list --format freeze',
            f'install --quiet --constraint are_here.txt git+{ADDRESS}',
        ]
