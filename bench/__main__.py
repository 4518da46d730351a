"""All benchmarks, or those named: `python -m bench [head] [recalibration] [precompute] [scale] [processes] [frozen_part] [fusion]`. Run by `make bench`.

Variants are timed in turn, round after round, and told as ratios: machines are noisy. Nothing here fails on time."""

import os, platform, sys, warnings

import pandas as pd, torch

from bench import frozen_part, fusion, head, precompute, processes, recalibration, scale
from bench.measure import BATCH, SIZE

PARTS = {
    'head': (head, ('resnet34', 'resnet50')),
    'recalibration': (recalibration, ('resnet18', 'resnet50', 'mobilenet_v2', 'densenet121', 'efficientnet_b0')),
    'precompute': (precompute, ('resnet34',)),
    'scale': (scale, (12_500, 25_000, 50_000, 100_000)),
    'processes': (processes, ('resnet34',)),
    'frozen_part': (frozen_part, ('resnet34', 'resnet50', 'mobilenet_v3_large', 'efficientnet_b0')),
    'fusion': (fusion, tuple(fusion.CASES)),
}

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    print(
        f'{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads; '
        f'{SIZE} px, batches of {BATCH} unless told otherwise, random weights, variants in turn'
    )
    for name in sys.argv[1:] or PARTS:
        part, cases = PARTS[name]
        for title, measure in part.TABLES.items():
            rows = [{'samples' if part is scale else 'network': case, **measure(case)} for case in cases]
            print(f'\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format)}')
