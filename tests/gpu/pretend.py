"""A pretended CUDA device: everything is computed on the CPU, and books are kept of what is "on cuda:0".

Faults of placement show without a GPU: a CPU tensor indexed with a CUDA tensor, the two added or concatenated, a CPU
generator for a CUDA tensor, `.numpy()` of a CUDA tensor, a mask or a checkpoint left on the CPU. Inside `pretended_cuda()`

- `device="cuda"` and `.to("cuda")` give tensors whose storage is marked; views share the mark, results inherit it, gradients too;
- `tensor.device`, `tensor.is_cuda` and their kin say where a tensor is said to be;
- an operation that CUDA would refuse raises the same type of error with nearly the same words;
- `torch.cuda` answers as on a machine with one GPU, and its random state is another one than the CPU's.

How: a `TorchDispatchMode` sees every operation of torch in this thread and in those started inside, backward included; what
never becomes an operation (getters, `.to()`, `.numpy()`, constructors that look for the device first) is replaced in `torch.Tensor` and
`torch` and put back afterwards.

What pretending can't show: numbers (TF32, bf16 kernels' rounding, sums in another order), memory, speed, asynchronous
execution, kernels that a CPU hasn't (bitsandbytes, flash attention, CUDA graphs), torch.compile (the mode turns it off), NCCL
and several GPUs, operations for which CUDA lacks a kernel (products of integers excepted), pickled tensors (they
lose their mark), a gradient handed to `backward` from another device, `torch.device(0)` (write `cuda:0`), and tensors that a
library reads by address.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import DefaultDeviceType

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class _Books:
    """Which storages are on the pretended device. A weak reference keeps a dead storage's address from being used again."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        self._sweep_at = 4096
        self._lock = threading.Lock()

    def holds(self, tensor: Tensor) -> bool:
        """Whether this tensor's storage is marked."""
        if getattr(_computing, "now", False):
            return False
        key = _address(tensor)
        return key is not None and key in self._held

    def mark(self, tensor: Tensor) -> Tensor:
        """Say that the tensor is on the device."""
        key = _address(tensor)
        if key is not None and key not in self._held:
            with self._lock:
                self._held[key] = StorageWeakRef(tensor.untyped_storage())
                if len(self._held) > self._sweep_at:
                    self._held = {key: held for key, held in self._held.items() if not held.expired()}
                    self._sweep_at = 2 * len(self._held) + 4096
        return tensor

    def unmark(self, tensor: Tensor) -> Tensor:
        """Say that the tensor is on the CPU."""
        key = _address(tensor)
        with self._lock:
            self._held.pop(key if key is not None else -1, None)
        return tensor


def _address(tensor: Tensor) -> int | None:
    try:
        found: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
        return None
    return found


_computing = threading.local()
"""Set in a thread while a library's own kernel, written in Python, computes: to it the tensors are what they are, on the CPU."""
_books = _Books()
_generators: weakref.WeakValueDictionary[int, torch.Generator] = weakref.WeakValueDictionary()
_real_generator: Any = torch.Generator


def is_pretended(tensor: Tensor) -> bool:
    """Whether a tensor is said to be on the pretended device."""
    return _books.holds(tensor)


# -- operations ---------------------------------------------------------------------------------------------------

ANY_DEVICES = {"copy_", "_foreach_copy_", "_to_copy", "is_same_size", "set_", "_has_compatible_shallow_copy_type"}
"""Operations that take tensors of several devices."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
SCALARS = {
    "where": (0, 1, 2),
    "masked_fill": (2,),
    "masked_fill_": (2,),
    "fill": (1,),
    "fill_": (1,),
    "index_fill_": (3,),
}
"""Operations that take numbers on the CPU at these places, as many as there are."""
NO_CPU_SCALARS = {"clamp", "clamp_"}
"""Pointwise ones that take none."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
"""Not there for integers on CUDA."""


def _differ(what: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but {what} (when checking arguments of the pretended aten::{name})"
    )


def _check(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise what CUDA would raise for tensors of several devices."""
    name = func._schema.name.split("::")[1]
    tensors = [tensor for tensor in _tensors((args, kwargs)) if not tensor.is_meta]
    marked = [tensor for tensor in tensors if _books.holds(tensor)]
    if marked and name in PRODUCTS and not marked[0].is_floating_point() and not marked[0].is_complex():
        raise RuntimeError(f'"{name}_cuda" not implemented for {str(marked[0].dtype)!r}')
    if not marked or len(marked) == len(tensors) or name in ANY_DEVICES:
        return
    if name in INDEXING:
        _check_index(name, *args[:3])
    elif name.startswith("_foreach_"):
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
        others = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        for several in zip(*lists, strict=False):
            _check_pointwise(name, [*several, *others], [several[0]] if name.endswith("_") else [])
    elif torch.Tag.pointwise in func.tags and name not in NO_CPU_SCALARS and name not in SCALARS:
        _check_pointwise(name, tensors, _written(func, args, kwargs))
    else:
        numbers = [args[place] for place in SCALARS.get(name, ()) if place < len(args)]
        rest = [tensor for tensor in tensors if not (tensor.dim() == 0 and any(tensor is one for one in numbers))]
        if any(_books.holds(tensor) for tensor in rest) and not all(_books.holds(tensor) for tensor in rest):
            raise _differ("found at least two devices, cuda:0 and cpu!", name)


def _check_index(name: str, whole: Tensor, indices: Sequence[Tensor | None], values: Any = None) -> None:
    """Indices may be on the CPU; values, but for a single number, must be where the tensor is."""
    here = _books.holds(whole)
    if not here and any(index is not None and _books.holds(index) for index in indices):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if isinstance(values, Tensor) and values.dim() > 0 and _books.holds(values) != here:
        raise _differ("got values on a device other than self's", name)


def _check_pointwise(name: str, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """One number on the CPU may take part, not as what is written to."""
    plain = [tensor for tensor in tensors if not _books.holds(tensor)]
    if not plain or len(plain) == len(tensors):
        return
    if any(tensor.dim() > 0 or any(tensor is one for one in written) for tensor in plain):
        raise _differ("found at least two devices, cuda:0 and cpu!", name)
    if len(plain) > 1:
        raise RuntimeError(f"Trying to pass too many CPU scalars to CUDA kernel! (the pretended aten::{name})")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += list(_tensors(value))
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Pretending(TorchDispatchMode):
    """Every operation: checked, computed on the CPU, its results entered into the books."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own isn't typed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # there, an operation made of others arrives whole
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        before = list(_tensors((args, kwargs)))
        _settle(before)
        _check(func, args, kwargs)
        asked = kwargs.get("device")
        on_cuda = any(_books.holds(tensor) for tensor in before)
        if asked is not None and torch.device(asked).type == "cuda":
            on_cuda, kwargs["device"] = True, CPU
        elif func._schema.name == "aten::copy_":
            on_cuda = _books.holds(before[0])
        elif func._schema.name.split("::")[1] in INDEXING:
            on_cuda = _books.holds(args[0])
        if on_cuda and func._schema.name == "aten::histc" and not args[0].is_floating_point():
            found = func(args[0].double(), *args[1:], **kwargs).to(
                args[0].dtype
            )  # the CPU has no histogram of integers
        elif torch.Tag.nondeterministic_seeded in func.tags:
            found = _drawn(func, args, kwargs, on_cuda)
        else:
            with nullcontext() if func.namespace == "aten" else _kernel():
                found = func(*args, **kwargs)
        if not before and _from_the_engine():
            _unplaced.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(found))
        if on_cuda:
            known = {_address(tensor) for tensor in before}
            for tensor in _tensors(found):
                if _address(tensor) not in known and not tensor.is_meta:
                    _books.mark(tensor)
        return found


def _from_the_engine() -> bool:
    """Whether autograd's own C++ code asked for this operation: the frame below is the Python that started backward."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == ENGINE


ENGINE = str(torch.autograd.graph.__file__)
WRAPPERS = tuple(os.path.join(os.path.dirname(torch.__file__), name) for name in ("_compile", "_dynamo"))
"""What torch puts around a mode's function."""


_unplaced: list[StorageWeakRef] = []
"""What autograd itself has made of nothing, zeros to scatter a gradient into: on CUDA it would be where the gradient is."""


def _settle(tensors: Sequence[Tensor]) -> None:
    """Such a tensor is where those are that it is first used with."""
    if not _unplaced:
        return
    known = {reference.cdata: reference for reference in _unplaced if not reference.expired()}
    mine = [tensor for tensor in tensors if _address(tensor) in known]
    if mine and len(tensors) > len(mine):
        if any(_books.holds(tensor) for tensor in tensors):
            for tensor in mine:
                _books.mark(tensor)
        for tensor in mine:
            known.pop(_address(tensor), None)
    _unplaced[:] = known.values()


@contextmanager
def _kernel() -> Iterator[None]:
    _computing.now = True
    try:
        yield
    finally:
        _computing.now = False


# -- randomness ---------------------------------------------------------------------------------------------------


def _on_cuda(generator: torch.Generator) -> bool:
    return generator._cdata in _generators  # type: ignore[attr-defined]  # torch's stubs lack it


def _drawn(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_cuda: bool) -> Any:
    """Random numbers from a generator of the tensor's device, or from that device's own random state."""
    own = [value for value in (*args, *kwargs.values()) if isinstance(value, _real_generator)]
    if own:
        if _on_cuda(own[0]) != on_cuda:
            wanted, got = ("cuda", "cpu") if on_cuda else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{got}'")
        return func(*args, **kwargs)
    if not on_cuda:
        return func(*args, **kwargs)
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(_random.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        _random.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(state)


class _Meta(type(_real_generator)):  # type: ignore[misc]  # known at run time only
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _real_generator)


class _Generator(_real_generator, metaclass=_Meta):  # type: ignore[misc]  # the class is known at run time only
    """torch.Generator, also for the pretended device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        on_cuda = torch.device(device).type == "cuda"
        made = super().__new__(cls, CPU if on_cuda else torch.device(device))
        if on_cuda:
            _generators[made._cdata] = made
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return CUDA if _on_cuda(self) else CPU


_random: Any = _Generator("cuda")
"""The pretended device's own random state."""


# -- what never becomes an operation ------------------------------------------------------------------------------


class _Move(torch.autograd.Function):
    """To the other device; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_cuda: bool) -> Tensor:
        ctx.back = not to_cuda
        return _moved(tensor, to_cuda)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _moved(grads[0], ctx.back), None


def _moved(tensor: Tensor, to_cuda: bool) -> Tensor:
    copy = tensor.detach().clone()
    return _books.mark(copy) if to_cuda else _books.unmark(copy)


def _crossed(tensor: Tensor, to_cuda: bool) -> Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        apply: Any = _Move.apply
        moved: Tensor = apply(tensor, to_cuda)
        return moved
    return _moved(tensor, to_cuda)


def _kind(device: Any) -> str:
    """The device's type; a bare number is a CUDA device's."""
    return "cuda" if isinstance(device, int) else torch.device(device).type


_NATIVE: dict[str, Any] = {
    name: getattr(torch.Tensor, name)
    for name in (
        "device",
        "is_cuda",
        "is_cpu",
        "get_device",
        "to",
        "type",
        "numpy",
        "tolist",
        "pin_memory",
        "is_pinned",
        "new_tensor",
        "__deepcopy__",
        "type_as",
    )
}


def _device(tensor: Tensor) -> torch.device:
    found: torch.device = CUDA if _books.holds(tensor) else _NATIVE["device"].__get__(tensor)
    return found


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` in all its forms."""
    args, device, dtype = list(args), kwargs.pop("device", None), kwargs.pop("dtype", None)  # type: ignore[assignment]
    other = kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other, args = args[0], args[1:]
    elif args and isinstance(args[0], str | torch.device | int) and not isinstance(args[0], bool):
        device, args = args[0], args[1:]
        if args and (isinstance(args[0], torch.dtype) or args[0] is None):
            dtype, args = args[0], args[1:]
    elif args and (isinstance(args[0], torch.dtype) or args[0] is None):
        first, args = args[0], args[1:]
        dtype = dtype if first is None else first
        if first is None and args and (isinstance(args[0], torch.dtype) or args[0] is None):  # to(None, dtype)
            dtype, args = args[0], args[1:]
    kwargs |= dict(zip(("non_blocking", "copy"), args, strict=False))
    if other is not None:
        device, dtype = other.device, other.dtype
    dtype = tensor.dtype if dtype is None else dtype
    native, here = _NATIVE["to"], _books.holds(tensor)
    if device is None or (_kind(device) == "cuda") == here:
        extra = {} if device is None or here else {"device": device}
        result: Tensor = native(tensor, dtype=dtype, **extra, **kwargs)
        return result
    if _kind(device) not in ("cpu", "cuda"):  # meta
        result = native(tensor, device=device, dtype=dtype, **kwargs)
        return _books.unmark(result)
    if tensor.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    kwargs.pop("copy", None), kwargs.pop("non_blocking", None)
    return native(_crossed(tensor, not here), dtype=dtype, **kwargs)  # type: ignore[no-any-return]  # it is Any


def _cuda(tensor: Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    return _to(tensor, CUDA if device is None else device, **kwargs)


def _cpu(tensor: Tensor, **kwargs: Any) -> Tensor:
    return _to(tensor, CPU, **kwargs)


def _numpy(tensor: Tensor, *, force: bool = False) -> Any:
    if _books.holds(tensor):
        if not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        tensor = _cpu(tensor.detach())
    return _NATIVE["numpy"](tensor, force=force)


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    if _books.holds(tensor):
        raise RuntimeError(f"cannot pin '{_type(tensor)}' only dense CPU tensors can be pinned")
    return tensor.clone()


def _type(tensor: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        name: str = _NATIVE["type"](tensor)
        return name.replace("torch.", "torch.cuda.") if _books.holds(tensor) else name
    return _NATIVE["type"](tensor, dtype, *args, **kwargs)


def _get_device(tensor: Tensor) -> int:
    return 0 if _books.holds(tensor) else -1


def _type_as(tensor: Tensor, other: Tensor) -> Tensor:
    return _to(tensor, other)


def _deepcopy(tensor: Tensor, memo: Any) -> Any:
    copied = _NATIVE["__deepcopy__"](tensor, memo)
    return _books.mark(copied) if _books.holds(tensor) else copied


def _new_tensor(tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
    return _tensor(data, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})


def _placed(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor after another tensor (zeros_like, new_zeros): on that one's device, unless it is told another."""

    def made(tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            return native(tensor, *args, **kwargs)
        result = native(tensor, *args, device=device, **kwargs)
        return _books.mark(result) if _kind(device) == "cuda" else _books.unmark(result)

    return made


def _default() -> torch.device:
    """The device of the innermost `with torch.device(...)`, or of `torch.set_default_device`."""
    modes = torch.overrides._get_current_function_mode_stack()
    found = [mode.device for mode in modes if isinstance(mode, torch.utils._device.DeviceContext)]
    device: torch.device = found[-1] if found else CPU
    return device


def _from_data(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, `as_tensor` and `asarray`: they look for the device before any operation."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            device = data.device if isinstance(data, Tensor) else _default()
        wanted = _kind(device)
        if wanted not in ("cpu", "cuda"):
            return native(data, *args, device=device, **kwargs)
        if isinstance(data, Tensor) and _books.holds(data) != (wanted == "cuda"):
            data = _crossed(data, wanted == "cuda")
        if isinstance(data, Tensor) and native is not _native_tensor:
            return native(data, *args, **kwargs)  # it may be the same tensor
        gradient = kwargs.pop("requires_grad", False)
        result = native(data, *args, device=CPU, **kwargs)
        return (_books.mark(result) if wanted == "cuda" else result).requires_grad_(gradient)

    return made


_native_tensor = torch.tensor
_tensor = _from_data(torch.tensor)


def _grouped(native: Callable[..., Any]) -> Callable[..., Any]:
    """Optimizers and gradient clipping group their tensors by device and dtype; each group by its mark, too."""

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        found: dict[Any, Any] = {}
        for (device, dtype), (several, indices) in native(lists, True).items():
            for place, index in enumerate(indices):
                on_cuda = several[0][place] is not None and _books.holds(several[0][place])
                key = (CUDA if on_cuda else device, dtype)
                group = found.setdefault(key, ([[] for _ in several], []))
                for mine, theirs in zip(group[0], several, strict=True):
                    if theirs:
                        mine.append(theirs[place])
                group[1].append(index)
        return found if with_indices else {key: (several, []) for key, (several, _) in found.items()}

    return grouped


def _run_pretending(native: Callable[..., None]) -> Callable[..., None]:
    """Threads started inside pretend as well: modes are a thread's own."""

    def run(thread: threading.Thread) -> None:
        with _Pretending():
            native(thread)

    return run


class _Device:
    """torch.cuda.device(...) as a block."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


GIB = 2**30


def _cuda_module() -> dict[str, Any]:
    """What `torch.cuda` says on a machine with one GPU."""
    device = SimpleNamespace(
        name="pretended", major=9, minor=0, total_memory=80 * GIB, multi_processor_count=100, warp_size=32
    )
    seeded: Callable[[int], Any] = _random.manual_seed
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    nothing = ("synchronize", "empty_cache", "reset_peak_memory_stats", "reset_accumulated_memory_stats", "ipc_collect")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_current_stream_capturing": lambda: False,  # optimizers ask, also where torch is built for CUDA
        "device": _Device,
        "get_device_name": lambda given=None: "pretended",
        "get_device_properties": lambda given=None: device,
        "get_device_capability": lambda given=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda given=None: (79 * GIB, 80 * GIB),
        "memory_stats": lambda given=None: {},
        "manual_seed": lambda seed: seeded(int(seed)) and None,
        "manual_seed_all": lambda seed: seeded(int(seed)) and None,
        "seed": lambda: _random.seed(),
        "initial_seed": lambda: _random.initial_seed(),
        "get_rng_state": lambda given="cuda": _random.get_state(),
        "get_rng_state_all": lambda: [_random.get_state()],
        "set_rng_state": lambda state, given="cuda": _random.set_state(_host(state)) and None,
        "set_rng_state_all": lambda states: _random.set_state(_host(states[0])) and None,
        "default_generators": (_random,),
        **dict.fromkeys(nothing, lambda *args: None),
        **dict.fromkeys(memory, lambda given=None: 0),
    }


def _host(state: Tensor) -> Tensor:
    if _books.holds(state):
        raise TypeError("RNG state must be a torch.ByteTensor")
    return state


def _patches() -> Iterator[Any]:
    tensor: dict[str, Any] = {
        "device": property(_device),
        "is_cuda": property(_books.holds),
        "is_cpu": property(lambda tensor: not _books.holds(tensor) and _NATIVE["is_cpu"].__get__(tensor)),
        "get_device": _get_device,
        "to": _to,
        "cuda": _cuda,
        "cpu": _cpu,
        "type": _type,
        "type_as": _type_as,
        "numpy": _numpy,
        "pin_memory": _pin_memory,
        "is_pinned": lambda tensor, device=None: False,
        "new_tensor": _new_tensor,
        "__deepcopy__": _deepcopy,
    }
    for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"):
        tensor[name] = _placed(getattr(torch.Tensor, name))
    for name, new in tensor.items():
        yield mock.patch.object(torch.Tensor, name, new)
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"):
        yield mock.patch.object(torch, name, _placed(getattr(torch, name)))
    for name in ("tensor", "as_tensor", "asarray"):
        yield mock.patch.object(torch, name, _from_data(getattr(torch, name)))
    yield mock.patch.object(torch, "Generator", _Generator)
    name = "_group_tensors_by_device_and_dtype"
    yield mock.patch.object(torch._C, name, _grouped(getattr(torch._C, name)))
    yield mock.patch.object(threading.Thread, "run", _run_pretending(threading.Thread.run))
    for name, new in _cuda_module().items():
        yield mock.patch.object(torch.cuda, name, new)
    accelerator = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None),
        "synchronize": lambda device=None: None,
    }
    for name, new in accelerator.items():
        yield mock.patch.object(torch.accelerator, name, new)
    yield mock.patch.object(DefaultDeviceType, "_default_device_type", "cuda")


def _import_first() -> None:
    """Libraries that look for CUDA's own libraries as they are imported must have done so."""
    for name in ("bitsandbytes", "peft", "accelerate"):
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)


def _forget_answers() -> None:
    """What libraries have found out about CUDA and keep: asked again inside, and again outside."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for held in vars(sys.modules[name]).values() if name in sys.modules else ():
            asks = getattr(held, "__name__", "").startswith(("is_torch_", "is_cuda", "get_cuda", "is_flash"))
            if asks and callable(getattr(held, "cache_clear", None)):
                held.cache_clear()


_open = threading.local()


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """A block in which `cuda:0` is there, pretended; the device."""
    if getattr(_open, "depth", 0):
        yield CUDA
        return
    _import_first()
    _open.depth = 1
    try:
        with ExitStack() as opened:
            for patch in _patches():
                opened.enter_context(patch)
            opened.enter_context(_Pretending())
            opened.callback(_forget_answers)
            _forget_answers()
            yield CUDA
    finally:
        _open.depth = 0
