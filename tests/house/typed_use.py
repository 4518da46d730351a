"""What a user writes, for a type checker: test_types.py asks pyright about this file, which nobody runs

A line ends in the rule that pyright reports there, if it has to be rejected."""

from collections.abc import Iterator
from typing import Any

import pandas as pd, torch
from fastai.learner import Learner
from fastai.vision.all import vision_learner
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn, Tensor
from typing_extensions import assert_type

from bnfreeze_fastai import learner as methods
from bnfreeze_fastai.all import *
from bnfreeze_fastai.choose.compare import check_training
from bnfreeze_fastai.cli import main
from bnfreeze_fastai.core import held_stats, set_affine, warn_unkept
from bnfreeze_fastai.digits import colour, digit_images, digit_learner, pretrain, ResBlock, small_resnet, ValidateLast
from bnfreeze_fastai.freeze.groups import as_groups, frozen_groups, Groups, pretrained_norms, trained_now
from bnfreeze_fastai.freeze.guard import drop_grads, level_slow_weights
from bnfreeze_fastai.freeze.in_force import frozen_in_force, planned_modes
from bnfreeze_fastai.freeze.policy import check_policy, layer_modes, ModeSpec, told_policy
from bnfreeze_fastai.freeze.stages import check_schedule, Stages, stages
from bnfreeze_fastai.freeze.summary import BatchNormSummary
from bnfreeze_fastai.fusion.fuse import Fusion, kept_bytes, refuse_fusion
from bnfreeze_fastai.health import check
from bnfreeze_fastai.health.report import BatchNormCheck
from bnfreeze_fastai.layers import (
    affine_params,
    BN_TYPES,
    check_glob,
    check_mode,
    is_compiled,
    is_frozen_norm,
    keeps_stats,
    Mode,
    mode_name,
    named_modules,
    named_tensors,
    never_trained,
    norm_params,
    NORM_TYPES,
    refuse_compiled,
    stats_buffers,
    updates_stats,
)
from bnfreeze_fastai.stats.distances import moved, symmetric_kl
from bnfreeze_fastai.stats.measure import layers_with_stats
from bnfreeze_fastai.stats.momentum import Momenta
from bnfreeze_fastai.stats.recalibrate import Drift
from bnfreeze_fastai.stats.shift import BatchNormShift
from bnfreeze_fastai.utils.ranks import all_ranks
from bnfreeze_fastai.utils.tensors import fingerprint
from bnfreeze_fastai.utils.tables import paragraphs, table_html, table_text


def modes_in_plain_torch(model: nn.Module, layer: nn.BatchNorm2d):
    set_bn_mode(model, 'frozen')
    set_bn_mode(bn_layers(model), mode='stats-only')
    set_bn_mode(norm_layers(model), 'train')
    set_bn_mode(layer, check_mode('train'))
    for m in MODES:
        set_bn_mode(model, m)
    set_bn_mode(model, 3)  # reportArgumentType
    set_bn_mode('model', 'frozen')  # reportArgumentType
    set_bn_mode(model)  # reportCallIssue
    assert_type(set_bn_mode(model, 'train'), None)
    assert_type(bn_mode(layer), str)
    assert_type(MODES[bn_mode(layer)], Mode)
    assert_type(MODES['train'].updates_stats, bool)
    with hold_bn_mode(model, 'affine-only', layers='0.*') as held:
        assert_type(held, nn.Module)
    with hold_bn_mode(model, 'frozen', layers=['0.*']):  # reportArgumentType
        pass
    with hold_bn_mode(model, MODES['frozen']):  # reportArgumentType
        pass
    with held_stats({layer: 'frozen'}, root=model) as holds:
        assert_type(len(holds), int)
    set_affine({layer: 'frozen'}, among=norm_params(model))
    set_affine({'0.1': 'frozen'})  # reportArgumentType


def layers_of_a_model(model: nn.Module, layer: nn.Module):
    assert_type(bn_layers(model), list[nn.Module])
    assert_type(norm_layers(model), dict[str, nn.Module])
    assert_type(named_modules(model), dict[str, nn.Module])
    assert_type(named_tensors(model), dict[str, Tensor])
    assert_type(layers_with_stats(model, '*'), dict[str, nn.Module])
    assert_type(norm_params(model), set[nn.Parameter])
    assert_type(affine_params(layer), list[nn.Parameter])
    assert_type(stats_buffers(layer), dict[str, Tensor])
    assert_type((is_frozen_norm(layer), keeps_stats(layer), never_trained(layer), is_compiled(model)), tuple[bool, bool, bool, bool])
    if isinstance(layer, BN_TYPES):
        assert_type(layer.momentum, float | None)
    if isinstance(layer, NORM_TYPES):
        assert_type(layer.eps, float)
    assert_type(warn_unkept({'0.1': 'frozen'}, norm_layers(model)), list[str])
    assert_type(fingerprint(torch.ones(3)), bytes)
    assert_type(all_ranks({'0.1'}, model), list[str])
    check_glob('0.*', norm_layers(model))
    assert_type(revert_sync_bn(model, torch.ones(2, 3, 8, 8)), nn.Module)
    assert_type((keeps_stats(layer), updates_stats(layer)), tuple[bool, bool])
    assert_type(mode_name(True, False), str)
    revert_sync_bn([model])  # reportArgumentType
    refuse_compiled(model, 'so it cannot be done.')
    drop_grads(model.parameters())
    bn_layers([model])  # reportArgumentType


def statistics(model: nn.Module, batches: list[tuple[Tensor, Tensor]], loader: torch.utils.data.DataLoader, x: Tensor):
    start = snapshot(model)
    assert_type(start, dict[str, dict[str, Tensor]])
    assert_type(bn_drift(model, start), pd.DataFrame)
    assert_type(moved(model, since=start), pd.DataFrame)
    shift = bn_shift(model, batches, n_batches=2, n_inp=1, progress=False)
    assert_type(shift, BatchNormShift)
    assert_type((shift.summary, shift.typical), tuple[str, float])
    assert_type(recalibrate_bn(model, batches), Drift)
    with recalibrate_bn(model, batches, max_mem=1e9) as drift:
        assert_type(drift, Drift)
        drift.undone_by(model.train)
    assert_type(recalibrate_bn(model, loader, '0.*', 'sequential', preserve=True, n_batches=None), Drift)
    assert_type(recalibrate_bn(model, batches, stats='mean', prior=2), Drift)
    assert_type(recalibrate_bn(model, (x for _ in range(3))), Drift)
    assert_type(symmetric_kl(x, x, x, x), Tensor)
    bn_drift(model)  # reportCallIssue
    with set_bn_momentum(model, 20, layers='0.*') as before:
        assert_type(before, Momenta)
    assert_type(set_bn_momentum(model, half_life=None)['0.1'], float | None)
    set_bn_momentum(model)  # reportCallIssue
    set_bn_momentum(model, '20')  # reportArgumentType
    bn_drift(model, bn_drift(model, start))  # reportArgumentType
    assert_type(convert_bn(model, batches, ['0.1'], n_batches=2), Drift)
    convert_bn(model, batches, 3)  # reportArgumentType
    recalibrate_bn(model, 3)  # reportArgumentType
    recalibrate_bn(model, batches, preserve='yes')  # reportArgumentType
    recalibrate_bn(model, batches, ds_idx=1)  # reportCallIssue
    plot_bn_drift(snapshot(model))  # reportArgumentType
    with bn_stats(model, start, layers='0.*') as switched:
        assert_type(switched, nn.Module)
    assert_type(bn_restore(model, flat_snapshot(start)), None)
    bn_restore(model, model.state_dict())
    bn_restore(model, [start])  # reportArgumentType
    flat_snapshot(model)  # reportArgumentType


def policies(model: nn.Module, groups: list[list[nn.Parameter]]):
    policy = check_policy(Policy('frozen', {'0.*': 'affine-only', '*': 'train'}), model)
    assert_type(policy, Policy)
    assert_type(policy.bn, ModeSpec)
    assert_type(policy.mode('0.1', frozen=True), str)
    assert_type(policy.mode('0.1', frozen=False, pretrained=policy.throughout), str)
    assert_type(told_policy(Policy('affine-only', throughout=True)), dict[str, ModeSpec | bool])
    assert_type(pretrained_norms(Groups(model, groups), trained_now(norm_layers(model))), list[str])
    Policy(throughout='affine-only')  # reportArgumentType
    rules = {'0.*': 'affine-only'}
    rules['*'] = bn_mode(model)
    Policy(bn_above=rules)
    Policy(bn_above={'0.*': 3})  # reportArgumentType
    Policy(above='train')  # reportCallIssue
    schedule = {0.7: dict(bn_above='affine-only')}
    for at, change in check_schedule(schedule, model).items():
        assert_type((at, change['bn_above']), tuple[float, ModeSpec])
    check_schedule({'0.7': dict(bn_above='affine-only')})  # reportArgumentType
    assert_type(stages(policy, check_schedule(None)), list[tuple[float, Policy]])
    assert_type(Stages(policy, check_schedule(None)).policy, Policy)
    assert_type(Groups(model, groups).by_layer, dict[str, int])
    assert_type(frozen_groups(Groups(model, groups), 1), list[bool])
    assert_type(layer_modes(Groups(model, groups), [True, False], policy), dict[str, str])


def the_callback(dls: Any, model: nn.Module):
    cb = BatchNormFreeze(
        'frozen',
        bn_above={'0.*': 'affine-only'},
        verify=False,
        schedule={0.7: dict(bn='train', bn_above={'*': 'frozen'})},
        throughout=True,
        accumulate=True,
    )
    learn = vision_learner(dls, small_resnet, cbs=[cb, BatchNormFuse(), BatchNormDrift(), BatchNormRecalibrate(every=2)])
    assert_type(cb.bn_policy, Policy)
    assert_type(cb.bn_start, dict[str, dict[str, Tensor]])
    for at, (epoch, batch) in cb.schedule_log.items():
        assert_type((at, epoch, batch), tuple[float, int, int])
    assert_type(active_callback(learn), BatchNormFreeze | None)
    modes: dict[str, str] = cb.modes()
    set_affine({norm_layers(model)[name]: mode for name, mode in modes.items()})
    assert_type(modes_in_force(learn), dict[str, str])
    assert_type(planned_modes(learn), list[dict[str, str]])
    assert_type(frozen_in_force(learn), list[bool])
    assert_type(as_groups([[p] for p in model.parameters()]), list[list[nn.Parameter]])
    level_slow_weights(learn.opt, model.parameters())
    active_callback(learn).bn_policy  # reportOptionalMemberAccess
    BatchNormFreeze(3)  # reportArgumentType
    BatchNormFreeze(schedule={0.7: 'frozen'})  # reportArgumentType
    BatchNormFreeze(model='frozen')  # reportCallIssue
    assert_type(BatchNormRecalibrate(n_batches=8, keep=True).drift, pd.DataFrame)
    BatchNormRecalibrate(every='epoch')  # reportArgumentType


def fusion(model: nn.Module, x: Tensor):
    with fused_bn(model) as fused:
        assert_type(fused, Fusion)
    assert_type(fused.pairs, pd.DataFrame)
    assert_type(BatchNormFuse().pairs, pd.DataFrame)
    assert_type(kept_bytes(model, x), int)
    refuse_fusion(model)
    fused_bn('model')  # reportArgumentType


def plots(runs: pd.DataFrame, drift: pd.DataFrame, ax: Axes):
    assert_type(plot_scores(runs, 'accuracy'), Axes)
    assert_type(plot_score_curves(runs, x='n_images', ax=None), Axes)
    assert_type(plot_gains(runs, best='train', ax=ax), Axes)
    assert_type(plot_bn_drift(drift, 'kl', ax), Axes)
    assert_type(BatchNormDrift().df, pd.DataFrame)
    assert_type(BatchNormDrift().plot_bn_drift(ax=ax), Axes)
    assert_type(plot_differences(paired_differences(runs, score='accuracy')), Axes)
    assert_type(table_text(runs) + paragraphs('Runs') + table_html(runs), str)
    plot_bn_drift(drift, ax='here')  # reportArgumentType
    plot_scores('runs.csv')  # reportArgumentType


def comparison(learn: Learner):
    def own(learn: Learner):
        learn.freeze()

    def fit(learn: Learner, epochs: int):
        learn.fit(epochs)

    def seeded(seed: int) -> Learner:
        return learn

    compared = bn_compare(lambda: learn, epochs=5, seeds=5, n_jobs=2, results='runs.csv')
    assert_type(compared, Comparison)
    bn_compare(seeded, ['fastai', 'frozen'], 1, range(3), fit, 0, slice(1e-4, 1e-2), False, None, None, True, dict(data='mine'))
    bn_compare(seeded, {'0.7': dict(bn_above='affine-only'), 'own': own, 'held': Policy('frozen', {'*': 'frozen'}), 'train': 'train'})
    bn_compare(learn)  # reportArgumentType
    bn_compare(seeded, [3])  # reportArgumentType
    bn_compare(seeded, seeds='all')  # reportArgumentType
    bn_compare(seeded, fit=own)  # reportArgumentType
    bn_compare(lambda: 'learn')  # reportArgumentType
    assert_type((compared.df, compared.final), tuple[pd.DataFrame, pd.DataFrame])
    assert_type((compared.summary, compared.differences), tuple[pd.DataFrame, pd.DataFrame])
    assert_type((compared.score, compared.unfinished), tuple[str, int])
    assert_type(compared.plot(), Figure)
    assert_type(compared.tables(), Iterator[tuple[str, pd.DataFrame]])
    check_training(5, 'fine_tune', -1, lr=None)


def methods_of_a_learner(learn: Learner, batches: list[tuple[Tensor, Tensor]]):
    "fastai's `Learner` has a `__getattr__`, so that pyright lets every method be, and knows of none what it returns"
    learn.freeze_to_bn(-1)
    learn.freeze_to_bn(0, bn_above={'0.*': 'affine-only', '*': 'train'}).fine_tune(3)
    for m in MODES:
        learn.freeze_to_bn(-1, bn=m)
    summary: BatchNormSummary = learn.bn_summary()
    report: BatchNormCheck = learn.bn_check(epochs=3)
    assert_type([f.layers for f in report.findings], list[tuple[str, ...]])
    assert_type((report.df, report.title), tuple[pd.DataFrame, str])
    assert_type(summary.df, pd.DataFrame)
    assert_type(summary.title, str)
    start = learn.bn_snapshot()
    learn.bn_restore(start, layers='0.*')
    learn.convert_bn(n_batches=4).fine_tune(3)
    drifts: list[pd.DataFrame] = [learn.recalibrate_bn(ds_idx=0, layers='0.*'), learn.bn_shift(dl=batches), learn.bn_drift(start)]
    ax: Axes = learn.plot_bn_drift()
    plot_bn_drift(pd.concat(drifts), ax=ax)
    with learn.precompute(n_aug=4, max_mem=2e9, dtype=torch.float16), learn.fold_frozen():
        learn.fuse_bn().fit_one_cycle(1)
    gap: BatchNormGap = learn.bn_gap(n_batches=20)
    assert_type((gap.gap, gap.verdict, gap.df), tuple[float, str, pd.DataFrame])
    for cause in gap.causes:
        assert_type((cause.name, cause.why, cause.remedy), tuple[str, str, str])
    assert_type(plot_bn_gap(gap.layers, gap.df, ax=gap.plot()), Axes)
    found: Found = learn.bn_find(epochs=5, plot=False)
    assert_type(found.apply(learn), Learner)
    assert_type((found.suggestion, found.gain, found.low, found.high), tuple[str, float, float, float])
    assert_type((found.table, found.why, found.seconds), tuple[pd.DataFrame, str, float])
    assert_type(found.plot(), Figure)
    for heading, part in found.tables():
        assert_type((heading, part), tuple[str, str | pd.DataFrame])


def signatures_of_the_methods(learn: Learner, batches: list[tuple[Tensor, Tensor]], ax: Axes):
    "What a checker that follows `@patch` would see; in this package they are functions of a Learner"
    assert_type(methods.freeze_to_bn(learn, -1, 'frozen', {'*': 'train'}), Learner)
    assert_type(methods.bn_summary(learn), BatchNormSummary)
    assert_type(methods.recalibrate_bn(learn, 0, None, 3, '*', 'batch', True), Drift)
    assert_type(methods.convert_bn(learn, layers='0.*'), Learner)
    assert_type(methods.bn_shift(learn, 1, dl=batches, n_batches=3), BatchNormShift)
    start = methods.bn_snapshot(learn)
    assert_type(start, dict[str, dict[str, Tensor]])
    assert_type(methods.bn_drift(learn, start), pd.DataFrame)
    assert_type(methods.bn_restore(learn, start), Learner)
    assert_type(methods.plot_bn_drift(learn, start, 'kl', ax), Axes)
    with methods.precompute(learn, n_aug=4, max_mem=2e9, dtype=torch.float16) as inside, methods.fold_frozen(learn) as faster:
        assert_type((inside, faster), tuple[Learner, Learner])
    assert_type(methods.fuse_bn(learn), Learner)
    assert_type(check.bn_check(learn, epochs=3), BatchNormCheck)
    check.bn_check(learn, 'all')  # reportArgumentType
    methods.freeze_to_bn(learn, 'head')  # reportArgumentType
    methods.freeze_to_bn(learn, -1, bn={'0.*': True})  # reportArgumentType
    methods.recalibrate_bn(learn, dl=3)  # reportArgumentType
    methods.convert_bn(learn, layers=['0.1'])  # reportArgumentType
    methods.bn_drift(learn, since=methods.bn_drift(learn))  # reportArgumentType
    methods.precompute(learn, max_mem='2 GB')  # reportArgumentType


def digits(x: Tensor):
    pretrained, accuracy = pretrain(n_epoch=1, build=small_resnet)
    assert_type((pretrained, accuracy), tuple[nn.Module, float])
    assert_type(digit_learner(pretrained, seed=0, recolour=colour), Learner)
    assert_type(digit_images(range(5)), tuple[Tensor, Tensor])
    assert_type(colour(x, seed=1), Tensor)
    assert_type(ResBlock(16, 16, 1).forward(x), Tensor)
    ValidateLast().before_validate()
    pretrain(build=nn.Linear)  # reportArgumentType
    digit_learner(pretrained)  # reportCallIssue


def command_line():
    assert_type(main(['demo', '--seeds', '1']), None)
    main()
    main('demo')  # reportArgumentType
