"""What a profile says: where it holds, what was measured and how sure that is, and where it comes from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from runtime.profile.fields import ByteCount, Count, Positive, Section


class ModelIdentity(Section):
    """What makes two checkpoints alike for a profile; the weights themselves do not matter."""

    architecture: str
    """Class name of the transformers model."""
    layers: Count
    """Number of MoE layers."""
    experts: Count
    """Experts per MoE layer."""
    top_k: Count
    """Experts per token."""
    expert_bytes: Count
    """Bytes of one expert in `dtype`."""
    dtype: str
    """Of the expert weights, such as bfloat16."""


class Bandwidth(Section):
    """A bandwidth that must be reached."""

    min: Positive
    """Bytes per second below which the profile is stale."""


class Match(Section):
    """Where the profile holds."""

    device: str | None = None
    """cpu, or cuda:NAME."""
    memory_total_bytes: ByteCount | None = None
    """Memory of the compute device."""
    bandwidth_at_expert_size_bytes_per_s: Bandwidth | None = None
    """Reading single experts into slots."""
    model: ModelIdentity | None = None
    """The model that was tuned."""

    @property
    def gpu(self) -> str | None:
        """The GPU that it was tuned on, as cuda:NAME; None: it was none, or the profile does not say."""
        return self.device if self.device is not None and self.device.startswith("cuda") else None


class Workload(Section):
    """What the profile was tuned on."""

    name: str | None = None
    """Of the prompt set."""
    sha256: str | None = None
    """Of the prompt set."""
    concurrency: Count | None = None
    """Requests outstanding at a time."""
    context: Count | None = None
    """Longest prompt with its answer, in tokens."""
    num_requests: Count | None = None
    """Of a measured run."""
    prompt_tokens: Count | None = None
    """Of each of them."""
    output_tokens: Count | None = None
    """Of each of them."""


class Objectives(Section):
    """What was measured with this configuration."""

    latency_ms_p50: Positive | None = None
    """Median over requests of (finish - arrival) / output tokens."""
    tokens_per_s: Positive | None = None
    """Output tokens of all requests per second."""
    ttft_ms_p50: Positive | None = None
    """Median time to the first token."""
    tpot_ms_p50: Positive | None = None
    """Median time per output token after the first."""
    peak_memory_bytes: Count | None = None
    """Highest resident memory."""
    bytes_per_token: Annotated[float, Field(ge=0)] | None = None
    """Expert bytes brought in per token."""
    hit_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of lookups that found their expert in its slot."""
    fraction_of_bound: Positive | None = None
    """Bound of the time per token divided by the measured time."""


class Ratio(Section):
    """Latency with this profile over that of the baseline, paired; below 1 is better."""

    estimate: Positive
    """Median of the paired ratios."""
    low: Positive
    """Lower end of the confidence interval."""
    high: Positive
    """Upper end of the confidence interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the interval."""


class Evidence(Section):
    """How sure the gain is."""

    baseline: Objectives | None = None
    """The default configuration, measured beside this one."""
    ratio: Ratio | None = None
    """This profile against the baseline."""
    pairs: Count | None = None
    """Interleaved pairs of runs behind `ratio`."""
    trials: Annotated[int, Field(ge=0)] | None = None
    """Configurations tried."""
    oom: Annotated[int, Field(ge=0)] | None = None
    """Trials that ran out of memory."""
    seed: int | None = None
    """Of the search."""
    simulator_rank_correlation: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Kendall's tau between simulated and measured latency."""
    memory_model_error: float | None = None
    """Measured over predicted peak memory, minus 1."""
    kl_nats: Annotated[float, Field(ge=0)] | None = None
    """Mean over tokens of KL(exact model || this profile), of the next token's distribution."""
    perplexity_ratio: Positive | None = None
    """Perplexity of the same text with this profile over that of the exact model."""
    max_logit_error: Annotated[float, Field(ge=0)] | None = None
    """Largest difference of a logit from the exact model's."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of tokens at which both find the same next token likeliest."""


class Provenance(Section):
    """Where the profile comes from."""

    created: str | None = None
    """ISO 8601, UTC."""
    model: str | None = None
    """Checkpoint that was tuned: a hub id, a folder, or "cache:NAME" for one in the cache of checkpoints."""
    model_command: str | None = None
    """That makes this checkpoint where it is not published."""
    versions: dict[str, str] | None = None
    """Of the packages that matter."""
    commit: str | None = None
    """Of this project."""
    hardware: dict[str, int | float | str] | None = None
    """`runtime.machine.fingerprint`."""
    command: str | None = None
    """That made the profile."""
