"""``oldlogits bench versions``: what it costs to keep exact versions, on this machine, of a random model or of yours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from oldlogits.config.model_folder import check_model_folder
from oldlogits.core.errors import ConfigError, reading
from oldlogits.record.folder import describe_environment, write_json

if TYPE_CHECKING:
    from oldlogits.bench.lab import Lab


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Measure what keeping exact versions costs: bytes of a version, seconds to encode one and to switch to one.

    Times are CPU time of one thread (on an accelerator, device time) and are shown as multiples of the time that a copy of
    all weights takes in the same round; each figure is the median over the rounds.
    """

    model: Path | None = None
    """A Hugging Face folder, which is trained for a few real steps on the CPU. Default: a random model."""
    lr: tuple[float, ...] = (1e-6, 1e-5)
    """Learning rates. The smaller the rate, the fewer bf16 values a step changes, and the smaller a version."""
    params: int = 128_000_000
    """Parameters of the random model."""
    rounds: int = 11
    """Versions made at each learning rate; from 10 on with the bytes of a window of 10."""
    smoke: bool = False
    """A random model of 24 million parameters: under a minute. Its ratios of times are not those of a larger model."""
    device: str = "cpu"
    """Where the random model lives: cpu, or cuda."""
    out: Path | None = None
    """A JSON file for the figures."""


def command(arguments: Sequence[str]) -> int:
    """Measure at each learning rate, and show one table."""
    if arguments[:1] != ["versions"]:
        if not arguments or arguments[0] in ("-h", "--help"):
            print("usage: oldlogits bench versions ...\n\n  versions  measure what exact versions cost on this machine")
            return 0
        raise ConfigError("unknown bench", got=arguments[0], allowed="versions", fix="run `oldlogits bench versions --help`")
    options = tyro.cli(BenchOptions, prog="oldlogits bench versions", args=list(arguments[1:]))
    has_rates = bool(options.lr) and all(0 < lr <= 1 for lr in options.lr)
    if not 1 <= options.rounds <= 10_000 or not 100_000 <= options.params <= 10**12 or not has_rates:
        raise ConfigError(
            "there is too little to measure, or too much",
            got=f"--rounds {options.rounds} --params {options.params} --lr {' '.join(map(str, options.lr))}",
            allowed="1 to 10,000 rounds, 100,000 to 10^12 parameters, and at least one learning rate in (0, 1]",
            fix="correct it, or leave it out",
        )
    started, console = time.perf_counter(), Console(highlight=False)
    figures = _measure(options, lambda said: console.print(said, style="dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("a version beside a copy of all weights")
    for lr in figures:
        table.add_column(f"lr {lr}", justify="right", no_wrap=True)
    for name, (label, show) in FIGURES.items():
        cells = [show(found[name]) if name in found else "" for found in figures.values()]
        table.add_row(label, *cells) if any(cells) else None
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s; how the format works: docs/versions.md")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        environment = describe_environment()
        write_json(options.out, {"environment": environment, "device": options.device, "figures": figures})
        console.print(f"figures  {options.out}")
    return 0


def _measure(options: BenchOptions, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Return the figures by learning rate and name."""
    if options.model is not None:
        check_model_folder(options.model, fix="name a Hugging Face folder, or leave --model out")
    import torch

    from oldlogits.bench.chains import RealModel, SyntheticModel
    from oldlogits.bench.lab import Lab
    from oldlogits.versions import kernels_in_use

    with reading(ConfigError, "there is no such device", got=options.device, allowed="cpu, cuda", fix="leave --device out"):
        device = torch.device(options.device)
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ConfigError("there is no such device", got=options.device, allowed="cpu", fix="leave --device out")
    torch.set_num_threads(1)
    say(f"kernels: {kernels_in_use()}; one thread")
    found: dict[str, dict[str, float]] = {}
    for lr in options.lr:
        if options.model is not None:
            lab = Lab(RealModel(options.model, lr=lr))
        else:
            num_params = 24_000_000 if options.smoke else options.params
            lab = Lab(SyntheticModel(num_params=num_params, lr=lr, device=options.device))
        say(f"{lab.resident.layout.num_values:,} parameters at lr {lr:g}, {options.rounds} rounds")
        for _ in range(options.rounds):
            lab.round()
        found[f"{lr:g}"] = {name: statistics.median(values) for name, values in _samples(lab).items()}
    return found


def _samples(lab: Lab) -> Mapping[str, Sequence[float]]:
    """Return the figures of each round, by name; encoding goes without the cast, which every way of keeping versions makes."""
    times, memcpy = lab.times, lab.times["memcpy"]
    encode = [whole - cast for whole, cast in zip(times["encode"], times["cast"], strict=True)]
    cold = [net + pack for net, pack in zip(encode, times["pack"], strict=True)]
    works = {"encode.memory": encode, "encode.cold": cold, **{name: times[name] for name in TIMED}}
    copies = {name: [work / copy for work, copy in zip(found, memcpy, strict=True)] for name, found in works.items()}
    return {**lab.values, **copies, "memcpy.ms": [1000 * copy for copy in memcpy]}


TIMED: Final = ("switch", "switch.cold", "checkout", "publish")


def _percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


FIGURES: Final[Mapping[str, tuple[str, Callable[[float], str]]]] = {
    "share.changed": ("bf16 values that a step changes", _percent),
    "bytes.memory": ("bytes of a version in memory", _percent),
    "bytes.cold": ("bytes of a version, compressed", _percent),
    "window.copy": ("bytes of ten versions, compressed", _percent),
    "encode.memory": ("time to encode it", "{:.2f} x".format),
    "encode.cold": ("time to encode and compress it", "{:.2f} x".format),
    "publish": ("time to publish it, with the cast to bf16", "{:.2f} x".format),
    "switch": ("time to switch to it, from memory", "{:.2f} x".format),
    "switch.cold": ("time to switch to it, compressed", "{:.2f} x".format),
    "checkout": ("time to check it out and come back", "{:.2f} x".format),
    "memcpy.ms": ("a copy of all weights takes", "{:.1f} ms".format),
}
"""The lines of the table: figure, label, and how it is written."""
