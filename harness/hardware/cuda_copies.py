"""Copies between host and an NVIDIA GPU through torch; timed by `harness.hardware.copies`."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from harness.hardware.copies import CopyError, Direction, HostBuffer

_LOAD_BYTES = 128 << 20
# How long the device waits before it starts, so that the host has enqueued everything by then.
_CYCLES_PER_OPERATION = 40_000


class CudaCopies:
    """A `CopyDevice`: one stream for each direction, one for the load, and one that holds them back until all is
    enqueued. `close` gives everything back."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._gate, self._copy, self._back, self._load = (torch.cuda.Stream(self._device) for _ in range(4))
        self._host: list[torch.Tensor] = []
        self._gpu: list[torch.Tensor] = []
        self._operands: list[torch.Tensor] = []
        self._registered: list[int] = []
        self._events: list[torch.cuda.Event] = []
        self._started: tuple[Direction, int, int, bool] | None = None
        self._copy_s: dict[tuple[Direction, int], float] = {}

    def allocate(self, memory: HostBuffer, num_bytes: int) -> None:
        self.close()
        with _refusals(self._device), torch.cuda.device(self._device):
            try:
                self._gpu = [torch.zeros(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
                for _ in range(2):
                    self._host.append(self._host_buffer(memory, num_bytes))
            except BaseException:
                self.close()
                raise

    def start(self, direction: Direction, num_bytes: int, num_copies: int, *, under_load: bool) -> None:
        with _refusals(self._device), torch.cuda.device(self._device):
            num_loads = self._num_loads(direction, num_bytes, num_copies) if under_load else 0
            self._hold_back(3 * num_copies + num_loads)
            with torch.cuda.stream(self._load):
                for _ in range(num_loads):
                    torch.add(self._operands[0], self._operands[1], out=self._operands[2])
            if direction is Direction.BOTH:
                with torch.cuda.stream(self._back):
                    # More than are timed the other way, which should be beside them to its end.
                    for _ in range(2 * num_copies):
                        self._host[1][:num_bytes].copy_(self._gpu[1][:num_bytes], non_blocking=True)
            source, target = self._host[0][:num_bytes], self._gpu[0][:num_bytes]
            if direction is Direction.TO_HOST:
                source, target = target, source
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            with torch.cuda.stream(self._copy):
                self._events[0].record()
                for _ in range(num_copies):
                    target.copy_(source, non_blocking=True)
                self._events[1].record()
            self._events[0].synchronize()
            self._started = (direction, num_bytes, num_copies, under_load)

    def finish(self) -> float:
        assert self._started is not None, "nothing was started"
        direction, num_bytes, num_copies, under_load = self._started
        with _refusals(self._device):
            self._events[1].synchronize()
            seconds = float(self._events[0].elapsed_time(self._events[1])) / 1e3
            torch.cuda.synchronize(self._device)
        if not under_load:
            self._copy_s[direction, num_bytes] = seconds / num_copies
        return seconds

    def is_intact(self, num_bytes: int) -> bool:
        with _refusals(self._device), torch.cuda.device(self._device):
            sent, received = (one[:num_bytes] for one in self._host)
            # Eight bytes a draw: torch draws each byte anew, which takes seconds for a large buffer.
            drawn = np.random.default_rng().integers(0, 1 << 63, -(-num_bytes // 8), np.int64)
            sent.copy_(torch.from_numpy(drawn).view(torch.uint8)[:num_bytes])
            received.zero_()
            self._gpu[0][:num_bytes].copy_(sent)
            received.copy_(self._gpu[0][:num_bytes])
            torch.cuda.synchronize(self._device)
            return torch.equal(sent, received)

    def close(self) -> None:
        """Idempotent."""
        with suppress(RuntimeError):  # a GPU that was lost in the middle
            torch.cuda.synchronize(self._device)
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())
        self._host, self._gpu, self._operands = [], [], []
        torch.cuda.empty_cache()
        # torch keeps freed pinned memory, too, and has no public way to have it back.
        if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
            empty()

    def _host_buffer(self, memory: HostBuffer, num_bytes: int) -> torch.Tensor:
        if memory is HostBuffer.PINNED:
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(mapping, dtype=torch.uint8).zero_()
        if memory is HostBuffer.REGISTERED:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
            self._registered.append(tensor.data_ptr())
        return tensor

    def _hold_back(self, num_operations: int) -> None:
        opened: Any = torch.cuda.Event()
        with torch.cuda.stream(self._gate):
            torch.cuda._sleep(_CYCLES_PER_OPERATION * num_operations)
            opened.record()
        for stream in (self._copy, self._back, self._load):
            stream.wait_event(opened)

    def _num_loads(self, direction: Direction, num_bytes: int, num_copies: int) -> int:
        """Additions that last twice as long as the copies do without them."""
        if not self._operands:
            shape = (3, _LOAD_BYTES // 4)
            self._operands = list(torch.ones(shape, dtype=torch.float32, device=self._device))
        copies_s = num_copies * self._copy_s.get((direction, num_bytes), num_bytes / 10e9 + 1e-5)
        return 2 + int(2 * copies_s / self._addition_s())

    def _addition_s(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._load):
            for number in range(3):  # the first one is not timed
                if number == 1:
                    begin.record()
                torch.add(self._operands[0], self._operands[1], out=self._operands[2])
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 2e3


@contextmanager
def _refusals(device: torch.device) -> Iterator[None]:
    """What torch raises as CopyError, its first line only."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        with suppress(RuntimeError):  # CUDA keeps the error for whatever launches a kernel next
            torch.ones(1, device=device)
        lines = str(error).strip().splitlines()
        raise CopyError(lines[0] if lines else type(error).__name__) from error
