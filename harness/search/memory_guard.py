"""Which configurations fit into memory: the memory model, corrected by what its errors were so far."""

from __future__ import annotations

import math
from collections.abc import Iterable

from harness.hardware.memory import MemoryModel
from harness.search.outcome import Tried
from harness.search.space import Params, Space
from runtime.machine import MemorySum, format_bytes
from runtime.profile import Scheduler

MARGIN = 0.02
"""Of the predicted peak, kept free beyond the largest error seen; with n configurations measured, a share 1/sqrt(n) of
it is enough. While nothing was measured, twice as much more for each that ran out of memory."""


class MemoryGuard:
    """Says what a configuration will need, and whether to launch it.

    Args:
        model: at the context that there must be memory for. measured_model: at that of the trials.
        limit_bytes: on the peak of the process.

    Attributes:
        error: the largest measured over predicted peak so far, minus 1; None before anything was measured.
    """

    def __init__(self, model: MemoryModel, measured_model: MemoryModel, space: Space, limit_bytes: int) -> None:
        self.model, self.limit_bytes = model, limit_bytes
        self._measured_model, self._space = measured_model, space
        self.error: float | None = None
        self._margin = MARGIN

    def learn(self, tried: Iterable[Tried], num_out_of_memory: int = 0) -> None:
        """Take in what was measured, and how many trials ran out of memory."""
        errors = [self.error_of(one) for one in tried]
        self.error = max(errors, default=None)
        if self.error is None:
            self._margin = MARGIN * (1 + 2 * num_out_of_memory)
        else:
            self._margin = max(0.0, self.error + MARGIN / math.sqrt(len(errors)))

    def error_of(self, one: Tried) -> float:
        """Measured over predicted peak, minus 1."""
        return one.peak_memory_bytes / self._predict(self._measured_model, one.params).total_bytes - 1

    def expected_bytes(self, params: Params) -> int:
        """The predicted peak with the largest error seen so far."""
        return round(self._predict(self.model, params).total_bytes * (1 + (self.error or 0.0)))

    def allows(self, params: Params) -> bool:
        """True for what fits even if the model is a little more wrong than it was so far."""
        return self._predict(self.model, params).total_bytes * (1 + self._margin) <= self.limit_bytes

    def excess(self, params: Params) -> str:
        """Why a configuration is not to be launched; empty where it may be.

        The bare model decides until something was measured: the default is to have its chance.
        """
        predicted = self._predict(self.model, params)
        if predicted.total_bytes * (1 + max(self.error or 0.0, 0.0)) <= self.limit_bytes:
            return ""
        wrong = f", {self.error:+.1%} as measured so far" if self.error and self.error > 0 else ""
        return f"not launched: {predicted.describe()}{wrong}, limit {format_bytes(self.limit_bytes)}"

    def _predict(self, model: MemoryModel, params: Params) -> MemorySum:
        values = self._space.complete(params)
        scheduler = Scheduler(kind=str(values["scheduler"]), group=int(values["group"]), window=int(values["window"]))
        return model.predict(int(values["slots"]), scheduler.num_sequences)
