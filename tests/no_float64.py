"A device that is not there: tensors that say `mps`, lie on the CPU, and refuse float64 with the words of Apple's"

import torch
from torch import nn, Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

REFUSAL = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."
TO_HOST = "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
CROSSES = ('copy_', 'to', 'cpu', 'is_set_to', '__set__', '__getitem__', '__setitem__')  # take or give tensors of the CPU
LOOKS = ('__get__', 'data_ptr', 'untyped_storage', 'is_floating_point', '_has_compatible_shallow_copy_type')


class Pretended(Tensor):
    "A tensor on that device"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.device.__get__:
                return torch.device('mps')
            if name in ('numpy', '__array__'):
                raise TypeError(TO_HOST)
            if name == 'double' or any(o is torch.float64 for o in (*args, kwargs.get('dtype'))):
                raise TypeError(REFUSAL)  # also where it would be cast on its way to the CPU
            if name == 'to' and any(str(o).startswith('mps') for o in (*args[1:], kwargs.get('device'))):
                dtype = next((o for o in (*args, kwargs.get('dtype')) if isinstance(o, torch.dtype)), args[0].dtype)
                return args[0] if dtype == args[0].dtype else args[0].type(dtype).as_subclass(cls)
            given = [o for o in tree_leaves((args, kwargs)) if isinstance(o, Tensor) and o.ndim]
            if name not in CROSSES + LOOKS and len({isinstance(o, Pretended) for o in given}) > 1:
                raise RuntimeError(f'{name}: Expected all tensors to be on the same device, but found mps:0 and cpu!')
            res = func(*args, **kwargs)
            if name == 'cpu' or name == 'to' and any(str(o) == 'cpu' for o in (*args[1:], kwargs.get('device'))):
                return Tensor.as_subclass(res, Tensor)
            if any(isinstance(o, Tensor) and o.dtype == torch.float64 for o in tree_leaves(res)) and name != '__get__':
                raise TypeError(REFUSAL)
            as_it = lambda t: t if isinstance(t, Pretended) else t.as_subclass(Pretended)
            return res if name in LOOKS else tree_map_only(Tensor, as_it, res)

    def as_subclass(self, cls):
        return self if cls is Tensor else Tensor.as_subclass(self, cls)

    def __deepcopy__(self, memo):
        return nn.Parameter(on_it(self), self.requires_grad) if isinstance(self, nn.Parameter) else on_it(self)


def on_it(x):
    "A tensor, or a model with its parameters and buffers, on that device"
    if isinstance(x, Tensor):
        if x.dtype == torch.float64:
            raise TypeError(REFUSAL)
        return x.detach().clone().as_subclass(Pretended)
    for m in x.modules():
        m._parameters.update({k: nn.Parameter(on_it(p), p.requires_grad) for k, p in m._parameters.items() if p is not None})
        m._buffers.update({k: on_it(b) for k, b in m._buffers.items() if b is not None})
    return x
