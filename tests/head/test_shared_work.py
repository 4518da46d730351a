"Two processes with gloo, of which each runs half of the samples"

from pathlib import Path

import pytest
from conftest import assert_two_ranks_agree

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes():
    assert_two_ranks_agree(Path(__file__).parent / 'shared_work_script.py')
