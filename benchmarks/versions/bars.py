"""What is measured of exact versions, in which unit, and the bar that each figure is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Model = Literal["synthetic", "smollm2", "gpu"]
"""The random model on the CPU, the real one there, and the random one on an accelerator."""
Unit = Literal["share", "ratio", "ms"]
SLOW, MIDDLE, FAST, DEMO = 1e-6, 5e-6, 1e-5, 1e-4
"""Learning rates: three of large models, and one of tiny models, at which most bf16 values change."""
ANY: Final = 0.0
"""In place of a learning rate, where a figure does not depend on it."""
GPU_PARAMS: Final = 4_000_000_000
"""Parameters for which the accelerator's bars are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure.

    Args:
        name: Its key in JSON.
        label: What the table calls it.
        unit: Of its values; shares are shown in percent.
        bars: The most that is allowed, by model and learning rate; elsewhere there is no bar.
    """

    name: str
    label: str
    unit: Unit
    bars: Mapping[tuple[Model, float], float] = field(default_factory=dict)

    def bar(self, model: Model, lr: float, num_params: int) -> float | None:
        """The bar of a model at a learning rate; those of the accelerator grow with the model, and are given for 4 B."""
        bar = self.bars.get((model, lr))
        return bar if bar is None or model != "gpu" else bar * num_params / GPU_PARAMS


def _gpu(most_ms: float) -> dict[tuple[Model, float], float]:
    return {("gpu", lr): most_ms for lr in (SLOW, MIDDLE, FAST)}


def _synthetic(slow: float, middle: float | None = None, fast: float | None = None) -> dict[tuple[Model, float], float]:
    bars = {SLOW: slow, MIDDLE: middle, FAST: fast}
    return {("synthetic", lr): bar for lr, bar in bars.items() if bar is not None}


def _smollm2(slow: float, fast: float) -> dict[tuple[Model, float], float]:
    return {("smollm2", SLOW): slow, ("smollm2", FAST): fast}


QUANTITIES: Final = (
    Quantity(name="share.changed", label="values changed", unit="share"),
    Quantity(name="share.dense", label="values in dense blocks", unit="share"),
    Quantity(
        name="bytes.cold",
        label="bytes of a version, cold tier / bf16 copy",
        unit="share",
        bars=_synthetic(0.0070, 0.022, 0.035) | _smollm2(0.0040, 0.013),
    ),
    Quantity(name="bytes.entropy", label="entropy of place and size", unit="share"),
    Quantity(name="bytes.xor", label="XOR + zstd-1", unit="share"),
    Quantity(name="bytes.of_xor", label="cold tier / XOR + zstd-1", unit="ratio", bars=_smollm2(0.55, 0.55)),
    Quantity(
        name="bytes.memory",
        label="bytes of a version, memory tier / bf16 copy",
        unit="share",
        bars=_synthetic(0.011, 0.038, 0.066),
    ),
    Quantity(name="window.copy", label="window of 10, cold tier / bf16 copy", unit="share", bars=_synthetic(0.07, None, 0.35)),
    Quantity(name="window.ewma", label="window of 10, cold tier / fp32 EWMA", unit="share", bars=_synthetic(0.07, None, 0.35)),
    Quantity(name="switch.memory", label="one switch, memory tier / memcpy", unit="ratio", bars=_synthetic(0.8, 0.8, 1.0)),
    Quantity(name="switch.cold", label="one switch, cold tier / memcpy", unit="ratio", bars=_synthetic(1.2, 1.2, 1.2)),
    Quantity(name="walk.pass", label="4 versions in one pass, per version / memcpy", unit="ratio", bars=_synthetic(0.45)),
    Quantity(name="walk.stops", label="4 versions, a stop at each, and back, per version / memcpy", unit="ratio"),
    Quantity(name="checkout", label="checkout and back / two load_state_dict", unit="ratio", bars=_synthetic(0.9, 0.9, 0.9)),
    Quantity(name="load_state_dict", label="one load_state_dict / memcpy", unit="ratio"),
    Quantity(name="encode.memory", label="encode net of the cast, memory tier / memcpy", unit="ratio", bars=_synthetic(1.6)),
    Quantity(name="encode.cold", label="encode net of the cast, cold tier / memcpy", unit="ratio", bars=_synthetic(2.2)),
    Quantity(name="cast", label="the cast alone / memcpy", unit="ratio"),
    Quantity(name="publish", label="publish to the store, with the cast / memcpy", unit="ratio"),
    Quantity(name="ewma", label="EWMA update / fp32 copy", unit="ratio", bars={("synthetic", ANY): 1.05}),
    Quantity(name="memcpy", label="memcpy of all weights", unit="ms"),
    Quantity(name="ms.switch", label="one switch, memory tier", unit="ms", bars=_gpu(5.0)),
    Quantity(name="ms.encode", label="encode with the cast, memory tier", unit="ms", bars=_gpu(10.0)),
    Quantity(name="ms.ewma", label="EWMA update", unit="ms", bars={("gpu", ANY): 15.0}),
)
"""In the order of the tables."""

BY_NAME: Final = {quantity.name: quantity for quantity in QUANTITIES}


def figure(value: float, unit: Unit) -> str:
    """A value of a unit.

    Example:
        .00673, "share": "0.673%"; .8, "ratio": "0.80"; 14.52, "ms": "14.5 ms".
    """
    if unit == "share":
        return f"{value:.3%}" if value < 0.1 else f"{value:.1%}"
    return f"{value:.1f} ms" if unit == "ms" else f"{value:.2f}"


def rate(lr: float) -> str:
    """A learning rate: "5e-6"; nothing for `ANY`."""
    return f"{lr:.0e}".replace("e-0", "e-") if lr else ""
