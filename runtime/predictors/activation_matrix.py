"""`activation_matrix`: experts that past requests alike to this one activated.

MoE-Infinity (Xue et al., arXiv 2401.14361v3, section 5). An activation matrix M [layers, experts] counts the tokens
that were routed to each expert: of one pass (iEAM), or summed over the passes of a request, prefill and decode apart
(rEAM). A collection (EAMC) keeps rEAMs of past requests. After each layer the running pass's matrix, whose later rows
are still zero, is matched with the collection: the nearest ones say what the layers to come are likely to choose.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import ArtifactError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.base import Forecast, Observation, Predictor
from runtime.predictors.params import ActivationMatrixParams
from runtime.vocabulary import Pass, Phase

KIND = "activation_matrix"

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Collection:
    """Activation matrices of past requests, in one phase (the paper's EAMC).

    Args:
        capacity: matrices at most (>= 1).
        shape: of the model.
    """

    def __init__(self, capacity: int, shape: RoutingShape) -> None:
        self.size = 0
        self._matrices: Floats = np.zeros((capacity, shape.layers, shape.experts), np.float32)
        self._tokens, self._norms = np.zeros(capacity, np.float32), np.ones(capacity, np.float32)

    @property
    def matrices(self) -> Floats:
        """[size, layers, experts]."""
        return self._matrices[: self.size]

    @property
    def tokens(self) -> Floats:
        """Tokens that each matrix counts, [size]."""
        return self._tokens[: self.size]

    def distances(self, matrix: Floats) -> Floats:
        """1 - <A, B> / (|A| |B|) of `matrix` [layers, experts], not all zero, to each stored one, flattened: [size]."""
        found = np.tensordot(self.matrices, matrix, 2)
        found /= self._norms[: self.size] * np.linalg.norm(matrix)
        return 1 - found

    def add(self, matrix: Floats, num_tokens: float) -> None:
        """Store a matrix; of a full collection the nearest one goes, so that what is kept stays recent and diverse."""
        if self.size < len(self._matrices):
            place, self.size = self.size, self.size + 1
        else:
            place = int(self.distances(matrix).argmin())
        self._matrices[place], self._tokens[place] = matrix, num_tokens
        self._norms[place] = np.linalg.norm(matrix)

    def products(self, layer: int, rows: Floats) -> Floats:
        """What row `layer` of other matrices, [count, experts], adds to their inner product with each stored one."""
        found: Floats = rows @ self.matrices[:, layer].T
        return found

    def nearest(self, products: Floats, count: int) -> Integers:
        """The `count` stored matrices (all, where there are fewer) with the smallest distance, [rows, count].

        Args:
            products: inner products with the stored matrices, [rows, size]; size is not 0.
        """
        closeness = products / self._norms[: self.size]  # the other norm is the same for all of a row
        found: Integers = closeness.argmax(axis=1)[:, None]
        return found if count == 1 else np.argpartition(-closeness, min(count, self.size) - 1, axis=1)[:, :count]

    def expected(self, matches: Sequence[Integers | None], tokens: Integers) -> Forecast:
        """Tokens expected to choose each expert, float32 [layers, experts].

        The cells of a request's matches summed and divided by the tokens that they count, which is what a row of the
        sum holds over top_k: the likelihood that a token chooses the expert.

        Args:
            matches: stored matrices of each request; None: it is left out.
            tokens: of each request.
        """
        weights = np.zeros(self.size, np.float32)
        for own, num_tokens in zip(matches, tokens.tolist(), strict=True):
            if own is not None:
                weights[own] += num_tokens / self._tokens[own].sum()
        found: Forecast = np.zeros(self._matrices.shape[1:], np.float32)
        for used in np.flatnonzero(weights):  # one by one: a matrix product rounds as the processor's BLAS does
            found += weights[used] * self._matrices[used]
        return found


@dataclass(slots=True)
class _Request:
    """One request in one phase: its rEAM, the tokens that this counts, its last matches, when it last ran."""

    matrix: Floats
    num_tokens: int = 0
    matches: Integers | None = None
    last_pass: int = 0


@dataclass(slots=True)
class _Running:
    """The pass at hand: its phase, its requests, whose each token is (an index of `requests`), tokens per request,
    their iEAMs [requests, layers, experts], and these matrices' inner products with the collection's."""

    phase: Phase
    requests: list[_Request]
    whose: Integers
    tokens: Integers
    matrices: Floats
    products: Floats


class ActivationMatrix(Predictor):
    """Matches every request of a pass by itself, and sums what their matches say.

    Rows of the forecast up to the layer just routed are what the matches say of the pass after this one, with one token
    of each request: the cache goes by them, as the paper's does (algorithm 1), which keeps the first layers because
    prefetching cannot help them. Before the first layer, and in passes that are not observed, a request's last matches
    hold. The row sums that the paper divides by, its decay over layers for eviction and its layer proximity for
    prefetch are the policy's (`activation`) and the coordinator's (`by_likelihood`).

    Requests do not say goodbye. One that has not been part of the last `_UNSEEN_PASSES` passes in a phase, or is the
    longest unseen of too many, has ended there: its matrix enters the phase's collection. If it comes back after all,
    the rest of it counts as another request. So does each pass that does not say whose its tokens are.

    Args:
        artifact: a collection to start with; None: an empty one. More than `params.capacity` matrices are thinned out
            as if they came one by one.

    Raises:
        ArtifactError: its arrays do not go together.
    """

    by_likelihood = True
    sees_next_pass = True

    def __init__(self, shape: RoutingShape, params: ActivationMatrixParams, artifact: Artifact | None = None) -> None:
        self._shape, self._num_matches = shape, params.matches
        self._collections = {phase: Collection(params.capacity, shape) for phase in Phase}
        self._requests: OrderedDict[tuple[Phase, int], _Request] = OrderedDict()  # the longest unseen first
        self._num_passes = 0
        self._running: _Running | None = None
        self._is_matched = True
        if artifact is not None:
            for phase, collection in self._collections.items():
                _restore(collection, artifact, phase)

    def begin(self, passing: Pass) -> None:
        """Recall the requests of `passing`; those that have ended enter the collection."""
        self._num_passes += 1
        numbers, whose, tokens = np.unique(
            passing.requests or np.full(passing.num_tokens, -self._num_passes), return_inverse=True, return_counts=True
        )
        requests = [self._recalled((passing.phase, number)) for number in numbers.tolist()]
        self._retire(len(requests))
        self._running = _Running(
            passing.phase,
            requests,
            whose,
            tokens,
            np.zeros((len(requests), *self._shape[:2]), np.float32),
            np.zeros((len(requests), self._collections[passing.phase].size), np.float32),
        )
        self._is_matched = True

    def observe(self, layer: int, observation: Observation) -> None:
        """Fill the layer's row of the iEAMs; with the last one they are part of their requests' rEAMs."""
        running = self._running
        assert running is not None, "observe() before begin()"
        if len(observation.experts) != len(running.whose):
            return  # an encoder beside a decoder: whose these tokens are is not known
        shape = len(running.requests), self._shape.experts + 1  # the last column: no expert
        places = (running.whose[:, None] * shape[1] + np.minimum(observation.experts, shape[1] - 1)).reshape(-1)
        running.matrices[:, layer] = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)[:, :-1]
        running.products += self._collections[running.phase].products(layer, running.matrices[:, layer])
        self._is_matched = False
        if layer == self._shape.layers - 1:
            for place, request in enumerate(running.requests):
                request.matrix += running.matrices[place]
                request.num_tokens += int(running.tokens[place])

    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens per expert by the nearest matrices (the paper's PredictEAM); None while there are none."""
        running = self._running
        if running is None:
            return None
        collection = self._collections[running.phase]
        if not self._is_matched and collection.size:
            nearest = collection.nearest(running.products, self._num_matches)
            for request, matches in zip(running.requests, nearest, strict=True):
                request.matches = matches
            self._is_matched = True
        matches = [request.matches for request in running.requests]
        if all(own is None for own in matches):
            return None
        forecast = collection.expected(matches, running.tokens)
        if running.tokens.max() > 1:
            forecast[: layer + 1] = collection.expected(matches, np.ones_like(running.tokens))[: layer + 1]
        return forecast

    def artifact(self, model: str) -> Artifact:
        """The collections, with the requests that may still run entered as if they had ended."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for phase, collection in self._collections.items():
            whole = copy.deepcopy(collection)
            for (of, _), request in self._requests.items():
                if of is phase and request.num_tokens:
                    whole.add(request.matrix, request.num_tokens)
            arrays |= {phase.name.lower(): whole.matrices, f"{phase.name.lower()}_tokens": whole.tokens}
        return Artifact(KIND, model, self._shape, {}, arrays)

    def _recalled(self, key: tuple[Phase, int]) -> _Request:
        request = self._requests.get(key)
        if request is None:
            request = self._requests[key] = _Request(np.zeros(self._shape[:2], np.float32))
        self._requests.move_to_end(key)
        request.last_pass = self._num_passes
        return request

    def _retire(self, num_running: int) -> None:
        """Enter the requests that have ended."""
        while self._requests:
            key, request = next(iter(self._requests.items()))
            is_unseen = self._num_passes - request.last_pass > _UNSEEN_PASSES
            if not is_unseen and len(self._requests) <= max(_MAX_REQUESTS, num_running):
                return
            del self._requests[key]
            if request.num_tokens:
                self._collections[key[0]].add(request.matrix, request.num_tokens)


# Longer than any scheduler leaves a running request out (`schedulers.deadline`: 40 passes with a window of 8).
_UNSEEN_PASSES = 64
_MAX_REQUESTS = 512


def _restore(collection: Collection, artifact: Artifact, phase: Phase) -> None:
    try:
        matrices, tokens = (artifact.arrays[phase.name.lower() + suffix] for suffix in ("", "_tokens"))
        if matrices.shape[1:] != artifact.shape[:2] or tokens.shape != matrices.shape[:1]:
            raise ValueError(f"{phase.name.lower()}: {matrices.shape} matrices of {tokens.shape} requests")
        is_sound = (np.isfinite(matrices) & (matrices >= 0)).all() and (matrices.sum((1, 2)) > 0).all()
        if not is_sound or not (tokens > 0).all():
            raise ValueError(f"{phase.name.lower()}: these are no counts of tokens")
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"the {KIND} predictor of {artifact.model} is damaged ({error!r}); "
            f"make it again: python -m harness.fit {KIND}"
        ) from error
    for matrix, num_tokens in zip(matrices, tokens, strict=True):
        collection.add(matrix, num_tokens)
