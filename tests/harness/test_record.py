"""Recording traces from the command line: what is in them, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from harness import record, simulate
from harness.measure import recording
from harness.measure.runner import Decoder
from runtime import build, devices
from runtime.trace import NO_PREDICTION, RoutingTrace, read_trace
from runtime.vocabulary import Phase

TEXTS = [
    ("english", "The king said to the people of the land that they should go down to the river and wait there."),
    ("english", "In the morning the men of the city came out to meet them, and they brought bread and water."),
    ("python", "def main(arguments):\n    for name in sorted(arguments):\n        print(name, arguments[name])\n"),
    ("python", "class Reader:\n    def __init__(self, path):\n        self.path = path\n        self.lines = []\n"),
]


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"task": task, "text": text}) for task, text in TEXTS))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": "The king said", "task": "english"}, {"prompt": "def main", "max_new_tokens": 3}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def _record(model: Path | None, out: Path, *more: object) -> RoutingTrace:
    chosen = [] if model is None else ["--model", str(model)]
    assert record.main([*chosen, "--out", str(out), *map(str, more)]) == 0
    return read_trace(out)


def _by_hand(model: Path, ids: list[int], prompt_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Choice and weights [tokens, layers, top_k] of a prompt in one pass and the rest token by token."""
    chosen: dict[int, list[np.ndarray]] = {}
    weighed: dict[int, list[np.ndarray]] = {}
    with runtime.load_reference(model) as engine, torch.inference_mode():
        engine.observe_routing(lambda layer, choice, weights: chosen.setdefault(layer, []).append(choice.copy()))
        engine.observe_routing(lambda layer, _, weights: weighed.setdefault(layer, []).append(weights.float().numpy()))
        decoder = Decoder(engine.model)
        for part in (ids[:prompt_tokens], *([token] for token in ids[prompt_tokens:])):
            decoder.step(part)
    joined = [np.stack([np.concatenate(kept[layer]) for layer in sorted(kept)], axis=1) for kept in (chosen, weighed)]
    return joined[0], joined[1]


def test_text_is_prefilled_and_decoded(tiny_checkpoint: Path, workload: Path, tmp_path: Path) -> None:
    lengths = ["--prompt-tokens", 6, "--output-tokens", 4, "--lookahead", 1, "--part", "all"]
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", "--workload", workload, *lengths)
    assert trace.request.tolist() == [number for number in range(4) for _ in range(10)]
    assert trace.meta["tasks"] == ["english", "python", "english", "python"]  # tasks take turns
    assert trace.phase is not None and trace.phase.tolist() == ([0] * 6 + [1] * 4) * 4
    steps = [5 * number + step for number in range(4) for step in [0] * 6 + [1, 2, 3, 4]]
    assert trace.step is not None and trace.step.tolist() == steps
    with runtime.load_reference(tiny_checkpoint) as engine:
        order = [TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3]]
        ids = [engine.tokenizer(text, add_special_tokens=False)["input_ids"][:10] for _, text in order]
    assert trace.token_ids is not None and trace.token_ids.tolist() == [one for text in ids for one in text]
    experts, weights = _by_hand(tiny_checkpoint, ids[2], prompt_tokens=6)
    assert np.array_equal(trace.experts[20:30], experts)
    assert trace.weights is not None and np.array_equal(trace.weights[20:30], weights.astype(np.float16))
    assert trace.predicted is not None and trace.predicted.shape == (40, 2, 1, 5)
    assert (trace.predicted[:, 0] < 8).all() and (trace.predicted[:, 1] == NO_PREDICTION).all()


def test_what_the_trace_says_of_itself(tiny_checkpoint: Path, workload: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    trace = _record(tiny_checkpoint, out, "--workload", workload, "--max-tokens", 30, "--set", "compute.threads=1")
    assert trace.meta["model"] == tiny_checkpoint.name
    assert trace.meta["expert_bytes"] == 3 * 64 * 32 * 2
    assert "texts.jsonl" in trace.meta["source"] and trace.meta["workload"]["part"] == "search"
    assert "licence" not in trace.meta
    command = trace.meta["command"]
    assert command.startswith(f"python -m harness.record --model {tiny_checkpoint.name} --out t.npz")
    assert "--workload texts.jsonl" in command and "--set compute.threads=1" in command
    assert str(tmp_path) not in json.dumps(trace.meta) and str(tiny_checkpoint.parent) not in json.dumps(trace.meta)


def test_the_bundled_demo_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = _record(None, tmp_path / "t.npz", "--max-tokens", 20, "--prompt-tokens", 8, "--output-tokens", 2)
    assert trace.meta["model"] == "expertflow-demo" and "MIT" in trace.meta["licence"]
    assert (trace.num_layers, trace.num_experts, trace.top_k, trace.num_tokens) == (8, 32, 4, 20)
    said = capsys.readouterr()
    assert "in memory" in said.err and "16 tokens prefilled, 4 decoded" in said.out
    assert f"harness.simulate --trace {tmp_path / 't.npz'} --predictor none,previous_token,gate_lookahead" in said.out


def test_prefill_only(tiny_checkpoint: Path, workload: Path, tmp_path: Path) -> None:
    arguments = ["--workload", workload, "--prefill", "--prompt-tokens", 12, "--part", "all", "--lookahead", 0]
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", *arguments)
    assert trace.predicted is None
    assert trace.phase is not None and not trace.phase.any()
    assert trace.step is not None and trace.step.tolist() == [step for step in range(4) for _ in range(12)]


def test_only_the_wanted_tasks(tiny_checkpoint: Path, workload: Path, tmp_path: Path) -> None:
    arguments = ["--workload", workload, "--prefill", "--part", "all", "--task", "python", "--prompt-tokens", 9]
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", *arguments)
    assert trace.meta["tasks"] == ["python", "python"] and "--task python" in trace.meta["command"]


@pytest.mark.parametrize(
    ("max_tokens", "lengths"), [(100, [10, 10, 10, 10]), (27, [10, 10, 7]), (25, [10, 10, 5]), (21, [10, 10])]
)
def test_max_tokens_shortens_the_last_request(
    tiny_checkpoint: Path, workload: Path, tmp_path: Path, max_tokens: int, lengths: list[int]
) -> None:
    sizes = ["--prompt-tokens", 6, "--output-tokens", 4, "--part", "all", "--max-tokens", max_tokens]
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", "--workload", workload, *sizes)
    assert np.bincount(trace.request).tolist() == lengths and len(trace.meta["tasks"]) == len(lengths)


def test_prompts_and_what_the_model_makes_of_them(tiny_checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", "--prompts", prompts, "--generate", 5)
    assert trace.meta["tasks"] == ["english", "default"] and "prompts.jsonl" in trace.meta["source"]
    assert trace.token_ids is not None and trace.phase is not None
    with runtime.load_reference(tiny_checkpoint) as engine:
        for number, (text, new) in enumerate([("The king said", 5), ("def main", 3)]):
            inputs = engine.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            found = engine.model.generate(**inputs, max_new_tokens=new, do_sample=False)[0].tolist()
            rows = trace.request == number
            assert trace.token_ids[rows].tolist() == found[:-1]  # the last token is never fed
            assert int((trace.phase[rows] == Phase.DECODE).sum()) == new - 1


def test_batches_hold_several_requests(tiny_checkpoint: Path, workload: Path, tmp_path: Path) -> None:
    sizes = ["--prompt-tokens", 6, "--output-tokens", 4, "--part", "all", "--batch", 2]
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", "--workload", workload, *sizes)
    assert trace.meta["tasks"] == ["english", "python", "english", "python"]
    assert np.bincount(trace.request).tolist() == [10] * 4
    assert trace.phase is not None and trace.step is not None and trace.predicted is not None
    decoded = trace.phase == Phase.DECODE
    together = np.unique(trace.step[decoded], return_counts=True)[1]
    assert decoded.sum() == 16 and (together == 2).all()


def test_offloaded_and_resident_record_the_same(
    tiny_checkpoint: Path,
    workload: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--workload", workload, "--max-tokens", 30, "--set", "cache.slots=5"]
    whole = _record(tiny_checkpoint, tmp_path / "a.npz", *arguments)
    monkeypatch.setattr("runtime.facts.RESIDENT_FACTOR", 1e9)
    offloaded = _record(tiny_checkpoint, tmp_path / "b.npz", *arguments)
    assert "offloaded, 5 of 16 experts" in capsys.readouterr().err
    for name in ("experts", "weights", "token_ids", "request", "step", "phase", "predicted"):
        assert np.array_equal(getattr(whole, name), getattr(offloaded, name)), name
    assert whole.meta["expert_bytes"] == offloaded.meta["expert_bytes"]


def test_the_trace_replays_with_its_lookahead(
    tiny_checkpoint: Path, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.npz"
    _record(tiny_checkpoint, out, "--workload", workload, "--prompt-tokens", 4, "--output-tokens", 16)
    capsys.readouterr()
    options = ["--policy", "lru", "--slots", "6", "--predictor", "none,gate_lookahead", "--json"]
    assert simulate.main(["--trace", str(out), *options]) == 0
    without, with_it = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert with_it["prefetch_used"] > 0 and with_it["misses"] < without["misses"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workload", "gone.jsonl"], "gone.jsonl cannot be read"),
        (["--workload", "broken.jsonl"], "broken.jsonl, line 2, is not JSON"),
        (["--workload", "short.jsonl"], "no text of 2 tokens"),
        (["--prompts", "gone.jsonl"], "gone.jsonl: cannot read"),
        (["--prompts", "broken.jsonl"], "line 1: no"),
        (["--prompts", "prompts.jsonl", "--prefill"], "--prefill is about text"),
        (["--prompts", "prompts.jsonl", "--generate", "600"], "more than the 512"),
        (["--prompts", "prompts.jsonl", "--max-tokens", "2"], "--max-tokens 2 is less"),
        (["--task", "latin"], "no text of that task here; there is"),
        (["--prompts", "prompts.jsonl", "--task", "english"], "--task is about text"),
        (["--generate", "5"], "it needs --prompts"),
        (["--prefill", "--output-tokens", "5"], "--prefill rules out"),
        (["--prompt-tokens", "1"], "--prompt-tokens 1: at least 2"),
        (["--prompt-tokens", "500", "--output-tokens", "13"], "above the 512"),
        (["--output-tokens", "0"], "--output-tokens 0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--batch", "0"], "--batch 0"),
        (["--lookahead", "-1"], "--lookahead -1"),
        (["--set", "cache.slot=5"], "cache.slot"),
        (["--profile", "gone.yaml"], "gone.yaml"),
        (["--model", "."], "is not a checkpoint: it has no config.json"),
        (["--out", "prompts.jsonl/t.npz"], "cannot be written"),
        (["--out", "."], "it is a folder"),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(prompts.parent)
    Path("broken.jsonl").write_text('{"text": "a b c d"}\n{"text": ')
    Path("short.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert record.main(["--model", str(tiny_checkpoint), "--out", "t.npz", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: "), error
    assert not Path("t.npz").exists()


def test_an_interrupted_recording_leaves_nothing(
    tiny_checkpoint: Path, workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = recording._feed

    def interrupted(model: Any, prompt: Any, text: Any) -> None:
        feed(model, prompt, text)
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.measure.recording._feed", interrupted)
    folder = tmp_path / "out"
    arguments = ["--model", str(tiny_checkpoint), "--workload", str(workload), "--out", str(folder / "t.npz")]
    assert record.main(arguments) == 130
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("free", "is_resident"), [(1 << 40, True), (1, False)])
def test_a_gpu_records_with_what_its_own_memory_holds(
    tiny_checkpoint: Path,
    workload: Path,
    tmp_path: Path,
    free: int,
    is_resident: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[tuple[str, object]] = []

    def opens(name: str) -> Any:
        load = getattr(build, name)

        def on_the_cpu(*arguments: Any, device: object) -> runtime.Engine:
            opened.append((name, device))
            engine: runtime.Engine = load(*arguments)
            return engine

        return on_the_cpu

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(devices, "find_device", lambda name, profile: gpu if name == "cuda:1" else devices.CPU)
    monkeypatch.setattr(devices, "free_bytes", lambda device: free)
    for name in ("load", "load_reference"):
        monkeypatch.setattr(build, name, opens(name))
    sizes = ("--workload", workload, "--part", "all", "--prompt-tokens", 8, "--output-tokens", 2)
    trace = _record(tiny_checkpoint, tmp_path / "t.npz", *sizes, "--device", "cuda:1")
    assert opened == [("load_reference" if is_resident else "load", gpu)]
    assert trace.num_tokens > 0 and "--device cuda:1" in trace.meta["command"]
    assert f"memory of {gpu}" in capsys.readouterr().err


def test_a_limit_is_not_called_free_memory(
    tiny_checkpoint: Path, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--workload", workload, "--part", "all", "--prompt-tokens", 8, "--output-tokens", 2)
    _record(tiny_checkpoint, tmp_path / "t.npz", *sizes, "--set", "limits.max_memory_bytes=1GiB")
    assert "in memory (1.07 GB are allowed)" in capsys.readouterr().err
