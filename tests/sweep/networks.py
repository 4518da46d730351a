"Which networks: every builder of torchvision for classification and segmentation, and the smallest member of every family of timm"

import json
from pathlib import Path
from typing import NamedTuple

import timm, torch
from fastai.torch_core import params, set_seed
from fastai.vision.learner import create_timm_model, create_vision_model
from torch import nn
from torchvision import models

from bnfreeze_fastai.choose.results import write_json

SMALLEST = Path(__file__).with_name('smallest.json')  # by family of timm; one that is deleted there is counted anew
SIZES = (64, 70, 75, 96, 128, 160, 192, 224, 240, 256, 299, 384, 512)  # pixels; 70 is for patches of 14, 75 for Inception
EXTRA = {'googlenet': dict(init_weights=False), 'inception_v3': dict(init_weights=False, aux_logits=False)}  # auxiliary heads want 299 px


class Network(NamedTuple):
    source: str
    family: str
    name: str


def from_torchvision(source, module):
    names = models.list_models(module=module)
    return [Network(source, models.get_model_builder(name).__module__.split('.')[-1], name) for name in names]


def n_params(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=2)
    return sum(p.numel() for p in model.parameters())


def smallest(family):
    "The member with the fewest parameters, other than those that timm has for its own tests"
    return min(timm.list_models(module=family, exclude_filters='test_*'), key=n_params)


def from_timm(progress=iter):
    known = json.loads(SMALLEST.read_text(encoding='utf-8')) if SMALLEST.exists() else {}
    for family in progress([f for f in timm.list_modules() if f not in known]):
        known[family] = smallest(family)
        write_json(SMALLEST, dict(sorted(known.items())))
    return [Network('timm', family, known[family]) for family in timm.list_modules()]


def all_networks(progress=iter):
    "In the order of the table; `progress` shows the families whose members are counted: minutes where none is known"
    classify, segment = from_torchvision('torchvision', models), from_torchvision('torchvision segmentation', models.segmentation)
    return classify + segment + from_timm(progress)


def create(network, **kwargs):
    "With random weights and two classes"
    if network.source == 'timm':
        return timm.create_model(network.name, num_classes=2, **kwargs)
    kwargs = dict(weights_backbone=None) | kwargs if 'segmentation' in network.source else kwargs
    return models.get_model(network.name, weights=None, num_classes=2, **EXTRA.get(network.name, {}), **kwargs)


def create_for(network, pixels):
    "For images of so many pixels, if the network asks for that; with the arguments that it took"
    for how in (dict(img_size=pixels), dict(image_size=pixels)):
        try:
            return create(network, **how), how
        except TypeError:  # no such argument
            pass
    return create(network), {}


def smallest_input(network):
    "The network for the smallest images that it takes in training and in evaluation, its arguments, and their size in pixels"
    for pixels in SIZES:
        set_seed(0)
        try:
            model, how = create_for(network, pixels)
            x = torch.randn(2, 3, pixels, pixels)
            model.train()(x)
            with torch.no_grad():
                model.eval()(x)
            return model, how, pixels
        except Exception as e:  # of many kinds, and nothing but a size too small
            problem = e
    raise ValueError(f'takes no images of {SIZES} px: {problem}')


def as_vision_learner(network, how):
    "The network as body and new head, as fastai's `vision_learner` builds it"
    if network.source == 'timm':
        return create_timm_model(network.name, 2, pretrained=False, **how)[0]
    return create_vision_model(models.get_model_builder(network.name), 2, pretrained=False)


def classifier(model):
    "What timm calls so, or the last part with parameters"
    named = getattr(model, 'get_classifier', lambda: None)()
    named = nn.ModuleList(named) if isinstance(named, tuple) else named  # with and without distillation
    if isinstance(named, nn.Module) and params(named):
        return named
    if hasattr(model, 'get_classifier'):  # which found none, in an encoder
        return [m for m in model.modules() if list(m.parameters(recurse=False))][-1]
    return [m for m in model.children() if params(m)][-1]


def two_groups(model):
    "All but the classifier, and the classifier: a splitter"
    of_head = set(classifier(model).parameters())
    return [[p for p in model.parameters() if p not in of_head], [p for p in model.parameters() if p in of_head]]
