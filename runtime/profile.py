"""The profile: one YAML file that says how to run one model on one machine, and what was measured doing so.

Its schema (pydantic models), reading, writing, and whether it fits a model and a machine. Reading is strict: a key that
nothing acts on, or a name of something that does not exist, is an error with the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from runtime import strict_yaml
from runtime.errors import ProfileError, UsageError
from runtime.files import write_atomic
from runtime.machine import format_bytes, parse_bytes
from runtime.predictors.params import PREDICTOR_PARAMS, TRAINED, default_period

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
MISS_ACTIONS = ("copy",)
LOSSY = ("lossy.substitute", "lossy.substitute_always")
NUMERICS = ("exact", *LOSSY)

SCHEMA_VERSION: Final = 1
KIND: Final = "moe-offload-profile"

# Memory reported by one machine differs a little from boot to boot.
MEMORY_TOLERANCE = 0.05


def _one_of(noun: str, known: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {noun} {name!r}; known: {', '.join(known)}")
        return name

    return AfterValidator(check)


def _check_slots(value: object) -> object:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value) and 0 < float(value[:-1]) <= 100:
        return value
    raise ValueError(f'{value!r} is neither a count of at least 1 nor a share of all experts such as "25%"')


def _read_bytes(value: object) -> object:
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from error


Count = Annotated[int, Field(ge=1)]
ByteCount = Annotated[int, BeforeValidator(_read_bytes), Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Params = dict[str, bool | int | float | str]


def _refuse_params(noun: str, name: str, params: Params) -> None:
    if params:
        raise ValueError(f"{noun} {name!r} takes no params; remove {', '.join(params)}")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelIdentity(_Section):
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


class Bandwidth(_Section):
    """A bandwidth that must be reached."""

    min: Positive
    """Bytes per second below which the profile is stale."""


class Match(_Section):
    """Where the profile holds."""

    device: str | None = None
    """cpu, or cuda:NAME."""
    memory_total_bytes: ByteCount | None = None
    """Memory of the compute device."""
    bandwidth_at_expert_size_bytes_per_s: Bandwidth | None = None
    """Reading single experts into slots."""
    model: ModelIdentity | None = None
    """The model that was tuned."""


class Workload(_Section):
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


class Limits(_Section):
    """What the user asked for."""

    max_memory_bytes: ByteCount | None = None
    """Of the whole process on the compute device; "1.5GiB" is read too."""
    slo_tpot_ms: Positive | None = None
    """Longest acceptable time per output token."""
    slo_ttft_ms: Positive | None = None
    """Longest acceptable time to the first token."""


class Cache(_Section):
    """Which experts are kept."""

    slots: Annotated[int | str | None, BeforeValidator(_check_slots)] = None
    """Expert slots over all layers, or a share of all experts such as "25%"; None: as many as fit the memory."""
    kv_bytes: ByteCount | None = None
    """Memory set aside for the KV cache."""
    policy: Annotated[str, _one_of("policy", POLICIES)] = "td_next_use"
    """Eviction policy."""
    params: Params = {}
    """Of the policy."""

    @model_validator(mode="after")
    def _no_params(self) -> Self:
        _refuse_params("policy", self.policy, self.params)
        return self


class Prefetch(_Section):
    """What is loaded before it is demanded."""

    depth: Annotated[int, Field(ge=0)] = 1
    """Layers ahead; 0: no prefetch."""
    count: Count = 2
    """Experts per token and layer at most."""
    adaptive: bool = False
    """`depth` is the most; how far to look is learned while running."""
    on_trial: bool = True
    """Compare decode steps with and without prefetch while running, and leave it off where it does not pay."""


class Predictor(_Section):
    """What prefetching goes by."""

    kind: Annotated[str, _one_of("predictor", PREDICTORS)] = "gate_lookahead"
    """Which predictor."""
    every: Count = 1
    """A forecast is reused for this many units; 40 where `periodic` is named without saying."""
    every_unit: Annotated[str, _one_of("unit", EVERY_UNITS)] = "step"
    """Unit of `every`; "prompt" where `periodic` is named without saying."""
    artifact: str | None = None
    """Trained predictor, a path beside the profile."""
    params: Params = {}
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


class Scheduler(_Section):
    """Which requests run together."""

    kind: Annotated[str, _one_of("scheduler", SCHEDULERS)] = "fifo"
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


class Compute(_Section):
    """Expert kernels: they fix the result to the bit."""

    prefill: Annotated[str, _one_of("prefill kernel", PREFILL_KERNELS)] = "grouped_mm"
    """Kernel of passes with several tokens per sequence."""
    decode: Annotated[str, _one_of("decode kernel", DECODE_KERNELS)] = "gemv"
    """Kernel of passes with one token per sequence."""
    threads: Count = 1
    """CPU threads that compute."""


class Transfer(_Section):
    """How experts travel."""

    streams: Count = 2
    """CUDA copy streams."""
    io_threads: Count = 2
    """Threads that read from disk."""


class Tiers(_Section):
    """Where experts rest that are not in a slot."""

    host_bytes: ByteCount | None = None
    """Host memory for experts of a model that computes on a GPU; the rest stays on disk."""


class Objectives(_Section):
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


class Ratio(_Section):
    """Latency with this profile over that of the baseline, paired; below 1 is better."""

    estimate: Positive
    """Median of the paired ratios."""
    low: Positive
    """Lower end of the confidence interval."""
    high: Positive
    """Upper end of the confidence interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the interval."""


class Evidence(_Section):
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
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of tokens at which both find the same next token likeliest."""


class Provenance(_Section):
    """Where the profile comes from."""

    created: str | None = None
    """ISO 8601, UTC."""
    model: str | None = None
    """Checkpoint that was tuned: a folder or hub id."""
    versions: dict[str, str] | None = None
    """Of the packages that matter."""
    commit: str | None = None
    """Of this project."""
    hardware: dict[str, int | float | str] | None = None
    """`runtime.machine.fingerprint`."""
    command: str | None = None
    """That made the profile."""


def _check_fixed(keys: tuple[str, ...]) -> tuple[str, ...]:
    for key in keys:
        if key not in _KNOWN_KEYS:
            raise ValueError(f"{key!r} is no key of a profile; {_nearest_key(key)}")
    return keys


class Profile(_Section):
    """The whole file. Sections that were not measured are None and not written."""

    schema_version: Literal[1]
    """Of this schema."""
    kind: Literal["moe-offload-profile"]
    """Tells a profile from any other YAML file."""
    match: Match | None = None
    """Where the profile holds."""
    workload: Workload | None = None
    """What it was tuned on."""
    limits: Limits | None = None
    """What the user asked for."""
    cache: Cache = Cache()
    """Which experts are kept."""
    prefetch: Prefetch = Prefetch()
    """What is loaded before it is demanded."""
    predictor: Predictor = Predictor()
    """What prefetching goes by."""
    scheduler: Scheduler = Scheduler()
    """Which requests run together."""
    compute: Compute = Compute()
    """Expert kernels."""
    transfer: Transfer = Transfer()
    """How experts travel."""
    tiers: Tiers | None = None
    """Where experts rest."""
    miss: Annotated[str, _one_of("miss action", MISS_ACTIONS)] = "copy"
    """What is done about an expert that is not there."""
    numerics: Annotated[str, _one_of("numerics", NUMERICS)] = "exact"
    """How close the result is to that of the resident model. `lossy.substitute`: when decoding, a token whose expert is
    absent goes to the best resident one, and only forecasts bring experts in; `_always`: when prefilling too."""
    fixed: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_fixed)] = ()
    """Dotted keys that the user set; the tuner does not touch them."""
    objectives: Objectives | None = None
    """What was measured."""
    evidence: Evidence | None = None
    """How sure the gain is."""
    provenance: Provenance | None = None
    """Where the profile comes from."""
    fallback: Literal["default"] = "default"
    """What runs instead where the profile is rejected."""

    @classmethod
    def default(cls) -> Profile:
        """The configuration that runs where nothing was tuned."""
        return cls(schema_version=SCHEMA_VERSION, kind=KIND)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Profile:
        """A copy with dotted keys set, such as {"cache.slots": "25%"}.

        Another predictor comes with its own default period, where this one's was the default.

        Raises:
            ProfileError: an unknown key or a value that its key does not take.
        """
        tree = self.model_dump(exclude_none=True)
        if (self.predictor.every, self.predictor.every_unit) == default_period(self.predictor.kind):
            del tree["predictor"]["every"], tree["predictor"]["every_unit"]
        for key, value in overrides.items():
            _set(tree, key, value)
        return _validate(tree, "override")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, the sections' own names among them."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


_KNOWN_KEYS = tuple(_keys(Profile))


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What a machine offers: `device` "cpu" or "cuda:NAME", its memory, and bandwidth where it was measured."""

    device: str
    memory_total_bytes: int
    bandwidth_at_expert_size_bytes_per_s: float | None = None


Level = Literal["exact", "compatible", "stale", "rejected"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class MatchResult:
    """How far a profile fits: `exact`, `compatible` (differs, or does not say), `stale` (tune again) or `rejected`."""

    level: Level
    reasons: tuple[str, ...]


def match_profile(profile: Profile, model: ModelIdentity, machine: MachineFacts) -> MatchResult:
    """Whether `profile` holds for `model` on `machine`: the worst of all findings, with every reason."""
    if profile.match is None:
        return MatchResult("compatible", ("the profile does not say which model and machine it is for",))
    findings = [*_match_model(profile.match, model), *_match_machine(profile.match, machine)]
    level = max((level for level, _ in findings), key=LEVELS.index, default=LEVELS[0])
    return MatchResult(level, tuple(reason for _, reason in findings))


def _match_model(match: Match, model: ModelIdentity) -> Iterator[tuple[Level, str]]:
    if match.model is None:
        yield "compatible", "the profile does not say which model it is for"
        return
    for name in ModelIdentity.model_fields:
        wanted, found = getattr(match.model, name), getattr(model, name)
        if wanted != found:
            yield "rejected", f"model {name}: profile {wanted}, here {found}"


def _match_machine(match: Match, machine: MachineFacts) -> Iterator[tuple[Level, str]]:
    if match.device is None:
        yield "compatible", "the profile does not say which device it is for"
    elif match.device != machine.device:
        same_kind = match.device.split(":")[0] == machine.device.split(":")[0]
        yield "compatible" if same_kind else "rejected", f"device: profile {match.device}, here {machine.device}"
    yield from _match_memory(match.memory_total_bytes, machine.memory_total_bytes)
    bandwidth, found = match.bandwidth_at_expert_size_bytes_per_s, machine.bandwidth_at_expert_size_bytes_per_s
    if bandwidth is None or (found is not None and found >= bandwidth.min):
        return
    if found is None:
        yield "exact", "bandwidth at expert size was not measured here"
    else:
        wanted = f"{format_bytes(bandwidth.min)}/s"
        yield "stale", f"bandwidth at expert size: profile at least {wanted}, here {format_bytes(found)}/s"


def _match_memory(wanted: int | None, found: int) -> Iterator[tuple[Level, str]]:
    if wanted is None:
        yield "compatible", "the profile does not say how much memory it is for"
    elif abs(found - wanted) > MEMORY_TOLERANCE * wanted:
        level: Level = "stale" if found < wanted else "compatible"
        yield level, f"memory: profile {format_bytes(wanted)}, here {format_bytes(found)}"


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        ProfileError: one line with the file, the key, what is wrong, and the nearest thing that would be right.
    """
    path = Path(path)
    try:
        content = strict_yaml.parse(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"{path}: cannot read the profile: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error
    return _validate(_check_head(content, path), str(path))


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write `profile` to `path`, wholly or not at all."""
    write_atomic(Path(path), dump_profile(profile))


def dump_profile(profile: Profile) -> str:
    """YAML of `profile`, keys in the order of the schema; `load_profile` gives an equal profile back."""
    return strict_yaml.dump(profile.model_dump(exclude_none=True))


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """{"cache.slots": 64} of ["cache.slots=64"]; values are read as YAML.

    Raises:
        UsageError: not of the form KEY=VALUE.
    """
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{setting!r} is not KEY=VALUE, such as cache.slots=25%")
        try:
            overrides[key.strip()] = strict_yaml.parse(value)
        except ValueError as error:
            raise UsageError(f"{setting!r}: {error}") from error
    return overrides


def _check_head(content: object, path: Path) -> dict[Any, Any]:
    """The parts that are checked first, because the rest means nothing without them."""
    if content is None:
        raise ProfileError(f"{path}: the file is empty; harness.tune writes profiles")
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys to values, this is a {type(content).__name__}")
    version, kind = content.get("schema_version"), content.get("kind")
    if isinstance(version, bool):
        raise ProfileError(f"{path}: schema_version is {version!r}, not {SCHEMA_VERSION}")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ProfileError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}; upgrade expertflow")
    if "kind" in content and kind != KIND:
        raise ProfileError(f"{path}: kind is {kind!r}, not {KIND!r}: another sort of file")
    return content


def _validate(tree: Mapping[Any, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(f"{where}: {'; '.join(_explain(dict(e)) for e in error.errors())}") from error


def _explain(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest_key(key)}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _nearest_key(key: str) -> str:
    """Advice on an unknown dotted key: the like-named one of its section, else of any, else the nearest at all."""
    section, _, name = key.rpartition(".")
    own = {known.rpartition(".")[2]: known for known in _KNOWN_KEYS if known.rpartition(".")[0] == section}
    every = {known.rpartition(".")[2]: known for known in reversed(_KNOWN_KEYS)}
    for names, cutoff in ((own, 0.6), (every, 0.7), (own, 0.0), (every, 0.0)):
        if nearest := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            break
    return f"the nearest known one is {names[nearest[0]]!r}"


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ProfileError(f"override: {'.'.join(sections[: depth + 1])!r} is no section; {_nearest_key(key)}")
    tree[name] = value
