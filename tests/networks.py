"Networks of fastai, torchvision and timm without weights, each with its splitter"

from functools import partial

import timm
from fastai.vision.learner import create_unet_model, create_vision_model, default_split, model_meta
from torchvision import models


def fastai_model(arch):
    return create_vision_model(arch, 2, pretrained=False), model_meta.get(arch, {'split': default_split})['split']


def timm_model(name):
    return timm.create_model(name, num_classes=2), lambda m: by_head(m, m.get_classifier())


def squeezenet():
    return models.squeezenet1_1(num_classes=2), lambda m: by_head(m, m.classifier)


def unet():
    return create_unet_model(models.resnet18, 2, (64, 64), pretrained=False), model_meta[models.resnet18]['split']


def by_head(model, head):
    of_head = {id(p) for p in head.parameters()}
    return [[p for p in model.parameters() if id(p) not in of_head], list(head.parameters())]


ARCHS = {
    **{name: partial(fastai_model, getattr(models, name)) for name in ['resnet18', 'densenet121', 'mobilenet_v3_small', 'vgg11_bn']},
    **{name: partial(timm_model, name) for name in ['efficientnet_b0', 'convnext_atto', 'inception_v4']},
    'squeezenet': squeezenet,
    'unet': unet,
}
