"""What one GPU does with this package: its tests, a table, and a training run, within a time that is kept to.

    python -m benchmarks.gpu [--device cuda|cpu] [--seconds 520] [--compute fp32|bf16] [--model FOLDER] [--out gpu.json]

Each part is a process of its own: one that fails, does not fit or takes too long leaves the others alone, and what it had
measured by then is in the table. With --device cpu everything runs with small shapes, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import torch

from benchmarks.gpu.clock import Budget
from benchmarks.gpu.desk import measure_desk
from benchmarks.gpu.models import SHAPES, make_folder
from benchmarks.gpu.peaks import measured_flops, peak_of
from benchmarks.gpu.rows import HEADER, Row, Rows, lines_of, report
from benchmarks.gpu.sampling import measure_engine
from benchmarks.gpu.training import measure_head, measure_training
from benchmarks.gpu.versions import measure_versions
from benchmarks.machine import this_machine
from oldlogits.models.device import configure_process
from oldlogits.versions import kernels_in_use

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the command.

    Args:
        name: What it is called.
        least_s: Seconds that must be left for it to be begun, on a GPU.
        most_s: Seconds after which it is ended, on a GPU.
    """

    name: str
    least_s: float
    most_s: float


PARTS: Final = (
    Part(name="tests", least_s=30, most_s=150),
    Part(name="small", least_s=40, most_s=120),
    Part(name="versions", least_s=30, most_s=60),
    Part(name="large", least_s=60, most_s=130),
    Part(name="desk", least_s=40, most_s=150),
)
"""In their order: a part takes what is left when its turn comes, so the largest model is the first to be left out."""
_CPU_SHARE: Final = 0.5
"""With small shapes on a CPU a part must have this share of the seconds left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a part is told."""

    device: torch.device
    compute: str
    model: Path | None
    work: Path
    rows: Rows
    budget: Budget


def small(options: Options) -> None:
    """The 0.6 B model: peak, training, scoring, head, engine."""
    device, name = options.device, "0.6b" if options.device.type == "cuda" else "tiny"
    peak, shape = peak_of(device), SHAPES[name]
    options.rows.add(Row(name="peak that shares are of", value=peak.flops / 1e12, unit="TFLOP/s", note=peak.source))
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else ():
        flops = measured_flops(device, 8192, dtype)
        options.rows.add(
            Row(name=f"product in {str(dtype)[6:]}", value=flops / 1e12, unit="TFLOP/s", of_peak=flops / peak.flops)
        )
    folder = make_folder(options.work / name, shape, device)
    trainer = measure_training(
        name, folder, shape, device, compute=options.compute, peak=peak, rows=options.rows, budget=options.budget
    )
    if trainer is not None:
        measure_head(name, trainer, shape, device, peak=peak, rows=options.rows)
    del trainer
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measure_engine(name, folder, device, options.rows, options.budget)


def large(options: Options) -> None:
    """Training and scoring of the 4 B model."""
    device, name = options.device, "4b" if options.device.type == "cuda" else "tiny"
    folder = make_folder(options.work / "large", SHAPES[name], device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measure_training(
        name,
        folder,
        SHAPES[name],
        device,
        compute=options.compute,
        peak=peak_of(device),
        rows=options.rows,
        budget=options.budget,
    )


def versions(options: Options) -> None:
    """Switches, encoding, the average."""
    measure_versions(options.device, options.rows, options.budget)


def desk(options: Options) -> None:
    """A training run: SmolLM2 where its folder is at hand, else a model with random weights."""
    device, given = options.device, options.model
    name = "0.5b" if device.type == "cuda" else "tiny"
    folder = given or make_folder(options.work / "desk", SHAPES[name], device, max_context=4096)
    label = given.name if given else f"random {name}"
    is_random, out = given is None, options.work / "run"
    measure_desk(label, folder, device, out, options.rows, is_random=is_random, compute=options.compute)


def tests(options: Options) -> None:
    """The tests that are marked gpu, of tests/gpu."""
    found = options.work / "junit.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={found}"]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {"OLDLOGITS_DEVICE": options.device.type}).returncode

    counts = ElementTree.parse(found).getroot()[0].attrib if found.is_file() else {}
    bad = sum(int(counts.get(key, 0)) for key in ("failures", "errors"))
    total, skipped = int(counts.get("tests", 0)), int(counts.get("skipped", 0))
    note = "" if status == 0 else f"{bad} failed (exit status {status}): see the output above"
    options.rows.add(Row(name="tests that passed", value=total - bad - skipped, unit=f"of {total}", note=note))
    if status:
        raise SystemExit(status)


RUN: Final[Mapping[str, Callable[[Options], None]]] = {
    "tests": tests,
    "small": small,
    "versions": versions,
    "large": large,
    "desk": desk,
}


def play(part: Part, arguments: argparse.Namespace, work: Path, budget: Budget) -> bool:
    """Run a part in a process of its own; tells whether it did all that it should, and adds a row where it did not."""
    rows, on_gpu = Rows(work / "rows.jsonl"), arguments.device != "cpu"
    least, most = (part.least_s, part.most_s) if on_gpu else (10.0, arguments.seconds * _CPU_SHARE)
    if budget.left_s < least:
        rows.add(Row(name=f"left out: {part.name}", value=None, note=f"{budget.left_s:.0f} s were left, it takes {least:.0f}"))
        return False
    seconds = min(most, budget.left_s)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--device", arguments.device]
    command += ["--compute", arguments.compute, "--seconds", str(seconds), "--work", str(work)]
    command += ["--model", str(arguments.model)] if arguments.model else []
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        rows.add(Row(name=f"cut: {part.name}", value=None, note=f"it was ended after {seconds:.0f} s"))
        return False
    finally:
        if process.poll() is None:  # too late, or interrupted
            end_with_children(process)
    if status and part.name != "tests":
        rows.add(Row(name=f"failed: {part.name}", value=None, note=f"exit status {status}: see the output above"))
    return status == 0


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: they are a session of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or the one that is named; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=520.0, help="the time that is kept to, in all")
    parser.add_argument("--compute", default="bf16", choices=["fp32", "bf16"], help="trainer.compute")
    parser.add_argument("--model", type=Path, default=None, help="a folder to train on the desk, such as SmolLM2's")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--part", choices=list(RUN), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no GPU; --device cpu (make gpu DEVICE=cpu) runs what a CPU can", file=sys.stderr
        )
        return 2
    if options.part is not None:
        configure_process(num_threads=1 if options.device == "cpu" else min(16, os.cpu_count() or 1), seed=0)
        rows = Rows(options.work / "rows.jsonl")
        budget = Budget(options.seconds)
        device, model = torch.device(options.device), options.model and options.model.resolve()
        RUN[options.part](
            Options(device=device, compute=options.compute, model=model, work=options.work, rows=rows, budget=budget)
        )
        return 0
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Run the parts one after the other, print the table, write the JSON file."""
    started, budget = time.monotonic(), Budget(options.seconds)
    work = Path(tempfile.mkdtemp(prefix="oldlogits-gpu-"))
    try:
        statuses = {part.name: play(part, options, work, budget) for part in PARTS}
        rows = Rows(work / "rows.jsonl").read()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    machine = this_machine(options.device, kernels_in_use())
    took = time.monotonic() - started
    print(f"\n{machine}\n\n{HEADER}")
    for row in rows:
        print("\n".join(lines_of(row)))
    missed = sum(row.is_met is False for row in rows)
    print(
        f"\n{took:.0f} s; {missed} goals missed (*); "
        + ", ".join(f"{n}: {'ok' if ok else 'NOT'}" for n, ok in statuses.items())
    )
    facts = {"machine": str(machine), "seconds_s": took, "device": options.device, "parts": statuses}
    options.out.write_text(json.dumps(report(rows, facts), indent=1) + "\n", encoding="utf-8")
    return 0 if all(statuses.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
