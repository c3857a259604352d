"""Trackers: the real packages write to a local folder, and one that fails ends no run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.core.tracker import TrackedRun
from oldlogits.core.trajectory import Context, Sampled, Trajectory
from oldlogits.record.bus import EventBus
from oldlogits.record.episodes import EpisodeRecorder
from oldlogits.record.events import Evaluated, Updated
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import LineFile
from oldlogits.record.trackers.feed import TrackerFeed, find_trackers, flat, open_feeds
from tests.memory_log import MemoryLog

CONFIG = {"seed": 3, "trainer": {"lr": 0.5}}
TRAJECTORY = Trajectory(
    id="g0.0",
    group_id="g0",
    segments=(Context(token_ids=(1, 2)), Sampled(token_ids=(3,), logp_mu=(-0.5,), version=0)),
    reward=1.0,
    stop_reason="done",
)
UPDATE = Updated(
    version=1,
    metrics={"reward/mean": 0.25, "kl/x@lag1": 0.5, "grad/norm": float("nan")},
    staleness_counts={"0": 1},
    trajectories=[TRAJECTORY],
)
EVALUATED = Evaluated(
    version=1,
    stage="after",
    mode="sampled",
    mean=0.5,
    low=0.25,
    high=0.75,
    reward_mean=0.5,
    reward_low=0.0,
    reward_high=1.0,
    success_at=1.0,
    num_episodes=4,
    rewards=[1.0, 0.0] * 2,
    seconds_s=2.0,
)


def follow(tmp_path: Path, name: str) -> RunFolder:
    """A run of one update and one evaluation, followed by the tracker; whatever it raises fails the test."""
    folder = RunFolder.create(tmp_path / "my-run")
    [feed] = open_feeds(find_trackers([name]), folder, CONFIG)
    log = MemoryLog()
    with LineFile(folder.episodes) as episodes:
        recorder = EpisodeRecorder(episodes, lambda ids: " ".join(map(str, ids)), every=1, others=[feed.take])
        bus = EventBus(log, recorder, feed)
        feed.warn_on(bus)
        bus.emit(UPDATE)
        bus.emit(EVALUATED)
    folder.report.write_text("<p>the report</p>")
    assert feed.finish(folder) == ""
    assert [event.kind for event in log.events] == ["update", "evaluation"], "no warning"
    return folder


@pytest.mark.trackers
def test_tensorboard_holds_metrics_evaluation_config_episodes_and_the_place_of_the_report(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = follow(tmp_path, "tensorboard")
    found = EventAccumulator(str(folder.path / "trackers" / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("reward/mean")] == [(1, 0.25)]
    assert [(e.step, e.value) for e in found.Scalars("eval/sampled_success")] == [(1, 0.5)]
    assert "grad/norm" not in found.Tags()["scalars"], "what is not finite is left out"
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert '"trainer.lr": 0.5' in texts["config/text_summary"]
    assert "| 1 | train | g0.0 | g0 | 1.0 | done | 1 | 0 | 1 23 |" in texts["episodes/text_summary"]
    assert str(folder.report) in texts["report/text_summary"]


@pytest.mark.slow
@pytest.mark.trackers
@pytest.mark.filterwarnings("default")  # its database layer uses what SQLAlchemy has deprecated
def test_mlflow_holds_metrics_evaluation_config_episodes_and_the_report(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = follow(tmp_path, "mlflow")
    own = folder.path / "trackers" / "mlflow"
    client = mlflow.tracking.MlflowClient(f"sqlite:///{own}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("oldlogits").experiment_id])
    assert run.info.run_name == "my-run"
    assert run.data.metrics == {
        "reward/mean": 0.25, "kl/x.lag1": 0.5, "eval/sampled_success": 0.5,
        "eval/sampled_success_low": 0.25, "eval/sampled_success_high": 0.75, "eval/sampled_num_failed": 0,
        "eval/sampled_reward": 0.5, "eval/sampled_reward_low": 0.0, "eval/sampled_reward_high": 1.0,
        "eval/sampled_seconds_s": 2.0,
    }  # fmt: skip
    assert run.data.params == {"seed": "3", "trainer.lr": "0.5"}
    [table] = (own / "artifacts").rglob("v000001-train.json")
    assert dict(zip(*(json.loads(table.read_text())[key] for key in ("columns",)), range(9), strict=True))["reward"] == 4
    assert json.loads(table.read_text())["data"][0][2:5] == ["g0.0", "g0", 1.0]
    assert [path.read_text() for path in (own / "artifacts").rglob("report.html")] == ["<p>the report</p>"]


@pytest.mark.slow
@pytest.mark.trackers
def test_wandb_writes_a_whole_offline_run_into_the_run_folder(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = follow(tmp_path, "wandb")
    wandb.teardown()  # its own process has then written everything
    [written] = (folder.path / "trackers" / "wandb").rglob("run-*.wandb")
    content = written.read_bytes()
    for text in (b"reward/mean", b"eval/sampled_success", b"trainer.lr", b"my-run", b"oldlogits"):
        assert text in content, text
    media = [path.suffix for path in written.parent.rglob("media/*/*")]
    assert sorted(media) == [".html", ".json"], "the report and the table of episodes"


@pytest.mark.trackers
def test_trackio_holds_metrics_evaluation_config_and_episodes(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio" or name.endswith("trackers.trackio")]:
        monkeypatch.delitem(sys.modules, name)  # it reads TRACKIO_DIR when it is imported
    follow(tmp_path, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("oldlogits", "my-run")
    found = {key: value for line in logs for key, value in line.items() if key not in ("timestamp", "step")}
    assert (found["reward/mean"], found["eval/sampled_success"]) == (0.25, 0.5)
    assert "episodes" in found
    assert "report" in found


class Failing:
    """Fails at its first episode table, and counts what it is asked for after that."""

    asked: list[str] = []  # noqa: RUF012

    def __init__(self, run: TrackedRun) -> None:
        self.asked.append(run.name)

    def log(self, metrics, *, step):
        self.asked.append(f"log {step}")
        raise ConnectionError("no route to host")

    def log_episodes(self, rows, *, step):
        self.asked.append("episodes")

    def finish(self, report):
        self.asked.append("finish")


def test_a_tracker_that_fails_is_warned_of_once_and_left_alone(tmp_path):
    Failing.asked.clear()
    feed = TrackerFeed("mine", Failing, TrackedRun(name="r", folder=tmp_path, config={}))
    log = MemoryLog()
    bus = EventBus(log, feed)
    feed.warn_on(bus)
    bus.emit(UPDATE)
    feed._thread.join(60)
    for version in (2, 3):
        bus.emit(Updated(version=version, metrics={}, staleness_counts={}))
    assert Failing.asked == ["r", "log 1"]
    [warning] = [event for event in log.events if event.kind == "warning"]
    assert warning.name == "tracker"
    assert "tracker 'mine' failed" in warning.message
    assert "ConnectionError: no route to host" in warning.message
    assert feed.finish(RunFolder(path=tmp_path)) == "", "told already"


def test_a_tracker_that_cannot_be_opened_is_told_at_the_end_if_nothing_happened_in_between(tmp_path):
    class Closed(Failing):
        def __init__(self, run):
            raise OSError("disk full")

    feed = TrackerFeed("mine", Closed, TrackedRun(name="r", folder=tmp_path, config={}))
    assert feed.finish(RunFolder(path=tmp_path)) == "tracker 'mine' failed: OSError: disk full"


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fix: pip install 'oldlogits\[wandb\]'"):
        find_trackers(["wandb"])


def test_a_tracker_of_ones_own_is_found_by_its_path_and_another_name_is_refused():
    assert find_trackers([f"{__name__}:Failing"])[f"{__name__}:Failing"].__name__ == "Failing"
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        find_trackers(["wanddb"])


def test_a_recipe_is_flat_for_a_tracker():
    assert flat(CONFIG) == {"seed": 3, "trainer.lr": 0.5}
