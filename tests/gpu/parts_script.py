"Parts of a benchmark that come to an end in each of the ways there are"

import os, time

import bench.measure  # here, as what a part is given comes from there


def dies(arch, at):
    os._exit(3)


def hangs(arch, at):
    time.sleep(60)


def fails(arch, at):
    raise RuntimeError('it')


def works(arch, at):
    return dict(nan=float('nan'), third=1 / 3)
