"Loaders with workers, and runs in several processes, where processes are spawned: they get what they need by pickle, and start empty"

import multiprocessing, sys, warnings
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastai.vision.all import DataLoaders, Datasets, FlipItem, Learner, Resize, set_seed, ToTensor
from learners import body_and_head, image, label, two_groups
from PIL import Image

import bnfreeze_fastai.learner
from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.vision import find_images, image_learner

FOLDER = Path('mit Leerzeichen ü' if sys.platform == 'win32' else 'mit Leerzeichen ü: 1')


class Torch(torch.utils.data.Dataset):
    "A plain dataset of PyTorch's"

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return image(i, 8), label(i)


def small_image(i):
    return image(i, 8)


def learner(workers, dls=None):
    set_seed(0)
    dsets = Datasets(range(24), [[small_image], [label]], splits=[range(24), range(8)])
    dls = dls or dsets.dataloaders(bs=8, num_workers=workers, device='cpu')
    return Learner(dls, body_and_head(), loss_func=torch.nn.CrossEntropyLoss(), splitter=two_groups, lr=0.1)


def by_torch(workers):
    loader = lambda **kwargs: torch.utils.data.DataLoader(Torch(), 8, num_workers=workers, **kwargs)
    return learner(0, DataLoaders(loader(shuffle=True), loader()))


def by_images(workers):
    learn = image_learner(find_images(FOLDER, 0.25), f'{FOLDER / "own.py"}:net', 'none', 8, 4, num_workers=workers)
    for dl in learn.dls.loaders:
        dl.after_item = type(dl.after_item)([Resize(12), FlipItem(), ToTensor()][:: 2 if dl is learn.dls.valid else 1])
    return learn


NETWORK = """
from torch import nn
def net(n_out):
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out)))
"""


def draw_images():
    for i in range(16):
        path = FOLDER / ('Käse', 'Brot')[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), 15 * i, 'uint8')).save(path)
    (FOLDER / 'own.py').write_text(NETWORK, encoding='utf-8')


def statistics(learn):
    "What each way of measuring the data gives"
    set_seed(1)
    parts = [torch.tensor(learn.bn_shift()['kl'].values)]
    for method in ('batch', 'sequential'):
        learn.recalibrate_bn(method=method)
        parts += [b.double() for b in learn.model.buffers()]
    return torch.cat([p.flatten() for p in parts])


def trained(learn, **how):
    "Parameters after training on stored features"
    learn.freeze_to_bn(-1)
    set_seed(1)
    with learn.no_bar(), learn.no_logging(), learn.precompute(**how):
        learn.fit(2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def main():
    warnings.simplefilter('ignore')
    multiprocessing.set_start_method('spawn', force=True)
    draw_images()
    for what, make in ((statistics, learner), (trained, learner), (trained, by_torch)):
        torch.testing.assert_close(what(make(1)), what(make(0)))
        print(what.__name__, make.__name__, 'passed', flush=True)
    assert trained(by_images(1), n_aug=2).isfinite().all()  # augmented by the random numbers of a worker
    print('images passed', flush=True)
    tables = [bn_compare(lambda: learner(0), ['fastai', 'frozen'], 1, 1, 'fit', n_jobs=n).df for n in (1, 2)]
    one, two = (df.drop(columns='seconds').sort_values('policy', ignore_index=True) for df in tables)
    pd.testing.assert_frame_equal(one, two)
    print('bn_compare passed', flush=True)


if __name__ == '__main__':
    main()
