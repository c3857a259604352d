from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from oldlogits.cli.report import command as report
from oldlogits.core.errors import ConfigError
from oldlogits.record.episodes import Episode, EpisodeSegment
from oldlogits.record.event_log import EventLog, read_events
from oldlogits.record.events import Updated, Warned
from oldlogits.record.jsonl import LineFile
from oldlogits.record.report.charts import Bar, Bound, Line, bar_chart, line_chart, log_ticks, nice_ticks, x_axis, y_axis
from oldlogits.record.report.data import binned, read_run
from oldlogits.record.report.page import write_report

EVIL = "<script>alert('x')</script>\"&{{ 7 * 7 }}"


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return " ".join(" ".join(ElementTree.fromstring(html.removeprefix("<!doctype html>")).itertext()).split())


@pytest.mark.slow
def test_the_report_of_a_whole_run_is_well_formed_and_holds_every_figure(fake_run):
    html = page(fake_run())
    text = text_of(html)
    for title in (
        "Reward", "Gradient norm", "Active tokens (rho)", "Staleness", "r_d = old/mu", "r_s = theta/old",
        "Size of the ratios by staleness", "Size of the ratios over the run", "KL divergence", "Effective sample size",
        "Tokens per second", "Idle time", "Trajectories in flight", "Seconds per update",
    ):  # fmt: skip
        assert f" {title} " in text
    assert "24.0% → 70.8%: better" in text
    assert "within its bound largest" in text
    assert "what limits the speed" in text
    assert "To know when reading this" not in text
    assert html.count("<svg") == 14 + 6
    assert "nan" not in re.findall(r'(?:points|d|x|y|cx|cy|x1|y1|height|width)="([^"]*)"', html)


def test_the_report_loads_nothing_from_elsewhere(fake_run):
    html = page(fake_run(3))
    assert not re.search(r"https?:|//[a-z]|\burl\(|@import|<link|<iframe|<img", html)
    assert not re.search(r"<script[^>]+src", html)


def test_what_episodes_and_recipes_say_is_escaped(fake_run):
    run = fake_run(2)
    segments = (
        EpisodeSegment(kind="context", text=EVIL, num_tokens=3),
        EpisodeSegment(kind="sampled", text=EVIL, num_tokens=1, version=9, tokens=(EVIL,), logp_mu=(-1.0,)),
    )
    evil = Episode(
        id="x", group="g", version=9, split="train", stage="train", reward=1.0,
        stop_reason=EVIL, num_turns=1, versions=(9,), segments=segments,
    )  # fmt: skip
    with LineFile(run / "episodes.jsonl") as log:
        log.append(asdict(evil))
    with EventLog(run / "events.jsonl") as log:
        log.emit(Warned(version=2, name="a", message=EVIL, figures={}))
    (run / "config.toml").write_text(f"x = '''{EVIL}'''")
    html = page(run)
    assert html.count("<script") == 1
    assert text_of(html).count("<script>alert('x')</script>\"&{{ 7 * 7 }}") == 5


def remove(run: Path, *names: str) -> Path:
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def keep_events(run: Path, *kinds: str) -> Path:
    path = run / "events.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if any(f'"kind": "{kind}"' in line for kind in kinds)]
    path.write_text("".join(kept) + '{"seq": 99, "kind": "upd')
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds, gone, said",
    [
        ((), ("tokens", "episodes.jsonl", "summary.json", "config.toml", "events.jsonl"), "The run never started"),
        (("run_started",), ("tokens", "episodes.jsonl", "summary.json"), "No update was recorded."),
        (("run_started", "update"), ("summary.json",), "No evaluation was recorded."),
        (("run_started", "update"), ("summary.json",), "the process was killed, or is still running"),
        (("run_started", "update", "evaluation", "run_ended"), ("tokens",), "no token tables"),
        (("run_started", "evaluation"), ("tokens",), "24.0% → 70.8%"),
        (("update", "run_ended"), ("episodes.jsonl",), "No episode was recorded with its text."),
    ],
)
def test_a_run_that_ended_early_gives_a_report_that_says_what_is_missing(fake_run, kinds, gone, said):
    run = fake_run(2)
    keep_events(run, *kinds)
    assert said in text_of(page(remove(run, *gone)))


@pytest.mark.slow
@pytest.mark.parametrize("num_updates", [1, 2, 500])
def test_runs_of_any_length_are_drawn_with_a_bounded_number_of_points(fake_run, num_updates):
    run = fake_run(2) if num_updates == 500 else fake_run(num_updates)
    if num_updates == 500:
        with EventLog(run / "events.jsonl") as log:
            for version in range(3, 501):
                log.emit(Updated(version=version, metrics={"mask/rho": 0.9}, staleness_counts={"0": 1}))
    root = ElementTree.fromstring(page(run).removeprefix("<!doctype html>"))
    paths = [path.get("d") for path in root.iter() if path.tag == "path" and "line" in path.get("class").split()]
    assert paths
    assert all(1 <= len(re.findall("[ML]", path)) <= 240 for path in paths)


def test_after_a_resume_the_updates_that_were_made_anew_replace_the_abandoned_ones(fake_run):
    run = fake_run(4)
    started = replace(read_run(run).started, version=2, num_kept=sum(e.version <= 2 for e in read_events(run / "events.jsonl")))
    with EventLog(run / "events.jsonl") as log:
        log.emit(started)
        log.emit(Updated(version=3, metrics={"mask/rho": 0.5}, staleness_counts={"1": 7}))
    data = read_run(run)
    assert [update.version for update in data.updates] == [1, 2, 3]
    assert data.updates[-1].metrics == {"mask/rho": 0.5}
    assert data.updates[-1].staleness_counts == {"1": 7}
    assert data.ended is None
    assert {evaluation.stage for evaluation in data.evaluations} == {"before", "during"}


def test_where_ratios_are_truncated_the_report_names_the_truncation_and_no_clip(fake_run):
    run = fake_run(2)
    started = replace(read_run(run).started, eps_low=None, eps_high=None, truncation=2.0)
    with EventLog(run / "events.jsonl") as log:
        log.emit(started)
        log.emit(Updated(version=1, metrics={"mask/rho": 0.5}, staleness_counts={"1": 7}))
    text = page(run)
    assert "No token is clipped: the weight of its gradient is truncated." in text
    assert "truncated at 2" in text
    assert "eps high" not in text
    assert "depends on the advantage" not in text


def test_bins_are_means_of_consecutive_updates():
    updates = [
        Updated(version=v, metrics={"a": float(v)} | ({"b": 1.0} if v == 2 else {}), staleness_counts={}) for v in range(1, 6)
    ]
    assert [(u.version, u.metrics) for u in binned(updates, 3)] == [(2, {"a": 1.5, "b": 1.0}), (4, {"a": 3.5}), (5, {"a": 5.0})]
    assert binned(updates, 5) == updates
    assert binned([], 5) == []


@pytest.mark.slow
def test_the_report_needs_no_torch(fake_run):
    code = f"import sys; from pathlib import Path; from oldlogits.cli.report import command; command([{str(fake_run(1))!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"got: no events\.jsonl"):
        report([str(tmp_path)])


@pytest.mark.parametrize("low, high", [(0.0, 0.93), (-3.0, 7.0), (0.998, 1.0021), (0.0, 1e-7), (0.0, 25_000.0), (-1e-3, 0.0)])
def test_ticks_cover_the_range_with_even_steps(low, high):
    ticks = nice_ticks(low, high, 4)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}
    assert ticks[0] <= low + 1e-6 * (high - low)
    assert ticks[-1] >= high - 1e-6 * (high - low)
    assert 3 <= len(ticks) <= 7


def test_ticks_of_a_ratio_are_even_where_narrow_and_powers_where_wide():
    assert log_ticks(0.8, 1.25) == (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    assert {0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0} <= set(log_ticks(0.1, 10))


def test_bars_and_bounds_stand_where_a_log_axis_puts_them():
    x, y = x_axis(0.25, 4.0, transform="log"), y_axis(0.0, 1.0)
    # 1 is the middle of [1/4, 4] in logs: pixel (52 + 468) / 2; a bar of height 1/2 ends at (208 + 12) / 2.
    assert x.at(1.0) == pytest.approx(260.0)
    svg = ElementTree.fromstring(
        bar_chart(x, y, [Bar(low=1.0, high=2.0, value=0.5, tip="a")], x_label="r", bounds=[Bound(x=1.0, label="b")])
    )
    bar = next(node for node in svg.iter("rect") if node.get("class") == "fill c0")
    assert (bar.get("x"), bar.get("y"), bar.get("height")) == ("260.0", "110.0", "98.0")
    bound = next(node for node in svg.iter("line") if node.get("class") == "bound")
    assert bound.get("x1") == bound.get("x2") == "260.0"


def test_a_value_that_is_not_finite_interrupts_a_line():
    line = Line(label="a", points=[(0.0, 0.0), (1.0, math.nan), (2.0, 1.0)], colour="c0")
    svg = line_chart(x_axis(0, 2), y_axis(0, 1), [line], x_label="x")
    assert 'd="M52.0,208.0M468.0,12.0"' in svg


def test_the_page_has_no_unclosed_element(fake_run):
    class Stack(HTMLParser):
        open: list[str]

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Stack()
    parser.open = []
    parser.feed(page(fake_run(2)))
    assert parser.open == []
