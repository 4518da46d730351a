"""Tests and figures from a GPU, in one JSON: `make gpu`, or `python -m bench.gpu [part …]`, such as `python -m bench.gpu fold fuse`.

It runs unattended and ends in ten minutes, of which each part has its share. The parts run in a process beside this one, as a fault in a
kernel would spoil all that comes after it. `--device cpu --quick` goes through all of it without a GPU."""

import argparse, json, math, platform, sys, time
from pathlib import Path

import fastai, torch

from bench.gpu_parts import PARTS
from bench.measure import Scale
from bench.worker import Worker

LIMIT, PATIENCE = 570, 600  # seconds: for all on a GPU; for each part on what may be slow
FULL, QUICK = ('resnet50', Scale(rounds=5, size=224, batch=64, n_batches=8)), ('resnet18', Scale(rounds=1, size=32, batch=4, n_batches=2))
MODULE, BY_NAME = 'bench.gpu_parts', {f.__name__: most for f, most in PARTS.items()}


def machine(device):
    "What the figures were measured on"
    versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, fastai=fastai.__version__)
    if device != 'cuda':
        return dict(card=platform.machine(), **versions)
    card = torch.cuda.get_device_properties(0)
    return dict(card=card.name, memory_gib=card.total_memory / 2**30, capability=f'{card.major}.{card.minor}', **versions)


def plain(figures):
    "As JSON has it: no NaN, four digits"
    digits = lambda v: (float(f'{v:.4g}') if math.isfinite(v) else str(v)) if isinstance(v, float) else v
    return {k: plain(v) if isinstance(v, dict) else digits(v) for k, v in figures.items()}


def main(names, device, quick, out):
    arch, at = QUICK if quick else FULL
    at, end = at._replace(device=device), time.perf_counter() + LIMIT
    result = plain(dict(machine(device), network=arch, scale=at._asdict(), parts={}))
    out.parent.mkdir(parents=True, exist_ok=True)
    with Worker(MODULE) as worker:
        for name in names:
            most = min(BY_NAME[name], end - time.perf_counter()) if device == 'cuda' else PATIENCE
            found = worker.run(name, (arch, at), most) if most > 1 else dict(error='no time left')
            result['parts'][name] = plain(found)
            print(f'{name}: {found.get("error") or "measured"}', flush=True)
            text = json.dumps(result, indent=1, ensure_ascii=False).replace(str(Path.cwd()), '.')  # errors may name the place
            out.write_text(text + '\n', encoding='utf-8')  # also what there is so far


if __name__ == '__main__':
    parser = argparse.ArgumentParser(prog='python -m bench.gpu', description='Tests and figures from a GPU, in one JSON')
    parser.add_argument('parts', nargs='*', metavar='part', help=', '.join(BY_NAME))
    parser.add_argument('--device', default='cuda', help='another one, to see whether all of it runs')
    parser.add_argument('--quick', action='store_true', help='a small network on small images')
    parser.add_argument('--out', type=Path, default=Path('bench/gpu.json'))
    args = parser.parse_args()
    if unknown := set(args.parts) - BY_NAME.keys():
        parser.error(f'There is no part {sorted(unknown)}: choose from {", ".join(BY_NAME)}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('PyTorch sees no GPU here. `--device cpu --quick` goes through all of it on the processor.')
    main(args.parts or BY_NAME, args.device, args.quick, args.out)
