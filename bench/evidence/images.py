"Folders and archives of images as tensors, shifted or not, divided into training and validation images"

import io, zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}
MOST_VALID = 1000  # validation images, at most


class Images(NamedTuple):
    "Images of one size in 0 to 255, their classes, and which ones the archive keeps for validation"

    x: Tensor  # (n, 3, size, size), uint8
    y: Tensor  # (n,)
    valid: Tensor  # (n,), bool


def _files(path):
    "`(path within, function that opens it)` of every image in a folder or a zip archive, in order"
    if path.is_dir():
        found = [(p.relative_to(path), p) for p in path.rglob('*') if p.suffix.lower() in SUFFIXES]
        return [(name, lambda p=p: open(p, 'rb')) for name, p in sorted(found)]
    archive = zipfile.ZipFile(path)
    names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES)
    return [(Path(n), lambda n=n: io.BytesIO(archive.read(n))) for n in names]


def _read(path, size):
    "A folder `train|valid/<class>/*`, possibly within another one"
    files = _files(path)
    if not files:
        raise ValueError(
            f'{path} holds no images: give a folder or a zip file with `train` and `valid`, each with a folder for each class.'
        )
    classes = sorted({name.parent.name for name, _ in files})
    load = lambda f: np.asarray(Image.open(f).convert('RGB').resize((size, size), Image.Resampling.BILINEAR))
    x = torch.tensor(np.stack([load(f()) for _, f in files])).permute(0, 3, 1, 2)
    y = torch.tensor([classes.index(name.parent.name) for name, _ in files])
    return Images(x.contiguous(), y, torch.tensor([name.parent.parent.name == 'valid' for name, _ in files]))


def _digits(size):
    "scikit-learn's digits, dark on light; the last 800 for validation"
    x, y = load_digits(return_X_y=True)
    grey = torch.tensor(255 * (1 - x / 16), dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(grey, size=(size, size), mode='bilinear').round().to(torch.uint8).expand(-1, 3, -1, -1)
    return Images(x.contiguous(), torch.tensor(y), torch.arange(len(y)) >= len(y) - 800)


def faded(x):
    "Colours and contrast faded, as on an old print"
    grey = x.mean(1, keepdim=True)
    return 255 * 0.35 + 0.5 * (0.4 * x + 0.6 * grey)


def blurred(x):
    "Out of focus: a Gaussian blur of 3 % of the image's side"
    sigma = 0.03 * x.shape[-1]
    at = torch.arange(-int(3 * sigma), int(3 * sigma) + 1).float()
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    pad = len(at) // 2
    x = F.conv2d(F.pad(x, (pad, pad, 0, 0), mode='reflect'), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, pad, pad), mode='reflect'), kernel.transpose(2, 3), groups=3)


def warm(x):
    "Another white balance: the light of a bulb"
    return (x * torch.tensor([1.15, 0.85, 0.5]).view(3, 1, 1)).clamp(max=255)


SHIFTS = dict(faded=faded, blurred=blurred, warm=warm)


@cache
def read_images(spec, size):
    "`digits`, or the path of a folder or zip archive; `path+faded` and the like for a shifted variant"
    path, _, shift = str(spec).partition('+')
    images = _digits(size) if path == 'digits' else _read(Path(path), size)
    if not shift:
        return images
    if shift not in SHIFTS:
        raise ValueError(f'Unknown shift {shift!r}: choose one of {", ".join(SHIFTS)}.')
    shifted = [SHIFTS[shift](part.float()).round().clamp(0, 255).to(torch.uint8) for part in images.x.split(256)]
    return images._replace(x=torch.cat(shifted))


def split(images, n, seed):
    "Indices of `n` training images, classes as even as they can be, and of validation images: those kept for it, and what is left"
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.y), generator=g)
    order = order[~images.valid[order]]
    rank = torch.stack([(images.y[order[:i]] == images.y[order[i]]).sum() for i in range(len(order))])
    order = order[torch.argsort(rank, stable=True)]  # one of each class, then the second of each, …
    if len(order) < n:
        raise ValueError(f'There are {len(order)} training images, not {n}.')
    left = order[n:][torch.randperm(len(order) - n, generator=g)]
    kept = torch.where(images.valid)[0]
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    return order[:n].tolist(), torch.cat([kept, left])[:MOST_VALID].tolist()
