"Running statistics: pooled moments, a forward pass watched, re-estimation, how far they have moved"

def __getattr__(name): # what 0.1 had in a module of this name
    from .. import _moved
    return _moved.moved('stats', name)
