"""Import paths and pickles of 0.1, whose modules lay side by side: each name from where it is now, with a `DeprecationWarning`.

To go with the first version that need not load what 0.1 saved."""

import sys, warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __package__
MODULES = { # of 0.1, to those that have their names now
    'architectures': 'vision',
    'batches': 'utils.batches',
    'callback': 'freeze.callback freeze.copies freeze.groups freeze.in_force',
    'compare': 'choose.compare choose.runs choose.policies',
    'convolution': 'fusion.convolution',
    'core': 'layers holds sync',
    'cut': 'head.cut head.calls head.resume',
    'deferred': 'fusion.lazy',
    'differences': 'choose.differences utils.tables',
    'drift': 'freeze.drift',
    'find': 'choose.find',
    'finite': 'freeze.finite',
    'fixed': 'freeze.guard layers utils.tensors utils.ranks',
    'fold': 'head.fold',
    'frozen_part': 'head.part utils.in_fit',
    'fuse': 'fusion.fuse',
    'fuse_callback': 'freeze.fuse',
    'guard': 'freeze.guard',
    'images': 'vision',
    'in_step': 'stats.in_step stats.look',
    'loaders': 'utils.loaders head.source utils.in_fit',
    'moments': 'stats.moments',
    'observe': 'stats.observe stats.one_by_one utils.batches',
    'point': 'freeze.point freeze.groups',
    'policy': 'freeze.policy freeze.stages freeze.groups',
    'precompute': 'head.precompute head.serve',
    'ranks': 'utils.ranks',
    'restore': 'utils.restore utils.tensors',
    'results': 'choose.results',
    'rules': 'choose.rules',
    'runs': 'choose.runs choose.policies',
    'samples': 'head.samples head.drawing',
    'stats': 'stats.distances stats.measure stats.shift stats.recalibrate',
    'store': 'head.store',
    'trials': 'choose.trials',
}
NAMES = {'_Hold': 'Hold01'} # of 0.1, to those of now


def moved(
    module:str, # Of 0.1
    name:str, # In it
): # What has that name
    "A name of 0.1 from where it is now; `AttributeError` if it is gone"
    for place in MODULES[module].split():
        found = import_module(f'{_PACKAGE}.{place}')
        if (now := NAMES.get(name, name)) in vars(found):
            warnings.warn(f"`{_PACKAGE}.{module}.{name}` is `{found.__name__}.{now}` now", DeprecationWarning, stacklevel=3)
            return vars(found)[now]
    raise AttributeError(f"module '{_PACKAGE}.{module}' of 0.1 had {name!r}, if anything, and there is none now: see UPGRADING.md")


class _Former(ModuleType):
    "A module of 0.1 that is none now"
    def __getattr__(self, name:str):
        if name == '__all__': return [n for place in MODULES[self._name].split() for n in import_module(f'{_PACKAGE}.{place}').__all__]
        if name.startswith('__'): raise AttributeError(name)
        return moved(self._name, name)

    @property
    def _name(self) -> str: return self.__name__.rpartition('.')[2]


class _Finder(MetaPathFinder, Loader):
    "Finds what is not found elsewhere"
    def find_spec(self, fullname, path=None, target=None):
        package,_,name = fullname.rpartition('.')
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MODULES else None

    def create_module(self, spec): return _Former(spec.name)
    def exec_module(self, module): pass


sys.meta_path.append(_Finder())
