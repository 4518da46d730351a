"""What `make gpu` measures, part by part. Each part takes a network and a `Scale`, and gives figures by name; ratios are of times in turn.

A part is on its own in what it needs, so that one that fails on some card or version leaves the others."""

import json, os, subprocess, sys, tempfile, warnings
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch, torch.nn.functional as F

from bench import frozen_part, fusion, head, precompute, recalibration
from bench.measure import medians, peaks
from bench.runtimes import compiled_body, compiled_step, graphs, of_stats, precision
from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.layers import MODES

ROOT = Path(__file__).parents[1]


def tests(arch, at):
    "How many tests with the marker `cuda` pass, and what failed"
    with tempfile.TemporaryDirectory() as folder:
        report = f'{folder}/report.xml'
        options = ['-m', 'cuda', '--device', at.device, f'--junitxml={report}', '-p', 'no:cacheprovider']
        subprocess.run([sys.executable, '-m', 'pytest', 'tests/gpu', *options], cwd=ROOT, stdout=subprocess.DEVNULL)
        suite = ElementTree.parse(report).find('testsuite')
    counts = {k: int(suite.get(k)) for k in ('tests', 'failures', 'errors', 'skipped')}
    broken = [(case, case.find(tag)) for case in suite.iter('testcase') for tag in ('failure', 'error') if case.find(tag) is not None]
    return counts | {f'{case.get("classname")}.{case.get("name")}': why.get('message')[:500] for case, why in broken}


WAYS = {  # to whether in half precision, and how images lie in memory
    'float32': (False, torch.contiguous_format),
    'bfloat16': (True, torch.contiguous_format),
    'bfloat16, channels_last': (True, torch.channels_last),
}


def train_step(model, x, y, autocast, opt):
    with autocast():
        loss = F.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def modes(arch, at):
    "A training step in each mode, ÷ one in training mode, in three ways to compute"
    figures = {}
    for way, (half, memory_format) in WAYS.items():
        model, x, y = fusion.make(arch, at)
        model, x = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        autocast = partial(torch.autocast, at.device, torch.bfloat16, enabled=half)
        step = partial(train_step, model, x, y, autocast, torch.optim.SGD(model.parameters(), lr=1e-4))

        def held(mode):
            with hold_bn_mode(model, mode):
                step()

        step()
        variants = {mode: partial(held, mode) for mode in MODES if mode != 'train'}
        found = medians(variants, step, at.rounds) | peaks(variants, step)
        before = of_stats(model)
        held('frozen')
        figures |= {f'{way}, {name}': v for name, v in found.items()} | {f'{way}, frozen moved': of_stats(model) != before}
    return figures


def callback(arch, at):
    "Head training in fastai's loop, the callback's own time and that of `verify`, and how often an epoch waits for the GPU"
    figures = head.time_variants(arch, at) | head.callback_cost(arch, at)
    learn, waits = head.make_learner(arch, at), {}
    for name, freeze in (('fastai freeze()', learn.freeze), ('freeze_to_bn', partial(learn.freeze_to_bn, -1))):
        freeze()
        waits |= {f'waits of an epoch, {name}': waits_of(partial(learn.fit, 1))} if at.device == 'cuda' else {}
    return figures | waits


def waits_of(f):
    "How often `f()` makes the processor wait for the GPU, as PyTorch tells it"
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            f()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing CUDA operation' in str(w.message) for w in told)


def stored(arch, at):
    "Head training on stored features"
    later = precompute.time_later_epochs(arch, at, n_epoch=4 * at.rounds)
    return precompute.time_five_epochs(arch, at) | {f'later epochs, {k}': v for k, v in later.items()}


def fold(arch, at):
    return frozen_part.time_forward_passes(arch, at, compiles=False)


def fuse(arch, at):
    task = fusion.make(arch, at)
    step = {name: partial(fusion.steps, 1, block, *task) for name, block in fusion.VARIANTS.items()}
    plain = step.pop('training mode')
    kept = {f'{k}, MiB kept' if '÷' not in k else f'{k}, kept': v for k, v in fusion.compare_kept(arch, at).items()}
    return fusion.time_steps(arch, at) | peaks(step, plain) | kept


def recalibrate(arch, at):
    args = recalibration.model_and_batches(arch, at)
    run = {name: partial(f, *args) for name, f in recalibration.VARIANTS.items()}
    return recalibration.time_passes(arch, at) | peaks(run, partial(recalibration.forward_pass, *args))


def ranks(arch, at):
    "Two processes on one device: what they agree on, and what is refused, in the words of the refusal"
    figures, most = {}, 60 if at.device == 'cuda' else 300
    how = dict(cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=most)
    for backend in ('gloo', *(['nccl'] if at.device == 'cuda' else [])):
        launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'bench.ranks']
        try:
            res = subprocess.run([*launch, backend, at.device], **how)
        except subprocess.TimeoutExpired:
            figures[backend] = f'no answer in {most} s'
            continue
        lines = [line for line in res.stdout.splitlines() if line.startswith('{')]
        found = json.loads(lines[-1]) if lines else {'ended': res.stderr[-500:]}
        figures |= {f'{backend}, {name}': v for name, v in found.items()}
    return figures


PARTS = {  # to the most seconds that each may take
    tests: 120,
    modes: 70,
    callback: 40,
    stored: 40,
    fold: 40,
    fuse: 50,
    recalibrate: 40,
    precision: 40,
    graphs: 40,
    ranks: 120,
    compiled_step: 150,  # these two last, as they take long
    compiled_body: 150,
}
