"Features in a file: the disk is reserved on every system, and nothing is left"

import errno, gc, os
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from conftest import on_linux

from bnfreeze_fastai.head import store as module
from bnfreeze_fastai.head.store import Store


def make_store(n=600):
    return Store(1, n, (torch.ones(1, 1000), torch.zeros(1)), max_mem=0)


@pytest.fixture(params=['Linux', 'elsewhere'])
def system(request, monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    if request.param == 'elsewhere':
        monkeypatch.delattr(os, 'posix_fallocate', raising=False)
    elif not hasattr(os, 'posix_fallocate'):
        pytest.skip('this is elsewhere')
    return request.param


def test_what_is_stored_comes_back(system):
    store, x = make_store(), torch.randn(600, 1000)
    store.put(0, 0, (x, torch.arange(600.0)))
    assert torch.equal(store.get(0, [5, 599])[0], x[[5, 599]]) and store.in_file


@pytest.mark.skipif(not hasattr(os.stat_result, 'st_blocks'), reason='the system does not tell how much of a file is on the disk')
def test_the_space_is_taken_at_once(system, monkeypatch):
    sizes, mapped = [], module.np.memmap

    def noting(f, **kwargs):
        sizes.append((os.fstat(f.fileno()).st_blocks * 512, kwargs['shape'][0]))
        return mapped(f, **kwargs)

    monkeypatch.setattr(module.np, 'memmap', noting)
    make_store()
    assert len(sizes) == 2 and all(on_disk >= n_bytes for on_disk, n_bytes in sizes)


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.delattr(os, 'posix_fallocate', raising=False)
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match='max_mem') as e:
        make_store()
    assert e.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.delattr(os, 'posix_fallocate', raising=False)

    def full(f, n_bytes):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(module, '_reserve', full)
    with pytest.raises(OSError, match='No space left on device.*max_mem.*TMPDIR'):
        make_store()
    assert os.listdir(tmp_path) == []


@on_linux
def test_the_file_of_windows_is_gone_after_its_last_user(monkeypatch, tmp_path):
    "There it has a name, and goes when the map does: it must not be deleted by hand, nor closed too early"
    opened = []

    class Named:
        def __init__(self, prefix):
            self.path = tmp_path / prefix
            self.file = open(self.path, 'w+b')
            opened.append(self.path)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, k):
            return getattr(self.file, k)

    monkeypatch.delattr(os, 'posix_fallocate', raising=False)
    monkeypatch.setattr('tempfile.TemporaryFile', Named)
    for name in ('unlink', 'remove'):
        monkeypatch.setattr(os, name, lambda *args: pytest.fail('an open file was deleted'))
    store = Store(1, 6, (torch.ones(1, 1000),), max_mem=0)
    mapped = lambda: str(opened[0]) in Path('/proc/self/maps').read_text()
    store.put(0, 0, (torch.ones(6, 1000),))
    assert mapped() and store.get(0, [5])[0].sum() == 1000
    del store
    gc.collect()
    assert not mapped()
