"""Find the configuration for a model on this machine: `python -m harness.tune [--model M] [--max-memory SIZE] …`.

Probe → search (the default first) → confirm the best against the default → write the profile.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import DeviceError, UsageError, cli_main

if TYPE_CHECKING:
    from harness.search.loop import Choice
    from harness.search.setup import Settings, Setup
    from harness.search.study import Study

PROMPT = "Once upon a time"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.tune", description=__doc__)
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the demo with 1 MiB experts")
    parser.add_argument("--gpu", type=int, metavar="N", help="tune for this GPU")
    parser.add_argument("--device", choices=["cpu"], help="tune for the CPU, experts coming from disk")
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="limit on the process, such as 1.5GiB; default: what is free"
    )
    parser.add_argument(
        "--time-budget", default="5m", metavar="T", help="for the search, such as 90s or 10m (default 5m)"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="stop the search after N trials")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the run; default: results/runs/MODEL-TIME")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="JSON lines with text; default: bundled text")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests outstanding (default 8)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="longest sequence to have memory for")
    parser.add_argument("--profile-out", type=Path, metavar="FILE", help="default: profiles/MODEL-DEVICE.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fix a profile key")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    return cli_main(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: list[str]) -> None:
    # Imported late: --help answers at once, and the trials' processes, which import this module, stay small.
    from harness.search.setup import Settings

    _choose_device(options)
    settings = Settings(
        model=options.model or _default_model(),
        label=_label(options.model),
        command=shlex.join([_python(), "-m", "harness.tune", *given]),
        folder=_folder(options),
        profile=options.profile_out or Path("profiles") / f"{_label(options.model)}-cpu.yaml",
        **_limits(options),
    )
    tune(settings)
    profile = shlex.quote(str(settings.profile))
    print(f"\nnext: {_python()} -m runtime.generate --profile {profile} --prompt {shlex.quote(PROMPT)}")


def tune(settings: Settings) -> None:
    """Probe, search, confirm, write; prints what a user wants to see.

    Raises:
        ExpertFlowError: something that was given cannot be used, or nothing runs.
        KeyboardInterrupt: after what was measured has been written.
    """
    from harness.report.progress import Progress
    from harness.report.run_folder import write_profile, write_run
    from harness.report.tables import front_text
    from harness.search.loop import NothingRunsError, choose, closest, search
    from harness.search.setup import TuneError, prepare

    setup = prepare(settings)
    study, measurer = setup.open_study(), setup.measurer()
    measurer.remember(study.records())
    print(f"\n{setup.outlook()}", flush=True)
    progress = Progress(settings.budget_s, settings.num_trials)
    try:
        stop_reason = search(study, measurer, progress, budget_s=settings.budget_s, num_trials=settings.num_trials)
        choice = choose(study, measurer, partial(measurer, part="confirm"), progress, budget_s=settings.budget_s)
    except NothingRunsError:
        write_run(setup, study, None, "nothing can be used")
        raise TuneError(f"no configuration runs within the limit: {closest(study)}; see {settings.folder}") from None
    except KeyboardInterrupt:
        progress.close()
        _keep(setup, study)
        raise
    progress.close()
    table = write_run(setup, study, choice, stop_reason)
    write_profile(setup, study, choice, settings.profile)
    print(f"\n{front_text(table, setup.memory.num_experts)}\n\n{verdict(choice)}")
    print(f"profile    {settings.profile}\nrun        {settings.folder} (trials.csv, pareto.csv, pareto.png)")


def verdict(choice: Choice) -> str:
    """What was chosen and how sure that is, in two lines at most."""
    confirmation = choice.confirmation
    lines = [f"chosen     {choice.reason}"]
    if confirmation is not None and confirmation.ratio is not None:
        sure = f"{confirmation.confidence:.0%} interval, {len(confirmation.default)} interleaved pairs"
        lines.append(f"ratio      latency {confirmation.ratio} of the default's ({sure})")
    if choice.drift is not None:
        lines.append(f"drift      the default at the end took {choice.drift:.2f} of its time at the start")
    return "\n".join(lines)


def _keep(setup: Setup, study: Study) -> None:
    """After Ctrl-C: write what there is and say how to go on."""
    from harness.report.run_folder import best_so_far, write_profile, write_run
    from harness.search.loop import Choice

    settings = setup.settings
    write_run(setup, study, None, "interrupted")
    best = best_so_far(study)
    kept = f"{len(study.records())} trials are kept in {settings.folder}"
    if best is not None:
        path = settings.folder / "best.yaml"
        write_profile(setup, study, Choice(best, "the best so far, unconfirmed", None, None), path)
        kept += f", the best so far (unconfirmed) as {path}"
    print(f"{kept}\ngo on with: {_resume_command(settings)}", file=sys.stderr)


def _resume_command(settings: Settings) -> str:
    words = shlex.split(settings.command)
    out = [] if "--out" in words else ["--out", str(settings.folder)]
    return shlex.join([*words, *out, *([] if "--resume" in words else ["--resume"])])


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    from harness.search.plan import parse_duration
    from runtime.machine import parse_bytes
    from runtime.profile import parse_overrides

    for name, least in (("trials", 1), ("concurrency", 1), ("context", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: at least {least} is needed")
    return {
        "max_memory_bytes": None if options.max_memory is None else parse_bytes(options.max_memory),
        "budget_s": parse_duration(options.time_budget),
        "num_trials": options.trials,
        "seed": options.seed,
        "resume": options.resume,
        "workload": options.workload,
        "concurrency": options.concurrency,
        "context": options.context,
        "fixed": parse_overrides(options.set),
    }


def _choose_device(options: argparse.Namespace) -> None:
    """Say in one line that it is the CPU, or refuse the GPU."""
    from harness.hardware.nvml import find_gpu, read_gpus

    nvml = read_gpus()
    if options.gpu is not None:
        gpu = find_gpu(options.gpu, nvml)
        raise DeviceError(f"--gpu {options.gpu}: {gpu.name} is there, but experts cannot be moved to a GPU yet; "
                          "run with --device cpu")  # fmt: skip
    if options.device is None:
        found = f"{nvml.num_gpus} GPUs, which cannot be tuned for yet" if nvml.num_gpus.value else "no GPU"
        print(f"tuning for the CPU (NVML: {nvml.num_gpus if nvml.num_gpus.value is None else found})")


def _default_model() -> str:
    from harness.probe import default_model

    return default_model()


def _label(model: str | None) -> str:
    """A file name for the model."""
    name = "demo-1MiB" if model is None else Path(model).resolve().name if Path(model).exists() else model
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out)
    if options.resume:
        raise UsageError("--resume needs the run's folder: --out results/runs/…")
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("results") / "runs" / f"{_label(options.model)}-{now}"


def _python() -> str:
    """How to call this interpreter from here: the shortest name that means it."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == executable.absolute():
        return "python"
    below = executable.absolute().is_relative_to(Path.cwd())
    return str(executable.absolute().relative_to(Path.cwd())) if below else str(executable)


if __name__ == "__main__":
    sys.exit(main())
