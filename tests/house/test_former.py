"Import paths and pickles of 0.1"

import gzip, importlib, io, json, shutil, subprocess, sys

import pytest, torch
from conftest import Body, ROOT
from fastai.learner import load_learner
from learners import make_dls

from bnfreeze_fastai.all import BatchNormFreeze, Policy
from bnfreeze_fastai.core import bn_mode
from bnfreeze_fastai.layers import norm_layers

FORMER = ROOT / 'tests' / 'house' / 'former'
NAMES = json.loads((FORMER / 'names.json').read_text(encoding='utf-8'))  # what each module of 0.1 offered
GONE = {  # and why
    'scipy does it': ['bootstrap_interval'],
    'a method of `Groups` or part of `freeze.point`': ['layer_groups', 'flags', 'pretrained_layers'],
    'inside `FrozenPart`': ['autocast', 'device_of', 'find_frozen_part', 'one_input', 'ready', 'unchanging'],
    'inside what watches samples and serves features': ['Origin', 'Spots', 'refuse_skipped', 'watched'],
    'inside `vision` and `Results`': ['load_body', 'image_loaders', 'ImageFolder', 'NAN', 'as_json'],
}


@pytest.mark.parametrize('module', NAMES)  # but `folders`, of which nothing is left
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_names_of_0_1_are_found_where_they_were(module):
    found = importlib.import_module(f'bnfreeze_fastai.{module}')
    lacking = {name for name in NAMES[module] if not hasattr(found, name)}
    assert lacking == {name for name in NAMES[module] if name in sum(GONE.values(), [])}


def test_what_is_gone_is_told():
    with pytest.raises(AttributeError, match='UPGRADING.md'):
        importlib.import_module('bnfreeze_fastai.policy').layer_groups


def test_a_former_path_warns_and_names_the_new_one():
    with pytest.warns(DeprecationWarning, match='bnfreeze_fastai.freeze.callback.BatchNormFreeze'):
        assert importlib.import_module('bnfreeze_fastai.callback').BatchNormFreeze is BatchNormFreeze
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('bnfreeze_fastai.nowhere')


def test_new_paths_do_not_warn():
    code = 'import bnfreeze_fastai.all, bnfreeze_fastai.core; from bnfreeze_fastai.stats import recalibrate'
    subprocess.run([sys.executable, '-W', 'error:`bnfreeze_fastai:DeprecationWarning', '-c', code], check=True)


def unpacked(name, folder):
    with gzip.open(FORMER / f'{name}.gz') as packed, open(folder / name, 'wb') as file:
        shutil.copyfileobj(packed, file)
    return folder / name


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_learner_exported_by_0_1_keeps_its_policy(tmp_path):
    learn = load_learner(unpacked('learner.pkl', tmp_path))
    assert learn.batch_norm_freeze.bn_policy == Policy('affine-only')
    assert learn.batch_norm_freeze.schedule == {0.5: {'bn_above': 'affine-only'}}
    learn.dls = make_dls()
    body = Body(learn.model[0])
    learn.fit(2)
    assert body.moved() == {'affine'} and learn.batch_norm_freeze.schedule_log == {0.5: (1, 0)}
    assert len(learn.batch_norm_drift.epochs) == 3 and learn.bn_summary().df['mode'].tolist() == ['affine-only', 'affine-only', 'train']
    learn.remove_cb(BatchNormFreeze)
    assert learn.splitter.__name__ == 'two_groups' and not any(l._forward_hooks for l in norm_layers(learn.model).values())


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_model_pickled_by_0_1_keeps_its_modes(tmp_path):
    saved = torch.load(unpacked('plain.pkl', tmp_path), weights_only=False)
    model = saved['model'].train()
    assert [bn_mode(l) for l in norm_layers(model).values()] == ['frozen', 'frozen', 'train']
    before = model[0][1].running_mean.clone()
    model(torch.randn(8, 3, 8, 8))
    assert torch.equal(before, model[0][1].running_mean) and model[0][1].training
    again = io.BytesIO()
    torch.save(model, again)
    again.seek(0)
    assert bn_mode(torch.load(again, weights_only=False)[0][1]) == 'frozen'
    assert saved['drift']['layer'].tolist() == ['0.1', '0.4', '1.2'] and 'nats' in saved['shift'].summary
    assert saved['policy'] == Policy('frozen', {'1.*': 'train'})
