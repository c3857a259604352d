"""One run of nothing but things from outside: loss, source, parser, adapter, engine and tracker, each by its import path."""

import json

import pytest

from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, tokens_of
from .own_engine import LoggingEngine

HERE = __name__.rpartition(".")[0]


@pytest.mark.slow
def test_a_run_is_made_of_ones_own_things_alone(tiny_folder, tmp_path):
    LoggingEngine.built.clear()
    config = recipe(
        tiny_folder,
        variant="ppo_clip",
        objective={"loss": f"{HERE}.own_loss:gspo"},
        proximal={"source": f"{HERE}.own_source:SmallSteps"},
        env={
            "target": f"{HERE}.own_adapter:NUMBERS",
            "adapter": f"{HERE}.own_adapter:adapt_quiz",
            "parser": f"{HERE}.own_parser:MarkParser",
        },
        engine={"type": f"{HERE}.own_engine:OwnEngine"},
        record={"trackers": [f"{HERE}.own_tracker:JsonTracker"]},
    )
    out = tmp_path / "run"
    assert run(config, out).error is None
    assert check_accounting(out)["trained"] == 4 * 3 * 4
    assert set(tokens_of(out, "provenance")["provenance"]) == {"exact"}
    [engine] = LoggingEngine.built
    assert engine.versions == [0, 1, 2, 3, 4]
    updates = [event.metrics for event in events_of(out, "update")]
    assert all(metrics["source/num_calls"] > 0 for metrics in updates)
    [told] = (out / "trackers").rglob("told.jsonl")
    opened, *rest = map(json.loads, told.read_text().splitlines())
    assert opened["config"]["objective.loss"] == f"{HERE}.own_loss:gspo"
    assert rest[-1] == {"report": "report.html"}
    rewards = {line["step"]: line["metrics"]["reward/mean"] for line in rest if "reward/mean" in line.get("metrics", {})}
    assert rewards == {version: metrics["reward/mean"] for version, metrics in enumerate(updates, 1)}
