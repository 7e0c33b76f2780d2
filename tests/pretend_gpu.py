"""A GPU that is only pretended: tensors that say cuda:0 and are computed by the CPU.

    with PretendGPU() as gpu:
        sft.train(sft.Config(..., device="cuda"))
    print(gpu.waits)                  # Counter({"sft.py:150": 3, ...}): where the host waited for the GPU

What a GPU would refuse raises an error here too: operands on two devices, a generator of the other device, numpy().
What makes the host wait until the GPU has done all that it was given is counted, by the project's line: a number that
is read (item, tolist, bool, int, float), a size that only the GPU knows (nonzero, a mask as an index), a copy from one
device to the other, a list or a CPU's tensor as an index.

A tensor is on the pretended GPU if its storage is in `on_gpu`; so a view is where its base is. Two modes see to that:
one sees every call of torch's Python functions (the device that is asked for, the generator, tolist), the other every
operation below them, those of the backward pass too (operands, results, indices, item).

It is kinder than a GPU in two respects: it takes a 0-dimensional CPU tensor beside any operand, which a GPU does in
arithmetic only; and it computes one thing after the other, so nothing is read before it is there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import ValuesView
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).resolve().parent.parent}/"
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)  # made by the CPU, and copied
NO_NUMBERS = (torch.nn.functional.one_hot,)  # the CPU reads its arguments to check them, a GPU does not


def tensors(found) -> list[Tensor]:
    """Those in a tensor, a number, or lists and dicts of such."""
    if isinstance(found, Tensor):
        return [found]
    found = found.values() if isinstance(found, dict) else found
    return [x for part in found for x in tensors(part)] if isinstance(found, list | tuple | ValuesView) else []


class PretendGPU:
    def __init__(self):
        self.on_gpu: dict[int, StorageWeakRef] = {}  # address of a storage -> a reference that keeps the address taken
        self.waits: Counter[str] = Counter()
        self.counting = True
        self.here = CPU  # where the function that is being computed makes what it needs

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.on_gpu

    def put(self, *found: Tensor) -> None:
        if len(self.on_gpu) > 20_000:  # those that have gone
            self.on_gpu = {address: ref for address, ref in self.on_gpu.items() if not ref.expired()}
        for x in found:
            storage = x.untyped_storage()
            self.on_gpu[storage._cdata] = StorageWeakRef(storage)

    def take_off(self, x: Tensor) -> None:
        self.on_gpu.pop(x.untyped_storage()._cdata, None)

    def wait(self, times: int = 1) -> None:
        """The host waits, in the innermost line of the project."""
        if not times or not self.counting:
            return
        frame = sys._getframe(1)
        while frame and not ((file := frame.f_code.co_filename).startswith(ROOT) and "/tests/" not in file):
            frame = frame.f_back
        self.waits[f"{file[len(ROOT) :]}:{frame.f_lineno}" if frame else "elsewhere"] += times

    def __enter__(self) -> PretendGPU:
        real_autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

        class Generator(torch.Generator):
            """On the device that it was asked for; the numbers are the CPU's."""

            def __new__(cls, device="cpu"):
                made = super().__new__(cls, device="cpu")
                made.where = torch.device(device)
                return made

            @property
            def device(self):
                return self.where

        def grouped(lists, with_indices=False):
            """What clip_grad_norm_ and the optimisers sort their tensors by."""
            found = group(lists, with_indices)
            return {(self.device(v[0][0][0]), dtype): v for (_, dtype), v in found.items()}

        group = torch.utils._foreach_utils._group_tensors_by_device_and_dtype
        name = "_group_tensors_by_device_and_dtype"
        self.patches = [
            patch.object(torch, "Generator", Generator),
            patch.object(torch, "autocast", lambda device_type, *args, **kw: real_autocast("cpu", *args, **kw)),
            patch.object(torch, "is_autocast_enabled", lambda device_type="cpu": enabled("cpu")),
            patch.object(torch, "get_autocast_dtype", lambda device_type="cpu": dtype("cpu")),
            patch.object(sys.modules["torch.nn.utils.clip_grad"], name, grouped),
            patch.object(sys.modules["torch.optim.optimizer"], name, grouped),
        ]
        self.modes = [Operations(self), Calls(self)]
        for entered in (*self.patches, *self.modes):
            entered.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for entered in reversed((*self.patches, *self.modes)):
            entered.__exit__(*error)

    def device(self, x: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return GPU if self.has(x) else CPU


class Operations(TorchDispatchMode):
    """Every operation, below autograd: operands on one device, and the results are where the operands are."""

    def __init__(self, gpu: PretendGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            kind, given = function.overloadpacket, tensors((args, kwargs))
            there = [self.gpu.has(x) for x in given]
            if any(there):
                self.look(kind, given, there, args)
            found = function(*args, **kwargs)
            if (any(there) and kind != aten.copy_) or (not given and self.gpu.here == GPU):
                self.gpu.put(*tensors(found))
            return found

    def look(self, kind, given: list[Tensor], there: list[bool], args: tuple) -> None:
        """What a GPU would refuse; and the waits."""
        gpu = self.gpu
        if kind == aten.copy_:
            return gpu.wait(not all(there))
        if kind in INDEXING:
            indices, values = tensors(args[1]), tensors(args[2:])
            copied = [not gpu.has(x) for x in indices]  # an index may come from the CPU
            masks = [x.dtype == torch.bool for x in indices]
            if not (values and values[0].dim() == 0):  # x[mask] = number is masked_fill, and nobody waits
                gpu.wait(sum(a or b for a, b in zip(copied, masks, strict=True)))
            mixed = any(x.dim() and not gpu.has(x) for x in [args[0], *values])
        else:
            gpu.wait(kind in READS)
            lists = [[gpu.has(x) for x in tensors(arg)] for arg in args if isinstance(arg, list | tuple)]
            mixed = any(len(set(some)) > 1 for some in lists) or any(
                x.dim() and not on for x, on in zip(given, there, strict=True)
            )
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({kind})")


class Calls(TorchFunctionMode):
    """Every call of a function or method of torch, and every property: what has to do with a device."""

    def __init__(self, gpu: PretendGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        if function == Tensor.device.__get__:
            return gpu.device(args[0])
        if function in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return (function == Tensor.is_cuda.__get__) == (gpu.device(args[0]) == GPU)
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.move(function, args, kwargs)
        own = gpu.device(args[0]) if args and isinstance(args[0], Tensor) else CPU
        if own == GPU and function in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        gpu.wait(own == GPU and function == Tensor.tolist)
        asked = kwargs.pop("device", None)
        device = own if asked is None else torch.device(asked)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device}'")
        gpu.counting, gpu.here = function not in NO_NUMBERS, device
        try:
            found = function(*args, **kwargs)
        finally:
            gpu.counting, gpu.here = True, CPU
        if function in FROM_PYTHON:
            gpu.wait(device.type == "cuda")
        copied = function in (*FROM_PYTHON, Tensor.__deepcopy__)
        if device.type == "cuda" and (asked is not None or copied):
            with torch._C.DisableTorchFunction():
                gpu.put(*tensors(found))
        return found

    def move(self, function, args: tuple, kwargs: dict) -> Tensor:
        """x.to(...), x.cpu(), x.cuda(): a copy if the device is another one."""
        gpu, x = self.gpu, args[0]
        own, wanted = gpu.device(x), {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(function)
        dtype = kwargs.pop("dtype", None)
        for arg in (*args[1:], kwargs.pop("device", None)) if function == Tensor.to else ():
            if isinstance(arg, (str, torch.device)):
                wanted = torch.device(arg)
            elif isinstance(arg, Tensor):
                wanted, dtype = gpu.device(arg), arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
        kwargs["dtype"] = x.dtype if dtype is None else dtype
        if wanted is None or wanted.type == own.type:
            return Tensor.to(x, **kwargs)
        gpu.wait()
        found = Tensor.to(x, **{**kwargs, "copy": True})
        with torch._C.DisableTorchFunction():
            gpu.put(found) if wanted.type == "cuda" else gpu.take_off(found)
        return found
