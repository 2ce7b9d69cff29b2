"""Kernels that keep one row per (token, rank): `grouped_mm`, and `gemv` with our own matrix-vector products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import _default_apply_gate, _grouped_mm

from runtime.gemv import Rows, gemv
from runtime.kernels.base import AT_ONCE_BYTES, Arrival, ComputedRows, Kernel, ascending, count
from runtime.readback import upload

# torch's CPU loops compute whole blocks of two vectors with vector code and what is left with scalar code, whose
# transcendental functions round differently. No block of any dtype and instruction set is longer than this.
_VECTOR_BLOCK = 64
# From this many elements on they are shared by the threads in equal parts, wherever in a row those end.
_GRAIN = 32768


class RowKernel(Kernel):
    """One row per (token, rank); the ranks of a token are weighted and summed at the end, whatever arrived first."""

    def _begin(self) -> None:
        self._flat = self._choice.reshape(-1)
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

    def _accept(self, computed: ComputedRows) -> None:
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
            order = ascending(self._flat)
            return self._flat[order], order
        experts, rows = torch.sort(self.index.reshape(-1))
        return experts.numpy(), rows.numpy()

    @cached_property
    def _places(self) -> torch.Tensor:
        """[3, T * K]: the token of each row in that order, where each row went, and the rows of each expert that has
        any, in the first places."""
        order, num_rows = self._sorted[1], np.zeros_like(self._flat)
        where, sizes = np.empty_like(order), count(self._flat)[1]
        where[order], num_rows[: len(sizes)] = np.arange(order.size), sizes
        return upload(np.stack([order // self.index.shape[-1], where, num_rows]), self.hidden.device)

    @cached_property
    def _gathered(self) -> torch.Tensor:
        """The hidden states of all rows in that order, [T * K, H]."""
        return self.hidden[self._places[0]]

    @cached_property
    def _groups(self) -> dict[int, _Group]:
        """The group of every expert."""
        experts, sizes = count(self._flat)
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

    def _accept(self, computed: ComputedRows) -> None:
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
        at_once = max(1, AT_ONCE_BYTES // (top_k * self._rows.shape[-1] * self._rows.element_size()))
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
        if not _multiplies_groups(weight.device, weight.dtype):
            out = x.to(weight.dtype) @ (weight if self.module.is_transposed else weight.t())
            return out if bias is None else out.add_(bias)
        (num_in, num_out), (row, column) = weight.shape, weight.stride()
        size, stride = (1, num_in, num_out), (num_in * row, row, column)
        if not self.module.is_transposed:
            size, stride = (1, num_out, num_in), (num_in * row, column, row)
        out = _grouped_mm(x, weight.as_strided(size, stride), offs=num_rows)  # a view: as by unsqueeze and transpose
        return out if bias is None else out.add_(bias)


@cache
def _multiplies_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for groups of rows on `device`. On a GPU without, it brings their sizes to the host,
    which waits for them, to do what a plain product of each group does."""
    if device.type != "cuda":
        return True
    return dtype is torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in _CAPABLE


_CAPABLE = (9, 10)  # compute capabilities, their first numbers: Hopper, Blackwell of data centres


def _split(rows: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Views of `sizes` rows each, one after the other, that can be written to."""
    if not rows.requires_grad:
        parts: tuple[torch.Tensor, ...] = rows.split(sizes)
        return parts
    starts = np.cumsum(sizes) - sizes  # autograd forbids to write to what was split
    return [rows[start : start + size] for start, size in zip(starts.tolist(), sizes, strict=True)]


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
