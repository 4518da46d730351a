"What `make gpu` runs goes through without a GPU, and one file tells of it, whatever fails"

import json

import pytest
from conftest import ROOT

from bench import gpu_parts
from bench.gpu import main, QUICK

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings('ignore')]
ARCH, AT = QUICK


@pytest.mark.parametrize('part', ['modes', 'callback', 'stored', 'fold', 'fuse', 'recalibrate', 'precision'])
def test_a_part_gives_figures(part):
    figures = getattr(gpu_parts, part)(ARCH, AT)
    assert all(isinstance(v, (int, float, str)) for v in figures.values())
    assert not any(v for k, v in figures.items() if k.endswith('frozen moved'))
    assert all(v for k, v in figures.items() if k.endswith('statistics finite'))


def test_two_ranks_tell_what_is_refused():
    found = gpu_parts.ranks(ARCH, AT)
    assert found['gloo, fixed'] == found['gloo, pooled'] == 'right'
    assert found['gloo, synced'].startswith('ValueError: SyncBatchNorm expected input tensor to be on GPU')


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    names = ['dies', 'hangs', 'fails', 'works']
    monkeypatch.setattr('bench.gpu.MODULE', 'parts_script')
    monkeypatch.setattr('bench.gpu.PATIENCE', 2)
    main(names, 'cpu', True, out := tmp_path / 'there' / 'gpu.json')
    result = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    told = {name: found.get('error') or found['figures'] for name, found in result['parts'].items()}
    assert told == {
        'dies': 'The process ended with 3',
        'hangs': 'TimeoutError: not done in 2 s',
        'fails': 'RuntimeError: it',
        'works': {'nan': 'nan', 'third': 0.3333},
    }
    assert result['network'] == ARCH and result['scale']['size'] == AT.size


def test_the_page_shows_the_file_that_is_there():
    cells = json.loads((ROOT / 'nbs/tutorials/costs_and_limits.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', []))
    assert ('Not yet measured' in outputs) != (ROOT / 'bench/gpu.json').exists(), 'run make notebooks'
