import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import oldlogits
from oldlogits.core.errors import ExactnessError, LayoutError, LogBusyError, LogDamagedError, LogWriteError
from oldlogits.versions import PatchStore
from oldlogits.versions.disk import log as log_module
from oldlogits.versions.disk.log_format import Kind
from oldlogits.versions.patches import codec as codec_module
from tests.versions.states import assert_bits, assert_holds, changed, history

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(oldlogits.__file__).parents[1]), str(Path.cwd())])}


def tiny():
    """Three states of five values."""
    states = [{"w": torch.tensor([0.5, -2.0, 3.0, 1e-3, 7.0]).bfloat16()}]
    states.append({"w": states[0]["w"] * torch.tensor([1, 1, -1, 1, 1]).bfloat16()})
    return [*states, {"w": torch.arange(5.0).bfloat16()}]


def publish_all(store, states, first=0):
    for version, weights in enumerate(states, start=first):
        store.publish(version, weights)


def written(folder, states=None):
    """A closed store in a folder: its states, the bytes of its log, and where records end."""
    states = states or history(["sparse", "dense", "none", "special"])
    with PatchStore(folder, sync=False) as store:
        publish_all(store, states)
        ends = [record.end for record in store._disk.log.records]
    return states, (folder / "versions.log").read_bytes(), ends


def test_a_store_is_opened_with_all_that_was_published_and_goes_on(tmp_path):
    states, _, _ = written(tmp_path)
    with PatchStore.open(tmp_path) as store:
        assert store.cut is None
        assert_holds(store, dict(enumerate(states)))
        states.append(changed(states[-1], 50, "sparse"))
        store.publish(5, states[-1])
        store.retain(2)
    with PatchStore.open(tmp_path) as store:
        assert_holds(store, dict(list(enumerate(states))[2:]))
        assert [link.num_bytes for link in store._chain.links] == [0, 0, 0]


def test_frozen_tensors_are_not_written_and_must_be_the_same_again(tmp_path):
    base, states = torch.randn(5000), history(["sparse"])
    with PatchStore(tmp_path, frozen=["base"]) as store:
        for version, weights in enumerate(states):
            store.publish(version, weights | {"base": base})
        assert store._disk.log.num_bytes < 5000
        base[7] *= -1
        with pytest.raises(LayoutError, match="base: not the frozen tensor"):
            store.verify()
        base[7] *= -1
        store.verify()
    for wrong in ({}, {"base": base + 1}, {"base": base.double()}):
        with pytest.raises(LayoutError, match="base: not the frozen tensor"):
            PatchStore.open(tmp_path, frozen=wrong)
    with PatchStore.open(tmp_path, frozen={"base": base}) as store:
        assert_holds(store, {version: weights | {"base": base} for version, weights in enumerate(states)})


def test_a_log_torn_at_any_byte_gives_back_every_whole_version(tmp_path):
    states, whole, ends = written(tmp_path, tiny())
    for size in range(ends[0], len(whole) + 1):
        (tmp_path / "versions.log").write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        with PatchStore.open(tmp_path, sync=False) as store:
            assert store.versions == tuple(range(kept))
            assert store.cut is None or (store.cut.offset, store.cut.num_bytes) == (ends[kept - 1], size - ends[kept - 1])
            assert (store.cut is None) == (size in ends)
            assert_holds(store, dict(enumerate(states[:kept])))
    for size in (0, 5, 16, 20, ends[0] - 1):
        (tmp_path / "versions.log").write_bytes(whole[:size])
        with pytest.raises(LogDamagedError, match="does not begin"):
            PatchStore.open(tmp_path)


def test_a_flipped_bit_at_any_byte_is_named_and_never_gives_wrong_bits(tmp_path):
    states, whole, ends = written(tmp_path, tiny())
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "versions.log").write_bytes(damaged)
        with pytest.raises(LogDamagedError) as caught:
            PatchStore.open(tmp_path)
        hit = sum(end <= position for end in ends)
        assert (f"record {hit} " if position >= 16 else "does not begin as a log") in caught.value.what
        if hit:
            assert f"version {hit - 1}" in caught.value.what or f"version {hit}" in caught.value.what
            with PatchStore.open(tmp_path, cut_damage=True, sync=False) as store:
                assert_holds(store, dict(enumerate(states[:hit])))
                assert "is damaged" in store.cut.reason


def test_a_flipped_bit_under_an_open_store_is_noticed_when_the_patch_is_read(tmp_path):
    states, _, ends = written(tmp_path)
    with PatchStore.open(tmp_path) as store:
        with (tmp_path / "versions.log").open("r+b") as file:
            file.seek(ends[1] + 60)
            byte = file.read(1)
            file.seek(ends[1] + 60)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(LogDamagedError, match="patch of version 2"), store.checkout(0):
            pass
        for version in (4, 3, 2):
            with store.checkout(version) as found:
                assert_bits(found, states[version])


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_leaves_the_store_in_memory_and_on_disk_as_it_was(tmp_path, monkeypatch, call, number):
    states = history(["sparse", "dense", "sparse"])
    store = PatchStore(tmp_path)
    calls = []

    def refuse(*_):
        calls.append(call)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "pwrite", refuse)
        with pytest.raises(LogWriteError):
            store.publish(0, states[0])
        assert store.versions == ()
    store.publish(0, states[0])
    store.publish(1, states[1])
    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, call, refuse)
        with pytest.raises(LogWriteError, match=os.strerror(number)):
            store.publish(2, states[2])
        assert_holds(store, dict(enumerate(states[:2])))
        patch.setattr(log_module.os, "pwrite", refuse)
        with pytest.raises(LogWriteError):
            store.rewind(0)
        assert_holds(store, dict(enumerate(states[:2])))
        assert store.retain(1) == [0]
        assert [record.kind for record in store._disk.log.records] == [Kind.COPY, Kind.PATCH]
    assert_holds(store, {1: states[1]})
    store.publish(2, states[2])
    store.close()
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, dict(enumerate(states[:3])))


def test_a_disk_that_is_full_for_real_is_survived(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        g = torch.Generator().manual_seed(0)
        states = [{"w": torch.randn(20_000, generator=g)}]
        store = PatchStore(place / "versions")
        store.publish(0, states[0])
        states += [{"w": torch.randn(20_000, generator=g)} for _ in range(8)]
        with pytest.raises(LogWriteError, match="No space left on device"):
            publish_all(store, states[1:], first=1)
        held = len(store.versions)
        assert 1 < held < 9
        assert_holds(store, dict(enumerate(states[:held])))
        store.close()
        with PatchStore.open(place / "versions") as again:
            assert_holds(again, dict(enumerate(states[:held])))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_interrupt_in_the_middle_of_encoding_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    states = history(["sparse", "dense", "special"])
    store = PatchStore(tmp_path)
    store.publish(0, states[0])
    encode = codec_module.encode

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return encode(*arguments)

    for version in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("oldlogits.versions.chain.encode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.publish(version, states[version])
        assert_holds(store, dict(enumerate(states[:version])))
        store.publish(version, states[version])
    store.close()
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, dict(enumerate(states[:3])))


def test_an_interrupt_while_a_version_is_written_leaves_memory_and_disk_agreed(tmp_path, monkeypatch):
    states = history(["sparse", "dense", "special"])
    store = PatchStore(tmp_path)
    store.publish(0, states[0])

    def interrupted(*arguments, real=os.fdatasync):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    for version in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(log_module.os, "fdatasync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.publish(version, states[version])
        assert store.versions[-1] == version
        store.publish(version, states[version])
    store.close()
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, dict(enumerate(states)))


def test_the_log_is_written_anew_when_most_of_it_is_no_longer_needed(tmp_path):
    states, window = history(["sparse"] * 150), 5
    with PatchStore(tmp_path, sync=False) as store:
        largest = 0
        for version, weights in enumerate(states):
            store.publish(version, weights)
            store.retain(version - window + 1)
            largest = max(largest, store._disk.log.num_bytes)
            if version % 20 == 19:
                store.close()
                store = PatchStore.open(tmp_path, sync=False)
                assert_holds(store, {v: states[v] for v in range(max(0, version - window + 1), version + 1)})
        record = store._disk.log.num_bytes / len(store._disk.log.records)
        assert largest < 30 * record
        store.close()


def test_a_compaction_that_finds_no_room_is_put_off(tmp_path, monkeypatch):
    states, refused = history(["sparse"] * 60), []

    def refuse(entries):
        refused.append(entries)
        raise LogWriteError("no room")

    with PatchStore(tmp_path, sync=False) as store:
        monkeypatch.setattr(store._disk.log, "rewrite", refuse)
        for version, weights in enumerate(states):
            if version:
                store.publish(version, weights)
                store.retain(version)
            else:
                monkeypatch.undo()
                store.publish(version, weights)
                monkeypatch.setattr(store._disk.log, "rewrite", refuse)
        assert refused
        assert sum(record.kind is Kind.PATCH for record in store._disk.log.records) == len(states) - 1
        monkeypatch.undo()
        store.publish(99, states[0])
        store.retain(99)
        assert [record.kind for record in store._disk.log.records] == [Kind.COPY]
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, {99: states[0]})


def test_two_processes_never_have_one_folder(tmp_path):
    states, _, _ = written(tmp_path)
    program = (
        "import pathlib, sys; from oldlogits.versions import PatchStore; "
        f"store = PatchStore.open(pathlib.Path({str(tmp_path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
        assert other.stdout.readline() == b"open\n"
        for refused in (lambda: PatchStore.open(tmp_path), lambda: PatchStore(tmp_path)):
            with pytest.raises(LogBusyError, match=f"the first is process {other.pid}"):
                refused()
        other.kill()
    with PatchStore.open(tmp_path) as store:
        assert_holds(store, dict(enumerate(states)))


PUBLISHER = """
import pathlib, sys
from oldlogits.versions import PatchStore
from tests.versions.states import history
folder = pathlib.Path(sys.argv[1])
states = history(["sparse", "dense", "special"] * 100)
if (folder / "versions.log").exists():
    store = PatchStore.open(folder, sync=False)
else:
    store = PatchStore(folder, sync=False)
for version in range(store.versions[-1] + 1 if store.versions else 0, len(states)):
    store.publish(version, states[version])
    store.retain(version - 4)
    print(version, flush=True)
"""


def test_a_process_that_is_killed_at_any_moment_leaves_every_version_that_it_had_published(tmp_path):
    states = history(["sparse", "dense", "special"] * 100)
    for delay_s in (0.0, 0.06):
        command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as publisher:
            first = publisher.stdout.readline()
            time.sleep(delay_s)
            publisher.kill()
            lines = [first, *publisher.stdout.read().splitlines(keepends=True)]
        last = [int(line) for line in lines if line.endswith(b"\n")][-1]
        with PatchStore.open(tmp_path) as store:
            oldest, newest = store.versions[0], store.versions[-1]
            assert last <= newest <= last + 1
            assert oldest <= max(0, newest - 4)
            assert_holds(store, {version: states[version] for version in range(oldest, newest + 1)})
            store.verify()


def test_records_that_do_not_follow_one_another_are_refused(tmp_path):
    written(tmp_path)
    log = log_module.VersionLog.open(tmp_path)
    entries = [(record.kind, record.version, [log.read(record)]) for record in log.records]
    for wrong in (entries[1:], entries[:1] + entries[2:], entries[:2] + entries[3:]):
        log.rewrite(wrong)
        log.close()
        with pytest.raises(LogDamagedError, match="leads to no version"):
            PatchStore.open(tmp_path)
        log = log_module.VersionLog.open(tmp_path)
    copy = bytearray(entries[0][2][0])
    copy[4 + int.from_bytes(copy[:4], "little")] ^= 1
    log.rewrite([(entries[0][0], 0, [bytes(copy)])])
    log.close()
    with pytest.raises(ExactnessError, match="bits of version 0"):
        PatchStore.open(tmp_path)
