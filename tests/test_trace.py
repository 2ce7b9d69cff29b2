"""Routing traces: the file format, its checks, and recording."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime.engine import Engine, checkpoint_name
from runtime.errors import TraceError
from runtime.trace import NO_PREDICTION, RoutingTrace, TraceRecorder, read_trace, validate, write_trace
from runtime.vocabulary import Pass, Phase

REAL = Path(__file__).parent.parent.parent / "shared" / "traces" / "gpt-oss-20b.npz"
TOKENS, LAYERS, TOP_K, EXPERTS = 5, 3, 2, 8


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    good = {
        "experts": rng.integers(0, EXPERTS, (TOKENS, LAYERS, TOP_K)).astype(np.uint16),
        "request": np.zeros(TOKENS, np.int32),
        "meta": json.dumps({"num_experts": EXPERTS}),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def save(path: Path, content: dict[str, Any]) -> Path:
    np.savez(path, **content)
    return path


def same(left: RoutingTrace, right: RoutingTrace) -> bool:
    names = ("experts", "request", "weights", "token_ids", "step", "phase", "predicted")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    equal = all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)
    return equal and left.meta == right.meta and all(a is None or a.dtype == b.dtype for a, b in pairs)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), optional=st.sets(st.sampled_from(["weights", "token_ids", "step", "phase", "predicted"])))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: Any, optional: set[str]) -> None:
    tokens, layers, top_k = (data.draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    made = {
        "weights": rng.random((tokens, layers, top_k)).astype(np.float16),
        "token_ids": rng.integers(0, 1 << 17, tokens).astype(np.int32),
        "step": np.arange(tokens, dtype=np.int32),
        "phase": rng.integers(0, 2, tokens).astype(np.uint8),
        "predicted": np.full((tokens, layers, 2, 3), NO_PREDICTION, np.uint16),
    }
    trace = RoutingTrace(
        experts=rng.integers(0, EXPERTS, (tokens, layers, top_k)).astype(np.uint16),
        request=rng.integers(0, 3, tokens).astype(np.int32),
        meta={"num_experts": EXPERTS, "source": "Æsop"},
        **{name: made[name] for name in optional},
    )
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    write_trace(path, trace)
    assert same(read_trace(path), trace)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16])
def test_other_integers_that_fit_are_converted(tmp_path: Path, dtype: Any) -> None:
    content = arrays()
    path = save(tmp_path / "t.npz", {**content, "experts": content["experts"].astype(dtype), "step": np.arange(TOKENS)})
    trace = read_trace(path)
    assert trace.experts.dtype == np.uint16 and np.array_equal(trace.experts, content["experts"])
    assert trace.step is not None and trace.step.dtype == np.int32
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (TOKENS, LAYERS, TOP_K, EXPERTS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts": None}, ["experts is missing"]),
        ({"request": None}, ["request is missing"]),
        ({"meta": None}, ["meta is missing"]),
        ({"experts": np.zeros((TOKENS, LAYERS), int)}, ["experts", "rank 3", f"({TOKENS}, {LAYERS})"]),
        ({"experts": np.full((TOKENS, LAYERS, TOP_K), EXPERTS)}, ["experts", "8 at [0, 0, 0]", "0 to 7"]),
        ({"experts": np.full((TOKENS, LAYERS, TOP_K), -1)}, ["experts", "-1"]),
        ({"experts": np.zeros((TOKENS, LAYERS, TOP_K))}, ["experts", "integers", "float64"]),
        ({"experts": np.zeros((TOKENS, LAYERS, EXPERTS + 1), int)}, ["experts", "9", "num_experts is 8"]),
        ({"experts": np.zeros((0, LAYERS, TOP_K), int)}, ["experts", "holds nothing"]),
        ({"experts": np.array([[["a", "b"]]], object)}, ["experts", "Python objects"]),
        ({"request": np.zeros(TOKENS + 1, int)}, ["request", f"({TOKENS + 1},)"]),
        ({"request": np.zeros((TOKENS, 1), int)}, ["request", "rank 1"]),
        ({"request": np.full(TOKENS, 1 << 31)}, ["request", "2147483648"]),
        ({"weights": np.zeros((TOKENS, LAYERS, TOP_K + 1))}, ["weights", "does not go with"]),
        ({"weights": np.zeros((TOKENS, LAYERS, TOP_K), int)}, ["weights", "floating-point"]),
        ({"weights": np.full((TOKENS, LAYERS, TOP_K), 1e6)}, ["weights", "too large"]),
        ({"weights": np.full((TOKENS, LAYERS, TOP_K), np.nan)}, ["weights", "not a number"]),
        ({"token_ids": np.full(TOKENS, -100)}, ["token_ids", "-100"]),
        ({"step": np.zeros(TOKENS - 1, int)}, ["step"]),
        ({"phase": np.full(TOKENS, 2)}, ["phase", "2", "0 to 1"]),
        ({"predicted": np.full((TOKENS, LAYERS, 1, 2), EXPERTS)}, ["predicted", "8", "0 to 7"]),
        ({"predicted": np.zeros((TOKENS, LAYERS + 1, 1, 2), int)}, ["predicted", "does not go with"]),
        ({"meta": "{"}, ["meta", "not JSON"]),
        ({"meta": "[8]"}, ["meta", "object"]),
        ({"meta": np.arange(3)}, ["meta", "JSON string"]),
        ({"meta": "{}"}, ["meta", "num_experts is missing"]),
        ({"meta": json.dumps({"num_experts": "8"})}, ["meta", "num_experts", "'8'"]),
        ({"meta": json.dumps({"num_experts": 0})}, ["meta", "num_experts", "0"]),
    ],
)
def test_malformed_traces_name_the_field_and_the_reason(
    tmp_path: Path, changes: dict[str, Any], says: list[str]
) -> None:
    path = save(tmp_path / "t.npz", arrays(**changes))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert all(word in str(caught.value) for word in ["t.npz", *says]), str(caught.value)


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


def damaged(content: bytes) -> bytes:
    """The first array's compressed bytes overwritten; the directory at the end of the file is left."""
    return content[:80] + bytes(20) + content[100:]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an .npz"),
        (b"experts,request\n", "not an .npz"),
        (b"\x80\x04N.", "not an .npz"),
        (npy_bytes(), "single array"),
        (npz_bytes()[:-30], "not an .npz"),
        (damaged(npz_bytes()), "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone\.npz: .*No such file"):
        read_trace(tmp_path / "gone.npz")


def test_a_bad_trace_is_not_written(tmp_path: Path) -> None:
    good = validate(RoutingTrace(np.zeros((1, 1, 1), int), np.zeros(1, int), {"num_experts": 2}))
    for bad in (
        {"meta": {"num_experts": 2, "path": Path()}},
        {"experts": good.experts + 2},
        {"request": good.request[:0]},
    ):
        fields = {"experts": good.experts, "request": good.request, "meta": good.meta, **bad}
        with pytest.raises(TraceError):
            write_trace(tmp_path / "t.npz", RoutingTrace(**fields))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not REAL.exists(), reason="the real trace is not beside this checkout")
def test_a_real_trace_loads() -> None:
    trace = read_trace(REAL)
    assert (trace.num_layers, trace.top_k, trace.num_experts) == (24, 4, 32)
    assert trace.num_tokens == len(trace.request) > 50_000
    assert trace.weights is not None and (np.diff(trace.weights.astype(np.float32), axis=2) <= 0).all()
    assert trace.phase is not None and set(np.unique(trace.phase)) == {Phase.DECODE}


def recorded_passes(with_weights: bool = True) -> tuple[TraceRecorder, list[np.ndarray], list[np.ndarray]]:
    """A prefill of two sequences of three tokens, then a decode step of both."""
    rng = np.random.default_rng(1)
    recorder = TraceRecorder(LAYERS, EXPERTS, {"model": "m"})
    chosen, weighed = [], []
    for step, (phase, length) in enumerate([(Phase.PREFILL, 3), (Phase.DECODE, 1)]):
        requests = tuple(request for request in range(2) for _ in range(length))
        recorder.begin(Pass(phase, 2 * length, step, tuple(range(100, 100 + 2 * length)), requests))
        shape = (LAYERS, 2 * length, TOP_K)
        weights = rng.permuted(np.arange(np.prod(shape)) / 64.0).reshape(shape)
        experts = np.argsort(rng.random((*shape[:2], EXPERTS)), axis=2)[..., :TOP_K]
        for layer in (2, 0, 1):
            recorder.record(layer, experts[layer], weights[layer] if with_weights or step == 0 else None)
        chosen.append(experts)
        weighed.append(weights)
    return recorder, chosen, weighed


def test_recording_keeps_order_passes_and_weights(tmp_path: Path) -> None:
    recorder, chosen, weighed = recorded_passes()
    trace = recorder.trace()
    assert trace.meta == {"model": "m", "num_experts": EXPERTS}
    assert trace.request.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert trace.step is not None and trace.step.tolist() == [0] * 6 + [1] * 2
    assert trace.phase is not None and trace.phase.tolist() == [0] * 6 + [1] * 2
    assert trace.token_ids is not None and trace.token_ids.tolist() == [*range(100, 106), 100, 101]
    experts = np.concatenate(chosen, axis=1).transpose(1, 0, 2)
    weights = np.concatenate(weighed, axis=1).transpose(1, 0, 2)
    assert trace.weights is not None
    for token, layer in np.ndindex(8, LAYERS):
        pairs = sorted(zip(weights[token, layer], experts[token, layer], strict=True), reverse=True)
        assert trace.experts[token, layer].tolist() == [expert for _, expert in pairs]
        assert trace.weights[token, layer].tolist() == [weight for weight, _ in pairs]
    write_trace(tmp_path / "t.npz", trace)
    assert same(read_trace(tmp_path / "t.npz"), trace)


def test_recording_goes_on_after_a_trace_was_taken() -> None:
    recorder, *_ = recorded_passes()
    recorder.trace()
    recorder.begin(Pass(Phase.DECODE, 1, 2))
    for layer in range(LAYERS):
        recorder.record(layer, np.zeros((1, TOP_K), int), np.ones((1, TOP_K)))
    trace = recorder.trace()
    assert trace.num_tokens == 9 and trace.request[-1] == 0
    assert trace.token_ids is None, "one pass came without token ids"


def test_weights_are_kept_only_if_every_pass_has_them() -> None:
    recorder, chosen, _ = recorded_passes(with_weights=False)
    trace = recorder.trace()
    assert trace.weights is None
    assert np.array_equal(trace.experts[6:], chosen[1].transpose(1, 0, 2)), "the router's order"


def test_what_was_recorded_does_not_change_with_the_caller_s_array() -> None:
    recorder = TraceRecorder(1, EXPERTS)
    recorder.begin(Pass(Phase.DECODE, 1, 0))
    buffer = np.array([[3, 1]])
    recorder.record(0, buffer)
    buffer[:] = 0
    assert recorder.trace().experts.tolist() == [[[3, 1]]]


def test_a_pass_that_lacks_layers_names_them() -> None:
    recorder = TraceRecorder(4, EXPERTS)
    recorder.begin(Pass(Phase.DECODE, 1, 7))
    recorder.record(2, np.zeros((1, TOP_K), int))
    for finish in (recorder.trace, lambda: recorder.begin(Pass(Phase.DECODE, 1, 8))):
        with pytest.raises(TraceError, match=r"pass 7 .* layers 0, 1, 3"):
            finish()


def test_misuse_of_the_recorder_is_an_error() -> None:
    recorder = TraceRecorder(2, EXPERTS)
    with pytest.raises(TraceError, match="no pass was recorded"):
        recorder.trace()
    with pytest.raises(TraceError, match="no pass was begun"):
        recorder.record(0, np.zeros((1, 2), int))
    recorder.begin(Pass(Phase.DECODE, 1, 0))
    recorder.record(0, np.zeros((1, 2), int))
    for layer, experts, weights in (
        (0, np.zeros((1, 2), int), None),
        (2, np.zeros((1, 2), int), None),
        (1, np.zeros((2, 2), int), None),
        (1, np.zeros((1, 3), int), None),
        (1, np.zeros((1, 2), int), np.zeros((1, 3))),
    ):
        with pytest.raises(TraceError, match="layer"):
            recorder.record(layer, experts, weights)
    for wrong in (EXPERTS, -1, 1 << 16):
        with pytest.raises(TraceError, match=f"layer 1: experts: {wrong} is outside 0 to 7"):
            recorder.record(1, np.full((1, 2), wrong))


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"t\.npz: cannot write the trace"):
        write_trace(tmp_path / "file" / "t.npz", recorded_passes()[0].trace())


def test_tasks_of_passes_are_kept_by_request() -> None:
    recorder = TraceRecorder(1, EXPERTS)
    for step, (requests, tasks) in enumerate([((0,), ("maths",)), ((2,), ("code",)), ((0, 3), ())]):
        recorder.begin(Pass(Phase.DECODE, len(requests), step, (), requests, tasks))
        recorder.record(0, np.zeros((len(requests), TOP_K), int))
    trace = recorder.trace()
    assert trace.meta["tasks"] == ["maths", "default", "code"]
    assert [trace.task(request) for request in (0, 2, 3)] == ["maths", "code", "default"]


def test_predictions_are_kept_where_they_were_made() -> None:
    recorder = TraceRecorder(2, EXPERTS)
    made = np.array([[[3, 1]], [[0, NO_PREDICTION]]], np.uint16)
    for step, predicted in enumerate([made, made[::-1]]):
        recorder.begin(Pass(Phase.PREFILL, 2, step))
        recorder.record(0, np.zeros((2, TOP_K), int), predicted=predicted)
        recorder.record(1, np.zeros((2, TOP_K), int))
    trace = recorder.trace()
    assert trace.predicted is not None and trace.predicted.dtype == np.uint16
    assert np.array_equal(trace.predicted[:, 0], np.concatenate([made, made[::-1]]))
    assert (trace.predicted[:, 1] == NO_PREDICTION).all()
    recorder.begin(Pass(Phase.DECODE, 1, 2))
    for wrong in (made, made[:1, :, :1], made[0]):
        with pytest.raises(TraceError, match="layer 0: predicted of shape"):
            recorder.record(0, np.zeros((1, TOP_K), int), predicted=wrong)
    for layer in range(2):
        recorder.record(layer, np.zeros((1, TOP_K), int))
    assert recorder.trace().predicted is None, "one pass came without"


def test_a_long_recording_stays_small() -> None:
    """48 layers, top-8, lookahead 2 x 11: 3.6 kB a token in the format; with a little for each pass."""
    layers, top_k, passes = 48, 8, 50
    recorder = TraceRecorder(layers, 128)
    experts, weights = np.zeros((1, top_k), np.int64), np.zeros((1, top_k), np.float32)
    predicted = np.zeros((1, 2, top_k + 3), np.uint16)
    tracemalloc.start()
    for step in range(passes):
        recorder.begin(Pass(Phase.DECODE, 1, step, (1,), (0,)))
        for layer in range(layers):
            recorder.record(layer, experts, weights, predicted)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    in_the_format = layers * (2 * top_k + 2 * top_k + 2 * 2 * (top_k + 3))
    assert num_bytes / passes < in_the_format + 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that hardly two experts are equally likely."""
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


LOAD: dict[str, Callable[[Path], Engine]] = {
    "offloaded": lambda model: runtime.load(model, overrides={"cache.slots": 5, "predictor.kind": "gate_lookahead"}),
    "resident": runtime.load_reference,
}


def _gates_and_norms(engine: Engine) -> tuple[list[Any], list[Any]]:
    """The parts of a lookahead, with norms that differ from layer to layer."""
    layers = engine.model.model.layers
    for number, layer in enumerate(layers):
        gain = torch.rand(32, generator=torch.Generator().manual_seed(number)) + 0.5
        layer.post_attention_layernorm.weight.data.copy_(gain)
    return [layer.mlp.gate for layer in layers], [layer.post_attention_layernorm for layer in layers]


@pytest.mark.parametrize("kind", LOAD)
def test_the_recorded_lookahead_is_what_later_routers_choose(checkpoint: Path, kind: str) -> None:
    ids = torch.arange(12).view(2, 6)
    with LOAD[kind](checkpoint) as engine, torch.inference_mode():
        gates, norms = _gates_and_norms(engine)
        untraced = engine.model(ids).logits
        engine.start_trace(lookahead=2)
        seen: dict[int, list[torch.Tensor]] = {}
        for layer, gate in enumerate(gates):
            gate.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.setdefault(layer, []).append(args[0].reshape(-1, 32))
            )
        output = engine.model(ids)
        engine.model(torch.tensor([[3], [7]]), past_key_values=output.past_key_values)
        trace = engine.trace()
        assert torch.equal(output.logits, untraced)
    assert trace.predicted is not None and trace.predicted.shape == (14, tiny.LAYERS, 2, tiny.TOP_K + 3)
    for layer in range(tiny.LAYERS):
        hidden = torch.cat(seen[layer])
        for ahead in (1, 2):
            found = trace.predicted[:, layer, ahead - 1]
            if layer + ahead >= tiny.LAYERS:
                assert (found == NO_PREDICTION).all()
                continue
            shown = hidden * norms[layer + ahead].weight / norms[layer].weight
            logits = shown @ gates[layer + ahead].weight.T
            assert np.array_equal(found, logits.argsort(dim=1, descending=True)[:, : tiny.TOP_K + 3].numpy())
    assert (trace.predicted[:, 0, 0, : tiny.TOP_K] != trace.experts[:, 1]).any(), "a forecast, not the choice itself"


@pytest.mark.parametrize("kind", LOAD)
def test_no_lookahead_is_recorded_where_none_is_asked_for_or_possible(checkpoint: Path, kind: str) -> None:
    ids = torch.arange(4).view(1, 4)
    with LOAD[kind](checkpoint) as engine, torch.inference_mode():
        engine.start_trace()
        engine.model(ids)
        assert engine.trace().predicted is None
        gate = engine.model.model.layers[1].mlp.gate
        plain = gate.forward
        gate.forward = lambda hidden_states, bias=None: plain(hidden_states)
        engine.start_trace(lookahead=1)
        engine.model(ids)
        assert engine.trace().predicted is None
        assert "no gate lookahead is recorded: router Qwen3MoeTopKRouter needs hidden_states, bias" in engine.notes[-1]


def test_a_new_trace_begins_empty_and_describes_its_model(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as engine, torch.inference_mode():
        engine.start_trace(lookahead=1)
        engine.model(torch.arange(5).view(1, 5))
        engine.start_trace({"source": "here"})
        engine.model(torch.arange(3).view(1, 3))
        trace = engine.trace()
    assert trace.num_tokens == 3 and trace.predicted is None
    described = {"model": checkpoint.name, "expert_bytes": 3 * 32 * 16 * 4, "source": "here"}
    assert trace.meta == {**described, "num_experts": tiny.EXPERTS}


def test_checkpoints_are_named_without_where_they_lie(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--name-8B" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert checkpoint_name(str(cached)) == "owner/name-8B"
    assert checkpoint_name(str(tmp_path / "hub" / "..") + "/") == tmp_path.name
    assert checkpoint_name("owner/name-8B") == "owner/name-8B"
