"What a page shows can be pasted into a script in an empty folder, and runs"

import re, subprocess, sys
from pathlib import Path
from textwrap import dedent

import pytest, warm
from nbdev.doclinks import _build_lookup_table

from docs.imports import FOLD
from docs.links import site_links
from docs.notebooks import module_of, NBS
from docs.pages import markdown, page_cells

pytestmark = pytest.mark.slow

OF_THE_REPOSITORY = {'which_mode', 'put_to_the_test'}  # they show its tables, and say so
PAGES = sorted(NBS.rglob('*.ipynb'))


def shown_code(notebook):
    "The code that a reader of the page sees, without slow cells"
    cells = [c.source for c in page_cells(notebook) if c.cell_type == 'code' or c.source.startswith(FOLD)]
    shown = [source for source in cells if not re.search(r'^#\| *(slow|echo: false)', source, flags=re.M)]
    return '\n\n'.join(re.sub(r'\s*```.*', '', dedent(s.removeprefix(FOLD))) if s.startswith(FOLD) else s for s in shown)


@pytest.mark.long
@pytest.mark.parametrize('notebook', PAGES, ids=lambda p: p.stem)
def test_shown_code_runs_in_an_empty_folder(notebook, tmp_path):
    (tmp_path / 'page.py').write_text(shown_code(notebook), encoding='utf-8')
    folder = notebook.parent if notebook.stem in OF_THE_REPOSITORY else tmp_path
    result = warm.run(tmp_path / 'page.py', folder=folder)
    assert result.returncode == 0, result.stderr[-2000:]


def test_shown_code_uses_nothing_that_is_hidden(tmp_path):
    "As far as can be told without running it"
    for notebook in PAGES:
        (tmp_path / f'{notebook.parent.name}_{notebook.stem}.py').write_text(shown_code(notebook), encoding='utf-8')
    command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select=F821,F822,F823', '--quiet', tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    'file,text',
    [
        ('pyproject.toml', '[project]\nname = "other"\n[tool.nbdev]\nskip_procs = "hide_"\nnbs_path = "notebooks"'),
        ('settings.ini', '[DEFAULT]\nlib_name = other'),
        ('none', ''),
    ],
)
def test_pages_are_made_by_the_settings_of_the_repository_alone(tmp_path, monkeypatch, file, text):
    notebook = NBS / 'stats' / '00_moments.ipynb'
    made = lambda: (site_links(markdown(notebook)[0], notebook), module_of(notebook).__name__)
    monkeypatch.chdir(NBS)
    expected = made()
    (tmp_path / file).write_text(text)
    (tmp_path / 'below').mkdir()
    monkeypatch.chdir(tmp_path / 'below')
    _build_lookup_table.cache_clear()
    assert made() == expected and Path.cwd() == tmp_path / 'below'


@pytest.mark.parametrize(
    'text,linked',
    [
        ('`bn_drift`', '[`bn_drift`](../stats/distances.md#bn_drift)'),
        ('`bn_drift(model, start)`', '[`bn_drift(model, start)`](../stats/distances.md#bn_drift)'),
        ('`learn.bn_find(epochs=5)`', '[`learn.bn_find(epochs=5)`](../choose/find.md#learner.bn_find)'),
        ('`fastai.callback.core.Callback`', '[`fastai.callback.core.Callback`](https://docs.fast.ai/callback.core.html#callback)'),
        ('see [the `bn_drift` page](../stats/07_distances.ipynb#Drift)', 'see [the `bn_drift` page](../stats/distances.md#drift)'),
        ('[which](which_mode.ipynb), [back](../index.ipynb)', '[which](which_mode.md), [back](../index.md)'),
        ('[which](nbs/tutorials/which_mode.ipynb)', '[which](which_mode.md)'),
        ('`n_batches`', '`n_batches`'),
        ('`learn.fit(1)`', '`learn.fit(1)`'),
        ('`_distinct_modes`', '`_distinct_modes`'),
        ('```python\n`bn_drift`\n```', '```python\n`bn_drift`\n```'),
        ('~~~\n`bn_drift`\n~~~', '~~~\n`bn_drift`\n~~~'),
        ('    `bn_drift`', '    `bn_drift`'),
        ('      <td>`bn_drift`</td>', '      <td>`bn_drift`</td>'),
    ],
)
def test_links_of_a_tutorial(text, linked):
    assert site_links(text, NBS / 'tutorials' / 'several_gpus.ipynb') == linked
