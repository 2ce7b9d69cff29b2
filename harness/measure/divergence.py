"""How far the next-token distributions of one model are from those of another, on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.measure.runner import Decoder
from harness.measure.workload import TokenRequest

if TYPE_CHECKING:
    from runtime.engine import Engine


@dataclass(frozen=True)
class Divergence:
    """Of the model that was measured from the exact one; logarithms are natural.

    Attributes:
        num_tokens: next-token predictions that were compared.
        kl_nats: mean of KL(exact || ours).
        perplexity_exact, perplexity: exp of the mean negative log-likelihood of the text's own next tokens.
        top1_agreement: share of predictions in which both find the same token likeliest.
        max_logit_error: largest absolute difference of a logit.
    """

    num_tokens: int
    kl_nats: float
    perplexity_exact: float
    perplexity: float
    top1_agreement: float
    max_logit_error: float

    @property
    def perplexity_ratio(self) -> float:
        """Ours over that of the exact model."""
        return self.perplexity / self.perplexity_exact

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


class DivergenceMeter:
    """Adds up predictions, one at a time; in float64."""

    def __init__(self) -> None:
        self._num_tokens = self._num_agreed = 0
        self._kl = self._nll_exact = self._nll = self._max_error = 0.0

    def add(self, exact: torch.Tensor, ours: torch.Tensor, target: int) -> None:
        """Logits [vocabulary] of both for the token that is really `target`."""
        exact, ours = exact.double().cpu(), ours.double().cpu()
        log_p, log_q = exact.log_softmax(-1), ours.log_softmax(-1)
        # A logit of -inf is a token that cannot be: 0 log 0 is 0.
        self._kl += float(torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum())
        self._nll_exact -= float(log_p[target])
        self._nll -= float(log_q[target])
        self._num_tokens += 1
        self._num_agreed += int(exact.argmax() == ours.argmax())
        self._max_error = max(self._max_error, float(torch.where(exact == ours, 0.0, (exact - ours).abs()).max()))

    def result(self) -> Divergence:
        """Of all predictions so far, one at least."""
        count = self._num_tokens
        return Divergence(
            num_tokens=count,
            kl_nats=self._kl / count,
            perplexity_exact=math.exp(self._nll_exact / count),
            perplexity=math.exp(self._nll / count),
            top1_agreement=self._num_agreed / count,
            max_logit_error=self._max_error,
        )


@torch.inference_mode()
def compare(
    exact: Engine, ours: Engine, requests: Sequence[TokenRequest], on_token: Callable[[], None] = lambda: None
) -> Divergence:
    """Feed the real tokens of `requests` (at least one) to both, one text after another, each token to both in turn.

    What is compared are the predictions of the output tokens; logits are kept no longer than that takes.

    Raises:
        ExpertFlowError: whatever a pass raises.
    """
    meter = DivergenceMeter()
    for request in requests:
        ours.passes.task = request.task
        streams = zip(_logits(exact.model, request), _logits(ours.model, request), request.output_ids, strict=True)
        for expected, found, target in streams:
            meter.add(expected, found, target)
            on_token()
    return meter.result()


def _logits(model: Any, request: TokenRequest) -> Iterator[torch.Tensor]:
    """Logits [vocabulary] for each output token of a request."""
    decoder = Decoder(model)
    yield decoder.logits(request.prompt_ids)
    for token in request.output_ids[:-1]:
        yield decoder.logits([token])
