"""What a disk can do to a run: full, gone, read-only, another mount. The run ends clearly, and goes on when there is room."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import pytest

from oldlogits.core.errors import RunWriteError
from oldlogits.record.event_log import EventLog
from oldlogits.record.events import Warned
from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import LineFile, read_lines
from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, summary_of, wait_for_updates, write_recipe
from ..waiting import HUNG_S, wait_until

ROOT = Path(__file__).parents[2]
ROOM = 1 << 22
LIMITED = (
    "import resource, sys; from oldlogits.cli.main import main; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); main()"
)


@pytest.fixture
def small_disk():
    """A mount of a few megabytes of its own."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)
    folder.rmdir()


def train(*words: object, limit: int | None = None) -> subprocess.Popen[str]:
    program = ["-c", LIMITED.format(limit)] if limit else ["-m", "oldlogits"]
    return subprocess.Popen(
        [sys.executable, *program, "train", *map(str, words)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    """What a run said that ended by an error of this package; nothing of it is left."""
    try:
        said, _ = process.communicate(timeout=HUNG_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1, said
    assert "Traceback" not in said
    for label in ("error", "got", "allowed", "fix"):
        assert f"{label}: " in said, said
    wait_until(lambda: not members(process.pid), "nothing of it is left")
    return said


def members(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, its_group, *_ = rest.split()
        found += [name] if int(its_group) == group and state != "Z" else []
    return found


def fill(folder: Path) -> Path:
    """Leave no room on a disk."""
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        write_endlessly(file)
    return folder / "filler"


def write_endlessly(file: BinaryIO) -> None:
    while file.write(b"\0" * 4096):
        pass


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [1, 0], ids=["checkpoints", "events"])
def test_on_a_full_disk_the_run_ends_clearly_and_goes_on_when_there_is_room(small_disk, tiny_folder, tmp_path, every):
    out = small_disk / "run"
    record = {"checkpoint_every": every or 2, "tokens_every": every, "keep_checkpoints": 1, "keep_best": False}
    config = recipe(tiny_folder, num_updates=100_000, record=record, runtime={"type": "local"})
    process = train(write_recipe(tmp_path / "r.toml", config), "--out", out)
    wait_for_updates(out, 3)
    wait_until(lambda: any((out / "checkpoints").glob("v0*[0-9]")), "a checkpoint")
    filler = fill(small_disk)
    said = ended(process)
    assert "cannot be written" in said
    assert "No space left on device" in said
    assert "go on from the last checkpoint, v" in said
    filler.unlink()
    for line in read_lines(out / "events.jsonl"):  # no line is cut in the middle
        assert "seq" in line
    updates = max(event.version for event in events_of(out, "update"))
    again = run(recipe(tiny_folder, num_updates=updates + 2, record=record, runtime={"type": "local"}), out, resume=True)
    assert again.error is None
    assert summary_of(out)["ended"] == "done"
    check_accounting(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000, 400_000])
def test_a_limit_of_size_at_any_file_ends_the_run_clearly(tiny_folder, tmp_path, limit):
    """2,000 bytes stop the first files, 20,000 and 60,000 the events, 400,000 the state of a checkpoint."""
    config = recipe(tiny_folder, num_updates=400, record={"checkpoint_every": 50}, runtime={"type": "lockstep"})
    said = ended(train(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "run", limit=limit))
    assert "File too large" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("runtime", ["lockstep", "local"])
def test_a_folder_that_is_deleted_ends_the_run_clearly(tiny_folder, tmp_path, runtime):
    config = recipe(tiny_folder, num_updates=100_000, record={"tokens_every": 0}, runtime={"type": runtime})
    process = train(write_recipe(tmp_path / "r.toml", config), "--out", tmp_path / "run")
    wait_for_updates(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run")
    said = ended(process)
    assert "cannot be written" in said
    assert "fix: leave the folder in its place while it is written" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_becomes_read_only_ends_the_run_clearly_and_a_read_only_folder_is_refused(
    small_disk, tiny_folder, tmp_path
):
    config = recipe(tiny_folder, num_updates=100_000, record={"checkpoint_every": 2}, runtime={"type": "local"})
    file = write_recipe(tmp_path / "r.toml", config)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = ended(train(file, "--out", small_disk / "run"))
    assert f"error: {small_disk}/run cannot be written" in said
    assert "Read-only file system" in said
    assert "make the folder writable, or choose another" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_out_on_another_mount_than_temporary_files_trains_and_goes_on(small_disk, tiny_folder):
    sizes = {"num_updates": 2, "runtime": {"type": "local"}, "record": {"checkpoint_every": 1, "keep_checkpoints": 1}}
    assert os.stat(small_disk).st_dev != os.stat(tempfile.gettempdir()).st_dev
    assert run(recipe(tiny_folder, **sizes), small_disk / "run").error is None
    assert run(recipe(tiny_folder, **{**sizes, "num_updates": 3}), small_disk / "run", resume=True).error is None


def test_a_line_that_does_not_fit_leaves_the_lines_before_it_whole_and_the_next_follows_them(small_disk):
    filler = fill(small_disk)
    filler.unlink()
    with LineFile(small_disk / "x.jsonl") as file:
        file.append({"a": 1})
        filler = fill(small_disk)
        with pytest.raises(RunWriteError, match="No space left on device"):
            file.append({"a": "x" * 100_000})
        with pytest.raises(RunWriteError, match="No space left on device"):
            write_atomic(small_disk / "summary.json", "y" * 10_000)
        filler.unlink()
        file.append({"a": 2})
        assert file.num_lines == 2
    assert [line["a"] for line in read_lines(small_disk / "x.jsonl")] == [1, 2]
    assert [path.name for path in small_disk.iterdir()] == ["x.jsonl"]


def test_events_of_a_file_that_was_deleted_are_not_written_into_nothing(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.emit(Warned(version=0, name="a", message="b", figures={}))
        (tmp_path / "events.jsonl").unlink()
        with pytest.raises(RunWriteError, match="the file was deleted") as caught:
            log.emit(Warned(version=0, name="a", message="b", figures={}))
    assert caught.value.fix.startswith("leave the folder in its place")
