"""Stand-ins for torch.cuda.CUDAGraph and torch.cuda.graph that need no device.

Recording notes each operator with its very tensors and undoes what it wrote; replaying runs the same operators on the
same tensors, whatever the host has decided since. An operator that would make the host wait is refused, as on CUDA.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "item")


def tensors(*values) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class GraphStandIn:
    recorded: list["GraphStandIn"] = []  # of all decoders; a test empties it

    def __init__(self):
        self.operators, self.n_replays = [], 0
        GraphStandIn.recorded.append(self)

    @torch.inference_mode()
    def replay(self):
        self.n_replays += 1
        for function, args, kwargs, results in self.operators:
            inputs = {address(each) for each in tensors(args, kwargs)}
            for old, new in zip(tensors(results), tensors(function(*args, **kwargs)), strict=True):
                if address(old) not in inputs:  # neither a view nor written in place
                    old.copy_(new)


class RecordStandIn(TorchDispatchMode):
    def __init__(self, graph: GraphStandIn, pool: object, capture_error_mode: str):
        super().__init__()
        self.graph, self.before, self.made = graph, {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"found {function} in a recording, which would wait for the device")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and address(value) not in self.made:
                self.before.setdefault(address(value), (value.untyped_storage(), value.untyped_storage().clone()))
        results = function(*args, **kwargs)
        self.made |= {address(each) for each in tensors(results)} - {address(each) for each in tensors(args, kwargs)}
        self.graph.operators.append((function, args, kwargs, results))
        return results

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, copy in self.before.values():
            storage.copy_(copy)


def install(monkeypatch) -> list[GraphStandIn]:
    """Puts the stand-ins in the place of PyTorch's; the graphs that will be recorded."""
    monkeypatch.setattr(GraphStandIn, "recorded", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphStandIn)
    monkeypatch.setattr(torch.cuda, "graph", RecordStandIn)
    return GraphStandIn.recorded
