"""Which requests to compute together so that few experts are needed: ExpertFlow's token scheduler as a pure function.

ExpertFlow (arXiv 2410.17954), section "Token Scheduler". It splits two batches of tokens anew so that
`sum over layers and experts of (R1 + R2)` is small, R_k being the union of the routes in batch k, by balanced
two-medoids with the similarity `S_ij = 1 - Hamming(r_i, r_j) / (L * E)`. More than two batches are split recursively.

The paper stops there. Its similarity looks at pairs, the objective at whole batches, so each result is improved by
exchanging single requests while that helps the objective itself, and the best of a few starts is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

Bits = npt.NDArray[np.uint64]  # [requests, words]: a request's experts, one bit each
Ints = npt.NDArray[np.int64]
Similarity = npt.NDArray[np.float64]

STARTS = 2
"""Pairs of first centres that are tried."""
MAX_ROUNDS = 20
"""Rounds of assignment after which a bisection stops, converged or not."""


def partition(routes: npt.NDArray[np.bool_], group: int) -> list[list[int]]:
    """Split requests into as few batches as hold them, such that few experts are needed in all.

    Deterministic, and `distinct_experts` of the result is never above that of the arrival order.

    Args:
        routes: bool [requests, layers, experts]; a request without any expert has an unknown route: it is put where
            there is room.
        group: requests per batch at most, at least 1.

    Returns:
        ceil(requests / group) lists of at most `group` rows of `routes`; rows ascend, and so do the batches by their
        first row.
    """
    num_requests = len(routes)
    num_batches = -(-num_requests // group)
    arrival = [list(range(num_requests))[start : start + group] for start in range(0, num_requests, group)]
    (known,) = np.nonzero(routes.any(axis=(1, 2)))
    if num_batches < 2 or len(known) < 2:
        return arrival
    # Unknown ones and free places need no expert: rows of zeros, with which the others may change places.
    bits = _packed(routes[known], num_batches * group)
    best = min(_solutions(bits, len(known), num_batches), key=lambda batch_of: _num_distinct(bits, batch_of))
    found = _in_rows(best, known, num_requests, group)
    return found if distinct_experts(routes, found) < distinct_experts(routes, arrival) else arrival


def distinct_experts(routes: npt.NDArray[np.bool_], batches: Sequence[Sequence[int]]) -> int:
    """The objective: experts that the batches need, summed over batches and layers.

    Args:
        routes: bool [requests, layers, experts].
        batches: rows of `routes`.
    """
    return sum(int(routes[list(batch)].any(axis=0).sum()) for batch in batches)


def _packed(routes: npt.NDArray[np.bool_], num_rows: int) -> Bits:
    """A row of bits per request, and rows of zeros up to `num_rows`."""
    packed = np.packbits(routes.reshape(len(routes), -1), axis=1)
    bits = np.zeros((num_rows, -(-packed.shape[1] // 8)), np.uint64)
    bits.view(np.uint8)[: len(packed), : packed.shape[1]] = packed
    return bits


def _solutions(bits: Bits, num_known: int, num_batches: int) -> list[Ints]:
    """The batch of every row of `bits`, all batches of one size; one answer per start."""
    similarity = _similarity(bits[:num_known])
    generator = np.random.default_rng(0)
    solutions = []
    for start in range(STARTS):
        batches = _bisected(similarity, np.arange(num_known), num_batches, generator if start else None)
        batch_of = _batch_of(batches, len(bits))
        _improve(bits, batch_of, num_batches)
        solutions.append(batch_of)
    return solutions


def _similarity(bits: Bits) -> Similarity:
    """S_ij = 1 - Hamming(r_i, r_j) / (L * E); the constant L * E, a matter of scale, is left at the bits stored."""
    common = _common(bits)
    used = common.diagonal()
    similarity: Similarity = 1 - (used[:, None] + used - 2 * common) / (64 * bits.shape[1])
    return similarity


def _bisected(
    similarity: Similarity, members: Ints, num_batches: int, generator: np.random.Generator | None
) -> list[Ints]:
    """`members` in `num_batches` batches of equal size, give or take one."""
    if num_batches == 1:
        return [members]
    num_left = num_batches // 2
    size = round(len(members) * num_left / num_batches)
    left, right = members[:size], members[size:]
    if len(left) and len(right):
        left, right = _two_medoids(similarity, members, size, generator)
    return [
        *_bisected(similarity, left, num_left, generator),
        *_bisected(similarity, right, num_batches - num_left, generator),
    ]


def _two_medoids(
    similarity: Similarity, members: Ints, size: int, generator: np.random.Generator | None
) -> tuple[Ints, Ints]:
    """`size` of the members and the others, each nearer to its centre than those exchanged for it would be.

    The first centres are the least similar pair, or two that `generator` draws.
    """
    own = similarity[np.ix_(members, members)]
    if generator is None:
        one, two = divmod(int(own.argmin()), len(members))
    else:
        one, two = generator.choice(len(members), 2, replace=False)
    for _ in range(MAX_ROUNDS):
        order = np.argsort(own[:, two] - own[:, one], kind="stable")
        left, right = order[:size], order[size:]
        centres = _medoid(own, left), _medoid(own, right)
        if centres == (one, two):
            break
        one, two = centres
    return members[np.sort(left)], members[np.sort(right)]


def _medoid(similarity: Similarity, cluster: Ints) -> int:
    """The member of `cluster` with the highest mean similarity to it."""
    return int(cluster[similarity[np.ix_(cluster, cluster)].sum(axis=1).argmax()])


def _batch_of(batches: Sequence[Ints], num_rows: int) -> Ints:
    """The batch of every row; rows beyond those in `batches` fill up the places that are left."""
    batch_of = np.full(num_rows, -1)
    for number, batch in enumerate(batches):
        batch_of[batch] = number
    size = num_rows // len(batches)
    batch_of[batch_of < 0] = [number for number, batch in enumerate(batches) for _ in range(size - len(batch))]
    return batch_of


def _num_distinct(bits: Bits, batch_of: Ints) -> int:
    num_batches = int(batch_of.max()) + 1
    in_batches = bits[np.argsort(batch_of, kind="stable")].reshape(num_batches, -1, bits.shape[1])
    return int(np.bitwise_count(np.bitwise_or.reduce(in_batches, axis=1)).sum())


def _in_rows(batch_of: Ints, known: Ints, num_requests: int, group: int) -> list[list[int]]:
    """Batches as rows of the routes: `known` where they belong, the others, in order, where there is room."""
    batches = [known[batch_of[: len(known)] == number].tolist() for number in range(len(batch_of) // group)]
    rest = np.setdiff1d(np.arange(num_requests), known).tolist()
    for batch in batches:
        room = group - len(batch)
        batch += rest[:room]
        rest = rest[room:]
    return sorted(sorted(batch) for batch in batches)


@njit(cache=True)
def _num_common(one, other):  # type: ignore[no-untyped-def]
    """Bits that both rows have."""
    pairs, nibbles = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
    octets, sums = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
    total = np.uint64(0)
    for word in range(one.size):
        x = one[word] & other[word]
        x -= (x >> np.uint64(1)) & pairs  # the form in which compilers recognise a population count
        x = (x & nibbles) + ((x >> np.uint64(2)) & nibbles)
        x = (x + (x >> np.uint64(4))) & octets
        total += (x * sums) >> np.uint64(56)
    return np.int64(total)


@njit(cache=True)
def _common(bits):  # type: ignore[no-untyped-def]
    """Bits that each pair of rows has in common: int64 [rows, rows]."""
    common = np.empty((len(bits), len(bits)), np.int64)
    for one in range(len(bits)):
        for two in range(len(bits)):
            common[one, two] = _num_common(bits[one], bits[two])
    return common


@njit(cache=True)
def _improve(bits, batch_of, num_batches):  # type: ignore[no-untyped-def]
    """Exchange, in place, the two rows whose exchange saves most experts, until none saves any.

    Row i in the place of row j costs the experts of i that no member of j's batch has (`lacking`) and those that j
    alone has there (`shared`); it saves those that j alone has.
    """
    num_rows, num_words = bits.shape
    absent, alone = np.empty(num_words, np.uint64), np.empty((num_rows, num_words), np.uint64)
    lacking, shared = np.empty((num_batches, num_rows), np.int64), np.empty((num_rows, num_rows), np.int64)
    changed = np.ones(num_batches, np.bool_)
    while True:
        for batch in range(num_batches):
            if not changed[batch]:
                continue
            for word in range(num_words):
                some, several = np.uint64(0), np.uint64(0)
                for row in range(num_rows):
                    if batch_of[row] == batch:
                        several |= some & bits[row, word]
                        some |= bits[row, word]
                absent[word] = ~some
                for row in range(num_rows):
                    if batch_of[row] == batch:
                        alone[row, word] = bits[row, word] & ~several
            for row in range(num_rows):
                lacking[batch, row] = _num_common(absent, bits[row])
                if batch_of[row] == batch:
                    for other in range(num_rows):
                        shared[row, other] = _num_common(alone[row], bits[other])
            changed[batch] = False
        least, one, two = 0, 0, 0
        for i in range(num_rows):
            for j in range(i):
                cost = lacking[batch_of[j], i] + shared[j, i] - shared[j, j]
                cost += lacking[batch_of[i], j] + shared[i, j] - shared[i, i]
                if cost < least and batch_of[i] != batch_of[j]:
                    least, one, two = cost, i, j
        if least == 0:
            return
        batch_of[one], batch_of[two] = batch_of[two], batch_of[one]
        changed[batch_of[one]] = changed[batch_of[two]] = True
