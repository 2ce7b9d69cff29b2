"""The experts implementation that is registered with transformers, and its kernels.

A transformers experts module calls `forward(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`.
Here the experts come from a source, in any order, as they are ready; each kernel accumulates in the order and dtype
in which its resident counterpart does, so that the result is the same to the bit:

    eager        the loop of the class's own forward: `index_add_` in ascending order of experts
    grouped_mm   transformers' grouped_mm: rows by (token, rank), weighted and summed over the ranks
    gemv         like grouped_mm, with our own matrix-vector kernel

Experts that are computed on the host (`HostArrival`) are rounded otherwise, and their rows take the same places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, _grouped_mm

from runtime.gemv import Rows, gemv
from runtime.readback import HostReader, Reader, upload

if TYPE_CHECKING:
    from runtime.host_experts import HostExperts, HostLayer

IMPLEMENTATION = "expertflow"

Weights = Mapping[str, torch.Tensor]
"""The parameters of one expert by their name in the experts module, without the leading expert dimension."""


class Arrival(NamedTuple):
    """Experts (indices in the layer) with their weights, ready to compute."""

    expert: int
    weights: Weights


class HostArrival(Arrival):
    """An expert that is not on the device: computed on the host, where these weights rest."""

    __slots__ = ()


class HostRows(NamedTuple):
    """What the host has computed, on the device.

    Attributes:
        experts: their rows are `rows[ends[i] : ends[i + 1]]`.
        positions: token * K + rank of each row, [n]. tokens: [n].
        rows: [n, H], before any weighting.
    """

    experts: Sequence[int]
    ends: Sequence[int]
    positions: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor


class ExpertSource(Protocol):
    """Where a layer's experts come from."""

    def ask(self) -> Sequence[torch.Tensor]:
        """Tensors that `serve` wants to see on the host, beside the router's choice; they need not be computed yet."""
        ...

    def serve(
        self,
        experts: Sequence[int],
        tokens: Sequence[int],
        choice: npt.NDArray[np.int64],
        answers: Sequence[torch.Tensor],
    ) -> Generator[Sequence[Arrival], None, None]:
        """Yield the distinct `experts` in groups as they are ready, in any order.

        `tokens[i]` tokens chose `experts[i]`; `choice` is the router's [T, K]; `answers` are what `ask` named. No group
        mixes the two kinds of arrival. Weights may be used until the next group is asked for.
        """
        ...


class _Numerics(NamedTuple):
    """How a class's own forward differs from the common one."""

    accumulate: Callable[[torch.Tensor, torch.Tensor], torch.dtype] = lambda hidden, weights: hidden.dtype
    compute: torch.dtype | None = None


# Read off the classes' forward methods; each row is proven by the exactness test of its family.
_EAGER_NUMERICS: dict[str, _Numerics] = {
    "NemotronHExperts": _Numerics(accumulate=lambda hidden, weights: weights.dtype),
    "Inkling2Experts": _Numerics(accumulate=lambda hidden, weights: torch.float32),
    "Inkling2LoopExperts": _Numerics(accumulate=lambda hidden, weights: torch.float32),
    "OpenAIPrivacyFilterExperts": _Numerics(accumulate=lambda hidden, weights: torch.float32, compute=torch.float32),
}


_Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_Activate = Callable[[torch.Tensor], torch.Tensor]


class Kernel(ABC):
    """Computes one call of an experts module, expert by expert as they arrive.

    `choice` is `index` [T, K] on the host: on a GPU nothing here waits for the device to tell it again.

    Attributes:
        host: computes experts on the host; None: none will be.
    """

    host: HostLayer | None = None
    _compute: torch.dtype | None = None  # that a class computes in, where that is not the weights'

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        choice: npt.NDArray[np.int64],
    ) -> None:
        self.module, self.hidden, self.index, self.weights = module, hidden, index, weights
        self.experts, self._choice = experts, choice

    @abstractmethod
    def add(self, arrivals: Sequence[Arrival]) -> None:
        """Compute experts for their tokens. Each of `experts` once, in any order and in any groups."""

    @torch.no_grad()
    def add_from_host(self, arrivals: Sequence[HostArrival]) -> None:
        """The same on the host, while the device goes on; then its rows are sent to the device."""
        places, rows = self._on_host.rows_of(arrivals)
        ends = np.cumsum([0, *map(len, places)]).tolist()
        flat = np.concatenate(places)
        positions, tokens = upload(np.stack([flat, flat // self.index.shape[-1]]), self.hidden.device)
        experts = [arrival.expert for arrival in arrivals]
        self._accept(HostRows(experts, ends, positions, tokens, upload(rows, self.hidden.device)))

    @abstractmethod
    def _accept(self, computed: HostRows) -> None:
        """Take in what the host has computed."""

    @cached_property
    def host_hidden(self) -> torch.Tensor:
        """`hidden` on the host. Asking for it waits for all that the device was given, unless it was set before."""
        return self.hidden.detach().cpu()

    @cached_property
    def _on_host(self) -> HostExperts:
        assert self.host is not None, "this layer computes nothing on the host"
        return self.host.experts(self.host_hidden, self._choice, self._compute)

    @abstractmethod
    def result(self) -> torch.Tensor:
        """[T, H] in the dtype of `hidden`, once every expert has been added."""

    def _feed_forward(self, x: torch.Tensor, weights: Weights, linear: _Linear, activate: _Activate) -> torch.Tensor:
        """up (-> gate) -> down (-> norm) of one expert for rows `x` [n, H]."""
        x = activate(linear(x, weights[self._up], weights.get(f"{self._up}_bias")))
        return self._normalise(linear(x, weights["down_proj"], weights.get("down_proj_bias")))

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module._apply_gate(x) if self.module.has_gate else self.module.act_fn(x)
        return out

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        # The flag is younger than transformers 5.17.
        has_norm = getattr(self.module, "has_post_expert_norm", False)
        out: torch.Tensor = self.module.post_expert_norm(x) if has_norm else x
        return out


class EagerKernel(Kernel):
    """The loop that experts classes carry themselves."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        choice: npt.NDArray[np.int64],
    ) -> None:
        super().__init__(module, hidden, index, weights, experts, choice)
        self._numerics = _EAGER_NUMERICS.get(type(module).__name__, _Numerics())
        self._compute = self._numerics.compute
        self._final = torch.zeros_like(hidden, dtype=self._numerics.accumulate(hidden, weights))
        self._order = iter(sorted(experts))
        self._next = next(self._order, None)
        self._waiting: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def add(self, arrivals: Sequence[Arrival]) -> None:
        for expert, weights in arrivals:
            token, hidden, share = self._chosen_by(expert)
            rows = self._feed_forward(self._cast(hidden), weights, self._linear, self._activate)
            rows = rows * self._cast(share)
            self._waiting[expert] = (token, rows if rows.dtype == self._final.dtype else rows.to(self._final.dtype))
        self._accumulate()

    def _accept(self, computed: HostRows) -> None:
        share = self._cast(self.weights.reshape(-1, 1)[computed.positions])
        rows = (computed.rows * share).to(self._final.dtype)
        for expert, (start, end) in zip(computed.experts, pairwise(computed.ends), strict=True):
            is_one = len(self.hidden) == end - start == 1
            self._waiting[expert] = (None if is_one else computed.tokens[start:end], rows[start:end])
        self._accumulate()

    def _accumulate(self) -> None:
        """Add what waits for no expert before it."""
        while self._next in self._waiting:
            token, rows = self._waiting.pop(self._next)
            if token is None:
                self._final += rows
            else:
                self._final.index_add_(0, token, rows)
            self._next = next(self._order, None)

    def _chosen_by(self, expert: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The tokens [n] that chose an expert, by the rank that they gave it, their hidden states [n, H] and weights
        [n, 1]. A single token is None: it needs no gathering, each step of which is a kernel of its own on a GPU."""
        if self._shares is not None:
            return None, self.hidden, self._shares[expert]
        token, hidden, share = self._by_expert[expert]
        return token, self.hidden[token] if hidden is None else hidden, share

    @cached_property
    def _shares(self) -> dict[int, torch.Tensor] | None:
        """The weight [1, 1] of each expert of a single token; None for several, or where it chose one twice."""
        chosen = self._choice[0].tolist() if len(self._choice) == 1 else []
        if not chosen or len(set(chosen)) < len(chosen):
            return None
        return dict(zip(chosen, self.weights.split(1, dim=1), strict=True))

    @cached_property
    def _by_expert(self) -> dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """What `_chosen_by` says of each expert, as views of what is gathered for all at once. The hidden states are
        None where they have to be gathered alone, to be aligned as the class's own are."""
        by_rank = self._choice.T.reshape(-1)
        ranks, tokens = np.divmod(_ascending(by_rank), len(self._choice))
        experts, sizes = _count(by_rank)
        token, rank = upload(np.stack([tokens, ranks]), self.hidden.device)
        hidden: Sequence[torch.Tensor | None] = [None] * len(sizes)
        if _may_gather_at_once(self.hidden, len(by_rank)):
            hidden = self.hidden[token].split(sizes)
        views = zip(token.split(sizes), hidden, self.weights[token, rank, None].split(sizes), strict=True)
        return dict(zip(experts, views, strict=True))

    def result(self) -> torch.Tensor:
        assert self._next is None, f"expert {self._next} was never added"
        return self._final.to(self.hidden.dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._numerics.compute is None else tensor.to(self._numerics.compute)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, x = self._cast(weight), self._cast(x)
        out = x @ weight if self.module.is_transposed else nn.functional.linear(x, weight)
        return out if bias is None else out + self._cast(bias)


# torch's CPU loops compute whole blocks of two vectors with vector code and what is left with scalar code, whose
# transcendental functions round differently. No block of any dtype and instruction set is longer than this.
_VECTOR_BLOCK = 64
# From this many elements on they are shared by the threads in equal parts, wherever in a row those end.
_GRAIN = 32768


class RowKernel(Kernel):
    """One row per (token, rank); the ranks of a token are weighted and summed at the end, whatever arrived first."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        choice: npt.NDArray[np.int64],
    ) -> None:
        super().__init__(module, hidden, index, weights, experts, choice)
        self._flat = choice.reshape(-1)
        self._rows: torch.Tensor | None = None

    @property
    def _has_default_gate(self) -> bool:
        """The gate reads rows of two halves, so that torch's loops go row by row."""
        return bool(self.module.has_gate) and type(self.module)._apply_gate is _default_apply_gate

    def _rows_are_independent(self, x: torch.Tensor) -> bool:
        """Whether activating rows like `x`, [n, columns], gives the same whatever other rows are in the call."""
        num_columns = x.shape[-1] // (2 if self.module.has_gate else 1)
        if num_columns % (_VECTOR_BLOCK * torch.get_num_threads()) == 0:
            return True
        is_unshared = torch.get_num_threads() == 1 or self._flat.size * num_columns < _GRAIN
        return self._has_default_gate and is_unshared

    def _weigh(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sum [t, H] over the ranks of `rows` [t * K, H], which are overwritten, times their `weights` [t, K]."""
        shares = weights.reshape(-1, 1)
        # In place where the product has the rows' dtype: a long prompt's rows are the largest activation there is.
        weighted = rows.mul_(shares) if shares.dtype == rows.dtype else rows * shares
        return weighted.view(*weights.shape, -1).sum(dim=1).to(self.hidden.dtype)

    def _accept(self, computed: HostRows) -> None:
        if self._rows is None:
            self._rows = computed.rows.new_zeros(self._flat.size, computed.rows.shape[-1])
        self._rows[computed.positions] = computed.rows

    def result(self) -> torch.Tensor:
        return torch.zeros_like(self.hidden) if self._rows is None else self._weigh(self._rows, self.weights)


class _Group(NamedTuple):
    """The rows of one expert among those of all, sorted: where they start, the rows [n, H], and [1] their number."""

    start: int
    rows: torch.Tensor
    num_rows: torch.Tensor


class GroupedKernel(RowKernel):
    """transformers' grouped_mm, called with one group at a time.

    transformers activates the rows of all experts in one call. Where an element would then be computed by other code
    than in a call of its own rows, that call is imitated.
    """

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The experts of all rows, ascending, and the rows, as transformers' sort leaves them.

        That sort is not stable, and MKL and torch's loops round a row by its place among those of the call. On a GPU a
        row does not depend on its place, and asking for theirs would make the host wait.
        """
        if self.index.device.type != "cpu":
            order = _ascending(self._flat)
            return self._flat[order], order
        experts, rows = torch.sort(self.index.reshape(-1))
        return experts.numpy(), rows.numpy()

    @cached_property
    def _places(self) -> torch.Tensor:
        """[3, T * K]: the token of each row in that order, where each row went, and the rows of each expert that has
        any, in the first places."""
        order, num_rows = self._sorted[1], np.zeros_like(self._flat)
        where, sizes = np.empty_like(order), _count(self._flat)[1]
        where[order], num_rows[: len(sizes)] = np.arange(order.size), sizes
        return upload(np.stack([order // self.index.shape[-1], where, num_rows]), self.hidden.device)

    @cached_property
    def _gathered(self) -> torch.Tensor:
        """The hidden states of all rows in that order, [T * K, H]."""
        return self.hidden[self._places[0]]

    @cached_property
    def _groups(self) -> dict[int, _Group]:
        """The group of every expert."""
        experts, sizes = _count(self._flat)
        starts = (np.cumsum(sizes) - sizes).tolist()
        num_rows = self._places[2, : len(sizes)].to(torch.int32).split(1)
        groups = map(_Group, starts, _split(self._gathered, sizes), num_rows)
        return dict(zip(experts, groups, strict=True))

    def add(self, arrivals: Sequence[Arrival]) -> None:
        for expert, weights in arrivals:
            group = self._groups[expert]
            linear, activate = partial(self._linear, group.num_rows), partial(self._activate_among, group.start)
            self._put(group, self._feed_forward(group.rows, weights, linear, activate))

    def _put(self, group: _Group, computed: torch.Tensor) -> None:
        """Keep what was computed of a group: in its place, which nobody reads any more, if it fits there."""
        kept = self._room_for(computed)
        rows = group.rows if kept is self._gathered else kept[group.start : group.start + len(computed)]
        rows.copy_(computed)

    def _accept(self, computed: HostRows) -> None:
        self._room_for(computed.rows)[self._places[1][computed.positions]] = computed.rows

    def _room_for(self, computed: torch.Tensor) -> torch.Tensor:
        """Where rows like `computed` are kept, [T * K, H] in sorted order."""
        gathered = self._gathered
        if self._rows is None:
            is_alike = computed.dtype == gathered.dtype and computed.shape[-1] == gathered.shape[-1]
            self._rows = gathered if is_alike else computed.new_zeros(len(gathered), computed.shape[-1])
        return self._rows

    def result(self) -> torch.Tensor:
        """See `Kernel.result`."""
        if self._rows is None:
            return torch.zeros_like(self.hidden)
        num_chosen = int(np.searchsorted(self._sorted[0], self.module.num_experts))
        if num_chosen < len(self._rows):
            self._rows[num_chosen:] = 0.0  # of no expert
        top_k = self.index.shape[-1]
        at_once = max(1, _AT_ONCE_BYTES // (top_k * self._rows.shape[-1] * self._rows.element_size()))
        parts = zip(self._places[1].split(at_once * top_k), self.weights.split(at_once), strict=True)
        sums = [self._weigh(self._rows[where], weights) for where, weights in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _activate_among(self, start: int, x: torch.Tensor) -> torch.Tensor:
        """Activate the rows of one expert as transformers' call does, where they stand among those of all experts: from
        row `start` on."""
        if self._rows_are_independent(x) or x.device.type != "cpu" or not self.module.has_gate:
            return self._activate(x)
        if self._has_default_gate:
            return self._activate_in_parts(start, x)
        among = x.new_zeros(self._flat.size, x.shape[-1])
        among[start : start + len(x)] = x
        return self._activate(among)[start : start + len(x)]

    def _activate_in_parts(self, start: int, x: torch.Tensor) -> torch.Tensor:
        """Where a thread's part of transformers' call ends within a row, its two sides are activated separately."""
        num_columns = x.shape[-1] // 2
        num_elements = self._flat.size * num_columns
        part = -(-num_elements // min(torch.get_num_threads(), -(-num_elements // _GRAIN)))
        ends = {end // num_columns - start: end % num_columns for end in range(part, num_elements, part)}
        step = max(1, (_GRAIN - 1) // num_columns)  # rows that are not shared
        out, row = [], 0
        while row < len(x):
            if column := ends.get(row, 0):
                halves = x[row].view(2, -1)
                sides = [halves[:, :column].reshape(1, -1), halves[:, column:].reshape(1, -1)]
                out.append(torch.cat([self._activate(side) for side in sides], dim=1))
                row += 1
            else:
                stop = min([row + step, len(x), *(end for end in ends if end > row)])
                out.append(self._activate(x[row:stop]))
                row = stop
        return torch.cat(out)

    def _linear(
        self, num_rows: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        (num_in, num_out), (row, column) = weight.shape, weight.stride()
        size, stride = (1, num_in, num_out), (num_in * row, row, column)
        if not self.module.is_transposed:
            size, stride = (1, num_out, num_in), (num_in * row, column, row)
        out = _grouped_mm(x, weight.as_strided(size, stride), offs=num_rows)  # a view: as by unsqueeze and transpose
        return out if bias is None else out.add_(bias)


_AT_ONCE_BYTES = 128 << 20
"""Rows are copied in another order for so many bytes at a time: all at once they would need twice their memory."""


def _split(rows: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Views of `sizes` rows each, one after the other, that can be written to."""
    if not rows.requires_grad:
        parts: tuple[torch.Tensor, ...] = rows.split(sizes)
        return parts
    starts = np.cumsum(sizes) - sizes  # autograd forbids to write to what was split
    return [rows[start : start + size] for start, size in zip(starts.tolist(), sizes, strict=True)]


def _may_gather_at_once(hidden: torch.Tensor, num_rows: int) -> bool:
    """Whether parts of a tensor of so many rows like those of `hidden` do for tensors of their own: not too many bytes,
    and aligned like what torch allocates, as MKL's results and cuBLAS's choice of kernels depend on that."""
    row_bytes = hidden.shape[-1] * hidden.element_size()
    alignment_bytes = 64 if hidden.device.type == "cpu" else 256
    return row_bytes % alignment_bytes == 0 and num_rows * row_bytes <= _AT_ONCE_BYTES


def _ascending(experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each place of the sorted `experts` was before; equal ones keep their order."""
    return np.argsort(experts.astype(np.uint16), kind="stable")  # short integers are sorted by their digits


def _count(experts: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """The distinct ones of `experts`, ascending, and how many there are of each."""
    counts = np.bincount(experts)
    distinct = np.flatnonzero(counts)
    return distinct.tolist(), counts[distinct].tolist()


class GemvKernel(RowKernel):
    """Matrix-vector products of our own, all arrived experts in one call; see `gemv.py`."""

    _wide: torch.Tensor | None = None  # the hidden states as float32

    @cached_property
    def _places(self) -> dict[int, list[int]]:
        """The rows of every expert, ascending."""
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(self._flat.tolist()):
            places.setdefault(expert, []).append(place)
        return places

    def add(self, arrivals: Sequence[Arrival]) -> None:
        starts, places = [0], list[int]()
        for expert, _ in arrivals:
            places += self._places[expert]
            starts.append(len(places))
        own, top_k = list(range(len(places))), self.index.shape[-1]
        like = arrivals[0].weights[self._up]
        if self._wide is None:  # as the weights would see it: rounded to their dtype first
            self._wide = self.hidden.to(like.dtype).to(torch.float32)
        if self._rows is None:
            self._rows = like.new_zeros(self._flat.size, self.hidden.shape[-1])
        x = like.new_empty(len(places), like.shape[1 if self.module.is_transposed else 0])
        self._multiply(arrivals, self._up, self._wide, Rows(starts, [place // top_k for place in places], own), x)
        if self._rows_are_independent(x):
            x = self._activate(x)
        else:
            x = torch.cat([self._activate(x[a:b]) for a, b in pairwise(starts)])
        self._multiply(arrivals, "down_proj", x, Rows(starts, own, places), self._rows)
        if getattr(self.module, "has_post_expert_norm", False):
            for expert, _ in arrivals:
                self._rows[self._places[expert]] = self._normalise(self._rows[self._places[expert]])

    def _multiply(self, arrivals: Sequence[Arrival], name: str, x: torch.Tensor, rows: Rows, out: torch.Tensor) -> None:
        gemv(x, [weights[name] for _, weights in arrivals], rows, out, is_transposed=self.module.is_transposed)
        if f"{name}_bias" not in arrivals[0].weights:
            return
        for (_, weights), (start, end) in zip(arrivals, pairwise(rows.starts), strict=True):
            out[rows.target[start:end]] += weights[f"{name}_bias"]


KERNELS: dict[str, type[Kernel]] = {"eager": EagerKernel, "grouped_mm": GroupedKernel, "gemv": GemvKernel}


Reroute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Another choice [T, K] and weights [T, K] for what a router gave: (hidden [T, H], index [T, K], weights [T, K])."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What a layer's tokens chose: index and weights [T, K], and `choice`, the index on the host."""

    index: torch.Tensor
    weights: torch.Tensor
    choice: npt.NDArray[np.int64]


class Substitution(Protocol):
    """Sends tokens whose experts are absent elsewhere; see `runtime.substitute`."""

    def ask(self) -> Sequence[torch.Tensor]:
        """Tensors that it wants to see on the host."""
        ...

    def __call__(self, routed: Routed, answers: Sequence[torch.Tensor]) -> Routed:
        """What the tokens get for what they chose; `answers` are what `ask` named."""
        ...


class LayerRunner:
    """One experts module served from a source. `kernel` says which kernel the running pass uses.

    Whatever the host wants to know of the layer is read at once: a GPU is waited for once per layer.

    `observers` are told each router's choice [T, K] and weights [T, K]. `reroute`, where there is one, replaces both
    before anything else, and `substitution` what then names absent experts. `host`, where there is one, computes
    experts that the source leaves on the host.
    """

    def __init__(
        self, module: Any, source: ExpertSource, kernel: Callable[[], type[Kernel]], read: Reader | None = None
    ) -> None:
        self.module, self.source, self.kernel, self._read = module, source, kernel, read or HostReader()
        self.observers: list[Callable[[npt.NDArray[np.int64], torch.Tensor], None]] = []
        self.reroute: Reroute | None = None
        self.substitution: Substitution | None = None
        self.host: HostLayer | None = None

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.reroute is not None:
            index, weights = self.reroute(hidden, index, weights)
        logits = () if self.substitution is None else self.substitution.ask()
        rows = [hidden.detach()] if self.host is not None and self.host.may_compute(index.numel()) else []
        read, *answers = self._read([index, *rows, *logits, *self.source.ask()])
        choice, host_hidden, answers = read.numpy(), answers[: len(rows)], answers[len(rows) :]
        if self.substitution is not None:
            routed = self.substitution(Routed(index, weights, choice), answers[: len(logits)])
            index, weights, choice = routed.index, routed.weights, routed.choice
        for observer in self.observers:
            observer(choice, weights)
        experts, tokens = _distinct(choice, self.module.num_experts)
        kernel = self.kernel()(self.module, hidden, index, weights, experts, choice)
        kernel.host = self.host
        if host_hidden:
            (kernel.host_hidden,) = host_hidden
        if experts:
            # Closed at once when computing fails: whoever keeps the error would keep the leases with it.
            with closing(self.source.serve(experts, tokens, choice, answers[len(logits) :])) as groups:
                for group in groups:
                    if on_host := [one for one in group if isinstance(one, HostArrival)]:
                        kernel.add_from_host(on_host)
                    else:
                        kernel.add(group)
        return kernel.result()


_FEW = 32  # routes that are counted faster without numpy


def _distinct(choice: npt.NDArray[np.int64], num_experts: int) -> tuple[list[int], list[int]]:
    """Experts chosen, ascending, and how many tokens chose each; indices past the last expert mean "none"."""
    if choice.size <= _FEW:
        few: dict[int, int] = {}
        for expert in sorted(choice.reshape(-1).tolist()):
            if expert < num_experts:
                few[expert] = few.get(expert, 0) + 1
        assert min(few, default=0) >= 0, f"there is no expert {min(few)}"
        return list(few), list(few.values())
    experts, counts = _count(choice.reshape(-1))
    num_chosen = bisect_left(experts, num_experts)
    return experts[:num_chosen], counts[:num_chosen]


class ResidentSource:
    """The experts of a module that holds them all: the reference that offloading must equal."""

    def __init__(self, module: Any, parameters: Sequence[str]) -> None:
        self._module, self._parameters = module, parameters

    def ask(self) -> Sequence[torch.Tensor]:
        """Nothing."""
        return ()

    def serve(
        self,
        experts: Sequence[int],
        tokens: Sequence[int],
        choice: npt.NDArray[np.int64],
        answers: Sequence[torch.Tensor],
    ) -> Generator[Sequence[Arrival], None, None]:
        """All at once."""
        yield [
            Arrival(expert, {name: getattr(self._module, name)[expert] for name in self._parameters})
            for expert in experts
        ]


def _forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    runner: LayerRunner = module._expertflow
    return runner(hidden, index, weights)


def register() -> None:
    """Make the implementation known to transformers; must precede `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
