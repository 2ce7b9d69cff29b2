"""`routing_path`: routes of the tokens at hand through all layers, from token ids alone, before the first layer runs.

ExpertFlow's Routing Path Predictor (He et al. 2024, arXiv 2410.17954): a small T5 whose encoder reads the tokens so
far, whose decoder reads the tokens at hand, and which has a head of E logits for each of the L layers. It looks the
whole depth of the model ahead within a token, and no token ahead. Here the encoder's part ends, and the decoder's
begins, at a multiple of half a decoder window, so that what the encoder made can be kept for as many tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import T5Config, T5Model

from runtime.errors import ArtifactError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.base import Forecast, Observation, Predictor
from runtime.predictors.params import RoutingPathParams
from runtime.predictors.weights import check_weights, sizes_of
from runtime.vocabulary import Pass

KIND = "routing_path"

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """Of the network. `window`: tokens that the decoder reads at most, an even number."""

    hidden: int
    feed_forward: int
    heads: int
    head_size: int
    encoder_layers: int
    decoder_layers: int
    window: int

    @property
    def stride(self) -> int:
        """Tokens after which the window moves on; the decoder always sees at least that many before the last one."""
        return self.window // 2


class RoutingPathNetwork(nn.Module):
    """T5 with one head per MoE layer, and a vocabulary of its own: the ids worth an embedding, all others sharing one.

    Args:
        ids: int64 [known], ascending: the token ids that have an embedding.
    """

    def __init__(self, sizes: Sizes, shape: RoutingShape, ids: Integers) -> None:
        super().__init__()
        self.sizes, self.shape, self._ids = sizes, shape, ids
        config = T5Config(
            vocab_size=len(ids) + 2,
            d_model=sizes.hidden,
            d_ff=sizes.feed_forward,
            d_kv=sizes.head_size,
            num_heads=sizes.heads,
            num_layers=sizes.encoder_layers,
            num_decoder_layers=sizes.decoder_layers,
            relative_attention_max_distance=sizes.window,
            dropout_rate=0.0,
            use_cache=False,
            pad_token_id=len(ids) + 1,
        )
        self.t5 = T5Model(config)
        self.heads = nn.Linear(sizes.hidden, shape.layers * shape.experts)

    def rows(self, token_ids: Integers) -> Integers:
        """Row of the embedding for each token id."""
        unknown = len(self._ids)
        if not unknown:
            return np.zeros_like(token_ids)
        place = np.minimum(np.searchsorted(self._ids, token_ids), unknown - 1)
        return np.where(self._ids[place] == token_ids, place, unknown)

    def encode(self, contexts: Sequence[Integers]) -> list[torch.Tensor]:
        """What the decoder looks back at, [1 + length, hidden] for rows of any length; a start marker comes first."""
        start = len(self._ids) + 1
        rows, mask = _padded([np.concatenate([[start], rows]) for rows in contexts], start)
        hidden = self.t5.encoder(input_ids=rows, attention_mask=mask).last_hidden_state
        return [hidden[i, : 1 + len(rows)] for i, rows in enumerate(contexts)]

    def decode(self, windows: Sequence[Integers], memories: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states [windows, tokens, hidden] of rows that follow the context of their memory; causal."""
        rows, _ = _padded(windows, 0)
        memory = nn.utils.rnn.pad_sequence(list(memories), batch_first=True)
        lengths = torch.tensor([len(states) for states in memories])
        mask = torch.arange(memory.shape[1]) < lengths[:, None]
        hidden: torch.Tensor = self.t5.decoder(
            input_ids=rows, encoder_hidden_states=memory, encoder_attention_mask=mask.long()
        ).last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., layers, experts] of hidden states [..., hidden]."""
        answer: torch.Tensor = self.heads(hidden)
        return answer.reshape(*hidden.shape[:-1], self.shape.layers, self.shape.experts)

    def artifact(self, model: str, **params: Any) -> Artifact:
        """This network on disk, with further params; weights in half precision, which costs nothing measurable."""
        # Not the state dict: that has the embedding three times.
        arrays = {name: weight.detach().half().numpy() for name, weight in self.named_parameters()}
        return Artifact(KIND, model, self.shape, {"sizes": asdict(self.sizes), **params}, {**arrays, _IDS: self._ids})

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The network of an artefact, in float32, ready for inference.

        Raises:
            ArtifactError: its sizes and its weights do not make a network.
        """
        try:
            sizes, ids = Sizes(**sizes_of(artifact)), artifact.arrays[_IDS]
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or sizes.window % 2:
                raise ValueError("the token ids are no list, or the window is odd")
            ids = ids.astype(np.int64)
            check_weights(lambda: cls(sizes, artifact.shape, ids), artifact.arrays)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                network = cls(sizes, artifact.shape, ids).float()
            _fill(network, artifact.arrays)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"the {KIND} predictor of {artifact.model} is damaged ({error!r}); "
                f"train it again: python -m harness.fit"
            ) from error
        return network.eval().requires_grad_(False)


_IDS = "token_ids"


@torch.no_grad()
def _fill(network: nn.Module, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    for name, weight in network.named_parameters():
        weight.copy_(torch.from_numpy(np.array(arrays[name])))


def _padded(rows: Sequence[Integers], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths as one [count, longest], and 1 where they are."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, filler, np.int64)
    padded[mask] = np.concatenate(rows)
    return torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64))


class Window(NamedTuple):
    """Rows that the decoder reads, those before that the encoder reads, and from where on the decoder is asked."""

    context: Integers
    tokens: Integers
    asked: int


def windows_of(rows: Integers, first: int, *, offset: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that answer for the tokens of a request from position `first` to its last one.

    Windows lie at the same positions however the tokens are cut into passes, so the answers are the same too.

    Args:
        rows: of the request's tokens from position `offset` on, which is early enough for the first window's context.
        context: tokens that the encoder reads at most.
        stride: half a decoder window.
    """
    end = offset + len(rows)
    for start in range(max(first // stride - 1, 0) * stride, max((end - 1) // stride, 1) * stride, stride):
        asked = max(first, start + stride if start else 0) - start
        tokens = rows[start - offset : min(start + 2 * stride, end) - offset]
        yield Window(rows[max(start - context, 0) - offset : start - offset], tokens, asked)


class RoutingPath(Predictor):
    """Forecasts all layers of a pass in `begin`; knows nothing of the pass after it, and `observe` teaches it nothing.

    Implements `RoutePredictor`. Passes without token ids have no forecast. What is kept: the last tokens of recent
    requests, and what the encoder made of recent contexts, both bounded.

    Args:
        artifact: a trained `RoutingPathNetwork`.

    Raises:
        ArtifactError: its weights do not go together.
    """

    def __init__(self, artifact: Artifact, params: RoutingPathParams) -> None:
        self._network = RoutingPathNetwork.of(artifact)
        self._context, self._stride = params.context, self._network.sizes.stride
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._memories: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._forecast: Forecast | None = None

    def begin(self, passing: Pass) -> None:
        """Forecast every layer for the tokens of `passing`, each after those that its request had before.

        The sum over tokens of the mean of "is among its top_k" and its probability, scaled to a sum of top_k per layer
        and at most 1.
        """
        self._forecast = None
        if not passing.token_ids:
            return
        rows = self._network.rows(np.array(passing.token_ids, np.int64))
        requests = np.array(passing.requests or (0,) * len(rows))
        windows = [
            window
            for number in np.unique(requests).tolist()
            for window in self._windows(number, rows[requests == number])
        ]
        top_k = self._network.shape.top_k
        self._forecast = np.zeros(self._network.shape[:2], np.float32)
        for logits in self._logits(windows):
            self._forecast += _expected(logits, top_k).numpy()
        _trim(self._requests, max(_MAX_REQUESTS, len(rows)))

    def observe(self, layer: int, observation: Observation) -> None:
        """Ignored: routes come from token ids alone."""

    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens per expert in the pass that was begun; rows of layers already run say nothing of the next."""
        return self._forecast

    def routes(self, contexts: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        """The top_k likeliest experts of the last token of each context: bool [contexts, layers, experts]."""
        shape, parts = self._network.shape, []
        for logits in self._logits([self._last_window(context) for context in contexts]):
            chosen = logits.topk(shape.top_k, dim=-1).indices
            parts.append(torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True).numpy())
        return np.concatenate(parts) if parts else np.zeros((0, *shape[:2]), np.bool_)

    def _windows(self, number: int, rows: Integers) -> Iterator[Window]:
        """Of the tokens that a request has in this pass; the request remembers them."""
        request = self._requests.pop(number, _NEW)
        known = np.concatenate([request.rows, rows])
        length = request.length + len(rows)
        self._requests[number] = _Request(known[-(self._context + 2 * self._stride) :].copy(), length)
        return self._cut(known, request.length, offset=length - len(known))

    def _last_window(self, context: Sequence[int]) -> Window:
        last, kept = len(context) - 1, self._context + 2 * self._stride
        rows = self._network.rows(np.array(context[-kept:], np.int64))
        return next(self._cut(rows, last, offset=len(context) - len(rows)))

    def _cut(self, rows: Integers, first: int, *, offset: int) -> Iterator[Window]:
        return windows_of(rows, first, offset=offset, context=self._context, stride=self._stride)

    @torch.inference_mode()
    def _logits(self, windows: Iterable[Window]) -> Iterator[torch.Tensor]:
        """[tokens, layers, experts] of the tokens asked about, in order, some windows at a time."""
        network, waiting = self._network, iter(windows)
        logits_per_window = 2 * self._stride * network.shape.layers * network.shape.experts
        at_once = max(1, min(_MAX_WINDOWS, _MAX_LOGITS // logits_per_window))
        while some := list(islice(waiting, at_once)):
            hidden = network.decode([window.tokens for window in some], self._memories_of(some))
            asked = [states[window.asked : len(window.tokens)] for states, window in zip(hidden, some, strict=True)]
            yield network.logits(torch.cat(asked))

    def _memories_of(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        """What the encoder makes of each window's context; kept where the window has room for the tokens to come."""
        keys = [window.context.tobytes() for window in windows]
        known = {key: self._memories[key] for key in keys if key in self._memories}
        missing = {key: window.context for key, window in zip(keys, windows, strict=True) if key not in known}
        if missing:
            known.update(zip(missing, self._network.encode(list(missing.values())), strict=True))
        for key, window in zip(keys, windows, strict=True):
            if len(window.tokens) < 2 * self._stride:
                self._memories[key] = known[key].clone() if key in missing else known[key]
                self._memories.move_to_end(key)
        _trim(self._memories, _MAX_MEMORIES)
        return [known[key] for key in keys]


class _Request(NamedTuple):
    """The last rows of a request and how many tokens it has had."""

    rows: Integers
    length: int


_NEW = _Request(np.zeros(0, np.int64), 0)

# Requests do not say goodbye; those that have not been seen for longest are forgotten.
_MAX_REQUESTS = 1024
_MAX_MEMORIES = 256
# At once: tens of megabytes of activations, however long a prompt is.
_MAX_WINDOWS = 32
_MAX_LOGITS = 1 << 22


def _trim(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def _expected(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Expected tokens per expert [layers, experts] of logits [tokens, layers, experts]."""
    likely = logits.sigmoid()
    likely *= top_k / likely.sum(dim=-1, keepdim=True)
    likely.clamp_(max=1.0)
    chosen = logits.topk(top_k, dim=-1).indices
    likely.scatter_add_(-1, chosen, torch.ones_like(likely))
    return 0.5 * likely.sum(dim=0)
