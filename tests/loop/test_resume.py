"""Going on with a run: everything that was counted goes on, and it stays the same experiment."""

import gc
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from oldlogits.cli.main import run as command
from oldlogits.config.check import resolve
from oldlogits.config.objective.sections import ProximalConfig
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import RunFolderError
from oldlogits.core.source import SOURCES
from oldlogits.engines.embedded import engine
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.loop.resume import refuse_another_run, sampler_seed
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import read_lines
from oldlogits.record.report.data import read_run
from oldlogits.train.checkpoint import read_state
from oldlogits.versions import PatchStore

from ..runs import assert_same_state, check_accounting, events_of, recipe, summary_of, tokens_of, write_recipe


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run of two updates, with evaluations. Read it only."""
    root = tmp_path_factory.mktemp("resume")
    config = recipe(tiny_folder, num_updates=2, eval={"num_episodes": 8})
    assert command(["train", str(write_recipe(root / "r.toml", config)), "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def said(capsys):
    """All that a command has written, as one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def steps_of(checkpoint):
    state = read_state(checkpoint / "state")
    return {value.item() for name, value in state.items() if name.startswith("step|")}


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_updates_and_its_summary_counts_them_all(copied, capsys):
    before = summary_of(copied)
    assert command(["train", "--resume", str(copied), "--num-updates", "5"]) == 0
    summary = summary_of(copied)
    assert (summary["num_updates"], summary["ended"]) == (5, "done")
    assert summary["num_trajectories"] == check_accounting(copied)["trained"] == 5 * 3 * 4
    assert sum(summary["provenance"].values()) == len(tokens_of(copied, "log_r_d")["log_r_d"])
    assert summary["success_before"] == before["success_before"], "the first evaluation is not repeated"
    assert summary["train_wall_s"] > before["train_wall_s"]
    events = events_of(copied)
    assert [line["seq"] for line in read_lines(copied / "events.jsonl")] == list(range(len(events)))
    assert [event.version for event in events if event.kind == "update"] == [1, 2, 3, 4, 5]
    assert [event.version for event in events if event.kind == "run_started"] == [0, 2]
    assert [e.stage for e in events if e.kind == "evaluation"] == ["before"] * 2 + ["after"] * 4


ROUTES = {
    "snapshot": ("decoupled_exact", {"exact"}),
    "dedicated": ("decoupled_exact", {"exact"}),
    "interruption": ("decoupled_exact", {"exact"}),
    "eager": ("decoupled_exact", {"exact"}),
    "arrival": ("decoupled_async", {"async"}),
    "ewma": ("ppo_ewma_train_infer", {"ewma"}),
    "aged": ("aged_train_infer", {"aged", "async"}),
    "rescore": ("rescore_train_infer", {"rescore"}),
    "balance": ("mis_balance", {"balance"}),
    "none": ("ppo_clip_train_infer", {"mu"}),
}
"""A variant that the route feeds, and how its tokens are labelled."""


@pytest.mark.slow
@pytest.mark.parametrize("route", SOURCES.names)
def test_a_killed_run_goes_on_from_its_last_checkpoint_under_every_route(route, tiny_folder, tmp_path, capsys):
    out, (variant, provenance) = tmp_path / "run", ROUTES[route]
    more = {"num_updates": 4, "record": {"checkpoint_every": 2}, "lockstep": {"lag": "random"}}
    config = recipe(tiny_folder, variant=variant, proximal={"source": route}, **more)
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]) == 0
    whole = shutil.move(
        out / "checkpoints/v000004", tmp_path / "whole"
    )  # as if it had been killed before it wrote the last one
    before = [pq.read_table(out / f"tokens/v{version:06d}.parquet") for version in range(1, 5)]

    assert command(["train", "--resume", str(out)]) == 0
    for version, table in enumerate(before, start=1):
        again = pq.read_table(out / f"tokens/v{version:06d}.parquet")
        assert again.to_pydict() == table.to_pydict(), f"update {version} is the same bit for bit"
    assert_same_state(out / "checkpoints/v000004/state", Path(whole) / "state")

    assert command(["train", "--resume", str(out), "--num-updates", "6"]) == 0
    run = read_run(out)
    assert [update.version for update in run.updates] == [1, 2, 3, 4, 5, 6], "the line of history that went on"
    account = check_accounting(out)
    assert account["trained"] == run.summary.num_trajectories == 6 * 3 * 4
    assert account["cancelled"] == 0
    tables = [pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict() for version in range(1, 7)]
    trained = [set(table["trajectory"]) for table in tables]
    assert len(set.union(*trained)) == sum(map(len, trained)) == 6 * 3 * 4, "no trajectory is trained twice"
    groups = {name.partition(".")[0] for names in trained for name in names}
    assert groups == {f"g{row:06d}" for row in range(18)}, "each row is trained, in the group that it had"
    assert not events_of(out, "trajectory_restarted")
    resumed = {name: np.concatenate([table[name] for table in tables[2:]]) for name in tables[0] if name != "context"}
    assert 1 <= resumed["staleness"].max() <= 2
    assert set(run.summary.provenance) == provenance
    if provenance == {"exact"}:  # an fp32 engine gives a token what the trainer gives it at that version
        assert np.abs(resumed["logp_proximal"] - resumed["logp_mu"]).max() <= 5e-5
        assert np.abs(resumed["log_r_s"][resumed["staleness"] > 0]).max() > 1e-3, "the versions differ, or nothing was tested"
    if route in ("ewma", "aged"):
        assert [update.metrics["average/num_versions"] for update in run.updates] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_optimizer_schedule_and_rows_go_on(copied, finished):
    assert command(["train", "--resume", str(copied), "--num-updates", "3"]) == 0
    assert steps_of(finished / "checkpoints/v000002") == {2 * 2.0}
    assert steps_of(copied / "checkpoints/v000003") == {3 * 2.0}
    state = json.loads((copied / "checkpoints/v000003/state/trainer.json").read_text())
    assert (state["version"], state["schedule_steps"]) == (3, 6)
    admitted = [event.group for event in events_of(copied, "group_admitted")]
    assert admitted == [f"g{row:06d}" for row in range(3 * 3)], "no row is played twice"


@pytest.mark.slow
def test_a_resumed_run_draws_numbers_that_it_has_not_drawn_and_always_the_same(finished, tmp_path, monkeypatch):
    seeds = []

    class Watched(EngineCore):
        def __init__(self, spec):
            seeds.append(spec.seed)
            super().__init__(spec)

    monkeypatch.setattr(engine, "EngineCore", Watched)
    weights = []
    for name in ("a", "b"):
        run = shutil.copytree(finished, tmp_path / name)
        assert command(["train", "--resume", str(run), "--num-updates", "3"]) == 0
        weights.append((run / "checkpoints/v000003/model/model.safetensors").read_bytes())
    assert seeds[0] == seeds[1] == sampler_seed(0, 2)
    assert weights[0] == weights[1]
    drawn = [sampler_seed(seed, num_updates) for seed in (0, 1) for num_updates in range(50)]
    assert len(set(drawn)) == len(drawn)
    assert drawn[0] == 0, "a run that starts is drawn from its own seed"


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("model.path", "OTHER", "model.path = "),
        ("seed", "7", "seed = 7; allowed: seed = 0"),
        ("variant", "ppo_clip", "variant = 'ppo_clip'"),
        ("env.target", "desk", "env.target = 'desk'"),
    ],
)
@pytest.mark.slow
def test_a_recipe_that_contradicts_the_run_is_refused_and_changes_nothing(copied, key, value, says, tmp_path, capsys):
    other = shutil.copytree(copied / "checkpoints/v000002/model", tmp_path / "other")
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != "environment.json"}
    status = command(["train", "--resume", str(copied), f"--{key}", str(other) if value == "OTHER" else value])
    assert status == 2
    error = " ".join(capsys.readouterr().err.replace("\n", "; ").split())
    assert f"the recipe contradicts the run in {copied}" in error
    assert says in error.replace("; ;", ";").replace(" ; ", "; ")
    assert "fix: leave these keys as they are" in error
    assert {path: path.read_bytes() for path in files} == files


def test_what_an_error_advises_to_raise_is_no_contradiction(tmp_path):
    folder, config = RunFolder.create(tmp_path / "run"), resolve(RunConfig(proximal=ProximalConfig(source="snapshot")))
    folder.write_config(asdict(config))
    raised = replace(config.rollout, max_failed_share=0.9, max_filtered_batches=128)
    refuse_another_run(replace(config, env=replace(config.env, timeout_s=60.0), rollout=raised), folder)
    with pytest.raises(RunFolderError, match="contradicts"):
        refuse_another_run(replace(config, env=replace(config.env, max_turns=3)), folder)


def test_a_folder_that_is_not_empty_is_never_written_to(tiny_folder, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    assert command(["train", str(write_recipe(tmp_path / "r.toml", recipe(tiny_folder))), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"error: {out} is not an empty folder" in error
    assert "got: thesis.txt" in error
    assert "fix: choose another --out, or go on with --resume" in error
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_what_cannot_be_resumed_says_so(tiny_folder, copied, tmp_path, capsys):
    assert command(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "the recipe does not exist" in capsys.readouterr().err
    shutil.rmtree(copied / "checkpoints")
    assert command(["train", "--resume", str(copied)]) == 2
    assert "got: no complete checkpoint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["lockstep", "local"])
def test_versions_in_a_folder_that_the_recipe_names_are_taken_over_as_those_of_the_run_folder(
    runtime, tiny_folder, tmp_path, monkeypatch
):
    """Those of the checkpoint are held again, other files stay, and a relative folder is the same one from anywhere."""
    out, store = tmp_path / "run", tmp_path / "here" / "store"
    store.mkdir(parents=True)
    monkeypatch.chdir(store.parent)
    versions = {"budget_bytes": 1, "folder": "store"}
    config = recipe(tiny_folder, num_updates=2, versions=versions, runtime={"type": runtime})
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]) == 0
    assert (store / "versions.json").is_file()
    (store / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for num_updates in ("3", "5"):
        gc.collect()  # the trainer of this process that has ended
        assert command(["train", "--resume", str(out), "--num-updates", num_updates]) == 0
    assert check_accounting(out)["trained"] == 5 * 3 * 4
    assert set(summary_of(out)["provenance"]) == {"exact"}
    assert (store / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_versions_in_a_folder_that_is_not_the_runs_own_are_left_alone(copied, tmp_path, capsys):
    with PatchStore(tmp_path / "store") as other:
        other.publish(7, {"w": torch.ones(3)})
        words = ["train", "--resume", str(copied), "--num-updates", "3", "--versions.budget_bytes", "1"]
        words += ["--versions.folder", str(tmp_path / "store")]
        assert command(words) == 1
        assert "have an owner" in said(capsys)
    for _ in range(2):  # that it was refused once does not make the folder the run's own
        assert command(words) == 1
        assert "holds versions already" in said(capsys)
    with PatchStore.open(tmp_path / "store") as again:
        assert again.versions == (7,)
