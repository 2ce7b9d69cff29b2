"""How long one expert takes to compute, with the engine's own kernels on experts of the model's own shape.

One sample is what a layer step does: a kernel is given `top_k` experts at once, each with the same number of tokens;
its time is divided among them. Steps go round an arena that is larger than the processor's caches, since an engine
that serves does not find the expert of a token in a cache either.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from runtime import machine

if TYPE_CHECKING:
    import torch

    from runtime.kernels import Arrival, Kernel
    from runtime.model import LoadedModel
    from runtime.transfer.layout import ExpertLayer

TOKENS = (1, 2, 4, 8, 16, 32, 64)
CPU_KERNEL = "gemv"
"""That does not run on a GPU."""
_ARENA_BYTES = 256 << 20
_MAX_SAMPLES = 10  # of one point in one round
_ROUNDS = 6  # so that a moment in which something else runs does not fall on one point alone


@dataclass(frozen=True)
class ExpertTime:
    """Least seconds of one expert for `num_tokens` tokens, with `threads` threads of computation; on a GPU those of the
    step that the host has waited for, so of whichever of the two is slower."""

    kernel: str
    threads: int
    num_tokens: int
    seconds: float


def measure_experts(
    loaded: LoadedModel,
    top_k: int,
    *,
    threads: Sequence[int] = (),
    budget_s: float = 3.0,
    device: str | torch.device = "cpu",
) -> tuple[ExpertTime, ...]:
    """Time every kernel with 1, 2, 4, … 64 tokens, in about `budget_s` seconds.

    Each kernel and number of threads has the same share of that time; for one token there is always an estimate, the
    tokens for which the share is too short are left out.

    Args:
        loaded: `runtime.model.meta_model`; the experts of its first layer are timed.
        top_k: experts that a layer step computes.
        threads: numbers of threads; by default 1, 2, 4, … and all cores.
        device: that computes; a GPU computes with the kernels that run there.
    """
    import torch

    place = torch.device(device)
    kernels = _kernels(place)
    series = [(name, count) for name in kernels for count in threads or _thread_counts(machine.cpu_count())]
    tokens = {one: cycle(TOKENS) for one in series}
    found: dict[tuple[str, int, int], float] = {}
    steps, visit_s = _Steps(loaded, top_k, place), budget_s / (_ROUNDS * len(series))
    with torch.inference_mode(), _threads_restored():
        for name, count in series * _ROUNDS:
            torch.set_num_threads(count)
            end = time.perf_counter() + visit_s
            for num_tokens in islice(tokens[name, count], len(TOKENS)):
                seconds = steps.time(kernels[name], num_tokens, visit_s / len(TOKENS))
                # Other processes only ever add time: the least says most about this machine.
                point = (name, count, num_tokens)
                found[point] = min(seconds, found.get(point, seconds))
                if time.perf_counter() > end:
                    break
    return tuple(ExpertTime(*point, seconds) for point, seconds in sorted(found.items()))


@contextmanager
def computing() -> Iterator[None]:
    """Another thread multiplies matrices meanwhile, as an engine does that loads experts."""
    import torch

    matrix, stop = torch.ones(512, 512), threading.Event()

    def multiply() -> None:
        while not stop.is_set():
            torch.mm(matrix, matrix)

    thread = threading.Thread(target=multiply, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _thread_counts(num_cores: int) -> list[int]:
    return sorted({*(1 << power for power in range(num_cores.bit_length())), num_cores})


def _kernels(device: torch.device) -> dict[str, type[Kernel]]:
    from runtime.kernels import KERNELS

    return {name: kernel for name, kernel in KERNELS.items() if device.type == "cpu" or name != CPU_KERNEL}


@contextmanager
def _threads_restored() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Steps:
    """Layer steps on an arena of equal experts, one after the other."""

    def __init__(self, loaded: LoadedModel, top_k: int, device: torch.device) -> None:
        import torch

        self._device = device
        layer, module = loaded.layers[0], loaded.modules[0]
        # A norm behind the experts has weights, which are on the meta device here.
        self._module = copy.deepcopy(module).to_empty(device=device)
        for parameter in self._module.parameters():
            torch.nn.init.ones_(parameter)
        self._top_k = min(top_k, layer.num_experts)
        self._dtype = layer.parameters[0].dtype
        up = next(one for one in layer.parameters if one.name == ("gate_up_proj" if module.has_gate else "up_proj"))
        self._hidden_size = up.shape[0 if module.is_transposed else 1]
        self._experts = _experts(layer, layer.num_experts * len(loaded.layers), device)
        self._next = 0

    def time(self, kernel: type[Kernel], num_tokens: int, budget_s: float) -> float:
        """Least seconds of an expert in steps that take `budget_s` together, at least one after one to warm up."""
        import torch

        hidden = torch.randn(num_tokens, self._hidden_size).to(self._device, self._dtype)
        index = torch.arange(self._top_k).expand(num_tokens, -1).contiguous()
        weights = torch.full((num_tokens, self._top_k), 1 / self._top_k, dtype=self._dtype, device=self._device)
        end, samples = time.perf_counter() + budget_s, list[float]()
        self._step(kernel, hidden, index, weights)
        while not samples or (time.perf_counter() < end and len(samples) < _MAX_SAMPLES):
            samples.append(self._step(kernel, hidden, index, weights))
        return min(samples)

    def _step(self, kernel: type[Kernel], hidden: Any, index: torch.Tensor, weights: torch.Tensor) -> float:
        arrivals, routed = list(self._arrivals()), index.to(self._device)
        self._synchronize()
        start = time.perf_counter()
        one = kernel(self._module, hidden, routed, weights, range(self._top_k), index.numpy())
        one.add(arrivals)
        one.result()
        self._synchronize()
        return (time.perf_counter() - start) / self._top_k

    def _synchronize(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _arrivals(self) -> Iterator[Arrival]:
        from runtime.kernels import Arrival

        for expert in range(self._top_k):
            yield Arrival(expert, self._experts[self._next])
            self._next = (self._next + 1) % len(self._experts)


def _experts(layer: ExpertLayer, num_experts: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Equal random experts in slots of an arena: as many as `_ARENA_BYTES` hold, at most `num_experts`."""
    import torch

    from runtime.transfer.device_slots import DeviceSlots
    from runtime.transfer.host_slab import ALIGNMENT_BYTES
    from runtime.transfer.layout import align
    from runtime.transfer.slots import SlotArena, TensorPlace

    on_cpu = device.type == "cpu"
    free_bytes = machine.available_memory_bytes() if on_cpu else torch.cuda.mem_get_info(device)[0]
    num_slots = max(1, min(num_experts, min(_ARENA_BYTES, free_bytes // 4) // layer.slot_bytes))
    arena = SlotArena(num_slots, layer.slot_bytes) if on_cpu else DeviceSlots(num_slots, layer.slot_bytes, device)
    places, offset = list[TensorPlace](), 0
    for parameter in layer.parameters:
        places.append(TensorPlace(parameter.name, offset, parameter.shape, parameter.dtype))
        offset = align(offset + parameter.num_bytes, ALIGNMENT_BYTES)
    experts = [{place.name: arena.view(slot, place) for place in places} for slot in range(num_slots)]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in experts[0].items():
        tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0.0, 0.02, generator=generator))
        for other in experts[1:]:
            other[name].copy_(tensor)
    return experts
