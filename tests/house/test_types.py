"What a type checker makes of the package as it is installed: of a user's code, and of the public signatures themselves"

import json, os, re, subprocess, sys
from pathlib import Path

import pytest
from conftest import METHODS, PUBLIC, ROOT

import bnfreeze_fastai.all

USE = ROOT / 'tests' / 'house' / 'typed_use.py'
UNKNOWN_BASE = ['Type of metaclass unknown', 'Type of base class unknown']
OF_CALLBACK = [*UNKNOWN_BASE, 'Type of base class "bnfreeze_fastai.freeze.copies.OneLearner" is partially unknown']
PARTLY = 'Return type is partially unknown'
EXTERNAL = {  # what is left unknown by fastai and pandas, which have no `py.typed`
    'BatchNormDrift': OF_CALLBACK,
    'BatchNormFreeze': OF_CALLBACK,
    'BatchNormFuse': OF_CALLBACK,
    'BatchNormRecalibrate': OF_CALLBACK,
    'BatchNormRecalibrate.order': ['Type unknown for variable "bnfreeze_fastai.freeze.recalibrate.BatchNormRecalibrate.order"'],
    'Drift': UNKNOWN_BASE,
    'BatchNormShift': UNKNOWN_BASE,  # a DataFrame
    'ValidateLast': UNKNOWN_BASE,
    'BatchNormFreeze.order': [
        'Type unknown for variable "bnfreeze_fastai.freeze.callback.BatchNormFreeze.order"'
    ],  # one more than fastai's
    'active_callback': [PARTLY],  # a fastai Callback
    'bn_check': [PARTLY],  # has a DataFrame
    'bn_compare': ['Type of parameter "policies" is partially unknown', PARTLY],  # functions of a Learner; has a DataFrame
    'bn_summary': [PARTLY],  # has a DataFrame
    'recalibrate_bn': [PARTLY],  # is a DataFrame
    'convert_bn': [PARTLY],
    'bn_shift': [PARTLY],
}


def pyright(folder, *args):
    "What pyright says in JSON; run elsewhere, so that it finds the package where Python does and heeds its `py.typed`"
    (folder / 'pyrightconfig.json').write_text('{}')  # it looks for settings in the folders above too
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYRIGHT_PYTHON_')}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    env['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), env['PATH']])  # it asks `python` for the search path
    told = subprocess.run([sys.executable, '-m', 'pyright', '--outputjson', *args], cwd=folder, env=env, capture_output=True, text=True)
    assert told.stdout.startswith('{'), told.stdout + told.stderr
    return json.loads(told.stdout)


def errors(folder, text):
    "Line and rule of each error that pyright reports in `text`"
    (folder / 'use.py').write_text(text, encoding='utf-8')
    found = [d for d in pyright(folder, 'use.py')['generalDiagnostics'] if d['severity'] == 'error']
    return {(d['range']['start']['line'] + 1, d.get('rule')): d['message'] for d in found}


def test_use_is_accepted_but_where_it_says_otherwise(tmp_path):
    text = USE.read_text(encoding='utf-8')
    expected = {(i, m[1]) for i, line in enumerate(text.splitlines(), 1) if (m := re.search(r'# (report\w+)$', line))}
    found = errors(tmp_path, text)
    assert {k: found[k] for k in found.keys() - expected} == {}
    assert expected - found.keys() == set() and len(expected) > 30


def test_all_that_is_public_is_used():
    methods = {f'learn.{n}' for n in METHODS}
    text = USE.read_text(encoding='utf-8')
    assert {n for n in PUBLIC | methods if not re.search(rf'\b{re.escape(n)}\b', text)} == set()
    assert len(PUBLIC) > 20 and len(methods) > 10


@pytest.fixture(scope='module')
def symbols(tmp_path_factory):
    told = pyright(tmp_path_factory.mktemp('verify'), '--verifytypes', 'bnfreeze_fastai', '--ignoreexternal')['typeCompleteness']
    assert Path(told['packageRootDirectory']) == ROOT / 'bnfreeze_fastai' and told['pyTypedPath']
    return told['symbols']


OFFERED = PUBLIC | {'BatchNormCheck', 'BatchNormShift', 'BatchNormSummary', 'Drift'}  # also classes that functions return


def public(name):
    "A name as users know it, or None: what `all` offers, members of the classes among it, methods of Learners, the toy data, the command"
    path = name.removeprefix('bnfreeze_fastai.').split('.')
    at = next((i for i, part in enumerate(path) if part in OFFERED | METHODS), len(path))
    module, inner = '.'.join(path[:at]), '.'.join(path[at:])
    offered = inner and (path[at] in OFFERED or module in ('learner', 'choose.find', 'health.check', 'health.gap'))
    return inner if offered else path[1] if path[0] == 'digits' and len(path) == 2 else 'main' if path == ['cli', 'main'] else None


def test_nothing_public_is_unknown_but_what_others_leave_so(symbols):
    passed_over = 'No docstring|Type is missing type annotation and could be inferred'  # attributes whose type is plain
    found = {}
    for symbol in symbols:
        said = [d['message'] for d in symbol['diagnostics'] if not re.match(passed_over, d['message'])]
        found.setdefault(public(symbol['name']), []).extend(said)
    del found[None]
    ours = {n: [m for m in said if m.split('\n')[0] not in EXTERNAL.get(n, []) or '[Unknown' in m] for n, said in found.items()}
    assert {n: said for n, said in ours.items() if said} == {}
    assert found.keys() >= {*EXTERNAL, *METHODS, 'main', 'set_bn_mode', 'recalibrate_bn', 'Policy.bn', 'pretrain'}
