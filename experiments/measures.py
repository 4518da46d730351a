"Cheap measurements on a Learner's training images: what `bn_find` looks at before it tries anything"

from contextlib import contextmanager

import numpy as np, torch
from bnfreeze_fastai.core import bn_layers, norm_layers
from bnfreeze_fastai.stats import recalibrate_bn, snapshot
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, KFold
from sklearn.preprocessing import StandardScaler
from sklearn.pipeline import make_pipeline

@contextmanager
def kept_stats(model):
    layers = list(bn_layers(model)) if not isinstance(bn_layers(model), dict) else list(bn_layers(model).values())
    old = [(b, b.detach().clone()) for l in layers for b in l.buffers(recurse=False)]
    flags = [(m, m.training) for m in model.modules()]
    try: yield layers
    finally:
        with torch.no_grad():
            for b,v in old: b.copy_(v)
        for m,f in flags: m.training = f

@torch.no_grad()
def features(body, x, bs, batch_stats=False, order=None):
    "Pooled outputs of the body, (n, d); with `batch_stats` of batches of `bs` normalised by themselves"
    body.eval()
    if batch_stats:
        for l in body.modules():
            if isinstance(l, torch.nn.modules.batchnorm._BatchNorm): l.training = True
    order = torch.arange(len(x)) if order is None else order
    n = len(x) if not batch_stats else (len(x)//bs)*bs if len(x) >= bs else len(x)
    out = torch.cat([body(x[o]).flatten(2).mean(-1).float().cpu() for o in order[:n].split(bs)])
    body.eval()
    return out.numpy(),order[:n]

def probe(): return make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=[1e1, 1e2, 1e3, 1e4]))

def folds(y, seed=0):
    k = int(min(4, np.bincount(y)[np.bincount(y)>0].min()))
    return StratifiedKFold(k, shuffle=True, random_state=seed) if k > 1 else KFold(4, shuffle=True, random_state=seed)

def cv(train, test, y):
    "Accuracy of probes fitted on `train` and tested on `test`, over folds"
    hits = np.zeros(len(y))
    for a,b in folds(y).split(train, y): hits[b] = probe().fit(train[a], y[a]).predict(test[b]) == y[b]
    return hits.mean()

def measures(learn, x, y, vx, vy, bs):
    "All measurements on images `x` with labels `y`, and validation images"
    model,yn,vyn = learn.model,y.numpy(),vy.numpy()
    body = model[0]
    res = {}
    with kept_stats(model):
        fixed,_ = features(body, x, 64)
        vfixed,_ = features(body, vx, 64)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        batch,at = features(body, x, bs, True, order)
    with kept_stats(model):
        drift = recalibrate_bn(body, [(x, y)], method='batch', progress=False)
        full,_ = features(body, x, 64)
        vfull,_ = features(body, vx, 64)
    with kept_stats(model):
        recalibrate_bn(body, [(x, y)], method='batch', stats='mean', progress=False)
        mean,_ = features(body, x, 64)
        vmean,_ = features(body, vx, 64)
    ya = yn[at]
    res |= dict(cv_fixed=cv(fixed, fixed, yn), cv_mean=cv(mean, mean, yn), cv_full=cv(full, full, yn), cv_batch=cv(batch, batch, ya),
                cv_cross=cv(fixed[at], batch, ya), cv_fixed_at=cv(fixed[at], fixed[at], ya), cv_bf=cv(batch, full[at], ya), cv_bx=cv(batch, fixed[at], ya))
    p,pm,pf = probe().fit(fixed, yn),probe().fit(mean, yn),probe().fit(full, yn)
    pb = probe().fit(batch, ya)
    acc = lambda p,f: (p.predict(f) == vyn).mean()
    res |= dict(v_fixed=acc(p, vfixed), v_mean=acc(pm, vmean), v_full=acc(pf, vfull), v_batch=acc(pb, vfull), v_cross=acc(p, vfull))
    z = (batch - fixed[at])/(fixed.std(0)+1e-6)
    res['feature_noise'] = float(np.sqrt(np.median(z.var(0))))
    res['feature_shift'] = float(np.median(np.abs((full.mean(0)-fixed.mean(0))/(fixed.std(0)+1e-6))))
    k = drift['kl'].to_numpy()
    res |= dict(kl_median=float(np.median(k[1:])), kl_first=float(k[0]), kl_mean=float(k.mean()), ms_median=float(np.median(drift['mean_shift'][1:])))
    return res
