"""Every network of torchvision and the smallest of each family of timm under all that the package does: `python -m tests.sweep`, or `make sweep`.

Rows are added to `tests/sweep/table.csv` as they come, and a second start goes on from there. Names of networks or families, as in
`python -m tests.sweep resnet18 levit`, run these anew; `python -m tests.sweep failed` those that something went wrong with."""

import re, sys
from pathlib import Path

import pandas as pd
from fastprogress.fastprogress import progress_bar

from bnfreeze_fastai.choose.results import write_whole

from .networks import Network, all_networks
from .rows import CHECKS, find_row

TABLE = Path(__file__).with_name('table.csv')
COLUMNS = [
    'source',
    'family',
    'network',
    'pixels',
    'parameters',
    'norms',
    'batch_norms',
    'modes',
    'precompute',
    'remedy',
    'fusion',
    'summary',
    'seconds',
]
OUTCOMES = {  # without the details, to be counted
    r'^(refused|wrong|failed|crashed|out of time|vision_learner cannot build it)\b.*': r'\1',
    r' \(.*?\)': '',
    r'^\d+ pairs?( exact.*), 0 left': r'all pairs\1',
    r'^\d+ pairs?( exact.*), .*': r'pairs\1, some left',
}
GOOD = r'right|exact.*|refused: .*|left alone.*|\d+ pairs? exact.*|vision_learner cannot build it.*|'


def is_good(row):
    return all(re.fullmatch(GOOD, row[c]) for c in CHECKS)


def earlier_rows(again):
    "Those of the table, by network, without those that are to be made anew"
    if not TABLE.exists():
        return {}
    rows = pd.read_csv(TABLE, dtype=str, keep_default_na=False).to_dict('records')
    stays = lambda row: not {row['network'], row['family']} & again and (is_good(row) or 'failed' not in again)
    return {Network(row['source'], row['family'], row['network']): row for row in rows if stays(row)}


def summarise(df):
    "Counts by outcome, what was refused in words, and all of what went wrong"
    brief = df[CHECKS].replace(OUTCOMES, regex=True)
    print(f'{len(df)} networks, {df.family.nunique()} families')
    for c in CHECKS:
        print(f'{c}: ' + ', '.join(f'{told or "not needed"} {n}' for told, n in brief[c].value_counts().items()))
    bad = df[[not is_good(row) for row in df.to_dict('records')]]
    print(f'\n{len(bad)} with something wrong')
    for row in bad.to_dict('records'):
        print(f'  {row["source"]} {row["network"]}: ' + '; '.join(f'{c} {row[c]}' for c in CHECKS if not re.fullmatch(GOOD, row[c])))


def main(again):
    plan, rows = all_networks(progress_bar), earlier_rows(again)
    for network in progress_bar([n for n in reversed(plan) if n not in rows]):
        rows[network] = find_row(network)
        df = pd.DataFrame([rows[n] for n in plan if n in rows], columns=COLUMNS).fillna('').astype(str)
        write_whole(TABLE, df.to_csv(index=False))
    summarise(pd.read_csv(TABLE, dtype=str, keep_default_na=False))


if __name__ == '__main__':
    main(set(sys.argv[1:]))
