"""The report's section of the calibration: what each band would mask of the engine's own noise."""

from __future__ import annotations

from oldlogits.record.jsonl import Json, number
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Line
from oldlogits.record.report.data import RunData
from oldlogits.record.report.figures import Figure


def calibration(run: RunData) -> dict[str, list[Figure]]:
    """The section by its name; empty without a calibration."""
    found = run.calibration
    points = list(zip(_numbers(found.get("bands")), _numbers(found.get("masked")), strict=True))
    if not points:
        return {}
    band = run.bound("band") if run.setting("r_d") != "1" else None
    own = [(at, share) for at, share in points if at == band]
    lines = [Line(label="masked", points=points, colour="c0", style="dots", text="{:.2%}".format)]
    lines += [Line(label="this run's band", points=own, colour="c1", style="dots", text="{:.2%}".format)] if own else []
    x = charts.x_axis(points[0][0], points[-1][0], transform="log")
    y = charts.y_axis(0, max(share for _, share in points), percent=True)
    mean, error, size, largest = (
        number(found[name]) or 0.0 for name in ("r_d_mean", "r_d_mean_error", "log_r_d_abs_mean", "log_r_d_abs_max")
    )
    caption = (
        f"r_d = old/mu of {found['num_tokens']} tokens at lag 0, before the first step: the engine's numerics alone. "
        f"Mean |log r_d| {size:.2g} nats, largest {largest:.2g}; mean r_d {mean:.5f} +- {error:.1g}, and 1 is expected."
    )
    figure = Figure(
        title="Tokens that a band would mask at lag 0",
        caption=caption,
        svg=charts.line_chart(x, y, lines, x_label="band (log axis)"),
        legend=tuple((line.colour, line.label) for line in lines),
        table=(
            ("band", *(f"{at:g}" + (" (this run)" if at == band else "") for at, _ in points)),
            ("masked", *(f"{share:.2%}" for _, share in points)),
        ),
    )
    return {"The engine's own noise": [figure]}


def _numbers(values: Json) -> list[float]:
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]
