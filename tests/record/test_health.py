"""The line of health and the forecast of a run: words that follow from the figures of one update."""

import io

import pytest
from rich.console import Console

from oldlogits.record.events import Evaluated, EvaluationProgressed, Updated
from oldlogits.record.live.health import Forecast, health_line, in_minutes
from oldlogits.record.live.view import LiveView


def updated(version=1, provenance=None, **metrics):
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Updated(version=version, metrics=named, staleness_counts={}, provenance=provenance or {})


@pytest.mark.parametrize(
    "provenance, metrics, failed, words",
    [
        (
            {"exact": 90},
            {"staleness__max": 3.0, "idle__trainer_share": 0.56, "idle__engine_share": 0.18},
            0,
            "old log-probs exact; staleness 3 of at most 4; the trainer waits for samples (56%); no episode failed",
        ),
        (
            {"exact": 90, "async": 10, "mu": 0},
            {"staleness__max": 5.0, "idle__trainer_share": 0.1, "idle__engine_share": 0.3, "queue__admission_open": 0.0},
            2,
            "90% of old log-probs exact, others async; staleness 5 of at most 4: BROKEN; "
            "the engine waits for the trainer (30%); 2 of 40 episodes failed",
        ),
        (
            {},
            {"idle__trainer_share": 0.1, "idle__engine_share": 0.3, "queue__admission_open": 1.0},
            0,
            "the engine waits for the environments (30%); no episode failed",
        ),
        (
            {},
            {"idle__engine_share": 0.3, "queue__admission_open": 1.0, "queue__queued": 400.0, "queue__running": 2.0},
            0,
            "the engine waits for the trainer (30%); no episode failed",
        ),
        ({}, {"idle__trainer_share": 0.1, "idle__engine_share": 0.1}, 0, "engine and trainer are busy; no episode failed"),
        ({}, {}, 0, "no episode failed"),
    ],
)
def test_the_line_of_health_says_in_words_what_the_figures_of_an_update_say(provenance, metrics, failed, words):
    found = health_line(updated(provenance=provenance, **metrics), max_staleness=4, num_failed=failed, num_ended=40)
    assert found == words


def evaluated(stage, seconds):
    rates = dict.fromkeys(("mean", "low", "high", "reward_mean", "reward_low", "reward_high"), 0.5)
    rest = {"success_at": 1.0, "num_episodes": 2, "rewards": [1.0, 0.0], "seconds_s": seconds}
    return Evaluated(version=0, stage=stage, mode="sampled", **rates, **rest)


def test_the_forecast_is_the_updates_that_are_left_and_the_evaluation_after_them():
    forecast = Forecast(10)
    assert forecast.left_s is None
    forecast.evaluated(evaluated("before", 7.0))
    forecast.evaluated(evaluated("before", 3.0))
    for version, seconds in ((1, 30.0), (2, 4.0), (3, 4.0)):  # compilation makes the first one long
        forecast.updated(updated(version, time__update_s=seconds, time__between_s=0.0))
    assert forecast.left_s == 7 * 4.0 + 10.0
    for version in range(4, 11):
        forecast.updated(updated(version, time__update_s=4.0))
    forecast.evaluated(evaluated("after", 6.0))
    assert forecast.left_s == 4.0


@pytest.mark.parametrize(
    "seconds, words",
    [(None, ""), (0.0, "about 0 s left"), (31.0, "about 40 s left"), (150.0, "about 2 min left"), (9000.0, "about 2.5 h left")],
)
def test_a_time_that_is_left_is_told_as_roughly_as_it_is_known(seconds, words):
    assert in_minutes(seconds) == words


@pytest.mark.parametrize("width", [80, 140])
def test_the_panel_names_the_phase_and_fits(width):
    out = io.StringIO()
    console = Console(file=out, width=width, height=30, force_terminal=True, color_system=None)
    shown = []

    def panel():
        found = io.StringIO()
        Console(file=found, width=width).print(view._panel())
        shown.append(found.getvalue())
        return shown[-1]

    with LiveView(total_updates=2, title="desk", console=console) as view:
        assert "starting" in panel()
        view.emit(EvaluationProgressed(version=0, num_ended=3, num_failed=0, num_episodes=9))
        assert "evaluation before training" in panel()
        view.emit(evaluated("before", 8.0))
        view.emit(updated(1, {"exact": 5}, time__update_s=4.0, staleness__max=1.0, idle__trainer_share=0.5))
        assert "training" in panel()
        assert "about 20 s left" in shown[-1]
        assert "old log-probs exact; staleness 1; the trainer waits for samples (50%)" in shown[-1]
        view.emit(updated(2, {"exact": 5}, time__update_s=4.0))
        view.emit(EvaluationProgressed(version=2, num_ended=3, num_failed=0, num_episodes=9))
        assert "evaluation after training" in panel()
    assert max(len(line) for text in shown for line in text.splitlines()) <= width
