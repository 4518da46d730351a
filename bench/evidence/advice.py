"""Fit the table that `bn_find` reads to the rows, and judge it on data and networks that the fit has not seen: `make advice`.

Writes `bnfreeze_fastai/advice.json`; `read`, `unseen` and `regrets` are what the page *Which mode when?* shows."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np, pandas as pd
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bnfreeze_fastai.choose.rules import BESIDE, REFERENCE, TRIED, advantages, choose, expected_gains, features

from .grid import KEYS

HERE = Path(__file__).parent
PHASE = {'head': 'head', 'fine_tune': 'fine_tune', 'fine_tune in thirds': 'fine_tune', 'slice': 'fine_tune', 'full': 'full'}
OTHERS = {'head': ('fastai', 'frozen', 'converted'), 'fine_tune': ('fastai', 'frozen', 'converted'), 'full': ('fastai', 'converted')}
ALPHAS = np.logspace(-1, 3, 9)
LEVEL = 0.8


def read():
    "One row per cell and seed: the cell, `phase`, accuracy by policy, and `trials`, the accuracies of its trials by policy"
    rows = pd.read_csv(HERE / 'rows.csv')
    df = rows.pivot_table(index=[*KEYS, 'seed'], columns='policy', values='accuracy').reset_index()
    trials = pd.read_csv(HERE / 'trials.csv').groupby([*KEYS, 'seed'])[['policy', 'accuracy']].apply(lambda t: dict(t.to_numpy()))
    tried = [trials.get(tuple(run), {}) for run in df[[*KEYS, 'seed']].itertuples(index=False)]
    return df.assign(trials=tried, phase=df['trains'].map(PHASE), source=df['data'].str.split('+').str[0])


def _points(df, phase, policy, tried):
    "Runs that have all it takes: their index, features, and how far `policy` is ahead of the reference"
    part = df[df['phase'] == phase]
    x = [features(phase, run['bs'], policy, run['trials'] if tried else {}) for _, run in part.iterrows()]
    y = part[policy] - part[REFERENCE[phase]]
    keep = [len(f) == 2 + tried and not np.isnan(v) for f, v in zip(x, y)]
    return part.index[keep], np.array([f for f, k in zip(x, keep) if k]), y[keep].to_numpy()


def _ridge(x, y, alpha):
    "Intercept and coefficients of the features after the first, which is 1"
    model = make_pipeline(StandardScaler(), Ridge(alpha)).fit(x[:, 1:], y)
    slope = model[-1].coef_ / model[0].scale_
    return np.array([model[-1].intercept_ - slope @ model[0].mean_, *slope])


def _left_out(x, y, groups, alpha):
    "What a fit to the other groups says of each"
    out = np.empty(len(y))
    for g in set(groups):
        out[groups == g] = x[groups == g] @ _ridge(x[groups != g], y[groups != g], alpha)
    return out


def _fit_one(df, phase, policy, tried):
    "Coefficients, and what fits without its data set say of each run"
    index, x, y = _points(df, phase, policy, tried)
    groups = df.loc[index, 'source'].to_numpy()
    said = {a: _left_out(x, y, groups, a) for a in ALPHAS}
    alpha = min(ALPHAS, key=lambda a: np.square(said[a] - y).mean())
    return _ridge(x, y, alpha).round(4).tolist(), pd.Series(said[alpha], index)


def fit(df):
    "For each phase the `advantage` of each policy over the reference, and the `half_width` of its gain's interval: `alone`, or `tried`"
    advice = {}
    for phase, others in OTHERS.items():
        fits, said = {}, {}
        for policy in others:
            for how in ('alone', 'tried') if policy in TRIED[phase] and policy != BESIDE[phase] else ('alone',):
                fits.setdefault(policy, {})[how], said[policy, how] = _fit_one(df, phase, policy, how == 'tried')
        advice[phase] = dict(advantage=fits, half_width=_half_widths(df[df['phase'] == phase], phase, said))
    return advice


def _half_widths(part, phase, said):
    "The quantile of the errors of the gain over fastai's default, on data sets that the fits had not seen"
    widths = {}
    for policy in (REFERENCE[phase], *(p for p in OTHERS[phase] if p != 'fastai')):
        for how in ('alone', 'tried'):
            of = lambda p: said.get((p, how), said.get((p, 'alone'), pd.Series(0.0, part.index)))
            gain = (of(policy) if policy != REFERENCE[phase] else 0) - of('fastai')
            errors = (gain - (part[policy] - part['fastai'])).abs().dropna()
            widths.setdefault(policy, {})[how] = round(float(errors.quantile(LEVEL)), 4)
    return widths


def suggestions(df, advice):
    "What `bn_find` would say of each run: `policy`, and `gain`, `low` and `high` in points"

    def one(run):
        how = run['phase'], run['bs'], run['trials']
        policy = choose(advantages(*how, advice), *how)
        gains = expected_gains(*how, advice).set_index('policy').loc[policy]
        return dict(policy=policy, gain=gains['expected'], low=gains['low'], high=gains['high'])

    return pd.DataFrame([one(run) for _, run in df.iterrows()], index=df.index)


def unseen(df, by):
    "Suggestions for the runs of each value of the column `by`, from a fit to all the others"
    return pd.concat([suggestions(df[df[by] == g], fit(df[df[by] != g])) for g in df[by].unique()]).reindex(df.index)


def regrets(df, chosen, policies):
    "By cell: how far, in points of accuracy, the chosen policies are behind the best of `policies`, means over seeds"
    cells = df.assign(chosen=[run.get(c, np.nan) for (_, run), c in zip(df.iterrows(), chosen)]).groupby(['phase', *KEYS], sort=False)
    means = cells[[*policies, 'chosen']].mean()
    return 100 * (means[list(policies)].max(axis=1) - means['chosen'])


def main():
    text = json.dumps(fit(read()), indent=1)
    Path(str(files('bnfreeze_fastai').joinpath('advice.json'))).write_text(text + '\n', encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
