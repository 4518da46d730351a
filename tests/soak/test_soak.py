"The soak finds what it is to find"

import subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(sys.platform != 'linux', reason='processes are watched by /proc'),
    pytest.mark.filterwarnings('ignore'),
    pytest.mark.slow,
    pytest.mark.long,
]


def test_what_does_wrong_is_told_and_one_of_each_kind_goes_well():
    command = [sys.executable, ROOT / 'tests' / 'soak' / 'soak_script.py']
    res = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert res.returncode == 0 and 'all told' in res.stdout, res.stdout[-3000:] + res.stderr[-3000:]


def test_the_table_counts_and_cases_can_be_repeated():
    from tests.soak.__main__ import FAULTS, fault, plan, table

    cases = plan(3)
    assert plan(3) == cases != plan(4) and sum(1 for c in cases if c[0] is fault) == sum(f.times for f in FAULTS.values())
    assert [c[2:] for c in plan(3, 'NaN loss', 2)] == [('NaN loss', 2)]
    rows = [dict(kind='NaN loss', times=1, wrong=w, seconds=1.0, left_at_end=0) for w in ([], ['a', 'b'])]
    assert table(rows).loc[0, ['cases', 'times', 'wrong']].tolist() == [2, 2, 2]
