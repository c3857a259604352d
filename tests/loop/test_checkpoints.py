"""What a run can go on from: whole checkpoints, one owner, sound records; what is damaged is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oldlogits.cli.main import run as command
from oldlogits.config.schema import RecordConfig
from oldlogits.core.errors import ModelFolderError, RunFolderError, RunWriteError
from oldlogits.loop.checkpoints import kept_versions
from oldlogits.loop.resume import LoopState, whole_checkpoint
from oldlogits.models.checksums import SUMS, check_model_sums, damage_of, files_of
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import read_lines
from oldlogits.record.owner import owned
from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, summary_of, wait_for_updates, write_recipe
from ..waiting import HUNG_S, wait_until

ROOT = Path(__file__).parents[2]
LOCAL = {"runtime": {"type": "local"}}


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run of four updates with checkpoints 2 and 4. Read it only."""
    out = tmp_path_factory.mktemp("checkpoints") / "run"
    assert run(recipe(tiny_folder, record={"checkpoint_every": 2}), out).error is None
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes() or b"\n")  # what has no bit is damaged by one more
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def start(*words: object) -> subprocess.Popen[str]:
    """`oldlogits train` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "oldlogits", "train", *map(str, words)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for its end; returns its exit status and what it said."""
    try:
        said, _ = process.communicate(timeout=HUNG_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


# --- damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_the_file_is_named(finished, tmp_path):
    rng, whole = random.Random(13), finished / "checkpoints/v000004"
    names = [path.relative_to(whole).as_posix() for path in files_of(whole)]
    assert {"model/model.safetensors", "model/tokenizer.json", "state/loop.json", "state/trainer.json"} <= set(names)
    assert "state/trainer-00000-of-00001.safetensors" in names
    assert damage_of(whole) == []
    copy = shutil.copytree(whole, tmp_path / "v")
    for name in [*names, SUMS] * 4:
        kept = (copy / name).read_bytes()
        flip(copy / name, rng)
        assert damage_of(copy) == [f"{name}: other bytes than were written"]
        (copy / name).write_bytes(kept)
    assert damage_of(copy) == []


def test_a_missing_an_emptied_and_an_added_file_are_each_named(finished, tmp_path):
    copy = shutil.copytree(finished / "checkpoints/v000004", tmp_path / "v")
    (copy / "model/tokenizer.json").unlink()
    (copy / "state/loop.json").write_bytes(b"")
    (copy / "model/pytorch_model.bin").write_bytes(b"x")
    assert damage_of(copy) == [
        "model/tokenizer.json: missing",
        "model/pytorch_model.bin: not a file of the checkpoint",
        "state/loop.json: other bytes than were written",
    ]
    (copy / SUMS).unlink()
    assert damage_of(copy) == [f"{SUMS}: No such file or directory"]


def test_the_checksums_are_those_that_sha256sum_reads(finished):
    folder = finished / "checkpoints/v000004"
    lines = (folder / SUMS).read_text().splitlines()[1:]
    found = {name: value for value, name in (line.split("  ") for line in lines)}
    assert found == {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files_of(folder)}
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=False).returncode == 0


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_the_one_before_is_offered_and_goes_on(copied, capsys):
    newest = copied / "checkpoints/v000004"
    for name in ("model/model.safetensors", "state/trainer-00000-of-00001.safetensors"):
        flip(newest / name, random.Random(0))
    config = (copied / "config.toml").read_bytes()
    assert command(["train", "--resume", str(copied)]) == 2
    said = capsys.readouterr().err
    assert "error: checkpoint v000004 is not what was written" in said
    assert "model/model.safetensors: other bytes than were written, state/trainer-00000-of-00001.safetensors: other" in said
    offered = f"rm -r {newest} && oldlogits train --resume {copied}"
    assert f"fix: go on from v000002, which is whole: {offered}" in said
    assert (copied / "config.toml").read_bytes() == config
    shutil.rmtree(newest)
    assert command(["train", "--resume", str(copied)]) == 0
    assert [event.version for event in events_of(copied, "run_started")] == [0, 2]


def test_without_a_whole_checkpoint_none_is_offered(copied):
    for version in (2, 4):
        (copied / f"checkpoints/v00000{version}/state/loop.json").unlink()
    with pytest.raises(RunFolderError, match="no other is whole") as caught:
        whole_checkpoint(RunFolder(path=copied))
    assert "state/loop.json: missing" in caught.value.got


def test_a_damaged_model_of_a_checkpoint_is_neither_played_nor_served_nor_trained(copied, tmp_path, capsys):
    model = copied / "checkpoints/v000004/model"
    check_model_sums(model)
    flip(model / "model.safetensors", random.Random(1))
    with pytest.raises(ModelFolderError, match=r"model/model\.safetensors: other bytes"):
        check_model_sums(model)
    file = write_recipe(tmp_path / "r.toml", recipe(model))
    for words in (
        ["play", "desk", "--mode", "checkpoint", "--model", str(copied)],
        ["play", "desk", "--mode", "checkpoint", "--model", str(model)],
        ["serve", str(model), "--port", "0"],
        ["train", str(file), "--out", str(tmp_path / "new")],
    ):
        assert command(words) == 2, words
        assert "the model of a checkpoint is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    shutil.copytree(model, tmp_path / "elsewhere")
    check_model_sums(tmp_path / "elsewhere")  # of a folder without checksums nothing is known


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["BOMB"]),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state/.metadata", "state/__0_0.distcp", "model/pytorch_model.bin", "state/loop.pkl"])
def test_nothing_in_a_run_folder_is_unpickled(copied, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (copied / "checkpoints/v000004" / name).write_bytes(pickle.dumps(Bomb()))
    assert command(["train", "--resume", str(copied)]) == 2
    assert f"{name}: not a file of the checkpoint" in capsys.readouterr().err
    (copied / "checkpoints/v000004" / SUMS).unlink()
    assert command(["train", "--resume", str(copied)]) == 2
    assert not (tmp_path / "exploded").exists()


# --- kills -----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is to the code that it ends: nothing after it runs."""


@pytest.mark.slow
def test_at_every_step_of_naming_a_checkpoint_a_kill_leaves_a_whole_one(finished, tmp_path, monkeypatch):
    """Each rename, fsync and removal is a step at which the process may be killed; then the folder is opened again."""
    steps = ["first"]
    number = 0
    while steps:
        out = shutil.copytree(finished, tmp_path / str(number))
        folder, steps = RunFolder(path=out), []

        def dies(function, at=number, done=steps):
            def step(*words, **named):
                done.append(function)
                if len(done) > at:
                    raise Killed
                return function(*words, **named)

            return step

        with monkeypatch.context() as patch:
            for module, name in ((Path, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
                patch.setattr(module, name, dies(getattr(module, name)))
            try:
                partial = folder.checkpoints / "v000004.7.partial"
                shutil.copytree(folder.checkpoints / "v000004", partial)
                folder.name_checkpoint(partial)
                folder.remove_checkpoint(folder.checkpoints / "v000002")
                steps = []
            except Killed:
                pass
        RunFolder.create(out, resume=True)
        assert damage_of(whole_checkpoint(folder)) == []
        assert folder.latest_checkpoint().name == "v000004"
        assert {path.name for path in folder.checkpoints.iterdir()} <= {"v000002", "v000004"}
        number += 1
    assert number > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_at_random_moments_goes_on_from_a_whole_checkpoint_each_time(tiny_folder, tmp_path):
    rng, out = random.Random(5), tmp_path / "run"
    config = recipe(tiny_folder, num_updates=400, record={"checkpoint_every": 1, "tokens_every": 0}, **LOCAL)
    words = [write_recipe(tmp_path / "r.toml", config), "--out", out]
    for _ in range(5):
        process = start(*words)
        made = len(RunFolder(path=out).all_checkpoints()) and max(RunFolder(path=out).all_checkpoints())
        wait_until(lambda made=made: max(RunFolder(path=out).all_checkpoints(), default=0) > made, "a checkpoint")
        time.sleep(rng.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=HUNG_S)
        assert damage_of(whole_checkpoint(RunFolder(path=out))) == []
        words = ["--resume", out]
    latest = max(RunFolder(path=out).all_checkpoints())
    status, said = finish(start("--resume", out, "--num-updates", latest + 2))
    assert status == 0, said
    check_accounting(out)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {f"v{latest + n:06d}" for n in (1, 2)}


# --- beside training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_that_is_written_beside_training_is_that_of_its_version_and_the_run_waits_for_the_last(
    tiny_folder, tmp_path
):
    config = recipe(tiny_folder, num_updates=6, record={"checkpoint_every": 1, "keep_checkpoints": 9}, **LOCAL)
    assert run(config, tmp_path / "run").error is None
    folder = RunFolder(path=tmp_path / "run")
    written = events_of(folder.path, "checkpoint")
    assert [event.version for event in written] == list(range(7))
    assert list(folder.all_checkpoints()) == list(range(1, 7)), "that of the start is of no use any more"
    for version, path in folder.all_checkpoints().items():
        assert damage_of(path) == []
        assert json.loads((path / "state/trainer.json").read_text())["version"] == version
        assert LoopState.read(path).num_updates == version
    assert written[1].bytes == sum(path.stat().st_size for path in files_of(folder.checkpoints / "v000001"))
    assert all(0 <= event.stall_s <= event.seconds_s for event in written)


@pytest.mark.parametrize(
    "keys, kept",
    [
        ({}, [3, 6, 7]),
        ({"keep_checkpoints": 1, "keep_best": False}, [7]),
        ({"keep_checkpoints": 1, "keep_best": False, "keep_every": 2}, [2, 4, 6, 7]),
        ({"keep_checkpoints": 3, "keep_every": 5}, [3, 5, 6, 7]),
    ],
)
def test_the_newest_the_best_and_every_kth_checkpoint_stay(keys, kept):
    success = {1: 0.5, 2: None, 3: 0.75, 4: 0.6, 5: None, 6: 0.6, 7: None}
    assert sorted(kept_versions(RecordConfig(**keys), success)) == kept


@pytest.mark.slow
def test_the_best_by_held_out_success_is_told_by_the_checkpoints_themselves(tiny_folder, tmp_path):
    evals = {"eval": {"every": 1, "num_episodes_during": 8}}
    config = recipe(tiny_folder, num_updates=4, record={"checkpoint_every": 1, "keep_checkpoints": 1}, **evals)
    assert run(config, tmp_path / "run").error is None
    rates = {event.version: event.mean for event in events_of(tmp_path / "run", "evaluation")}
    best = max(rates, key=lambda version: (rates[version], version))
    found = RunFolder(path=tmp_path / "run").all_checkpoints()
    assert list(found) == sorted({best, 4})
    assert LoopState.read(found[best]).success == rates[best]


# --- one owner -------------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner_whose_process_and_host_are_named(tmp_path):
    with owned(tmp_path / "run"):
        with pytest.raises(RunFolderError, match="has an owner") as caught, owned(tmp_path / "run"):
            pass
        assert f"the owner is process {os.getpid()} on {os.uname().nodename}" in caught.value.got
    with owned(tmp_path / "run"):
        pass


def test_a_child_that_environment_code_has_forked_does_not_keep_the_folder(tmp_path):
    def locks():
        return [
            fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "owner.lock")
        ]

    with owned(tmp_path):
        assert len(locks()) == 1
        child = os.fork()
        if not child:
            os._exit(len(locks()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child holds the lock's file"
    with owned(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_processes_one_has_the_folder_and_a_kill_gives_it_free(tiny_folder, tmp_path):
    out = tmp_path / "run"
    config = recipe(tiny_folder, num_updates=500, record={"checkpoint_every": 1, "tokens_every": 0}, **LOCAL)
    first = start(write_recipe(tmp_path / "r.toml", config), "--out", out)
    try:
        wait_for_updates(out, 2)
        wait_until(lambda: RunFolder(path=out).latest_checkpoint() is not None, "a checkpoint")
        for words in (["--resume", out], [tmp_path / "r.toml", "--out", out]):
            status, said = finish(start(*words))
            assert status == 2
            assert f"the owner is process {first.pid} on" in said or "is not an empty folder" in said
        assert command(["report", str(out)]) == 0, "who reads needs no lock"
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate(timeout=HUNG_S)
    both = [start("--resume", out, "--num-updates", 400) for _ in range(2)]
    wait_until(lambda: any(one.poll() is not None for one in both), "one of two is refused")
    [refused], [owner] = ([one for one in both if (one.poll() is None) is lives] for lives in (False, True))
    assert refused.returncode == 2
    assert f"the owner is process {owner.pid} on" in refused.communicate()[0]
    owner.send_signal(signal.SIGINT)
    finish(owner)
    numbers = [line["seq"] for line in read_lines(out / "events.jsonl")]
    assert numbers == list(range(len(numbers))), "no event twice"
    check_accounting(out)


# --- records at the door ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, damage",
    [
        ("events.jsonl", b'{"seq": 2, "ki\n'),
        ("events.jsonl", b'{"seq": 2, "kind": "war\xffning"}\n'),
        ("events.jsonl", b'{"seq": 2, "kind": "unheard", "version": 1}\n'),
        ("events.jsonl", b"[" * 100_000 + b"\n"),
        ("episodes.jsonl", b"\0\0\0\n"),
    ],
)
def test_a_damaged_line_is_reported_by_number_before_training_goes_on_and_its_remedy_helps(copied, name, damage, capsys):
    lines = (copied / name).read_bytes().splitlines(keepends=True)
    (copied / name).write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != "environment.json"}
    assert command(["train", "--resume", str(copied), "--num-updates", "5"]) == 1
    said = capsys.readouterr().err
    assert f"error: line 3 of {name} is" in said
    assert {path: path.read_bytes() for path in files} == files
    remedy = said[said.index("sed -i") :].strip()
    if shutil.which("sed"):
        subprocess.run(["bash", "-c", remedy], check=True)
        assert command(["train", "--resume", str(copied), "--num-updates", "5"]) == 0
        assert [line["seq"] for line in read_lines(copied / "events.jsonl")] == list(range(len(events_of(copied))))
        assert summary_of(copied)["num_updates"] == 5


def test_events_that_a_checkpoint_remembers_and_the_file_has_not_are_missed(copied, capsys):
    lines = (copied / "events.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "events.jsonl").write_bytes(b"".join(lines[:5]))
    assert command(["train", "--resume", str(copied)]) == 2
    assert "error: events.jsonl has lost events" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cut_last_line_is_dropped_and_counted(copied):
    with (copied / "events.jsonl").open("ab") as file:
        file.write(b'{"seq": 99, "ki')
    assert command(["train", "--resume", str(copied), "--num-updates", "5"]) == 0
    [warning] = [event for event in events_of(copied, "warning") if event.name == "cut_line"]
    assert warning.figures == {"num_bytes": 15}
    assert warning.message == "events.jsonl ended in an incomplete line, which was cut: one record is lost"


# --- a disk that refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["lockstep", pytest.param("local", marks=pytest.mark.slow)])
def test_a_checkpoint_that_cannot_be_written_is_an_event_and_ends_the_run_with_a_way_on(
    tiny_folder, tmp_path, monkeypatch, runtime
):
    begin = RunFolder.begin_checkpoint

    def begin_on_a_folder_that_goes(self, version):
        partial = begin(self, version)
        if version == 3:
            shutil.rmtree(partial)
            partial.write_text("no folder")
        return partial

    monkeypatch.setattr(RunFolder, "begin_checkpoint", begin_on_a_folder_that_goes)
    config = recipe(tiny_folder, num_updates=200, record={"checkpoint_every": 1}, runtime={"type": runtime})
    result = run(config, tmp_path / "run")
    assert isinstance(result.error, RunWriteError)
    assert result.error.fix == "leave the folder in its place while it is written, then start again or go on with --resume"
    [failed] = events_of(tmp_path / "run", "checkpoint_failed")
    assert (failed.version, failed.error) == (3, str(result.error))
    assert summary_of(tmp_path / "run")["ended"] == "error"
    check_accounting(tmp_path / "run")
    monkeypatch.undo()
    again = run(recipe(tiny_folder, num_updates=5, runtime={"type": runtime}), tmp_path / "run", resume=True)
    assert again.error is None
