"""`numerics: lossy.substitute`: a token whose expert is absent does not wait for it but goes to the best resident one.

After eMoE (arXiv 2503.06823, section 3.2). Results differ from the exact model's: `python -m harness.quality` measures
by how much. The substitute is the expert to which the router gave the highest logit in the running pass, of those that
are resident and that the token does not have yet, and it gets the weight that the router itself would have given it.
Nothing is loaded for a miss: experts come by forecast, between passes (`Residency.plan_refresh`) and by prefetch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from runtime.cache.residency import Residency
from runtime.experts import Routed
from runtime.readback import upload
from runtime.vocabulary import Phase

PHASES: dict[str, tuple[Phase, ...]] = {
    "lossy.substitute": (Phase.DECODE,),
    "lossy.substitute_always": (Phase.PREFILL, Phase.DECODE),
}
"""By its name in profiles: the passes in which tokens are sent elsewhere.

eMoE does so always. A prefill served exactly costs loads, but leaves its prompt's own experts behind for decoding.
"""

_TOLERANCE = 0.02  # relative, of weights in bfloat16
_NUM_PROBES = 32  # hidden states that a router is asked about


class RouterAnswer:
    """Keeps the logits [tokens, experts] that a router last answered, until they are taken."""

    def __init__(self, router: nn.Module) -> None:
        self._logits: torch.Tensor | None = None
        router.register_forward_hook(self._keep)

    def take(self) -> torch.Tensor:
        """The logits of the running pass."""
        logits, self._logits = self._logits, None
        assert logits is not None, "the experts ran without their router"
        return logits

    def _keep(self, module: nn.Module, args: object, answer: tuple[torch.Tensor, ...]) -> None:
        self._logits = answer[0].detach()


class Weighing(NamedTuple):
    """How a router weighs the experts of a token: `score(logits)` of each, times a factor of the token's own.

    `is_normalised`: the factor makes the sum of a token's weights what it is, whichever experts it has.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    is_normalised: bool

    def reweigh(
        self, logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        """The weights [tokens, top_k] of the experts `other` for tokens that have `weights` for the experts `index`."""
        score = self.score(logits.double())  # in float32 nothing may be left of those far below the absent experts
        new = score.gather(1, other)
        total = new if self.is_normalised else score.gather(1, index)
        factor = weights.double().sum(dim=1, keepdim=True) / total.sum(dim=1, keepdim=True)
        return (new * factor).to(weights.dtype)


_SCORES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda logits: logits.softmax(-1),
    torch.sigmoid,
    lambda logits: nn.functional.softplus(logits).sqrt(),
)
"""What transformers' routers make of logits: softmax of all or (normalised) of the chosen; DeepSeek-V3's; -V4's."""


def weighing_of(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> Weighing | None:
    """The rule behind a router's answers for several tokens; None: none that is known.

    Args: logits [tokens, experts], weights and index [tokens, top_k].
    """
    weights = weights.double()
    is_normalised = _spread(weights.sum(dim=1)) < _TOLERANCE
    fits = []
    for score in _SCORES:
        factor = weights / score(logits.double()).gather(1, index)
        within = factor / factor.mean(dim=1, keepdim=True) if is_normalised else factor
        fits.append((_spread(within), Weighing(score, is_normalised)))
    spread, best = min(fits, key=lambda fit: fit[0])
    return best if spread < _TOLERANCE else None


def _spread(values: torch.Tensor) -> float:
    """Largest relative distance from the mean."""
    return float((values / values.mean() - 1).abs().max())


def substituted(
    choice: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """`choice` with the absent experts of each token replaced, in its order, by its best present ones.

    Args:
        choice: [tokens, top_k], distinct experts of each token.
        logits: [tokens, experts].
        present: [experts], true for top_k experts or more.
    """
    is_absent = ~present[choice]
    candidates = np.where(present, logits, -np.inf)
    np.put_along_axis(candidates, choice, -np.inf, axis=1)
    best = np.argsort(-candidates, axis=1, kind="stable")
    turn = np.maximum(np.cumsum(is_absent, axis=1) - 1, 0)
    return np.where(is_absent, np.take_along_axis(best, turn, axis=1), choice)


class Substitution:
    """The `LayerRunner.substitution` of one layer.

    A layer in which fewer experts than a token needs are resident is left as it is, and so are as many absent experts,
    those of most tokens first, as there are free slots: these are loaded as usual. An expert on its way counts as
    resident and is waited for: what is computed must not depend on how fast a disk is.

    Args:
        residency, layer: where the layer's experts are.
        answer: of its router.
        weighing: how its router weighs; None: a substitute gets the weight of the expert whose place it takes.
        applies: whether the running pass is to be substituted in.
    Attributes:
        routed: what the router chose [tokens, top_k] when it was last asked; predictors go by that.
    """

    def __init__(
        self,
        residency: Residency,
        layer: int,
        answer: RouterAnswer,
        weighing: Weighing | None,
        applies: Callable[[], bool],
    ) -> None:
        self._residency, self._layer, self._answer = residency, layer, answer
        self._weighing, self._applies = weighing, applies
        self.routed: npt.NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._logits: torch.Tensor | None = None

    def ask(self) -> Sequence[torch.Tensor]:
        """The router's logits, in passes to be substituted in."""
        self._logits = self._answer.take()
        return [self._logits.float()] if self._applies() else ()

    def __call__(self, routed: Routed, answers: Sequence[torch.Tensor]) -> Routed:
        """See `runtime.experts.Substitution`."""
        index, weights, self.routed = routed.index, routed.weights, routed.choice
        logits, self._logits = self._logits, None
        assert logits is not None, "called before it has asked"
        names_none = (self.routed >= self._residency.num_experts).any()  # past the last expert: none at all
        if not answers or names_none:
            return routed
        present = self._present()
        is_absent = ~present[self.routed]
        if not is_absent.any() or present.sum() < index.shape[1]:
            return routed
        self._residency.count_substituted(int(is_absent.sum()))
        choice = substituted(self.routed, answers[0].numpy(), present)
        other = upload(choice, index.device)
        if self._weighing is None:
            return Routed(other, weights, choice)
        is_changed = upload(np.any(is_absent, axis=1, keepdims=True), index.device)
        reweighed = self._weighing.reweigh(logits, weights, index, other)
        return Routed(other, torch.where(is_changed, reweighed, weights), choice)

    def _present(self) -> npt.NDArray[np.bool_]:
        """The experts that hold a slot, and those that free slots are there for."""
        present = self._residency.present(self._layer)
        if num_free := self._residency.num_free:
            counts = np.bincount(self.routed.reshape(-1), minlength=present.size)
            counts[present] = 0
            first = np.argsort(-counts, kind="stable")[:num_free]
            present[first[counts[first] > 0]] = True
        return present


@torch.inference_mode()
def substitution_of(router: nn.Module, residency: Residency, layer: int, applies: Callable[[], bool]) -> Substitution:
    """The substitution of a layer whose `router` answers hidden states, and nothing else, with (logits, weights,
    indices); see `gate_lookahead.lookahead_router`. How it weighs is told from its answers to random ones."""
    weight = next(p for p in router.parameters(recurse=False) if p.ndim == 2)
    random = torch.randn(_NUM_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0))
    weighing = weighing_of(*router.forward(random.to(weight))[:3])
    return Substitution(residency, layer, RouterAnswer(router), weighing, applies)
