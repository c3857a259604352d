"""The report's section of the calibration: what each band would mask of the engine's own noise."""

from __future__ import annotations

from oldlogits.record.report import charts
from oldlogits.record.report.charts import Line
from oldlogits.record.report.data import RunData
from oldlogits.record.report.figures import Figure


def calibration(run: RunData) -> dict[str, list[Figure]]:
    """The section by its name; empty without a calibration."""
    found = run.calibration
    if found is None:
        return {}
    points = list(zip(found.bands, found.masked, strict=True))
    band = run.bound("band") if run.setting("r_d") != "1" else None
    own = [(at, share) for at, share in points if at == band]
    lines = [Line(label="masked", points=points, colour="c0", style="dots", text="{:.2%}".format)]
    lines += [Line(label="this run's band", points=own, colour="c1", style="dots", text="{:.2%}".format)] if own else []
    x = charts.x_axis(points[0][0], points[-1][0], transform="log")
    y = charts.y_axis(0, max(share for _, share in points), percent=True)
    caption = (
        f"r_d = old/mu of {found.num_tokens} tokens at lag 0, before the first step: the engine's numerics alone. "
        f"Mean |log r_d| {found.log_r_d_abs_mean:.2g} nats, largest {found.log_r_d_abs_max:.2g}; "
        f"mean r_d {found.r_d_mean:.5f} +- {found.r_d_mean_error:.1g}, and 1 is expected."
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
