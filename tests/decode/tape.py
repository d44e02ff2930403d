"""What a CUDA graph does, on any device: operators are recorded with the tensors they were given,
and run again on those, whatever Python's variables hold by then."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Values that come from the host, or go there: a capture refuses them.
_HOST = {"_local_scalar_dense", "lift_fresh", "nonzero", "_assert_async", "equal", "item"}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name in _HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    assert old.shape == new.shape and old.stride() == new.stride(), function
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeGraphs:
    """In the place of CudaGraphs; `log` tells what was asked of all of them."""

    log: list[str] = []

    def __init__(self, device):
        self.log.append("new")

    def warm_up(self, function):
        self.log.append("warm-up")
        return function()

    def capture(self, function):
        self.log.append("capture")
        with Tape() as tape:
            result = function()

        def replay():
            self.log.append("replay")
            tape.replay()
            return result

        return replay
