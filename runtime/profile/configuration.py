"""What a profile sets: the sections that act."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from runtime.predictors.params import PREDICTOR_PARAMS, TRAINED, default_period
from runtime.profile.fields import (
    ByteCount,
    Count,
    OneOf,
    Params,
    Positive,
    Section,
    Share,
    Slots,
    Threads,
    refuse_params,
)

# Names of what exists. An issue that adds a member of a family adds its name here.
POLICIES = (
    "lru",
    "lfu",
    "lfru",
    "static",
    "next_use",
    "activation",
    "plec",
    "periodic",
    "probabilistic_belady",
    "td_next_use",
)
PREDICTORS = tuple(PREDICTOR_PARAMS)
SCHEDULERS = ("fifo", "route_overlap", "deadline")
PREFILL_KERNELS = ("eager", "grouped_mm")
DECODE_KERNELS = ("eager", "grouped_mm", "gemv")
EVERY_UNITS = ("step", "prompt")
MISS_ACTIONS = ("copy", "compute", "auto")
LOSSY = ("lossy.substitute", "lossy.substitute_always")
NUMERICS = ("exact", "equivalent", *LOSSY)


class Limits(Section):
    """What the user asked for."""

    max_memory_bytes: ByteCount | None = None
    """Of the whole process on the compute device; "1.5GiB" is read too."""
    slo_tpot_ms: Positive | None = None
    """Longest acceptable time per output token."""
    slo_ttft_ms: Positive | None = None
    """Longest acceptable time to the first token."""


class Cache(Section):
    """Which experts are kept."""

    slots: Slots = None
    """Expert slots over all layers, or a share of all experts such as "25%"; None: as many as fit the memory."""
    kv_bytes: ByteCount | None = None
    """Memory set aside for the KV cache."""
    policy: Annotated[str, OneOf("policy", POLICIES)] = "td_next_use"
    """Eviction policy."""
    params: Params = Field(default_factory=dict)
    """Of the policy."""

    @model_validator(mode="after")
    def _no_params(self) -> Self:
        refuse_params("policy", self.policy, self.params)
        return self


class Prefetch(Section):
    """What is loaded before it is demanded."""

    depth: Annotated[int, Field(ge=0)] = 1
    """Layers ahead; 0: no prefetch."""
    count: Count = 2
    """Experts per token and layer at most."""
    adaptive: bool = False
    """`depth` is the most; how far to look is learned while running."""
    on_trial: bool = True
    """Compare decode steps with and without prefetch while running, and leave it off where it does not pay."""


class Predictor(Section):
    """What prefetching goes by."""

    kind: Annotated[str, OneOf("predictor", PREDICTORS)] = "gate_lookahead"
    """Which predictor."""
    every: Count = 1
    """A forecast is reused for this many units; 40 where `periodic` is named without saying."""
    every_unit: Annotated[str, OneOf("unit", EVERY_UNITS)] = "step"
    """Unit of `every`; "prompt" where `periodic` is named without saying."""
    artifact: str | None = None
    """Trained predictor, a path beside the profile."""
    params: Params = Field(default_factory=dict)
    """Of the predictor."""

    @model_validator(mode="before")
    @classmethod
    def _default_period(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        every, unit = default_period(str(found.get("kind")))
        return {"every": every, "every_unit": unit, **found}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.artifact is not None and self.kind not in TRAINED:
            raise ValueError(f"predictor {self.kind!r} is not trained and takes no artifact; remove {self.artifact!r}")
        if self.artifact is None and TRAINED.get(self.kind):
            raise ValueError(f"predictor {self.kind!r} needs an artifact; train one: python -m harness.fit {self.kind}")
        if self.every_unit == "prompt" and self.kind != "periodic":
            raise ValueError(f"every_unit 'prompt' is for predictor 'periodic'; {self.kind!r} counts steps")
        known = PREDICTOR_PARAMS[self.kind]
        try:
            known.model_validate(self.params)
        except ValidationError as error:
            first = error.errors()[0]
            name, takes = ".".join(map(str, first["loc"])), ", ".join(known.model_fields) or "none"
            raise ValueError(
                f"params of predictor {self.kind!r}: {name}: {first['msg'].lower()}; it takes {takes}"
            ) from None
        return self


class Scheduler(Section):
    """Which requests run together."""

    kind: Annotated[str, OneOf("scheduler", SCHEDULERS)] = "fifo"
    """Which scheduler."""
    group: Count = 1
    """Requests decoded together."""
    window: Count | None = None
    """Batches of `group` that take turns; None: 2 for route_overlap, which distributes requests among them, else 1."""
    quantum: Count | None = None
    """Tokens that a batch of route_overlap decodes before the next one's turn; others have none. None: its default."""

    @property
    def num_batches(self) -> int:
        """`window`, or what it is where it is left out: a single batch leaves route_overlap nothing to choose between;
        ExpertFlow looks at two."""
        return self.window or (2 if self.kind == "route_overlap" else 1)

    @property
    def num_sequences(self) -> int:
        """Under way at most: each needs a KV cache."""
        return self.group * self.num_batches


class Compute(Section):
    """Expert kernels: they fix the result to the bit."""

    prefill: Annotated[str, OneOf("prefill kernel", PREFILL_KERNELS)] = "grouped_mm"
    """Kernel of passes with several tokens per sequence."""
    decode: Annotated[str, OneOf("decode kernel", DECODE_KERNELS)] = "gemv"
    """Kernel of passes with one token per sequence."""
    threads: Threads = 1
    """CPU threads that compute."""
    host_share: Share | None = None
    """Of the experts that a layer step misses, with miss auto: the share that the CPU computes from host memory, where
    the model computes on a GPU. None: by rates that are measured on loading."""


class Transfer(Section):
    """How experts travel."""

    streams: Threads = 2
    """CUDA copy streams."""
    io_threads: Threads = 2
    """Threads that read from disk."""


class Tiers(Section):
    """Where experts rest that are not in a slot."""

    host_bytes: ByteCount | None = None
    """Host memory for experts of a model that computes on a GPU; the rest stays on disk. None: what is allowed."""
    host_policy: Annotated[str, OneOf("policy", POLICIES)] = "td_next_use"
    """Eviction policy of the host memory, where it does not hold all experts."""
