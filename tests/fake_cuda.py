"""A CUDA driver, and of torch's CUDA what is compiled, on a machine without either: the real code above them runs.

Tensors "on cuda:0" are of a class of their own around tensors of the host: what mixes them with the host's is refused,
as a GPU does, and kernels run at once, after all that their stream was told to wait for. Copies by the driver run as
late as the order of streams and events allows; device memory that nothing was written to is full of ones (NaN).
All that is done is watched, and what happened to go well is an error, too: see `happens_before`.
Functions of the driver take their arguments by the prototypes of cuda.h, whatever the caller declares. There are no
gradients.
"""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from happens_before import Clock, HappensBefore, memmove, span
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

from runtime import readback

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, LOST = 1, 2, 201, 400, 700
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
PAGE_BYTES = 4096
TOTAL_BYTES, FREE_BYTES = 8 << 30, 6 << 30
UUID, BUS_ID = "0b3a5a0e-0000-0000-0000-00000000000{}", "0000:A{}:00.0"

_POINTER, _ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
_OUT = object()  # by reference
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_OUT, _INT),
    "cuDeviceGetPCIBusId": (ctypes.c_char_p, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_OUT, _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuGetErrorString": (_INT, _OUT),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuStreamSynchronize": (_POINTER,),
    "cuMemHostRegister_v2": (_POINTER, _SIZE, ctypes.c_uint),
    "cuMemHostUnregister": (_POINTER,),
}


class Queue:
    """What a stream was given, oldest first, of which `num_run` have been run."""

    def __init__(self, device: int, handle: int) -> None:
        self.device, self.handle = device, handle
        self.waiting: deque[Callable[[], None]] = deque()
        self.num_run = 0

    @property
    def end(self) -> int:
        return self.num_run + len(self.waiting)

    def run(self, until: int) -> None:
        while self.num_run < until:
            step = self.waiting.popleft()
            self.num_run += 1
            step()


class FakeCuda:
    """The machine's GPUs.

    Attributes:
        calls: of the driver's functions, by name. failures: errors that their next calls return, by name.
        num_syncs: how often the host waited for a device in torch's calls. num_pageable: copies it waited for.
        pin_limit_bytes: that can be registered at once. heeds_memlock: nor more than RLIMIT_MEMLOCK.
        pinned: ranges that are, by address. contexts: devices that have one, which takes memory of theirs.
        order: of all that is done. haste, rng: how often streams go on before they must, and how far.
    """

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices
        self.order, self.haste, self.rng = HappensBefore(), 0.0, random.Random(0)
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, list[int]] = {}
        self.num_syncs = self.num_pageable = 0
        self.pin_limit_bytes, self.heeds_memlock = 1 << 60, False
        self.registered: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.contexts: set[int] = set()
        # Kept: like torch's allocator, which gives memory to nobody before its stream has come to that.
        self.allocated: list[dict[tuple[int, int], Any]] = [{} for _ in range(num_devices)]
        self.allocated_bytes = 0
        self._lost = ""
        self._queues: dict[tuple[int, int], Queue] = {}
        self._num_streams, self._local = 0, threading.local()
        self._lock = threading.RLock()

    def lose(self) -> None:
        """Every call from now on says that a kernel has gone wrong."""
        self._lost = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."

    # What CUDA keeps for each thread

    @property
    def device(self) -> int:
        return getattr(self._local, "device", 0)

    @property
    def context(self) -> int | None:
        return getattr(self._local, "context", None)

    def exchange_device(self, device: int) -> int:
        before = self.device
        if device >= 0:
            assert device < self.num_devices, "invalid device ordinal"
            self._local.device = self._local.context = device
            self.contexts.add(device)
        return before

    def maybe_exchange_device(self, device: int) -> int:
        """As torch leaves a device again: without a context for one that has none."""
        if device in self.contexts:
            return self.exchange_device(device)
        before, self._local.device = self.device, device
        return before

    def current(self, device: int) -> Queue:
        handles: dict[int, int] = getattr(self._local, "handles", {})
        return self.queue(device, handles.get(device, 0))

    def set_current(self, queue: Queue) -> None:
        self._local.handles = {**getattr(self._local, "handles", {}), queue.device: queue.handle}

    def queue(self, device: int, handle: int) -> Queue:
        return self._queues.setdefault((device, handle), Queue(device, handle))

    def new_queue(self, device: int) -> Queue:
        self._num_streams += 1
        return self.queue(device, (1 << 40) + self._num_streams)  # wider than an int

    def use_runtime(self, device: int | None = None) -> None:
        """As every call of the CUDA runtime does; `device`: that torch makes current for it."""
        if self._lost:
            raise torch.AcceleratorError(self._lost)
        used = self.device if self.context is None and device is None else device
        if used is not None:
            self.contexts.add(used)
            self._local.context = self.device if self.device in self.contexts else used

    def catch_up(self, queue: Queue) -> None:
        with self._lock:
            queue.run(queue.end)

    def wait_for(self, queue: Queue) -> None:
        """The calling thread does."""
        self.catch_up(queue)
        self.order.host_waits(self.order.known(queue))

    def hasten(self) -> None:
        """Let streams go on, now and then."""
        if self.rng.random() < self.haste:
            with self._lock:
                for queue in list(self._queues.values()):
                    queue.run(self.rng.randint(queue.num_run, queue.end))

    # The driver

    def call(self, name: str, arguments: list[Any]) -> int:
        with self._lock:
            self.calls[name] += 1
            if queued := self.failures.get(name):
                return queued.pop(0)
            if self._lost and name != "cuGetErrorString":
                return LOST
            found: int = getattr(self, f"_{name}")(*arguments)
            return found

    def _cuInit(self, flags: int) -> int:
        return INVALID_VALUE if flags else 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device.value = ordinal
        return 0 if 0 <= ordinal < self.num_devices else 101

    def _cuDeviceGetPCIBusId(self, name: Any, length: int, device: int) -> int:
        assert len(name) >= length >= 13
        name.value = BUS_ID.format(device).encode()
        return 0

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context.value = 0x7000_0000_0000 + device
        return 0

    def _cuCtxSetCurrent(self, context: int) -> int:
        self._local.device = self._local.context = context - 0x7000_0000_0000
        self.contexts.add(self.device)
        return 0

    def _cuGetErrorString(self, error: int, text: Any) -> int:
        text.value = f"error number {error}".encode()
        return 0

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, num_bytes: int, handle: int | None) -> int:
        return self._copy(target, source, num_bytes, handle, device_side=target, host_side=source)

    def _cuMemcpyDtoHAsync_v2(self, target: int, source: int, num_bytes: int, handle: int | None) -> int:
        return self._copy(target, source, num_bytes, handle, device_side=source, host_side=target)

    def _copy(
        self, target: int, source: int, num_bytes: int, handle: int | None, *, device_side: int, host_side: int
    ) -> int:
        if self.context is None:
            return INVALID_CONTEXT
        if (self.context, handle or 0) not in self._queues and handle:
            return INVALID_HANDLE
        end = device_side + num_bytes
        if not any(start <= device_side and end <= stop for start, stop in self.allocated[self.context]):
            return INVALID_VALUE
        queue = self.queue(self.context, handle or 0)
        overlaps = [min(host_side + num_bytes, at + size) - max(host_side, at) for at, size in self._pinned_ranges()]
        overlap = max(overlaps, default=0)
        if 0 < overlap < num_bytes:
            return INVALID_VALUE  # pinned in part
        queue.waiting.append(lambda: memmove(target, source, num_bytes) and None)
        self.order.enqueue(queue)
        writes, is_pageable = target == device_side, overlap <= 0
        self.order.on_stream(queue, device_side, num_bytes, writes=writes, what="a copy")
        if is_pageable:
            self.order.on_host(host_side, num_bytes, writes=not writes, what="a copy", is_loose=True)
            self.num_pageable += 1
            queue.run(queue.end)
        else:
            self.order.on_stream(queue, host_side, num_bytes, writes=not writes, what="a copy")
        self.hasten()
        return 0

    def _pinned_ranges(self) -> list[tuple[int, int]]:
        return [*self.registered.items(), *self.pinned.items()]

    def _cuStreamSynchronize(self, handle: int | None) -> int:
        if self.context is None:
            return INVALID_CONTEXT
        self.wait_for(self.queue(self.context, handle or 0))
        return 0

    def _cuMemHostRegister_v2(self, address: int, num_bytes: int, flags: int) -> int:
        if self.context is None:
            return INVALID_CONTEXT
        if flags or address % PAGE_BYTES or num_bytes % PAGE_BYTES or not num_bytes:
            return INVALID_VALUE
        if any(address < at + size and at < address + num_bytes for at, size in self.registered.items()):
            return ALREADY_REGISTERED
        memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit_bytes = min(self.pin_limit_bytes, memlock) if self.heeds_memlock else self.pin_limit_bytes
        if sum(self.registered.values()) + num_bytes > limit_bytes:
            return OUT_OF_MEMORY
        memmove(address, ctypes.string_at(address, num_bytes), num_bytes)  # all of it is there, and writable
        self.registered[address] = num_bytes
        self.order.forget(address, num_bytes)
        return 0

    def _cuMemHostUnregister(self, address: int) -> int:
        if self.context is None:
            return INVALID_CONTEXT
        num_bytes = self.registered.pop(address, 0)
        if num_bytes:
            self.give_back(address, num_bytes)
        return 0 if num_bytes else NOT_REGISTERED

    def unpin(self, address: int) -> None:
        """As torch does with what it has pinned itself."""
        self.give_back(address, self.pinned.pop(address))

    def give_back(self, address: int, num_bytes: int) -> None:
        """Memory that nothing may be copying from or to."""
        self.order.on_host(address, num_bytes, writes=True, what="giving memory back")
        self.order.forget(address, num_bytes)


class Function:
    """One of the driver's, as ctypes makes it: without `argtypes` whole numbers are passed as C ints."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self._name, self._argtypes = cuda, name, None

    @property
    def argtypes(self) -> Any:
        return self._argtypes

    @argtypes.setter
    def argtypes(self, types: tuple[Any, ...]) -> None:
        assert tuple(types) == _PROTOTYPES[self._name], f"{self._name} takes {_PROTOTYPES[self._name]}, not {types}"
        self._argtypes = types

    def __call__(self, *arguments: Any) -> int:
        prototype = _PROTOTYPES[self._name]
        assert len(arguments) == len(prototype), f"{self._name} takes {len(prototype)} arguments"
        pairs = zip(arguments, prototype, strict=True)
        return self._cuda.call(self._name, [self._taken(one, kind) for one, kind in pairs])

    def _taken(self, argument: Any, kind: Any) -> Any:
        if kind is _OUT:
            return argument._obj  # of byref
        if kind is ctypes.c_char_p:
            return argument
        if isinstance(argument, ctypes._SimpleCData):
            assert ctypes.sizeof(argument) == ctypes.sizeof(kind), f"{self._name}: {argument} is no {kind}"
            return argument.value
        assert type(argument) is int, f"{self._name}: {argument!r} is no {kind}"
        if self._argtypes is None:
            assert ctypes.sizeof(kind) == 4 and -(1 << 31) <= argument < 1 << 31, f"{self._name}: {argument} is cut off"
        assert 0 <= argument < 1 << 8 * ctypes.sizeof(kind), f"{self._name}: {argument} is no {kind}"
        return argument


class Library:
    """libcuda.so.1."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Function:
        if name not in _PROTOTYPES:
            raise AttributeError(f"libcuda.so.1: undefined symbol: {name}")
        found = Function(self._cuda, name)
        setattr(self, name, found)
        return found


_cuda: FakeCuda  # that is installed


def _index(device: Any) -> int:
    index = torch.device(device).index if device is not None and not isinstance(device, int) else device
    return _cuda.device if index is None else index


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **known: int) -> None:
        assert priority in (0, -1) and set(known) in (set(), {"stream_id", "device_index", "device_type"})
        index = known.get("device_index", _index(device))
        if not known:
            _cuda.use_runtime(index)
        self.queue = _cuda.queue(index, known["stream_id"]) if known else _cuda.new_queue(index)
        self.device = torch.device("cuda", index)

    @property
    def cuda_stream(self) -> int:
        return self.queue.handle

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        _cuda.use_runtime(self.queue.device)
        _cuda.wait_for(self.queue)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.queue is other.queue

    def __hash__(self) -> int:
        return hash(id(self.queue))


class Event:
    """torch.cuda.Event; each step of a stream takes a millisecond."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._is_timed, self._at = enable_timing, None
        self._known: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        queue = _cuda.current(_cuda.device) if stream is None else stream.queue
        _cuda.use_runtime(queue.device)
        assert self._at is None or self._at[0].device == queue.device, "an event is of one device"
        self._at = (queue, queue.end)
        _cuda.order.enqueue(queue)
        self._known = _cuda.order.known(queue)

    def wait(self, stream: Stream | None = None) -> None:
        queue = _cuda.current(_cuda.device) if stream is None else stream.queue
        _cuda.use_runtime(queue.device)
        if self._at is not None:
            queue.waiting.append(lambda at=self._at: at[0].run(at[1]))
            _cuda.order.enqueue(queue)
            _cuda.order.stream_waits(queue, self._known)

    def query(self) -> bool:
        _cuda.use_runtime()
        _cuda.hasten()
        has_happened = self._at is None or self._at[0].num_run >= self._at[1]
        if has_happened:
            _cuda.order.host_waits(self._known)
        return has_happened

    def synchronize(self) -> None:
        _cuda.use_runtime()
        if self._at is not None:
            with _cuda._lock:
                self._at[0].run(self._at[1])
        _cuda.order.host_waits(self._known)

    def elapsed_time(self, end_event: Event) -> float:
        if not (self._is_timed and end_event._is_timed and self._at and end_event._at):
            raise ValueError("Both events must be recorded, with enable_timing=True")
        _cuda.use_runtime(self._at[0].device)
        if not (self.query() and end_event.query()):
            raise ValueError("Both events must be completed")
        return float(end_event._at[1] - self._at[1])


_VIEWS = ("alias", "detach", "view", "split", "select", "slice", "unsqueeze", "t")  # no kernel of theirs
_MIXING = ("copy_", "_to_copy", "_local_scalar_dense")
_SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")


class CudaTensor(torch.Tensor):
    """A tensor on a GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> CudaTensor:
        assert type(inner) is torch.Tensor
        with torch.inference_mode(False):  # else what is a view of one made without that mode is refused
            made: CudaTensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device("cuda", index)
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:  # asks the device's library which kernel it takes
            return _run(func, args, kwargs)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            return _run(func, args, kwargs)  # it looks for the device's library before it dispatches

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


def _tensors(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call that names a GPU or takes tensors of one, on the host's tensors inside."""
    name = getattr(func, "__name__", "").partition(".")[0]
    given = _tensors(args, kwargs)
    indices = {one.device.index for one in given if isinstance(one, CudaTensor)}
    on_host = [one for one in given if not isinstance(one, CudaTensor) and one.dim() and one.device.type == "cpu"]
    target = next((one for one in (kwargs.get("device"), *args) if isinstance(one, torch.device)), None)
    if len(indices) > 1 or (indices and on_host and name not in _MIXING):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")
    to_host = target is not None and target.type == "cpu"
    index = _index(target) if target is not None and not to_host else next(iter(indices))
    if name not in _VIEWS:
        _cuda.use_runtime(index)
    if name not in _VIEWS and not name.startswith("empty"):
        _cuda.catch_up(_cuda.current(index))
    is_waited_for = name == "copy_" and bool(on_host) and not (args[2:] or kwargs.get("non_blocking"))
    _cuda.num_syncs += to_host or name in _SYNCING or is_waited_for
    if name == "_grouped_mm":
        _cuda.num_syncs += _check_groups(given)
    inside = {id(_inner(one)): one for one in given}
    plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    if not name.startswith("empty"):
        _note_kernel(func, index, given, (args, kwargs), [] if to_host else _tensors(found))
    if to_host or name in _SYNCING or is_waited_for:
        _cuda.wait_for(_cuda.current(index))
    if to_host:
        return found
    if name.startswith("empty"):
        _fill(found, index)
    assert all(one.shape == _inner(one).shape for one in inside.values()), f"{func} gives a tensor another size"
    return tree_map(lambda one: inside[id(one)] if id(one) in inside else _wrapped(one, index), found)


def _note_kernel(func: Any, index: int, taken: list[torch.Tensor], call: Any, made: list[torch.Tensor]) -> None:
    """A call reads the tensors `taken`, and writes what it was to change of them and what it made; a view is none's."""
    (args, kwargs), given = call, [one.inner for one in taken if isinstance(one, CudaTensor)]
    changed = [_inner(args[at] if at < len(args) else kwargs.get(key)) for at, key in _changed(func)]
    storages = {one.untyped_storage().data_ptr() for one in given}
    new = [one for one in made if one.untyped_storage().data_ptr() not in storages]
    if made and not changed and not new:
        return
    queue, name = _cuda.current(index), getattr(func, "__name__", "")
    _cuda.order.enqueue(queue)
    for tensors, writes in ((given, False), (_tensors(changed, new), True)):
        for one in tensors:
            _cuda.order.on_stream(queue, *span(one), writes=writes, what=name)


@cache
def _changed(func: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that it writes."""
    if not hasattr(func, "_schema"):  # one of Python's, on its way to where it is dispatched
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or name.startswith("__i") or (name[-1:] == "_" and name[-2:] != "__")
        return [(0, "self")] if in_place else []
    arguments = enumerate(func._schema.arguments)
    return [(at, one.name) for at, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _check_groups(given: list[torch.Tensor]) -> bool:
    """Whether torch's host reads how large the groups are: the one kernel on the device is bfloat16's."""
    assert all(one.data_ptr() % 16 == 0 for one in given[:2]), "expected data_ptr to be aligned to 16 bytes"
    return any(one.dtype is not torch.bfloat16 for one in given[:2])


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, CudaTensor) else value


def _wrapped(value: Any, index: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    _cuda.allocated[index][storage.data_ptr(), storage.data_ptr() + storage.nbytes()] = storage
    return CudaTensor(value, index)


def _fill(made: torch.Tensor, index: int) -> None:
    num_bytes = made.untyped_storage().nbytes()
    ctypes.memset(made.data_ptr(), 255, num_bytes)
    _cuda.allocated_bytes += num_bytes


@contextmanager
def _current_stream(stream: Stream) -> Iterator[None]:
    index = stream.queue.device
    before = _cuda.current(index)
    _cuda.set_current(stream.queue)
    try:
        yield
    finally:
        _cuda.set_current(before)


def _pinned(cuda: FakeCuda, tensor: torch.Tensor) -> torch.Tensor:
    address = tensor.data_ptr()
    cuda.pinned[address] = max(1, tensor.nbytes)
    cuda.order.forget(address, tensor.nbytes)
    weakref.finalize(tensor, cuda.unpin, address).atexit = False
    return tensor


def _properties(index: int) -> SimpleNamespace:
    return SimpleNamespace(name="Fake GPU", total_memory=TOTAL_BYTES, uuid=UUID.format(index), major=9, minor=0)


def _raw_stream(cuda: FakeCuda, index: int) -> int:
    assert type(index) is int, f"device index {index!r}"
    return cuda.current(index).handle


@contextmanager
def installed(num_devices: int = 1) -> Iterator[FakeCuda]:
    """Within it torch has GPUs, in all threads."""
    global _cuda
    assert not torch.backends.cuda.is_built(), "there is a real one"
    _cuda = cuda = FakeCuda(num_devices)
    patch, library, real = pytest.MonkeyPatch(), Library(cuda), ctypes.CDLL
    empty, tensor = torch.empty, torch.tensor
    _device_constructors()  # before they are replaced: it keeps what it finds

    def load_library(name: str | None, *args: Any, **kwargs: Any) -> Any:
        return library if name == "libcuda.so.1" else real(name, *args, **kwargs)

    def empty_pinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return _pinned(cuda, made.fill_(255)) if pin_memory else made

    def there(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Made in one step: torch's own go past the dispatcher, or resize what they have made empty."""

        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if device is None or torch.device(device).type != "cuda":
                return make(*args, device=device, **kwargs)
            cuda.use_runtime(_index(device))
            here = make(*args, device="cpu", **kwargs)
            cuda.num_syncs += make is tensor and here.numel() > 0
            made: torch.Tensor = _wrapped(here, _index(device))
            _note_kernel(make, _index(device), [], ((), {}), [here])
            return made

        return made

    def statistics(index: int) -> dict[str, Any]:
        return {f"{kind}_bytes": {"all": dict.fromkeys(("current", "peak"), cuda.allocated_bytes)} for kind in _KINDS}

    def synchronize(device: Any = None) -> None:
        cuda.use_runtime(_index(device))
        for queue in list(cuda._queues.values()):
            if queue.device == _index(device):
                cuda.wait_for(queue)

    below: dict[str, Any] = {
        "_cuda_getDevice": lambda: cuda.device,
        "_cuda_getCurrentRawStream": lambda index: _raw_stream(cuda, index),
        "_cuda_getCurrentStream": lambda index: (cuda.current(index).handle, index, 1),
        "_cuda_getDefaultStream": lambda index: (0, index, 1),
        "_cuda_memoryStats": statistics,
        "_cuda_emptyCache": lambda: None,
    }
    above: dict[str, Any] = {
        "_initialized": True,
        "default_generators": tuple(torch.Generator() for _ in range(num_devices)),
        "is_available": lambda: True,
        "device_count": lambda: num_devices,
        "_exchange_device": cuda.exchange_device,
        "_maybe_exchange_device": cuda.maybe_exchange_device,
        "_get_device_properties": _properties,
        "cudart": lambda: SimpleNamespace(cudaMemGetInfo=lambda index: (FREE_BYTES, TOTAL_BYTES)),
        "synchronize": synchronize,
        "Stream": Stream,
        "Event": Event,
        "stream": _current_stream,
    }
    fallback = torch.library.Library("_", "IMPL")
    watching = ExitStack()
    fallback.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "CUDA")
    try:
        watching.enter_context(cuda.order.watching())
        patch.setattr(ctypes, "CDLL", load_library)
        patch.setattr(torch, "empty", empty_pinned)
        patch.setattr(torch, "arange", there(torch.arange))
        patch.setattr(torch, "tensor", there(tensor))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: _pinned(cuda, tensor.clone()))
        for name, value in below.items():
            patch.setattr(torch._C, name, value, raising=False)
        for name, value in above.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        readback._uploaders.clear()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a plain tensor cannot become one of ours
        yield cuda
    finally:
        for queue in list(cuda._queues.values()):
            cuda.order.host_waits(cuda.order.known(queue))  # the process ends
        gc.collect()  # engines that were given up end on the driver that they are of
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        readback._uploaders.clear()
        fallback._destroy()
        patch.undo()
        watching.close()
    assert not cuda.order.races, "\n".join(cuda.order.races)


_KINDS = ("allocated", "reserved")
COMPILED = (
    "_cuda_getDevice",
    "_cuda_getCurrentRawStream",
    "_cuda_getCurrentStream",
    "_cuda_getDefaultStream",
    "_cuda_memoryStats",
    "_cuda_emptyCache",
)
REPLACED = (
    "is_available",
    "device_count",
    "_exchange_device",
    "_maybe_exchange_device",
    "cudart",
    "synchronize",
    "Stream",
    "Event",
    "stream",
)
