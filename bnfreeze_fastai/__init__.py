"""A pretrained network carries batch norm layers with two halves: running statistics and affine parameters. This package lets you say, for the frozen part and for the trained part of a network, which half moves and which is held, and sees to it that this is so: through every `fit`, `fine_tune`, `lr_find`, whatever optimizer or callback, bit for bit.

A callback re-applies the mode that you chose; `learn.freeze_to_bn` sets it; `learn.bn_summary` shows it. `learn.recalibrate_bn` sets running statistics to those of your own data, exactly; `learn.bn_shift` and `learn.bn_drift` tell how foreign that data is and where a network has moved. `learn.bn_find` and `bn_compare` find out which mode suits it, and what that is worth. The same works in plain PyTorch without a Learner.

Modules:

- `bnfreeze_fastai.choose.compare`: Full runs of several batch norm policies, from the same weights and over the same batches
- `bnfreeze_fastai.choose.differences`: Paired differences between policies, and whether they are more than chance
- `bnfreeze_fastai.choose.find`: Which batch norm policy suits your data: the rule, corrected by short trials, with the gain to expect
- `bnfreeze_fastai.cli`: The command `bnfreeze`: compare batch norm policies from the command line
- `bnfreeze_fastai.core`: Set, hold and read the mode of norm layers, in plain PyTorch
- `bnfreeze_fastai.freeze.callback`: The callback that keeps a batch norm policy in every fit
- `bnfreeze_fastai.freeze.fuse`: Train a Learner through fixed statistics at the cost of a convolution
- `bnfreeze_fastai.freeze.recalibrate`: A callback that re-estimates running statistics before each validation
- `bnfreeze_fastai.freeze.stages`: A policy that changes during a fit
- `bnfreeze_fastai.fusion.fuse`: Train through fixed statistics at the cost of a convolution
- `bnfreeze_fastai.head.fold`: A faster frozen part, for when it has to run in every epoch
- `bnfreeze_fastai.head.precompute`: Train the head at the speed of the head: run the frozen part once
- `bnfreeze_fastai.health.check`: A report card before training: what about this model, these batches and these callbacks will hurt batch norm
- `bnfreeze_fastai.health.gap`: Training is fine, validation is terrible: how much of that is batch norm's, in which layers, and why
- `bnfreeze_fastai.layers`: What a norm layer is, its two halves, its name, and the four modes
- `bnfreeze_fastai.learner`: Freeze with a policy, and work on running statistics, by methods of every Learner
- `bnfreeze_fastai.stats.distances`: How far running statistics, weight and bias have moved since a snapshot
- `bnfreeze_fastai.stats.momentum`: How fast running statistics follow the data, told in training steps
- `bnfreeze_fastai.stats.recalibrate`: Set running statistics to those of your data, exactly
- `bnfreeze_fastai.stats.shift`: How foreign your data is to a network, layer by layer, before any training
- `bnfreeze_fastai.stats.switch`: Put running statistics back, or switch between those of several domains
- `bnfreeze_fastai.sync`: Back from SyncBatchNorm to plain batch norm"""

__version__ = "0.1.0"

from . import _moved
