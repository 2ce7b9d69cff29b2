"""The systems of a GPU, each in a process of its own and one visit after the other, beside the resident model.

On every visit a system is opened, warmed, and decodes the same requests in turns with the resident model, so that what
is said of the two is of the same minutes; then it prefills the long prompt. Whatever fails is an entry with its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.measure import process as processes
from harness.measure.blocks import Asked, Row, run_blocks, warm_up
from harness.measure.gpu_figures import (
    RESIDENT,
    Known,
    buffer_figures,
    entry,
    prefill_figures,
    resident_entry,
)
from harness.measure.gpu_visits import Visit
from harness.measure.process import ContenderFailed, Kind, Spec

if TYPE_CHECKING:
    from harness.measure.gpu_runs import GpuWorkload
    from harness.measure.workload import TokenRequest
    from runtime.facts import ModelFacts

JsonDict = dict[str, Any]
Clock = Callable[[], float]
Start = Callable[[str, Spec, float], AbstractContextManager[Asked]]

REQUEST_CAP_S = 8.0
LEAST_S = 15.0  # with less time than that, no visit is begun
_SHARE = 2.0  # of the time that is left, over an even one: most visits need less, and the last tell the least
_DECODE_SHARE = 0.6  # of a visit's time
_NO_TIME = "no time was left"
_CALL_S = 120.0  # of anything but a load
_PROFILE_S = 40.0


class _Timed:
    """A process that is asked for nothing that would end after `end_s`."""

    def __init__(self, process: Asked, end_s: float, clock: Clock) -> None:
        self._process, self._end_s, self._clock = process, end_s, clock
        self.facts: dict[str, Any] = dict(process.facts)

    @property
    def peak_bytes(self) -> int | None:
        return self._process.peak_bytes

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        left_s = self._end_s - self._clock()
        if left_s <= 0:
            raise ContenderFailed(_NO_TIME, out_of_memory=False)
        return self._process.ask(op, timeout_s=min(timeout_s, left_s), **arguments)


class GpuContest:
    """Makes visits until the time is over.

    Attributes:
        systems: what is known of each, by name. gpu: what it is. memory_rate: at which it reads its memory.
        left_out: the visits for which no time was left.

    Args:
        model: the checkpoint. end_s: on `clock`; nothing is asked for beyond it.
        on_entry: told the name of each system when its entry is there.
        on_profile: told name and tables of each system in `profiled`, after a short request.
        start: starts a process, given its name, what it is, and how long it may take.
    """

    def __init__(
        self,
        model: str,
        device: str,
        facts: ModelFacts,
        workload: GpuWorkload,
        *,
        end_s: float,
        on_entry: Callable[[str], None],
        on_profile: Callable[[str, str], None],
        profiled: Sequence[str] = (),
        start: Start | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._model, self._device, self._workload = model, device, workload
        # What is copied is an expert, not the pages around one in a file.
        self._facts = replace(facts, slot_bytes=facts.expert_bytes)
        self._end_s, self._clock, self._start = end_s, clock, start or _start
        self._on_entry, self._on_profile, self._profiled = on_entry, on_profile, profiled
        self._running = dict[str, tuple[ExitStack, _Timed]]()
        self._samples = list[JsonDict]()
        self._demands = dict[int, list[list[int]]]()
        self.systems: dict[str, JsonDict] = {}
        self.gpu: JsonDict = {}
        self.memory_rate: JsonDict = {}
        self.left_out: list[str] = []

    @property
    def _left_s(self) -> float:
        return self._end_s - self._clock()

    @property
    def _is_over(self) -> bool:
        """What fails now has only been cut off."""
        return self._left_s <= 0

    @property
    def _known(self) -> Known:
        context = max(
            [len(one.prompt_ids) + len(one.output_ids) for one in self._workload.requests]
            + [len(self._workload.long_prompt)]
        )
        rate = self.memory_rate.get("memory_bytes_per_s", float("inf"))
        return Known(self._facts, rate, self._demands, context)

    def run(self, wanted: Sequence[Visit]) -> None:
        """Make the visits; the resident model's process runs beside all of them."""
        try:
            self._open_resident()
            for number, visit in enumerate(wanted):
                if self._left_s < LEAST_S:
                    self.left_out.append(visit.name)
                    continue
                later = {one.system for one in wanted[number + 1 :]}
                self._visit(visit, min(1.0, _SHARE / (len(wanted) - number)) * self._left_s)
                if visit.system not in later:
                    self._end(visit.system)
            if (running := self._running.get(RESIDENT)) is not None:  # last: a profiler may take its process with it
                self._profile(RESIDENT, running[1], self.systems[RESIDENT])
        finally:
            for system in list(self._running):
                self._end(system)

    def _process(self, system: str, kind: Kind) -> _Timed:
        """That of a system, started where it does not run."""
        if system not in self._running:
            if self._is_over:
                raise ContenderFailed(_NO_TIME, out_of_memory=False)
            stack = ExitStack()
            spec = Spec(kind, self._model, _threads(), device=self._device)
            process = stack.enter_context(self._start(system, spec, min(self._left_s, _CALL_S)))
            self._running[system] = stack, _Timed(process, self._end_s, self._clock)
        return self._running[system][1]

    def _end(self, system: str) -> None:
        found = self._running.pop(system, None)
        if found is not None:
            found[0].close()

    def _open_resident(self) -> None:
        """The reference of all others: its demands, its prefill, its memory, and how fast the GPU reads."""
        try:
            process = self._process(RESIDENT, "gpu_reference")
            self.gpu = process.facts["gpu"]
            opened = process.ask("open", timeout_s=_CALL_S, overrides={})
            for block, request in enumerate(self._workload.requests[1:]):
                answer = process.ask("demands", timeout_s=_CALL_S, **_ids(request))
                self._demands[block] = answer["demands"]
            found = opened
            self._add_peaks(found, process, has_prefill=True)
            found["buffers"] = buffer_figures(
                found["memory"], self._facts.model_bytes - self._facts.dense_bytes, self._known
            )
            self.memory_rate = process.ask("memory_rate", timeout_s=_CALL_S)
        except ContenderFailed as error:
            self._end(RESIDENT)
            found = {"error": str(error)}
        self.systems[RESIDENT] = found
        self._on_entry(RESIDENT)

    def _visit(self, visit: Visit, share_s: float) -> None:
        began = self._clock()
        try:
            process = self._process(visit.system, visit.kind)
            self.gpu = self.gpu or process.facts["gpu"]
            found = self._measured(visit, process, share_s)
        except ContenderFailed as error:
            self._end(visit.system)
            if self._is_over:
                self.left_out.append(visit.name)
                return
            found = {"overrides": dict(visit.overrides), "error": str(error)}
        found["total_s"] = self._clock() - began
        self.systems[visit.name] = found
        self._on_entry(visit.name)

    def _measured(self, visit: Visit, process: _Timed, share_s: float) -> JsonDict:
        began = self._clock()
        opened = process.ask("open", timeout_s=_CALL_S, overrides=dict(visit.overrides))
        process.facts = opened
        ours, resident = self._warm(visit, process)
        spent_s = self._clock() - began
        num_blocks = self._num_blocks(visit, ours, resident, _DECODE_SHARE * (share_s - spent_s))
        rows = [ours] if resident is None else [resident, ours]
        requests = self._workload.requests[1 : 1 + num_blocks]
        run_blocks(rows, requests, (), cap_s=REQUEST_CAP_S, on_sample=lambda row: None, on_block=lambda: None)
        if resident is not None:
            self._take_in(resident)
        if not ours.samples:
            raise ContenderFailed(ours.failure or "nothing was measured", out_of_memory=not ours.fits)
        found = entry(ours, resident, opened, self._known)
        why = ours.failure
        if why is None:
            try:
                self._finish(visit, process, found)
            except ContenderFailed as error:
                why = str(error)
        if why is not None:  # what it measured before is kept, but it is asked for nothing more
            self._end(visit.system)
            found["cut_off" if self._is_over else "error"] = why
        return found

    def _warm(self, visit: Visit, process: _Timed) -> tuple[Row, Row | None]:
        warming, num_tokens = self._workload.requests[0], len(self._workload.requests[0].output_ids)
        ours = Row(visit.name, process)
        warm_up(ours, warming, num_tokens, REQUEST_CAP_S)
        if visit.warms_all:
            for request in self._workload.requests[1:]:
                process.ask("run", timeout_s=_CALL_S, **_ids(request))
        running = self._running.get(RESIDENT)
        if running is None:
            return ours, None
        resident = Row(RESIDENT, running[1])
        try:
            warm_up(resident, warming, num_tokens, REQUEST_CAP_S)
        except ContenderFailed as error:
            self._lose_resident(str(error))
            return ours, None
        return ours, resident

    def _num_blocks(self, visit: Visit, ours: Row, resident: Row | None, share_s: float) -> int:
        """As many as there is time for, two at least and no more than there are requests."""
        rows = [ours] if resident is None else [ours, resident]
        block_s = sum((row.warm_s_per_token or 0.0) * row.num_tokens for row in rows)
        most = min(visit.most_blocks, len(self._workload.requests) - 1)
        return min(most, max(2, int(share_s / block_s))) if block_s else most

    def _take_in(self, resident: Row) -> None:
        """The resident model's samples beside this visit are figures of its own, too."""
        self._samples += resident.samples.values()
        if self._samples:
            self.systems[RESIDENT] |= resident_entry(self._samples)
        if resident.failure is not None:
            self._lose_resident(resident.failure)

    def _lose_resident(self, why: str) -> None:
        """The others go on alone."""
        self._end(RESIDENT)
        if not self._is_over:
            self.systems[RESIDENT]["error"] = why

    def _finish(self, visit: Visit, process: _Timed, found: JsonDict) -> None:
        """Add what is measured after decoding, as far as it comes."""
        self._add_peaks(found, process, has_prefill=visit.has_prefill)
        if "slots" in found:
            found["buffers"] = buffer_figures(found["memory"], found["slots_bytes"], self._known)
        self._profile(visit.name, process, found)
        if "profile_error" in found:
            self._end(visit.system)
        else:
            process.ask("shut", timeout_s=_CALL_S)

    def _add_peaks(self, found: JsonDict, process: _Timed, *, has_prefill: bool) -> None:
        """Memory after decoding and, where the long prompt is prefilled, after that; and the figures of that, beside
        those of the resident model now."""
        memory = process.ask("memory", timeout_s=_CALL_S)
        found["memory"] = {**memory, "decode_peak_gpu_bytes": memory["peak_gpu_bytes"]}
        if not has_prefill or not self._workload.long_prompt:
            return
        taken, resident = self._prefill(process), None
        if (running := self._running.get(RESIDENT)) is not None and running[1] is not process:
            resident = prefill_figures(self._prefill(running[1]), None)
        found["prefill"] = prefill_figures(taken, resident)
        found["memory"] |= process.ask("memory", timeout_s=_CALL_S)

    def _prefill(self, process: _Timed) -> JsonDict:
        return process.ask("prefill", timeout_s=_CALL_S, prompt_ids=list(self._workload.long_prompt))

    def _profile(self, name: str, process: _Timed, found: JsonDict) -> None:
        """Where it was asked for; a profiler that does not run here costs nothing else."""
        if name not in self._profiled:
            return
        try:
            answer = process.ask("profile", timeout_s=_PROFILE_S, **_ids(self._workload.requests[1]))
        except ContenderFailed as error:
            found["profile_error"] = str(error)
        else:
            self._on_profile(name, answer["text"])


def _ids(request: TokenRequest) -> dict[str, list[int]]:
    return {"prompt_ids": list(request.prompt_ids), "output_ids": list(request.output_ids)}


def _threads() -> int:
    from runtime.profile import Profile

    return Profile.default().compute.threads


def _start(name: str, spec: Spec, timeout_s: float) -> AbstractContextManager[Asked]:
    return processes.start(name, spec, limit_bytes=None, use_cgroup=False, load_timeout_s=timeout_s)
