"The guarantees of the callback, by their numbers: `pytest -m guarantee` runs what shows them"

import re

import pytest
from conftest import ROOT

GUARANTEES = {
    1: 'what a mode calls fixed is bitwise unchanged, whatever the optimizer',
    2: 'no `.train()` call defeats it, and validation is untouched',
    3: 'it survives new optimizers, saving, loading, exporting and wrapping',
    4: 'a fit that ends early leaves the Learner usable, and removing the callback restores what was there',
    5: '`verify` names what moved',
    6: 'a callback given to `fit` wins for that fit',
    7: 'outside a fit nothing changes',
    8: 'no batch leaves NaN in running statistics',
    9: 'a forward pass that is recomputed counts once',
    10: 'tools that write statistics work, or raise before anything is lost',
}


@pytest.mark.parametrize('number', GUARANTEES)
def test_each_guarantee_has_its_tests(number):
    files = [p.read_text(encoding='utf-8') for p in (ROOT / 'tests').rglob('test_*.py')]
    assert any(re.search(rf'mark\.guarantee\({number}\)', text) for text in files), GUARANTEES[number]
