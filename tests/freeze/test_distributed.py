"Two processes with gloo: through PyTorch's own wrapper, and through fastai's `distrib_ctx`"

from pathlib import Path

import pytest
from conftest import assert_two_ranks_agree

pytestmark = pytest.mark.distributed


@pytest.mark.guarantee(3)
@pytest.mark.parametrize('script', ['distributed_script.py', 'distrib_ctx_script.py'])
def test_two_processes(script):
    assert_two_ranks_agree(Path(__file__).parent / script)
