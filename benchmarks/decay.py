"""What the weight average's decay is worth: max-lag, auto and audited on the same recorded traces.

    python -m benchmarks.decay [--seeds 6] [--windows 4 8] [--lags even skewed] [--driver exact] [--share 0.25] [--out FILE]

Setting: the order desk in lockstep, as in the decision tables of studies/old_logits/recipes/study-small.toml (engine fp8). Each
trace is one run of 3 W updates, the last 2 W of which are recorded: all averages take in the same versions and score the same
tokens, side by side. The batches of which "audited" is told OLD are `--share` of all, evenly spaced. Settings are interleaved,
seed by seed. `--out` keeps the rows of the decision tables as JSON.

Printed, for each setting and for all: the geometric mean over seeds of the ratio of two averages' errors on the same trace,
with the 95% t interval of its logarithm over seeds; half a token is added to both decision errors. Below 1 the first is nearer
to OLD.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from studies.old_logits.analyse.pooling import HALF
from studies.old_logits.analyse.stats import Estimate, geometric_mean, group_means
from studies.old_logits.declare.plan import decision_cells, read_plan
from studies.old_logits.measure.decision import DecisionError, decision_errors
from studies.old_logits.measure.trace import AVERAGES as PANEL
from studies.old_logits.measure.trace import Decay, record_trace

PLAN = Path(__file__).parents[1] / "studies/old_logits/recipes/study-small.toml"
AVERAGES: dict[str, Decay] = {**PANEL, "ewma-audited": "audited"}
PAIRS = (("ewma-audited", "ewma-auto"), ("ewma-audited", "ewma"), ("ewma-auto", "ewma"), ("ewma-audited", "arrival"))
MEASURES = ("by_count", "by_weight", "log_error")


def traced(options: argparse.Namespace) -> Iterator[DecisionError]:
    """Record the traces, seed by seed, and judge them."""
    plan = read_plan(PLAN)
    decision = replace(plan.decision, windows=tuple(options.windows), lags=tuple(options.lags))
    decision = replace(decision, drivers=(options.driver,) * options.seeds, bands=tuple(options.bands))
    cells = sorted(decision_cells(replace(plan, decision=decision)), key=lambda cell: cell.block)
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            started, window, o = time.perf_counter(), cell.config.window, cell.config.objective
            config = replace(cell.config, num_updates=3 * window, audit=replace(cell.config.audit, share=0.0))
            out, num_scored = Path(folder) / str(number), 2 * window
            table = record_trace(config, out, num_scored, averages=AVERAGES, audit_share=options.share)
            yield from decision_errors(
                table,
                driver=cell.method,
                trace=cell.block,
                bands=cell.bands,
                eps_low=o.eps_low,
                eps_high=o.eps_high,
                dual_clip=None if math.isinf(o.dual_clip) else o.dual_clip,
            )
            seconds = time.perf_counter() - started
            print(f"trace {number + 1} of {len(cells)}: {cell.label}, {len(table):,} tokens, {seconds:.0f} s", flush=True)


def ratio(errors: Sequence[DecisionError], pair: tuple[str, str], measure: str) -> Estimate:
    """The ratio of the errors of two averages, over the traces of each seed and then over seeds."""
    rows: dict[tuple[int, int, str], dict[str, float]] = {}
    for e in errors:
        half = HALF / e.num_tokens if measure != "log_error" else 0.0
        rows.setdefault((e.seed, e.window, e.lag), {})[e.proximal_policy] = getattr(e, measure) + half
    logs = ((seed, math.log(found[pair[0]] / found[pair[1]])) for (seed, _, _), found in rows.items())
    return geometric_mean([math.exp(mean) for mean in group_means(logs)])


def tell(name: str, errors: Sequence[DecisionError]) -> None:
    """Print the mean errors of one setting, and the ratios of pairs."""
    for policy in ("arrival", *AVERAGES):
        rows = [e for e in errors if e.proximal_policy == policy]
        means = [sum(getattr(e, measure) for e in rows) / len(rows) for measure in MEASURES]
        betas = [e.beta for e in rows if e.beta is not None]
        beta = f"{sum(betas) / len(betas):.3f}" if betas else "-"
        told = f"by count {means[0]:.3%}  by weight {means[1]:.3%}  log error {means[2]:.5f}"
        print(f"  {name:12} {policy:13} beta {beta:6} {told}")
    for pair in PAIRS:
        found = [(measure, ratio(errors, pair, measure)) for measure in MEASURES]
        told = "  ".join(f"{measure} {f.mean:.3f} [{f.low:.3f}, {f.high:.3f}]" for measure, f in found)
        print(f"  {name:12} {pair[0]} / {pair[1]}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--lags", nargs="+", default=["even", "skewed"])
    parser.add_argument("--bands", type=float, nargs="+", default=[1.1])
    parser.add_argument("--driver", default="exact")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    errors = list(traced(options))
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(e) for e in errors]))
    for band in options.bands:
        own = [e for e in errors if e.band == band]
        settings = sorted({(e.window, e.lag) for e in own})
        print(f"\nband {band:g}, {options.seeds} seeds, {options.seeds * len(settings)} traces")
        for one in settings:
            tell(f"W {one[0]}, {one[1]}", [e for e in own if (e.window, e.lag) == one])
        tell("all", own)


if __name__ == "__main__":
    main()
