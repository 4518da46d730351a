"Real architectures without weights, in every mode: what is fixed stays bitwise as it was"

import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelTrainException, CancelValidException
from learners import bits, make_learner
from networks import ARCHS

from bnfreeze_fastai.freeze.callback import active_callback
from bnfreeze_fastai.layers import affine_params, keeps_stats, MODES, norm_layers, stats_buffers

pytestmark = pytest.mark.filterwarnings('ignore')  # deprecated torchvision arguments


class FirstBatchOnly(Callback):
    def after_batch(self):
        raise CancelTrainException

    def before_validate(self):
        raise CancelValidException


def loss(out, y):
    return F.cross_entropy(out.mean((2, 3)) if out.ndim == 4 else out, y)


@pytest.mark.guarantee(1)
@pytest.mark.parametrize('name', ARCHS)
def test_architecture(name):
    model, split = ARCHS[name]()
    learn = make_learner(
        model=model, splitter=split, size=96 if name == 'inception_v4' else 64, lr=1e-3, cbs=FirstBatchOnly(), loss_func=loss
    )
    learn.fit(1)
    n_norms = len(norm_layers(model))
    assert (n_norms == 0) == (name == 'squeezenet')
    for mode in MODES:
        learn.freeze_to_bn(-1, bn=mode)
        groups, frozen = learn.opt.param_lists, active_callback(learn).attachment.look().groups
        assert frozen == [True] * (len(groups) - 1) + [False]
        before = [bits(group) for group in groups]
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        learn.fit(1)
        modes, layers = active_callback(learn).modes(), norm_layers(model)
        owner = {id(p): n for n, l in layers.items() for p in affine_params(l)}
        for group, values, is_frozen in zip(groups, before, frozen):
            for p, old in zip(group, values):
                fixed = not MODES[modes[owner[id(p)]]].trains_affine if id(p) in owner else is_frozen
                if fixed:
                    assert torch.equal(p, old)
                elif id(p) in owner and is_frozen:
                    assert p.grad is not None
        for n, l in layers.items():
            moves = keeps_stats(l) and MODES[modes[n]].updates_stats
            assert moves == any(not torch.equal(b, buffers[f'{n}.{k}' if n else k]) for k, b in stats_buffers(l).items()), (n, mode)
        df = learn.bn_summary().df
        assert len(df) == n_norms and (df.loc[df['mode'].eq('frozen'), ['stats_moved', 'affine_moved']].fillna(0) == 0).all(axis=None)
