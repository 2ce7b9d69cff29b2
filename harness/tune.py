"""Find the configuration for a model on this machine: `python -m harness.tune [--model M] [--max-memory SIZE] …`.

Probe → search (the default first; the simulator proposes, trials measure) → confirm the best against the default →
write the profile. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.device_options import check_gpu_is_numbered
from runtime.errors import DeviceError, ExpertFlowError, UsageError, cli_main

if TYPE_CHECKING:
    from harness.hardware.readings import NvmlReadings
    from harness.report.progress import Progress
    from harness.search.confirm import Confirmation
    from harness.search.gpu import Gpu
    from harness.search.guide import Guide
    from harness.search.loop import Choice
    from harness.search.measurer import Measurer
    from harness.search.outcome import Limits
    from harness.search.setup import Setup
    from harness.search.space import Params
    from harness.search.study import Study
    from runtime.interrupt import StopRequest

PROMPT = "Once upon a time"
OBJECTIVES = ("latency", "memory", "balanced")
SAMPLERS = ("tpe", "gp", "nsga2", "random", "brute")
DEMO_LIMITS = {"cpu": "704MiB", "gpu": "2GiB"}
"""In which the demo has no room for all experts, of 1 MiB on the CPU, of `GPU_DEMO_EXPERT_BYTES` on a GPU."""
GPU_DEMO_EXPERT_BYTES = 12 << 20
"""As in the models that are too large for a GPU; smaller ones come so fast that keeping them gains little."""
_FIGURES = (
    "figures    latency as a client sees it: ms per output token, waiting included, median over requests (p50);\n"
    "           peak memory of the whole process"
)
_GPU_FIGURES = " on the GPU: what torch reserved, and CUDA's own as far as it could be told"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.tune", description=__doc__.splitlines()[0])
    model, wanted, effort, where = (
        parser.add_argument_group(name) for name in ("what is tuned", "what is wanted", "how", "where it goes")
    )
    model.add_argument("--model", help="checkpoint folder or hub id; default: the demo, widened")
    model.add_argument("--demo", action="store_true", help="the demo, in too little memory unless --max-memory says")
    model.add_argument(
        "--gpu", type=int, metavar="N", help="tune for this GPU, by nvidia-smi's number; default: the first"
    )
    model.add_argument("--device", metavar="cpu", help="tune for the CPU, experts coming from disk")
    model.add_argument("--workload", type=Path, metavar="FILE", help="JSON lines with text; default: bundled text")
    model.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests outstanding (default 8)")
    model.add_argument("--context", type=int, default=1024, metavar="N", help="longest sequence to have memory for")
    model.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fix a profile key")
    rounding = "exact (default), or equivalent: on a GPU, the CPU may then compute experts that are not there"
    model.add_argument("--numerics", choices=["exact", "equivalent"], help=rounding)

    wanted.add_argument("--objective", choices=OBJECTIVES, default="latency", help="(default latency)")
    most = "of the process, on the GPU where it computes there, such as 1.5GiB; default: what is free"
    wanted.add_argument("--max-memory", metavar="SIZE", help=most)
    wanted.add_argument("--slo-tpot", type=float, metavar="MS", help="limit on the median time per output token")
    wanted.add_argument("--slo-ttft", type=float, metavar="MS", help="limit on the median time to the first token")

    effort.add_argument("--time-budget", default="4m", metavar="T", help="for the search, such as 90s (default 4m)")
    effort.add_argument("--trials", type=int, metavar="N", help="stop the search after N trials")
    effort.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="beside the simulator (default tpe)")
    effort.add_argument("--no-simulator", action="store_true", help="leave all proposals to the sampler")
    effort.add_argument("--seed", type=int, default=0, help="of the search")
    effort.add_argument("--dry-run", action="store_true", help="probe, print the plan and the space, and stop")

    where.add_argument("--out", type=Path, metavar="DIR", help="of the run; default: results/runs/MODEL-TIME")
    where.add_argument("--resume", action="store_true", help="go on with the run in --out")
    where.add_argument("--storage", metavar="URL", help="study shared by several machines, such as postgresql://…")
    where.add_argument("--profile-out", type=Path, metavar="FILE", help="default: profiles/MODEL-DEVICE.yaml")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    return cli_main(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: list[str]) -> None:
    # Imported late: --help answers at once, and the trials' processes, which import this module, stay small.
    from harness.probe import default_model
    from harness.search.setup import Settings, prepare
    from harness.search.storage import redacted

    wanted = _wanted(options)
    gpu = _choose_device(options)
    label, kind = _label(options.model, gpu), "cpu" if gpu is None else gpu.name
    settings = Settings(
        model=options.model or default_model(_demo_expert_bytes(gpu)),
        label=label,
        command=redacted(shlex.join([_python(), "-m", "harness.tune", *given])),
        folder=_folder(options, label),
        profile=options.profile_out or Path("profiles") / f"{label}-{_slug(kind)}.yaml",
        storage=options.storage,
        limits=_limits(options, gpu),
        gpu=gpu,
        **wanted,
    )
    setup = prepare(settings)
    if options.dry_run:
        print(f"\n{_plan(setup)}")
        return
    tune(setup, use_simulator=not options.no_simulator)


def tune(setup: Setup, *, use_simulator: bool = True) -> None:
    """Search, confirm, write; prints what a user wants to see, and a JSON object as the last line.

    Raises:
        ExpertFlowError: nothing runs within the limits, or what was found cannot be written.
        KeyboardInterrupt, GpuLostError: after what was measured has been written.
    """
    from harness.report.messages import failures_text, infeasible_text
    from harness.report.results import summary, write_profile, write_run
    from harness.report.run_folder import collect
    from harness.search.loop import GpuLostError, NothingRunsError
    from harness.search.setup import TuneError
    from runtime.interrupt import StopRequest

    setup, study = setup.begin()
    settings, measurer = setup.settings, setup.measurer()
    measurer.remember(study.records())
    figures = _FIGURES if settings.gpu is None else _FIGURES + _GPU_FIGURES
    print(f"\n{setup.outlook()}\n{figures}", flush=True)
    watched = closing(_progress(setup, study))
    try:
        with watched as progress, StopRequest().listening("this run is measured") as stop:
            guide = _guide(setup, measurer, progress) if use_simulator else None
            stop_reason, choice = _searched(setup, study, measurer, guide, progress, stop)
    except NothingRunsError:
        results = collect(setup, study, None, "nothing can be used")
        write_run(results)
        print(json.dumps(summary(results, None)))
        why = infeasible_text(study.tried(), study.limits) if study.tried() else failures_text(study.records())
        raise TuneError(f"no configuration runs within the limits: {why}; see {settings.folder}") from None
    except (KeyboardInterrupt, GpuLostError) as error:
        _keep(setup, study, str(error) or "interrupted")
        raise
    results = collect(setup, study, choice, stop_reason)
    write_profile(results, settings.profile)
    write_run(results)
    print(f"\n{results.text()}")
    print(f"profile    {settings.profile}\nrun        {settings.folder} (report.html, trials.csv, pareto.csv)")
    print(f"next       {_python()} -m runtime.generate --profile {_quoted(settings.profile)} --prompt '{PROMPT}'")
    print(f"others     {_python()} -m harness.pick --run {_quoted(settings.folder)} --list")
    print(f"check      {_python()} -m harness.check --profile {_quoted(settings.profile)}")
    print(json.dumps(summary(results, settings.profile)))


def _progress(setup: Setup, study: Study) -> Progress:
    from harness.report.progress import Progress

    settings, default = setup.settings, study.space.default
    known_ms = next((one.latency_ms_p50 for one in study.tried() if one.params == default), None)
    return Progress(settings.budget_s, settings.num_trials, default, known_ms)


def _guide(setup: Setup, measurer: Measurer, progress: Progress) -> Guide | None:
    """None, and why is said, where the workload of this model cannot be simulated."""
    try:
        return setup.guide(measurer, progress.simulated)
    except ExpertFlowError as error:
        print(f"simulator  not used: {error}", flush=True)
        return None


def _searched(
    setup: Setup, study: Study, measurer: Measurer, guide: Guide | None, progress: Progress, stop: StopRequest
) -> tuple[str, Choice]:
    from harness.search.loop import choose, search

    settings = setup.settings
    if guide is None:
        study.enqueue(study.space.seeds(), "seed")
    stop_reason = search(
        study,
        measurer,
        guide,
        progress,
        guard=setup.guard,
        objective=settings.objective,
        budget_s=settings.budget_s,
        num_trials=settings.num_trials,
        stop=stop,
    )
    stop.raise_if_set()

    def on_run(name: str, outcome: Any) -> None:
        progress.confirmation(name, outcome)
        stop.raise_if_set()

    def confirms(finalists: Sequence[Params], default: Params) -> Confirmation:
        progress.finalists(finalists)
        return setup.confirm(on_run, finalists, default)

    measurer.remember(study.records())
    choice = choose(
        study,
        stop.heeded(measurer),
        stop.heeded(measurer.verify),
        stop.heeded(confirms),
        objective=settings.objective,
        num_finalists=setup.num_finalists,
    )
    return stop_reason, choice


def _keep(setup: Setup, study: Study, stop_reason: str) -> None:
    """Before the end: write what there is and say how to go on."""
    from harness.report.results import write_profile, write_run
    from harness.report.run_folder import collect, resume_command

    folder = setup.settings.folder
    results = collect(setup, study, None, stop_reason)
    write_run(results)
    kept = f"{len(study.records())} trials are kept in {folder}"
    if results.run.chosen is not None:
        write_profile(results, folder / "best.yaml")
        kept += f", the best so far (unconfirmed) as {folder / 'best.yaml'}"
    print(f"{kept}\ngo on with: {resume_command(setup.settings)}", file=sys.stderr)


def _plan(setup: Setup) -> str:
    from harness.report.messages import plan_text

    settings = setup.settings
    return plan_text(
        setup.space,
        fixed=settings.fixed,
        objective=settings.objective,
        limits=settings.limits,
        trial=f"{setup.sizes}, {settings.concurrency} outstanding",
        trial_s=setup.default_s,
        budget_s=settings.budget_s,
        num_trials=settings.num_trials,
        confirm_s=setup.confirm_s,
        share_infeasible=setup.share_infeasible(),
    )


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    from harness.search.objective import Objective
    from harness.search.plan import parse_duration
    from runtime.profile import parse_overrides

    for name, least in (("trials", 1), ("concurrency", 1), ("context", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: at least {least} is needed")
    if options.resume and options.out is None:
        raise UsageError("--resume needs the run's folder: --out results/runs/…")
    if options.demo and options.model is not None:
        raise UsageError(f"--demo and --model {options.model} exclude each other; give one of them")
    _limits(options, None)
    numerics = {} if options.numerics is None else {"numerics": options.numerics}
    return {
        "objective": Objective(options.objective),
        "budget_s": parse_duration(options.time_budget),
        "num_trials": options.trials,
        "sampler": options.sampler,
        "seed": options.seed,
        "resume": options.resume,
        "workload": options.workload,
        "concurrency": options.concurrency,
        "context": options.context,
        "fixed": {**parse_overrides(options.set), **numerics},
    }


def _limits(options: argparse.Namespace, gpu: Gpu | None) -> Limits:
    from harness.search.outcome import Limits

    demo = DEMO_LIMITS["cpu" if gpu is None else "gpu"] if options.demo else None
    return Limits.parse(demo if options.max_memory is None else options.max_memory, options.slo_tpot, options.slo_ttft)


def _choose_device(options: argparse.Namespace) -> Gpu | None:
    """The GPU that was named, else the first that can be used unless it is to be the CPU; said in one line.

    Raises:
        DeviceError: the one that was named cannot be used.
    """
    check_gpu_is_numbered(options)
    if options.device is not None:
        return None
    from harness.hardware.nvml import find_gpu, read_gpus

    nvml = read_gpus()
    if options.gpu is not None:
        from harness.search.gpu import examine

        gpu = examine(find_gpu(options.gpu, nvml), nvml)
        print(f"tuning for GPU {gpu.index}: {gpu.name} ({gpu.device})", flush=True)
        return gpu
    found, why = _first_usable(nvml)
    if found is None:
        print(f"tuning for the CPU ({why})")
    else:
        print(f"tuning for GPU {found.index}: {found.name} ({found.device}); for the CPU: --device cpu", flush=True)
    return found


def _first_usable(nvml: NvmlReadings) -> tuple[Gpu | None, str]:
    """In NVML's order; else why the first of them cannot be used."""
    from harness.hardware.nvml import find_gpu
    from harness.search.gpu import examine

    reasons = []
    for index in range(len(nvml.gpus)):
        try:
            return examine(find_gpu(index, nvml), nvml), ""
        except DeviceError as error:
            reasons.append(str(error))
    none = "no GPU" if nvml.num_gpus.value == 0 else nvml.num_gpus
    return None, reasons[0] if reasons else f"NVML: {none}"


def _demo_expert_bytes(gpu: Gpu | None) -> int:
    from harness.probe import DEMO_EXPERT_BYTES

    return DEMO_EXPERT_BYTES if gpu is None else GPU_DEMO_EXPERT_BYTES


def _label(model: str | None, gpu: Gpu | None) -> str:
    """A file name for the model."""
    if model is None:
        return f"demo-{_demo_expert_bytes(gpu) >> 20}MiB"
    return _slug(Path(model).resolve().name if Path(model).exists() else model) or "model"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _folder(options: argparse.Namespace, label: str) -> Path:
    if options.out is not None:
        return Path(options.out)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results") / "runs" / f"{label}-{now}"


def _python() -> str:
    """How to call this interpreter from here: the shortest name that means it."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == executable.absolute():
        return "python"
    below = executable.absolute().is_relative_to(Path.cwd())
    return str(executable.absolute().relative_to(Path.cwd())) if below else str(executable)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


if __name__ == "__main__":
    sys.exit(main())
