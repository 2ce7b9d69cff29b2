"""What the samples of a GPU's systems say: figures of each, the ladder of the bound, and the goals. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.hardware.bound import oracle_misses
from harness.measure.bench_report import ladder
from harness.measure.blocks import Row, agreement, paired
from harness.measure.stats import median, summarize
from runtime import machine

if TYPE_CHECKING:
    from runtime.facts import ModelFacts

JsonDict = dict[str, Any]

# Of 256 slots, the demo's grid of 8 layers x 32 experts: 16, 26, 64, 128 and all.
RESIDENCIES = ("6.25 %", "10 %", "25 %", "50 %")
SMALLEST, USUAL, ALL_RESIDENT = "6.25 %", "25 %", "100 %"
RESIDENT, ACCELERATE, ON_DEMAND, SYNCHRONOUS = "resident", "accelerate", "on demand", "LRU, synchronous"
MET, NOT_MET, NOT_TAKEN, WRONG = "met", "not met", "not taken", "WRONG"
RATIO_HOW = "paired by request, each over the resident model beside it"
_TOO_FAST = "a prompt was faster than its loads alone: the measurement is wrong"
_MOST_TPOT = 3.0


@dataclass(frozen=True)
class Known:
    """What holds for all systems of a run.

    `demands[b]`: the experts that each layer step of block b's decode needs. `context`: tokens of the longest sequence.
    """

    facts: ModelFacts
    memory_bytes_per_s: float
    demands: Mapping[int, Sequence[Sequence[int]]]
    context: int

    def steps(self, block: int, sample: JsonDict) -> Sequence[Sequence[int]]:
        """Those of the tokens that were decoded in a sample of block `block`."""
        return self.demands[block][: sample["decode_tokens"] * self.facts.identity.layers]


def entry(ours: Row, resident: Row | None, opened: JsonDict, known: Known) -> JsonDict:
    """Decode figures of a system; `resident` decoded the same blocks in turns with it, None: it could not."""
    rate = ours.rate()
    found: JsonDict = {
        **opened,
        "tokens_per_s": rate.as_dict(),
        "tpot_ms": 1e3 / rate.median,
        "bytes_per_token": _per_token(ours, "num_bytes"),
        "hit_rate": ours.hit_rate(),
        "stall_ms_per_token": None if ours.stall_s() is None else 1e3 * (ours.stall_s() or 0.0),
        "replay_ms_per_token": _replay_ms(ours),
        "blocks": list(_blocks(ours, resident, known)),
    }
    if resident is None or not resident.samples:
        return found
    equal, compared = agreement(ours, resident)
    over = paired(resident.rates(), ours.rates())
    found |= {
        "tpot_over_resident": None if over is None else over.as_dict(),
        "equal_tokens": equal,
        "compared_tokens": compared,
    }
    if "slots" in opened:
        found |= {"ladder": _ladder(ours, resident, known), **_overhead(ours, resident, known)}
    return found


def resident_entry(samples: Sequence[JsonDict]) -> JsonDict:
    """Decode figures of the resident model, over all the blocks that it decoded beside others."""
    rate = summarize([one["decode_tokens"] / one["decode_s"] for one in samples])
    return {"tokens_per_s": rate.as_dict(), "tpot_ms": 1e3 / rate.median}


def _per_token(row: Row, name: str) -> float | None:
    told = [one for one in row.samples.values() if "stats" in one]
    tokens = sum(one["decode_tokens"] for one in told)
    return sum(one["stats"][name] for one in told) / tokens if tokens else None


def _replay_ms(row: Row) -> float | None:
    seconds = row.mean("replay_s")
    return None if seconds is None else 1e3 * seconds


def _blocks(ours: Row, resident: Row | None, known: Known) -> Iterator[JsonDict]:
    for block, sample in sorted(ours.samples.items()):
        kept: JsonDict = {name: sample[name] for name in ("request", "decode_s", "decode_tokens", "ttft_ms")}
        if resident is not None and block in resident.samples:
            other = resident.samples[block]
            kept["resident_s_per_token"] = other["decode_s"] / other["decode_tokens"]
        if "stats" in sample:
            names = ("num_loads", "num_bytes", "num_lookups", "num_hits", "busy_s", "stall_s")
            kept |= {name: sample["stats"][name] for name in names}
            kept |= {"needed_loads": sample["needed_loads"], "replay_s": sample["replay_s"]}
            if block in known.demands:
                kept["oracle_loads"] = oracle_misses(known.steps(block, sample), sample["slots"])
        yield kept


def _ladder(ours: Row, resident: Row, known: Known) -> JsonDict | None:
    """Rates in tokens/s; see `Ladder`. `allowed`: what the fewest loads and the resident model would allow."""
    both = ours.samples.keys() & resident.samples.keys() & known.demands.keys()
    told = {block: {**resident.samples[block], "demands": known.steps(block, ours.samples[block])} for block in both}
    rows = {"ours": ours, "reference": Row("reference", None, samples=told)}
    found = ladder(rows, known.facts, known.memory_bytes_per_s)
    if found is None:
        return None
    return {**asdict(found), "allowed": _allowed(ours, resident, known), "flag": found.flag}


def _allowed(ours: Row, resident: Row, known: Known) -> float | None:
    """Tokens/s of the slower of the resident model and the oracle's loads at the rate of the replay."""
    rates = []
    for block, sample in ours.samples.items():
        if block not in resident.samples or block not in known.demands or sample["replay_s"] is None:
            continue
        load_s = sample["replay_s"] / sample["needed_loads"] if sample["needed_loads"] else 0.0
        loads_s = load_s * oracle_misses(known.steps(block, sample), sample["slots"])
        other = resident.samples[block]
        rates.append(1 / max(other["decode_s"] / other["decode_tokens"], loads_s / sample["decode_tokens"]))
    return median(rates) if rates else None


def _overhead(ours: Row, resident: Row, known: Known) -> JsonDict:
    """Time per layer step beyond the resident model's where nothing was missed: the host's."""
    layers, spans = known.facts.identity.layers, []
    for block, sample in ours.samples.items():
        if block in resident.samples and not sample["stats"]["num_loads"]:
            other = resident.samples[block]
            more_s = sample["decode_s"] / sample["decode_tokens"] - other["decode_s"] / other["decode_tokens"]
            spans.append(1e6 * more_s / layers)
    return {"host_us_per_layer_step": summarize(spans).as_dict()} if spans else {}


def prefill_figures(taken: JsonDict, resident: JsonDict | None) -> JsonDict:
    """Of the long prompt: how fast the bytes that it needed came over the link, and how fast they do without the
    computation. What was loaded in vain counts for nothing."""
    repeats = taken["repeats"]
    seconds = [one["prefill_s"] for one in repeats]
    found = {**taken, "seconds": median(seconds)}
    if resident is not None:
        found["equals_resident"] = taken["logits_sha256"] == resident["logits_sha256"]
    replayed = [one for one in repeats if one.get("replay_s") and one["needed_loads"]]
    if not replayed:
        return found
    needed = [one["num_bytes"] / one["num_loads"] * one["needed_loads"] for one in replayed]
    shares = summarize([one["replay_s"] / one["prefill_s"] for one in replayed])
    found |= {
        "link_bytes_per_s": median([moved / one["prefill_s"] for moved, one in zip(needed, replayed, strict=True)]),
        "h2d_bytes_per_s": median([moved / one["replay_s"] for moved, one in zip(needed, replayed, strict=True)]),
        "share_of_h2d": shares.as_dict(),
        "flag": _TOO_FAST if shares.min > 1 else None,
    }
    if resident is not None:
        attainable_s = max(resident["seconds"], median([one["replay_s"] for one in replayed]))
        found["fraction_of_attainable"] = attainable_s / found["seconds"]
        found["resident_seconds"] = resident["seconds"]
    return found


def buffer_figures(memory: JsonDict, experts_bytes: int, known: Known) -> JsonDict:
    """What of the peaks is neither dense weights, nor experts or their slots, nor KV cache; and what is set aside for
    it."""
    from runtime.facts import cuda_buffer_bytes

    facts = known.facts
    kv_bytes = machine.kv_cache_bytes(facts.config, known.context, 1, dtype_bytes=facts.dtype.itemsize)
    planned = facts.dense_bytes + experts_bytes + kv_bytes
    return {
        "kv_bytes": kv_bytes,
        "peak_bytes": memory["peak_gpu_bytes"] - planned,
        "peak_reserved_bytes": memory["peak_reserved_gpu_bytes"] - planned,
        "set_aside_bytes": cuda_buffer_bytes(facts, known.context),
    }


def derived(systems: Mapping[str, JsonDict], experts_bytes: int) -> JsonDict:
    """Figures of one system over another."""
    return {
        "speed_up": {
            name: found for name in (ACCELERATE, ON_DEMAND, SYNCHRONOUS) if (found := _speed_up(systems, name))
        },
        "saved_share_of_experts": {
            name: share for name in RESIDENCIES if (share := _saved(systems, name, experts_bytes)) is not None
        },
    }


def _speed_up(systems: Mapping[str, JsonDict], name: str) -> JsonDict | None:
    """Of 25 % over `name`, paired by request; None where they have none in common.

    The two were measured minutes apart, but each in turns with the resident model: a pair is of their rates over its
    rate beside them, which takes out by how much the GPU was slower or faster then.
    """
    ours, other = (_over_resident(systems.get(one, {})) for one in (USUAL, name))
    found = paired(ours, other)
    return None if found is None else found.as_dict()


def _over_resident(system: JsonDict) -> dict[int, float]:
    """Rates by block, over those of the resident model beside them."""
    return {
        block: one["resident_s_per_token"] * one["decode_tokens"] / one["decode_s"]
        for block, one in enumerate(system.get("blocks", ()))
        if "resident_s_per_token" in one
    }


def _saved(systems: Mapping[str, JsonDict], name: str, experts_bytes: int) -> float | None:
    """By how much the peak is below the resident model's, of what its experts take: every buffer counts."""
    ours, resident = (systems.get(one, {}).get("memory") for one in (name, RESIDENT))
    if ours is None or resident is None:
        return None
    return float((resident["peak_gpu_bytes"] - ours["peak_gpu_bytes"]) / experts_bytes)


def goals(systems: Mapping[str, JsonDict], figures: JsonDict) -> list[JsonDict]:
    """Every goal: whether it was met, by which value; `note` says what limits it. `WRONG`: by one that cannot be.

    What is wanted is what this project set itself, and for the memory what ExpertFlow claims to save (arXiv 2410.17954,
    abstract: 93.72 %). README says the same.
    """
    over = figures["speed_up"].get(ACCELERATE)
    ratio, note = (
        (None, "") if over is None else (over["estimate"], f"{RATIO_HOW} [{over['low']:.3g}, {over['high']:.3g}]")
    )
    found = [_goal("tokens/s over accelerate's CPU offload at 25 %", ">=", 10.0, ratio, note)]
    for name in RESIDENCIES:
        steps = systems.get(name, {}).get("ladder")
        fraction, flag = (None, None) if steps is None else (steps["fraction"]["estimate"], steps["flag"])
        found.append(_goal(f"fraction of attainable at {name}", ">=", 0.8, fraction, flag=flag))
    spent = systems.get(ALL_RESIDENT, {}).get("host_us_per_layer_step")
    found.append(_goal("host us per layer step, all resident", "<=", 150.0, None if spent is None else spent["median"]))
    for name in RESIDENCIES:
        found.append(_prefill_goal(name, systems.get(name, {}).get("prefill") or {}))
    saved = figures["saved_share_of_experts"].get(SMALLEST)
    found.append(_goal("GPU memory saved at 16 slots, share of the experts", ">=", 0.9372, saved))
    found.append(_tpot_goal(systems.get(SMALLEST, {})))
    most = max(
        (
            one["peak_reserved_bytes"] / one["set_aside_bytes"]
            for each in systems.values()
            if (one := each.get("buffers"))
        ),
        default=None,
    )
    found.append(_goal("buffers beside weights, slots and KV, of what is set aside", "<=", 1.0, most))
    return found


def _goal(
    name: str, relation: str, wanted: float, value: float | None, note: str = "", *, flag: str | None = None
) -> JsonDict:
    """`flag`: why the value is not to be believed; None: nothing says so."""
    if value is None:
        status = NOT_TAKEN
    elif flag is not None:
        status, note = WRONG, "; ".join(filter(None, (flag, note)))
    else:
        status = MET if (value >= wanted if relation == ">=" else value <= wanted) else NOT_MET
    return {"goal": name, "wanted": f"{relation} {wanted:g}", "value": value, "status": status, "note": note}


def _prefill_goal(name: str, prefill: JsonDict) -> JsonDict:
    share = prefill.get("share_of_h2d")
    note = ""
    if share is not None and "resident_seconds" in prefill:
        computed = prefill["resident_seconds"] / prefill["seconds"]
        note = f"computing alone takes {computed:.0%} of it; {prefill['fraction_of_attainable']:.2f} of attainable"
    value = None if share is None else share["median"]
    return _goal(f"prefill at {name}, share of the H2D bandwidth", ">=", 0.9, value, note, flag=prefill.get("flag"))


def _tpot_goal(system: JsonDict) -> JsonDict:
    over, steps = system.get("tpot_over_resident"), system.get("ladder")
    note = ""
    if over is not None and steps is not None and steps["allowed"] is not None:
        least = over["estimate"] * system["tokens_per_s"]["median"] / steps["allowed"]
        verdict = "allows it" if least <= _MOST_TPOT else "does not allow it"
        note = f"the trace {verdict}: with the fewest loads {least:.2f} times"
    value = None if over is None else over["estimate"]
    return _goal("TPOT over resident at 16 slots", "<=", _MOST_TPOT, value, note)
