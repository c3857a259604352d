from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.bus import Event, EventBus, recorded_names
from oldlogits.record.event_log import EventLog, history, is_wall_clock, read_events
from oldlogits.record.events import (
    CheckpointWritten,
    EvaluationProgressed,
    Probed,
    RunStarted,
    TrajectoryFailed,
    Updated,
    VersionPublished,
    Warned,
)
from oldlogits.record.jsonl import LineFile, RecordError, encode, read_lines, revived
from tests.memory_log import MemoryLog, without_wall_clock

NAMES = [
    "audit", "average_reset", "batch", "calibration", "checkpoint", "checkpoint_failed", "conversation_rewritten", "evaluation",
    "group_admitted", "group_closed", "probe", "published", "run_ended", "run_started", "scored", "server_down", "server_up",
    "trajectory_failed", "trajectory_restarted", "update", "warm_start", "warning", "weights_updated",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.slow
@given(JSON)
def test_whatever_is_encoded_is_one_line_of_strict_json(value):
    line = encode(value)
    assert "\n" not in line
    json.loads(line, parse_constant=refuse)


@given(st.floats())
def test_every_float_is_read_back_non_finite_ones_included(value):
    back = revived(json.loads(encode(value)))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_other_strings_are_no_numbers():
    assert revived(["12", "x", "NaN", {"a": ["Infinity", True, None]}]) == ["12", "x", "NaN", {"a": ["Infinity", True, None]}]


def test_seq_counts_from_0_and_goes_on_after_a_resume(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    for version in (0, 1):
        with EventLog(path) as log:
            log.emit(Warned(version=version, name="a", message="a", figures={}))
            log.emit(CheckpointWritten(version=version, path="b", bytes=1, stall_s=0.0, seconds_s=0.0))
    assert [(line["seq"], line["kind"], line["version"]) for line in read_lines(path)] == [
        (0, "warning", 0),
        (1, "checkpoint", 0),
        (2, "warning", 1),
        (3, "checkpoint", 1),
    ]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_log_cut_at_any_byte_is_readable_and_is_continued_without_gaps(tmp_path: Path, cut: int):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for index in range(3):
            log.emit(Warned(version=index, name="a", message="höher", figures={}))
    path.write_bytes(path.read_bytes()[:-cut])
    num_whole = path.read_bytes().count(b"\n")
    assert len(list(read_events(path))) == num_whole
    with EventLog(path) as log:
        log.emit(Warned(version=9, name="a", message="again", figures={}))
    assert [line["seq"] for line in read_lines(path)] == list(range(num_whole + 1))
    assert [event.version for event in read_events(path)][-1] == 9


def test_an_event_is_on_disk_when_emit_returns(tmp_path: Path):
    log = EventLog(tmp_path / "events.jsonl")
    log.emit(Warned(version=0, name="a", message="a", figures={}))
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 1
    log.close()


def test_an_event_without_a_field_of_its_kind_is_refused_and_names_it():
    with pytest.raises(TypeError, match=r"num_tokens.*num_above"):
        Probed(
            version=1,
            max_abs_error=0.0,
            mean_abs_error=0.0,
            consistency_publish_max_abs_error=0.0,
            consistency_lag0_max_abs_error=0.0,
        )


@pytest.mark.parametrize("key", ["seq", "kind"])
def test_a_field_cannot_take_the_name_of_the_head(key: str):
    with pytest.raises(TypeError, match=key):
        CheckpointWritten(version=1, path="x", **{key: 4})


@pytest.mark.parametrize(
    "event",
    [
        VersionPublished(version=1, bytes=3, version_bytes=1, full_bytes=4, changed=0.5, store_s=0.1, seconds_s="soon"),
        Updated(version=1, metrics={"idle/engine_share": [1]}, staleness_counts={}),
    ],
)
def test_a_wall_clock_key_holds_a_number(event):
    with pytest.raises(RecordError, match="wall-clock"):
        MemoryLog().emit(event)


def test_every_kind_has_one_class_and_states_its_fields():
    assert {kind.kind for kind in Event.__subclasses__()} == {"", *NAMES}
    assert recorded_names(Updated) == ("metrics", "staleness_counts", "provenance"), "tables and trajectories are not recorded"


def test_what_is_only_shown_is_not_recorded_and_takes_no_number():
    log = MemoryLog()
    log.emit(EvaluationProgressed(version=1, num_ended=3, num_failed=1, num_episodes=8))
    log.emit(CheckpointWritten(version=1, path="x", bytes=1, stall_s=0.0, seconds_s=0.0))
    assert log.events == [CheckpointWritten(version=1, path="x", bytes=1, stall_s=0.0, seconds_s=0.0)]


def test_a_bus_hands_an_event_to_its_subscribers_in_their_order():
    seen = []
    names = ("first", "second")
    bus = EventBus(*(SimpleNamespace(emit=lambda event, name=name: seen.append((name, event.path))) for name in names))
    for path in ("x", "y"):
        bus.emit(CheckpointWritten(version=1, path=path, bytes=1, stall_s=0.0, seconds_s=0.0))
    assert seen == [("first", "x"), ("second", "x"), ("first", "y"), ("second", "y")]


def started(version, num_kept=None):
    return RunStarted(
        version=version, variant="ppo_clip", r_d="1", r_s="theta/old", corrects_mismatch=False, source="snapshot",
        runtime="local", seed=3, denominator="tokens", band=1.5, eps_low=None, eps_high=None, truncation=None, max_staleness=2,
        group_size=4, prompts_per_update=2, model="tiny", num_parameters=9, num_trained=9, numerics="fp32", num_kept=num_kept,
    )  # fmt: skip


def test_a_run_that_goes_on_keeps_the_events_up_to_its_checkpoint_and_no_later_one():
    update = Updated(version=1, metrics={}, staleness_counts={})
    scored = CheckpointWritten(version=1, path="x", bytes=1, stall_s=0.0, seconds_s=0.0)
    # 0 start, 1 update 1 and its checkpoint, 2 checkpoint event, 3 update 2, 4 start again, 5 checkpoint event, 6 update 2
    line = [started(0), update, scored, replace(update, version=2), started(1, num_kept=2), scored, replace(update, version=2)]
    assert history(line) == [line[number] for number in (0, 1, 4, 5, 6)]
    again = [*line, started(2, num_kept=7), replace(update, version=3)]
    assert history(again) == [again[number] for number in (0, 1, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize("fields", [{}, {"path": "x", "colour": "red"}])
def test_a_line_that_lacks_a_field_of_its_kind_or_has_another_is_refused(tmp_path: Path, fields):
    with LineFile(tmp_path / "events.jsonl") as file:
        file.append({"seq": 0, "kind": "checkpoint", "version": 1, **fields})
    with pytest.raises(RecordError, match=r"is no event; got: .*(path|colour)"):
        list(read_events(tmp_path / "events.jsonl"))


@pytest.mark.parametrize(
    "key, expected",
    [
        ("pause_s", True),
        ("idle/engine_share", True),
        ("throughput/engine_tokens_per_s", True),
        ("r_s", False),
        ("log_r_s", False),
        ("ratio/log_r_s", False),
        ("groups", False),
        ("staleness_counts", False),
        ("trainer_s", True),
    ],
)
def test_wall_clock_is_told_from_the_key_alone_and_the_ratio_r_s_is_no_duration(key: str, expected: bool):
    assert is_wall_clock(key) is expected


def test_two_runs_that_differ_in_time_only_have_equal_events_without_wall_clock_keys():
    logs = MemoryLog(), MemoryLog()
    for log, speed in zip(logs, (1.0, 3.0), strict=True):
        log.emit(
            VersionPublished(version=1, bytes=3, version_bytes=1, full_bytes=4, changed=0.5, store_s=speed, seconds_s=speed)
        )
        log.emit(
            Updated(
                version=1,
                metrics={"mask/rho": 0.9, "time/step_s": speed},
                staleness_counts={"0": 4},
            )
        )
    first, second = ([(event.kind, without_wall_clock(dict(event.recorded()))) for event in log.events] for log in logs)
    assert first == second
    assert first[1][1]["metrics"] == {"mask/rho": 0.9}
    assert logs[0].events != logs[1].events


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(RecordError, match=r"line 2 of x\.jsonl is damaged"):
        list(read_lines(path))


def test_text_that_spells_a_number_stays_text_and_numbers_that_are_not_finite_come_back(tmp_path: Path):
    warned = Warned(version=1, name="nan", message="inf", figures={"nan": math.nan, "x": -math.inf})
    failed = [TrajectoryFailed(version=1, trajectory="inf", stage="train", reason=text) for text in ("nan", "-inf", "inf")]
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in (warned, *failed):
            log.emit(event)
    back, *others = read_events(tmp_path / "events.jsonl")
    assert (back.name, back.message) == ("nan", "inf")
    assert math.isnan(back.figures["nan"])
    assert back.figures["x"] == -math.inf
    assert others == failed


def test_a_line_that_is_no_event_is_refused(tmp_path: Path):
    with LineFile(tmp_path / "events.jsonl") as file:
        file.append({"seq": 0, "kind": "unheard_of", "version": 0})
    with pytest.raises(RecordError, match="is no event"):
        list(read_events(tmp_path / "events.jsonl"))
