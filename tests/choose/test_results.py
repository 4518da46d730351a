"A results file where another program has it open, where permissions do not tell, and on a drive that is not there"

import os
from pathlib import Path

import pytest

from bnfreeze_fastai.choose import results
from bnfreeze_fastai.choose.results import check_folder, write_whole


@pytest.fixture
def waits(monkeypatch):
    "How often it was waited, in no time"
    found = []
    monkeypatch.setattr(results.time, 'sleep', found.append)
    return found


def held(monkeypatch, times):
    "Let `os.replace` refuse as Windows does, so often"
    real, left = os.replace, [times]

    def replace(part, path):
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, 'Access is denied', str(part), None, str(path))
        return real(part, path)

    monkeypatch.setattr(os, 'replace', replace)


def test_a_file_that_another_program_has_open_for_a_moment(monkeypatch, waits):
    path = Path('runs.csv')
    path.write_text('old')
    held(monkeypatch, 3)
    write_whole(path, 'new\n')
    assert path.read_bytes() == b'new\n' and os.listdir() == ['runs.csv'] and len(waits) == 3


def test_a_file_that_stays_open_elsewhere_keeps_its_content(monkeypatch, waits):
    path = Path('runs.csv')
    path.write_text('old')
    held(monkeypatch, 10**6)
    with pytest.raises(PermissionError, match='what was there stays.*runs.csv'):
        write_whole(path, 'new')
    assert path.read_text() == 'old' and os.listdir() == ['runs.csv'] and 1 < sum(waits) < 10


def test_other_errors_are_raised_at_once(monkeypatch, waits):
    with pytest.raises(OSError, match='runs.csv'):
        Path('runs.csv').mkdir()
        write_whole(Path('runs.csv'), 'new')
    assert waits == []


def test_a_folder_that_only_looks_writable(monkeypatch):
    "`os.access` looks at one flag on Windows, and lies on network drives"

    tried = []

    def refused(path, **how):
        tried.append(path)
        raise PermissionError(13, 'Access is denied', str(path))

    monkeypatch.setattr(Path, 'touch', refused)
    with pytest.raises(ValueError, match='read-only'):
        check_folder(Path('new', 'below'))
    assert os.listdir() == [] and len(tried) == 1


def test_a_drive_that_is_not_there(monkeypatch):
    monkeypatch.setattr(Path, 'exists', lambda self: False)
    monkeypatch.setattr(Path, 'is_dir', lambda self: False)
    monkeypatch.setattr(Path, 'touch', lambda self, **how: open('/no/such/drive'))
    with pytest.raises(ValueError, match='not there'):
        check_folder(Path('new'))


def test_a_look_at_a_folder_leaves_nothing():
    check_folder(Path('new', 'below'))
    assert os.listdir() == []
