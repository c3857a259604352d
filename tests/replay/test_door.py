"""What is refused before anything is trained, and how it is said."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.core.errors import ConfigError, ReplayError
from oldlogits.core.policies import OLD, Provenance
from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.tables import write_tokens
from oldlogits.replay.recipes import recipes_of_run, recipes_of_table
from oldlogits.replay.run_batches import check_run_tables, run_batches
from oldlogits.train.loss_tokens import LossTokens, TokenRecord, token_table

from ..builders import batch_of, sampled, trajectory
from ..runs import recipe, write_recipe
from .runs import recorded


def batch():
    """A group of two branches and one of a single trajectory; versions, temperatures and keys and values of several kinds."""
    first = trajectory(
        [1, 2, 3], sampled([4, 5], 2, logp=[-0.1, -0.2], temperature=0.5), [6], sampled([7], 3), id="g1.0", group="g1"
    )
    branch = trajectory([1, 2], sampled([8], 3, logp=-0.3), sampled([9], 4, kv="mixed"), id="g1.0#1", group="g1")
    last = trajectory([3], sampled([5, 5], 4, logp=-0.4), [6, 6, 6], id="g2.0", group="g2", reward=0.5)
    return batch_of([first, branch, last], [1.0, 1.0, -0.5], num_steps=2)


def written(folder, made, version=4):
    tokens = LossTokens.of(made, None, version)
    record = TokenRecord.empty(len(tokens.flat), tokens.advantages.device)
    columns = token_table(made, tokens, record, proximal=OLD, label=Provenance.EXACT, version=version)
    folder.tokens.mkdir(parents=True, exist_ok=True)
    return write_tokens(folder.tokens, version + 1, columns)


def test_a_batch_is_read_back_from_its_table_up_to_its_last_trained_tokens(tmp_path):
    folder, made = RunFolder(path=tmp_path), batch()
    written(folder, made)
    assert check_run_tables(folder, 4, 5) == [2]
    [found] = run_batches(folder, 4, 5, 2)
    n = made.num_tokens - 3  # what is read behind the last trained token of the last trajectory
    for name in ("token_ids", "temperature", "loss_mask", "version", "logp_mu", "mixed_kv"):
        was, now = getattr(made, name)[:n], getattr(found.batch, name)
        assert now.dtype == was.dtype
        np.testing.assert_array_equal(now, was)
    assert found.batch.starts.tolist() == [*made.starts[:-1], n]
    for name in ("advantages", "rewards", "step"):
        was, now = getattr(made, name), getattr(found.batch, name)
        assert now.dtype == was.dtype
        np.testing.assert_array_equal(now, was)
    assert found.batch.trajectory_ids == made.trajectory_ids
    assert found.groups == ("g1", "g1", "g2")
    assert found.in_steps(1).batch.step.tolist() == [0, 0, 0]


def changed(table, name, row, value):
    column = table.column(name).to_pylist()
    column[row] = value
    at = table.schema.get_field_index(name)
    kind = table.schema.field(at).type
    is_name = pa.types.is_dictionary(kind)
    values = pa.array(column).dictionary_encode() if is_name else pa.array(column, kind)
    return table.set_column(at, table.schema.field(at), values)


@pytest.mark.parametrize(
    "name, row, value, what",
    [
        ("index", 2, 9, "its context does not fill the gaps of its indices"),
        ("context", 0, [1, 2], "its context does not fill the gaps of its indices"),
        ("trajectory", 1, "g9.0", "the rows of a trajectory are apart"),
        ("trainer_version", 3, 5, "it is not of the update that version 4 began"),
        ("version", 0, 7, "a version is none that the trainer had"),
        ("version", 0, -1, "a version is none that the trainer had"),
        ("loss_mask", 4, False, "a row is not trained"),
        ("advantage", 1, 3.0, "advantage, reward or step differ within a trajectory"),
        ("step", 1, 1, "advantage, reward or step differ within a trajectory"),
        ("logp_mu", 1, None, "a value is missing"),
        ("temperature", 0, 0.0, "a temperature is not above 0"),
        ("temperature", 0, float("nan"), "a temperature is not above 0"),
        ("advantage", 4, float("inf"), "an advantage or reward is not finite"),
        ("step", 4, 2, "an optimizer step is none of the 2 of an update"),
        ("step", 4, -1, "an optimizer step is none of the 2 of an update"),
    ],
)
def test_rows_that_contradict_each_other_are_refused_with_the_file(tmp_path, name, row, value, what):
    folder = RunFolder(path=tmp_path)
    path = written(folder, batch())
    pq.write_table(changed(pq.read_table(path), name, row, value), path)
    with pytest.raises(ReplayError, match=f"a token table is damaged; got: .*v000005.parquet: {what}"):
        list(run_batches(folder, 4, 5, 2))


def test_missing_cut_and_older_tables_are_refused_before_the_first_update(tmp_path):
    folder = RunFolder(path=tmp_path)
    path = written(folder, batch())
    with pytest.raises(ReplayError, match=r"version 6 is missing.*replay those before it with --num-updates 1"):
        check_run_tables(folder, 4, 6)
    with pytest.raises(ReplayError, match=r"version 4 is missing.*record the run with that key"):
        check_run_tables(folder, 3, 5)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["context", "step"]), path)
    with pytest.raises(ReplayError, match="no column, or one of another type: step, context"):
        check_run_tables(folder, 4, 5)
    pq.write_table(table.set_column(1, "index", [[float(i) for i in range(len(table))]]), path)
    with pytest.raises(ReplayError, match="of another type: index"):
        check_run_tables(folder, 4, 5)
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ReplayError, match=r"a token table is damaged; got: .*v000005.parquet"):
        check_run_tables(folder, 4, 5)


@pytest.fixture
def run_config(tmp_path, tiny_folder):
    folder = RunFolder(path=tmp_path)
    write_recipe(folder.config, recipe(tiny_folder))
    return folder


@pytest.mark.slow
def test_keys_that_say_how_to_sample_are_refused_and_those_of_training_are_told(run_config):
    for key in ("--rollout.group-size 8", "--sampling.temperature 0.5", "--objective.advantage mean-only", "--seed 1"):
        name = key.split()[0][2:].replace("-", "_")
        with pytest.raises(ConfigError, match=f"a replay samples nothing.*got: {name};.*num_updates, variant, band"):
            recipes_of_run(run_config, key.split())
    found = recipes_of_run(
        run_config, ["--variant", "ppo_ewma", "--trainer.lr", "1e-4", "--num-updates", "2", "--trainer.num-threads", "2"]
    )
    assert dict(found.changes) == {
        "variant": ("decoupled_exact", "ppo_ewma"),
        "proximal.source": ("snapshot", "ewma"),
        "trainer.lr": (1e-2, 1e-4),
    }
    assert (found.num_updates, found.recorded.num_updates, found.replayed.num_updates) == (2, 4, 4)
    assert found.recorded.trainer.num_threads == 2, "where it is computed is no change of the recipe"


def test_as_many_updates_as_the_recipe_has_may_be_asked_for(run_config):
    """The schedule stays that of all updates."""
    assert recipes_of_run(run_config, ["--num-updates", "4"]).num_updates == 4
    assert recipes_of_run(run_config, []).num_updates is None
    sizes = {"num_updates": 100, "max_staleness": 1, "longest": 9}
    for asked in (1, 60, 100):
        found = recipes_of_table(["--num-updates", str(asked)], **sizes)
        assert (found.num_updates, found.recorded.num_updates, found.replayed.num_updates) == (asked, 100, 100)
    assert recipes_of_table([], **sizes).num_updates is None


def test_a_run_that_followed_its_engines_routing_is_refused(run_config, tiny_folder):
    config = recipe(tiny_folder)
    write_recipe(run_config.config, replace(config, model=replace(config.model, routing="replayed")))
    with pytest.raises(ReplayError, match=r"token tables do not hold them.*fix: pass --model.routing off"):
        recipes_of_run(run_config, [])
    assert recipes_of_run(run_config, ["--model.routing", "off"]).recorded.model.routing == "off"


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert command(["replay", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_is_no_record_is_refused(tmp_path, capsys):
    assert "the first word names no record" in refused(capsys, "--band", "1.2")
    assert "a folder without config.toml" in refused(capsys, tmp_path)
    assert "nothing there" in refused(capsys, tmp_path / "absent")
    (tmp_path / "config.toml").write_text("variant = 3")
    assert "variant" in refused(capsys, tmp_path, "--out", tmp_path / "o")


@pytest.mark.slow
def test_a_damaged_run_folder_is_refused_at_the_door(tiny_folder, tmp_path, capsys):
    run_folder = recorded(tiny_folder, tmp_path / "run")
    words = (run_folder, "--out", tmp_path / "o")
    assert "is not an empty folder" in refused(capsys, run_folder, "--out", run_folder)
    assert "the run has not recorded these updates" in refused(capsys, *words, "--num-updates", "9")
    assert "checkpoints of 2, 4" in refused(capsys, *words, "--start-at", "3")
    said = refused(capsys, run_folder / "tokens/v000001.parquet", "--out", tmp_path / "o")
    assert "allowed: the run folder itself" in said
    state = run_folder / "checkpoints/v000002/state/trainer-00000-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    assert "checkpoint v000002 is not what was written" in refused(capsys, *words, "--start-at", "2")
    log = (run_folder / "events.jsonl").read_text()
    (run_folder / "events.jsonl").write_text("[" + log)
    assert "line 1" in refused(capsys, *words)
    write_atomic(run_folder / "events.jsonl", log)
    said = refused(capsys, *words, "--model.path", tmp_path / "elsewhere")
    assert "elsewhere" in said
    assert not (tmp_path / "o").exists(), "nothing is written where something is refused"
