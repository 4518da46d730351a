"Files from elsewhere: whatever is in them gives an error that names the file, and runs no code"

import io, os, pickle, stat, tarfile, zipfile
from pathlib import Path

import pandas as pd, pytest, torch
from conftest import on_linux
from learners import make_learner
from torch import nn

from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.choose.results import write_whole
from bnfreeze_fastai.vision import make_model, read_weights

RAN = Path('ran')


class RunsCode:
    "Unpickled, it leaves a file behind"

    def __reduce__(self):
        return os.mkdir, (str(RAN),)


def as_zip(payload):
    file = io.BytesIO()
    torch.save({'0.0.weight': torch.zeros(1), 'more': payload}, file)
    return file.getvalue()


def as_legacy(payload):
    file = io.BytesIO()
    torch.save({'0.0.weight': torch.zeros(1), 'more': payload}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_tar(payload):
    "The oldest format of torch.save"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as tar:
        for name in ('storages', 'tensors', 'pickle'):
            info = tarfile.TarInfo(name)
            info.size = len(pickle.dumps(payload))
            tar.addfile(info, io.BytesIO(pickle.dumps(payload)))
    return file.getvalue()


def as_torchscript(payload):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), file)
    with zipfile.ZipFile(file, 'a') as z:
        z.writestr('archive/constants.pkl', pickle.dumps(payload))
    return file.getvalue()


WEIGHTS = {
    'a pickle': pickle.dumps,
    'torch.save': as_zip,
    'the legacy format': as_legacy,
    'a tar file': as_tar,
    'TorchScript': as_torchscript,
    'a whole model': lambda payload: as_zip(nn.Linear(1, 1)),
    'text': lambda payload: b'__import__("os").mkdir("ran")',
    'nothing': lambda payload: b'',
    'no tensors': lambda payload: as_zip(3)[:100],
}


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.filterwarnings('ignore')
def test_weights(kind):
    Path('weights.pth').write_bytes(WEIGHTS[kind](RunsCode()))
    with pytest.raises(ValueError, match='weights.pth'):
        read_weights('weights.pth')
    with pytest.raises(ValueError, match='weights.pth'):
        make_model('resnet18', 'weights.pth', 2)
    assert not RAN.exists()


def test_the_payload_does_run_where_it_is_unpickled():
    Path('weights.pth').write_bytes(as_zip(RunsCode()))
    torch.load('weights.pth', weights_only=False)
    assert RAN.exists()


def get_learner(seed=0):
    return make_learner()


def compare(**kwargs):
    return bn_compare(get_learner, ['train'], 1, 1, 'fit', results='runs.csv', **kwargs)


HEADER = 'policy,seed,epoch,train_loss,valid_loss,stats_moved,affine_moved,seconds,precomputed,weights\n'
ROW = 'train,0,0,1.0,1.0,0.0,0.0,1.0,False,ab\n'
CSV = {
    'a pickle': pickle.dumps(RunsCode()),
    'torch.save': as_zip(RunsCode()),
    'code for a number': HEADER + ROW.replace('1.0,1.0', '1.0,"__import__(\'os\').mkdir(\'ran\')"'),
    'a formula': HEADER + ROW.replace('train,0,0,1.0', 'train,0,0,"=cmd|\' /C mkdir ran\'!A0"'),
    'code for a seed': HEADER + ROW.replace('train,0', 'train,"@ran"'),
    'a number that is too large': HEADER + ROW.replace('train,0', f'train,{"9" * 30}'),
    'zero bytes': HEADER + '\0' * 1000 + '\n',
    'a run twice': HEADER + ROW + ROW,
    'a run without its start': HEADER + ROW.replace('train,0,0', 'train,0,1'),
    'epochs in another order': HEADER + ROW.replace('train,0,0', 'train,0,1') + ROW,
    'a truth for a number': HEADER + ROW.replace('1.0,1.0', '1.0,True'),
    'a number for a truth': HEADER + ROW.replace('False', '5'),
    'a seed that is no number': HEADER + ROW.replace('train,0', 'train,nan'),
    'a policy that the settings do not have': HEADER + ROW.replace('train', 'mine'),
    'no policy': HEADER + ROW.replace('train', ''),
    'more columns than names': HEADER + ROW.replace('ab', 'ab,1,2,3'),
    'no columns': '\n',
    'nothing': '',
    'not UTF-8': b'\xff\xfe' + HEADER.encode(),
    'no weights': HEADER + ROW.replace(',ab', ','),
    'cut off': HEADER + ROW[:-1],
    'written anew by another program': (HEADER + ROW).replace('1.0', '1.00'),
    'line ends of another system': (HEADER + ROW).replace('\n', '\r\n'),
    'only a header': HEADER,
    'a column less': HEADER.replace('seconds,', '') + ROW,
}
JSON = {
    'a pickle': pickle.dumps(RunsCode()),
    'too deep': '[' * 100_000,
    'too deep, but whole': '{"policies": ' * 100_000 + '1' + '}' * 100_000,
    'a list': '[]',
    'policies that are none': '{"policies": "train"}',
    'a number of many digits': f'{{"policies": {{}}, "epochs": {"9" * 10_000}}}',
    'NaN': '{"policies": {}, "epochs": NaN}',
    'code': '__import__("os").mkdir("ran")',
    'other settings': '{"policies": {"train": {"__reduce__": "os.mkdir"}}}',
    'nothing': '',
}


def refused():
    "What was there stays there"
    before = {p: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    with pytest.raises(ValueError, match='runs.csv'):
        compare()
    assert before == {p: p.read_bytes() for p in Path().iterdir()}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize('kind', CSV)
def test_results(kind):
    compare()
    write(Path('runs.csv'), CSV[kind])
    refused()


@pytest.mark.parametrize('kind', JSON)
def test_settings(kind):
    compare()
    write(Path('runs.json'), JSON[kind])
    refused()


def test_a_run_cut_at_the_end_of_a_line():
    whole = bn_compare(get_learner, ['train'], 2, 2, 'fit', results='runs.csv')
    lines = Path('runs.csv').read_text().splitlines(keepends=True)
    Path('runs.csv').write_text(''.join(lines[:-1]))
    before = Path('runs.csv').read_bytes()
    with pytest.raises(ValueError, match="rows of .'train, seed 1'. are missing"):
        bn_compare(get_learner, ['train'], 2, 2, 'fit', results='runs.csv')
    assert Path('runs.csv').read_bytes() == before
    Path('runs.csv').write_text(''.join(lines[:-2]))  # without the whole run, which is run again
    again = bn_compare(get_learner, ['train'], 2, 2, 'fit', results='runs.csv')
    pd.testing.assert_frame_equal(again.df.drop(columns='seconds'), whole.df.drop(columns='seconds'))


def test_a_folder_in_the_place_of_results():
    Path('runs.csv').mkdir()
    for resume in (True, False):
        with pytest.raises(ValueError, match='runs.csv'):
            compare(resume=resume)


def test_both_are_replaced_on_request():
    write(Path('runs.csv'), CSV['a pickle'])
    write(Path('runs.json'), JSON['too deep'])
    assert len(compare(resume=False).df) == 1 == len(pd.read_csv('runs.csv')) and not RAN.exists()


def test_names_in_a_results_file_are_shown_as_text():
    compare()
    script = '<script>alert(1)</script>'
    df = pd.read_csv('runs.csv')
    df.insert(5, script, 0.5)
    df.to_csv('runs.csv', index=False, na_rep='nan')
    shown = compare()._repr_html_()
    assert script not in shown and '&lt;script&gt;' in shown


@on_linux
@pytest.mark.parametrize('name', ['runs.csv.part', 'runs.json.part'])
def test_a_link_laid_in_the_way_is_not_followed(name):
    Path('mine.txt').write_text('mine')
    Path(name).symlink_to('mine.txt')
    compare()
    assert Path('mine.txt').read_text() == 'mine' and not Path(name).is_symlink()
    assert sorted(os.listdir()) == ['mine.txt', 'runs.csv', 'runs.json']


def test_what_a_killed_process_left_is_replaced():
    Path('x.txt.part').write_text('half')
    write_whole(Path('x.txt'), 'whole')
    assert os.listdir() == ['x.txt'] and Path('x.txt').read_text() == 'whole'


@on_linux
def test_features_in_a_file_are_seen_by_nobody_else(monkeypatch):
    monkeypatch.setenv('TMPDIR', os.getcwd())
    monkeypatch.setattr('tempfile.tempdir', None)
    umask = os.umask(0)
    try:
        with make_learner().freeze_to_bn(-1).precompute(max_mem=0):
            mapped = [line for line in Path('/proc/self/maps').read_text().splitlines() if os.getcwd() in line]
            opened = [p for p in Path('/proc/self/fd').iterdir() if os.getcwd() in os.path.realpath(p)]
            modes = [stat.S_IMODE(os.stat(p).st_mode) for p in opened]
            assert mapped and all(line.endswith('(deleted)') for line in mapped) and os.listdir() == []
            assert modes and set(modes) == {0o600}
    finally:
        os.umask(umask)
