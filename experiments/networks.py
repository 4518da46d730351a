"Three small networks with batch norm for images of 16 × 16 pixels, each a body and a head as `small_resnet` is"

import torch
from torch import nn

from bnfreeze_fastai.digits import small_resnet


def conv(n_in, n_out, size=3, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Inception(nn.Module):
    "Branches with 1 × 1, 3 × 3 and twice 3 × 3 pixels, and pooling, side by side (Szegedy et al., 2015 and 2016)"

    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        n = n_out // 4
        self.branches = nn.ModuleList(
            [
                conv(n_in, n, 1, stride),
                conv(n_in, n, 3, stride),
                nn.Sequential(conv(n_in, n), conv(n, n, 3, stride)),
                nn.Sequential(nn.AvgPool2d(3, stride, 1), conv(n_in, n, 1)),
            ]
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Dense(nn.Module):
    "Layers that see the outputs of all before them, with batch norm before the convolution (Huang et al., 2017)"

    def __init__(self, n_in, growth, n_layers):
        super().__init__()
        layer = lambda n: nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, growth, 3, padding=1, bias=False))
        self.layers = nn.ModuleList([layer(n_in + i * growth) for i in range(n_layers)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def transition(n_in, n_out):
    return nn.Sequential(nn.BatchNorm2d(n_in), nn.ReLU(), nn.Conv2d(n_in, n_out, 1, bias=False), nn.AvgPool2d(2))


def with_head(body, n_features, n_out):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(n_features), nn.Linear(n_features, n_out))
    return nn.Sequential(body, head)


def small_inception(n_out=5):
    return with_head(nn.Sequential(conv(3, 16), Inception(16, 32, 2), Inception(32, 64, 2)), 64, n_out)


def small_densenet(n_out=5):
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), Dense(16, 12, 3), transition(52, 26), Dense(26, 12, 3), transition(62, 31)
    )
    return with_head(body, 31, n_out)


NETWORKS = dict(residual=small_resnet, inception=small_inception, dense=small_densenet)
