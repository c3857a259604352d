import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oldlogits
from oldlogits.core.errors import ExactnessError, LayoutError, StoreBusyError, StoreDamagedError, StoreWriteError
from oldlogits.versions import PatchStore
from oldlogits.versions import disk as disk_module
from oldlogits.versions.patches import codec as codec_module
from tests.versions.states import assert_bits, assert_holds, changed, history

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(oldlogits.__file__).parents[1]), str(Path.cwd())])}


def stored_bytes(disk):
    return sum(file.num_bytes for file in (disk.held.copy, *disk.held.patches))


def tiny():
    """Three states of five values."""
    states = [{"w": torch.tensor([0.5, -2.0, 3.0, 1e-3, 7.0]).bfloat16()}]
    states.append({"w": states[0]["w"] * torch.tensor([1, 1, -1, 1, 1]).bfloat16()})
    return [*states, {"w": torch.arange(5.0).bfloat16()}]


def publish_all(store, states, first=0):
    for version, weights in enumerate(states, start=first):
        store.publish(version, weights)


def written(folder, states=None):
    """A closed store in a folder: its states, and the files of its patches."""
    states = states or history(["sparse", "dense", "none", "special"])
    with PatchStore(folder) as store:
        publish_all(store, states)
        files = [folder / patch.name for patch in store._disk.held.patches]
    return states, files


def test_a_store_is_opened_with_all_that_was_published_and_goes_on(tmp_path):
    states, _ = written(tmp_path)
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
        assert stored_bytes(store._disk) < 5000
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


@pytest.mark.slow
def test_a_flipped_bit_at_any_byte_is_named_and_never_gives_wrong_bits(tmp_path):
    states, files = written(tmp_path, tiny())
    (copy,) = tmp_path.glob("*.copy")
    for number, path in enumerate([copy, *files]):
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises(StoreDamagedError, match=path.name):
                PatchStore.open(tmp_path)
        path.write_bytes(whole)
        if number:
            kept = tmp_path / f"kept{number}"
            shutil.copytree(tmp_path, kept, ignore=shutil.ignore_patterns("kept*"))
            (kept / path.name).write_bytes(damaged)
            with PatchStore.open(kept, cut_damage=True) as store:
                assert_holds(store, dict(enumerate(states[:number])))
                assert "is damaged" in store.cut


def test_a_flipped_bit_under_an_open_store_is_noticed_when_the_patch_is_read(tmp_path):
    states, files = written(tmp_path)
    with PatchStore.open(tmp_path) as store:
        with files[1].open("r+b") as file:
            file.seek(60)
            byte = file.read(1)
            file.seek(60)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(StoreDamagedError, match=files[1].name), store.checkout(0):
            pass
        for version in (4, 3, 2):
            with store.checkout(version) as found:
                assert_bits(found, states[version])


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_leaves_the_store_in_memory_and_on_disk_as_it_was(tmp_path, monkeypatch, call, number):
    states = history(["sparse", "dense", "sparse"])
    store = PatchStore(tmp_path)
    calls = []

    def refuse(*_):
        calls.append(call)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "fsync", refuse)
        with pytest.raises(StoreWriteError):
            store.publish(0, states[0])
        assert store.versions == ()
    store.publish(0, states[0])
    store.publish(1, states[1])
    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, call, refuse)
        with pytest.raises(StoreWriteError, match=os.strerror(number)):
            store.publish(2, states[2])
        assert_holds(store, dict(enumerate(states[:2])))
        patch.setattr(disk_module.os, "fsync", refuse)
        with pytest.raises(StoreWriteError):
            store.rewind(0)
        assert_holds(store, dict(enumerate(states[:2])))
        assert store.retain(1) == [0]
        assert (store._disk.held.oldest, len(store._disk.held.patches)) == (0, 1)
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
        with pytest.raises(StoreWriteError, match="No space left on device"):
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

    def interrupted(*arguments, real=os.fsync):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    for version in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(disk_module.os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.publish(version, states[version])
        assert store.versions[-1] == version
        store.publish(version, states[version])
    store.close()
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, dict(enumerate(states)))


@pytest.mark.slow
def test_the_copy_is_written_anew_when_most_of_the_folder_is_no_longer_needed(tmp_path):
    states, window = history(["sparse"] * 150), 5
    store, largest = PatchStore(tmp_path), 0
    for version, weights in enumerate(states):
        store.publish(version, weights)
        store.retain(version - window + 1)
        files = [path.stat().st_size for path in tmp_path.iterdir()]
        largest = max(largest, len(files))
        assert sum(files) >= stored_bytes(store._disk)
        if version % 20 == 19:
            store.close()
            store = PatchStore.open(tmp_path)
            assert_holds(store, {v: states[v] for v in range(max(0, version - window + 1), version + 1)})
    assert largest < 30
    store.close()


@pytest.mark.slow
def test_a_compaction_that_finds_no_room_is_put_off(tmp_path, monkeypatch):
    states, refused = history(["sparse"] * 60), []

    def refuse(*arguments):
        refused.append(arguments)
        raise StoreWriteError("no room")

    with PatchStore(tmp_path) as store:
        store.publish(0, states[0])
        monkeypatch.setattr(store._disk, "_write_copy", refuse)
        for version in range(1, len(states)):
            store.publish(version, states[version])
            store.retain(version)
        assert refused
        assert len(store._disk.held.patches) == len(states) - 1
        monkeypatch.undo()
        store.publish(99, states[0])
        store.retain(99)
        assert (store._disk.held.copy.target, store._disk.held.patches) == (99, ())
    with PatchStore.open(tmp_path) as again:
        assert_holds(again, {99: states[0]})


@pytest.mark.slow
def test_two_processes_never_have_one_folder(tmp_path):
    states, _ = written(tmp_path)
    program = (
        "import pathlib, sys; from oldlogits.versions import PatchStore; "
        f"store = PatchStore.open(pathlib.Path({str(tmp_path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
        assert other.stdout.readline() == b"open\n"
        for refused in (lambda: PatchStore.open(tmp_path), lambda: PatchStore(tmp_path)):
            with pytest.raises(StoreBusyError, match=f"the first is process {other.pid}"):
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
if (folder / "versions.json").exists():
    store = PatchStore.open(folder)
else:
    store = PatchStore(folder)
for version in range(store.versions[-1] + 1 if store.versions else 0, len(states)):
    store.publish(version, states[version])
    store.retain(version - 4)
    print(version, flush=True)
"""


@pytest.mark.slow
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


def test_a_copy_with_other_bits_than_its_digest_is_refused(tmp_path):
    written(tmp_path, tiny())
    disk = disk_module.Disk.open(tmp_path)
    (held, wrong) = disk.held, disk.read_copy({}, None)
    wrong.weights["w"][0] += 1
    disk._commit(replace(held, copy=disk._write_copy(0, wrong), patches=()))
    disk.close()
    with pytest.raises(ExactnessError, match="bits of version 0"):
        PatchStore.open(tmp_path)


def test_what_a_cut_leaves_is_a_store_that_goes_on_even_where_all_that_was_needed_is_lost(tmp_path):
    states = history(["sparse"] * 10)
    with PatchStore(tmp_path) as store:
        publish_all(store, states)
        store.retain(6)
        [patch] = [patch for patch in store._disk.held.patches if patch.target == 5]
    content = bytearray((tmp_path / patch.name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / patch.name).write_bytes(content)
    for _ in range(2):
        with PatchStore.open(tmp_path, cut_damage=True) as store:
            assert store.versions == (4,)
            assert_holds(store, {4: states[4]})
    with PatchStore.open(tmp_path) as store:
        store.publish(5, states[5])
        assert_holds(store, {4: states[4], 5: states[5]})


def test_a_file_that_cannot_be_removed_and_a_folder_that_cannot_be_synced_do_not_part_memory_and_disk(tmp_path, monkeypatch):
    states, _ = written(tmp_path)

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no")

    with PatchStore.open(tmp_path) as store:
        with monkeypatch.context() as broken:
            broken.setattr(Path, "unlink", refuse)
            broken.setattr(disk_module, "_sync", refuse)
            store.rewind(1)
            store.publish(2, states[3])
        assert_holds(store, {0: states[0], 1: states[1], 2: states[3]})
    with PatchStore.open(tmp_path) as store:
        assert_holds(store, {0: states[0], 1: states[1], 2: states[3]})
        assert len(list(tmp_path.glob("*.patch"))) == 2


def test_a_folder_is_opened_on_a_full_disk(tmp_path, monkeypatch):
    states, _ = written(tmp_path)
    (tmp_path / "9-00000000.copy").write_bytes(b"what a kill left behind")
    monkeypatch.setattr(
        disk_module.Disk, "_put", lambda *_: (_ for _ in ()).throw(StoreWriteError("full", got="", allowed="", fix=""))
    )
    with PatchStore.open(tmp_path) as store:
        assert_holds(store, dict(enumerate(states)))
    assert not (tmp_path / "9-00000000.copy").exists()
