"Groups, freeze points and globs"

import pytest
from learners import body_and_head, two_groups
from torch import nn

from bnfreeze_fastai.freeze.groups import frozen_groups, Groups
from bnfreeze_fastai.freeze.policy import check_policy, layer_modes, Policy


def test_first_glob_wins_and_the_default_has_the_rest():
    policy = Policy(bn={'0.4': 'train', '0.*': 'stats-only'}, bn_above={'1.*': 'frozen'})
    assert [policy.mode(n, frozen) for n, frozen in [('0.4', True), ('0.1', True), ('1.2', True), ('1.2', False), ('0.1', False)]] == [
        'train',
        'stats-only',
        'frozen',
        'frozen',
        'train',
    ]


@pytest.mark.parametrize(
    'policy,words',
    [
        (Policy('eval'), "'eval'"),
        (Policy(bn_above='freeze'), "'freeze'"),
        (Policy({'0.*': 'off'}), "'off'"),
        (Policy({'9.*': 'train'}), "'9.*'"),
        (Policy(bn_above={'0.*': 'train', 'x': 'train'}), "'x'"),
        (Policy(None), 'takes a mode or a dict'),
        (Policy(['train']), 'takes a mode or a dict'),
    ],
)
def test_bad_policies(policy, words):
    with pytest.raises(ValueError) as e:
        check_policy(policy, body_and_head())
    assert words in str(e.value)


def test_star_is_fine_without_norm_layers():
    check_policy(Policy({'*': 'train'}), nn.Linear(2, 2))
    with pytest.raises(ValueError, match='none'):
        check_policy(Policy({'0.*': 'train'}), nn.Linear(2, 2))


def test_layers_without_parameters_take_a_neighbours_group():
    bn = lambda: nn.BatchNorm2d(4, affine=False)
    conv = lambda: nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Sequential(conv(), bn()), nn.Sequential(nn.Sequential(bn(), conv()), bn(), conv()), bn())
    first, second, third = [list(m.parameters()) for m in (model[0], model[1][0], model[1][2])]
    assert Groups(model, [first, second, third]).by_layer == {'0.1': 0, '1.0.0': 1, '1.1': 1, '2': 2}
    assert Groups(nn.Sequential(bn()), []).by_layer == {'0': 0}


def test_parameters_left_out_of_the_optimizer_take_a_neighbours_group():
    model = body_and_head()
    assert Groups(model, [list(model[0].parameters()), list(model[1][3].parameters())]).by_layer == {'0.1': 0, '0.4': 0, '1.2': 1}


@pytest.mark.parametrize('n', [0, 1])
@pytest.mark.parametrize('tensors_frozen', [True, False])
def test_tensors_have_the_last_word(n, tensors_frozen):
    model = body_and_head()
    for m in (model[0][0], model[0][3]):
        m.requires_grad_(not tensors_frozen)
    assert frozen_groups(Groups(model, two_groups(model)), n) == [tensors_frozen, False]


@pytest.mark.parametrize('n', [0, 1, 2])
@pytest.mark.parametrize('requires_grad', [True, False])
def test_groups_of_norm_layers_follow_n(n, requires_grad):
    model = nn.Sequential(nn.BatchNorm2d(3).requires_grad_(requires_grad), nn.Conv2d(3, 2, 1))
    groups = Groups(model, [list(m.parameters()) for m in model])
    assert frozen_groups(groups, n) == [n > 0, False]
    assert layer_modes(groups, [n > 0, False], Policy()) == {'0': 'frozen' if n else 'train'}
