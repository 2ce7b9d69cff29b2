"""Everything that reads files from elsewhere: valid files, how to mangle them, and what a value must stand.

A value that a reader accepts is put to use as the project would: a profile is written and read again, a trace is
replayed, a predictor forecasts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mutate
import numpy as np
import torch
from safetensors.torch import save_file

from harness.measure.replay import Setting, Timing, replay
from harness.measure.schedule import Schedule
from runtime import strict_yaml
from runtime.errors import ArtifactError
from runtime.predictors.activation_matrix import ActivationMatrix
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import Observation, Predictor
from runtime.predictors.expert_sequence import ExpertSequence
from runtime.predictors.expert_sequence import Sizes as SequenceSizes
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.params import TRAINED, ActivationMatrixParams
from runtime.predictors.routing_path import RoutingPathNetwork, Sizes
from runtime.profile import MachineFacts, ModelIdentity, Profile, dump_profile, load_profile, match_profile
from runtime.prompts import Prompt, read_prompts
from runtime.trace import RoutingTrace, read_trace, write_trace
from runtime.transfer.safetensors_index import TensorEntry, read_header
from runtime.vocabulary import Pass, Phase

SHAPE = RoutingShape(layers=3, experts=8, top_k=2)
NUM_TOKENS = 10


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        seeds: valid files.
        mangle: makes another file of one of them, seldom a valid one.
        read: the reader.
        use: does with its value what the project does (the file may be written beside), as long as it keeps to errors.
    """

    suffix: str
    seeds: Callable[[Path], Sequence[bytes]]
    mangle: mutate.Mutator
    read: Callable[[Path], Any]
    use: Callable[[Any, Path], None]


def mangled(reader: Reader, seeds: Sequence[bytes], rng: Random) -> bytes:
    """One input for `reader`."""
    data = rng.choice(seeds)
    pick = rng.random()
    if pick < 0.65:
        data = reader.mangle(rng, data)
    if pick < 0.55:
        return data
    if pick > 0.95:
        other, at = rng.choice(seeds), rng.random()
        return data[: int(at * len(data))] + other[int(at * len(other)) :]
    return mutate.bytes_of(rng, data)


# --- profiles ---

_IDENTITY = ModelIdentity(
    architecture="Qwen3MoeForCausalLM", layers=3, experts=8, top_k=2, expert_bytes=3072, dtype="bfloat16"
)
_FULL = {
    "match": {
        "device": "cpu",
        "memory_total_bytes": 8 << 30,
        "bandwidth_at_expert_size_bytes_per_s": {"min": 1.5e9},
        "model": _IDENTITY.model_dump(),
    },
    "workload": {"name": "heldout", "concurrency": 2, "context": 512},
    "limits": {"max_memory_bytes": "1.5GiB", "slo_tpot_ms": 40.0},
    "cache": {"slots": "25%", "policy": "next_use", "kv_bytes": 1 << 20},
    "prefetch": {"depth": 2, "count": 1},
    "predictor": {"kind": "periodic", "every": 40, "every_unit": "prompt", "params": {"model": "frequency"}},
    "scheduler": {"kind": "route_overlap", "group": 2, "window": 2},
    "compute": {"prefill": "eager", "decode": "gemv", "threads": 1},
    "fixed": ["cache.slots"],
    "objectives": {"latency_ms_p50": 12.5, "hit_rate": 0.6},
    "evidence": {"ratio": {"estimate": 0.9, "low": 0.8, "high": 0.95}, "pairs": 12, "seed": 1},
    "provenance": {"model": "models/demo", "versions": {"torch": "2.13"}, "hardware": {"cores": 2}},
}


def _profile_seeds(folder: Path) -> list[bytes]:
    full = Profile.model_validate({"schema_version": 1, "kind": "moe-offload-profile", **_FULL})
    return [dump_profile(full).encode(), dump_profile(Profile.default()).encode()]


def _mangled_profile(rng: Random, data: bytes) -> bytes:
    return mutate.yaml_text(rng, strict_yaml.parse(data), strict_yaml.dump)


def _use_profile(profile: Profile, path: Path) -> None:
    again = path.with_suffix(".again.yaml")
    again.write_text(dump_profile(profile))
    assert load_profile(again) == profile
    match_profile(profile, _IDENTITY, MachineFacts("cpu", 8 << 30, 1e9))
    profile.with_overrides({"cache.slots": 3})


# --- traces ---


def _trace(rng: np.random.Generator, full: bool) -> RoutingTrace:
    layers, experts, top_k = SHAPE
    chosen = np.argsort(rng.random((NUM_TOKENS, layers, experts)), axis=2)[:, :, :top_k]
    fields = {}
    if full:
        fields = {
            "weights": -np.sort(-rng.random((NUM_TOKENS, layers, top_k))).astype(np.float16),
            "token_ids": rng.integers(0, 100, NUM_TOKENS),
            "step": np.repeat(np.arange(5), 2),
            "phase": np.repeat([0, 1], 5),
            "predicted": np.argsort(rng.random((NUM_TOKENS, layers, 2, experts)), axis=3)[:, :, :, :3],
        }
    meta = {"num_experts": experts, "model": "m", "expert_bytes": 3072, "tasks": ["code", "prose"], "source": "x"}
    return RoutingTrace(experts=chosen, request=np.repeat([0, 1], 5), meta=meta, **fields)


def _trace_seeds(folder: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for full in (True, False):
        write_trace(folder / "seed.npz", _trace(rng, full))
        files.append((folder / "seed.npz").read_bytes())
    buffer = io.BytesIO()
    small = _trace(rng, False)
    np.savez(buffer, experts=small.experts, request=small.request, meta=np.array(json.dumps(dict(small.meta))))
    return [*files, buffer.getvalue()]


_REPLAYS = ((None, "lru", "none"), (2, "td_next_use", "none"), (1, "next_use", "previous_token"))


def _use_trace(trace: RoutingTrace, path: Path) -> None:
    again = path.with_suffix(".again.npz")
    write_trace(again, trace)
    assert read_trace(again).meta == trace.meta
    timing = Timing(load_s=1e-3, expert_s=1e-4, layer_s=1e-3)
    slots = max(1, trace.num_layers * trace.num_experts // 4)
    for batch, policy, predictor in _REPLAYS:
        schedule = Schedule(trace, batch=batch, max_tokens=20)
        schedule.passing(0)
        replay(schedule, Setting(policy, slots, predictor), timing)


# --- trained predictors ---


def _artifacts() -> list[Artifact]:
    rng = np.random.default_rng(0)
    layers, experts, top_k = SHAPE
    collection = ActivationMatrix(SHAPE, ActivationMatrixParams(capacity=5, matches=2))
    for step in range(6):
        phase = Phase.PREFILL if step % 3 == 0 else Phase.DECODE
        tokens = 4 if phase is Phase.PREFILL else 1
        passing = Pass(phase, tokens, step, tuple(range(tokens)), (step // 3,) * tokens, ("a",) * tokens)
        collection.begin(passing)
        for layer in range(layers):
            chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int64)
            collection.observe(layer, Observation(passing, chosen))
    sizes = {"alphas": (2,), "context": (layers, 2 * experts, 4), "layer": (layers, 4), "spread": (layers, 4, experts)}
    sizes |= {"inner": (3, 5), "inner_bias": (5,), "outer": (5, 2), "direct": (3, 2), "bias": (layers, experts, 2)}
    arrays = {name: rng.normal(scale=0.3, size=size).astype(np.float32) for name, size in sizes.items()}
    torch.manual_seed(0)
    path = RoutingPathNetwork(
        Sizes(hidden=8, feed_forward=8, heads=1, head_size=8, encoder_layers=1, decoder_layers=1, window=16),
        SHAPE,
        np.arange(20),
    )
    return [
        collection.artifact("m"),
        Artifact("sequence", "m", SHAPE, {"discount": 0.9}, arrays),
        path.artifact("m"),
        ExpertSequence(SequenceSizes(hidden=4, window=3), SHAPE, ["a", "b"]).artifact(
            "m", sensitivity={"a": {"insensitive_layers": [1]}}
        ),
    ]


def _artifact_seeds(folder: Path) -> list[bytes]:
    files = []
    for artifact in _artifacts():
        write_artifact(folder / "seed.safetensors", artifact)
        files.append((folder / "seed.safetensors").read_bytes())
    return files


def _read_predictor(path: Path) -> Predictor:
    kind = read_artifact(path, shape=SHAPE).kind
    if kind not in TRAINED:
        raise ArtifactError(f"no kind of predictor: {kind!r}")
    return make_predictor(PredictorSpec(kind, path), SHAPE)


def _use_predictor(predictor: Predictor, path: Path) -> None:
    for step in range(3):
        passing = Pass(Phase.DECODE, 1, step, (step,), (step,), ("a",))
        predictor.begin(passing)
        for layer in range(SHAPE.layers):
            predictor.observe(layer, Observation(passing, np.array([[0, 1]])))
            predictor.forecast(layer)
    if (learned := predictor.artifact("m")) is not None:
        write_artifact(path.with_suffix(".again.safetensors"), learned)


# --- prompts ---

_PROMPTS = (
    {"prompt": "def main():", "id": "a", "task": "code", "slo_ms": 200, "max_new_tokens": 8},
    {"prompt": "Once upon a time — …", "id": 7},
    {"prompt": "3 + 4 =", "slo_ms": 12.5},
)


def _prompt_seeds(folder: Path) -> list[bytes]:
    return ["\n".join(json.dumps(one, ensure_ascii=ascii) for one in _PROMPTS).encode() for ascii in (True, False)]


def _use_prompts(prompts: list[Prompt], path: Path) -> None:
    for prompt in prompts:
        "".join((prompt.id, prompt.task, prompt.text)).encode()
        assert prompt.text and (prompt.slo_s is None or 0 < prompt.slo_s < 1e12)
        assert prompt.max_new_tokens is None or 1 <= prompt.max_new_tokens < 2**63


# --- checkpoints ---


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    tensors = {
        "model.embed_tokens.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(4, dtype=torch.float16),
        "empty": torch.zeros(0, 5),
        "flag": torch.tensor(True),
    }
    save_file(tensors, folder / "seed.safetensors", {"format": "pt"})
    return [(folder / "seed.safetensors").read_bytes()]


def _use_header(entries: list[TensorEntry], path: Path) -> None:
    size = path.stat().st_size
    for entry in entries:
        assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= size
        assert all(0 <= length < 2**63 for length in entry.shape)


READERS: dict[str, Reader] = {
    "profile": Reader(".yaml", _profile_seeds, _mangled_profile, load_profile, _use_profile),
    "trace": Reader(".npz", _trace_seeds, mutate.npz_of, read_trace, _use_trace),
    "predictor": Reader(".safetensors", _artifact_seeds, mutate.safetensors_of, _read_predictor, _use_predictor),
    "prompts": Reader(".jsonl", _prompt_seeds, mutate.lines_of, read_prompts, _use_prompts),
    "checkpoint": Reader(".safetensors", _checkpoint_seeds, mutate.safetensors_of, read_header, _use_header),
}
