"""A folder of versions: nothing counts before the manifest names it, damage never passes, one process owns it."""

import errno
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import oldlogits
from oldlogits.core.errors import StoreBusyError, StoreDamagedError, StoreUseError, StoreWriteError
from oldlogits.versions import FlatWeights
from oldlogits.versions import disk as disk_module
from oldlogits.versions.disk import Disk, Manifest, StoredFile
from tests.versions.states import assert_bits


def flat(value=1.0):
    return FlatWeights.of({"w": torch.full((5,), value), "tied": torch.arange(3)})


def patch_to(version):
    return StoredFile(version - 1, 10 + version - 1, version, 10 + version, 0, 0)


def begun(folder, num_patches=0, first=0):
    """An open folder with a copy of the first version, and patches of a few bytes."""
    disk = Disk.create(folder)
    disk.begin(first, flat())
    for version in range(first + 1, first + num_patches + 1):
        disk.append(patch_to(version), bytes([version]) * 30)
    return disk


def targets(disk):
    return [patch.target for patch in disk.held.patches]


def names(folder):
    return {path.name for path in folder.iterdir()} - {"owner.lock", "versions.json"}


def test_what_is_written_is_read_back_before_and_after_opening():
    manifest = Manifest(copy=StoredFile(3, 2**64 - 1, 3, 2**64 - 1, 9, 7), patches=(patch_to(4),), oldest=2, frozen={"a": "b"})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_a_folder_is_opened_with_all_that_was_appended(tmp_path):
    disk = begun(tmp_path, 3)
    held = disk.held
    files = (held.copy, *held.patches)
    assert sum(file.num_bytes for file in files) == sum((tmp_path / name).stat().st_size for name in names(tmp_path))
    disk.close()
    again = Disk.open(tmp_path)
    assert again.held == held
    assert again.cut is None
    assert [bytes(again.read(patch)) for patch in again.held.patches] == [bytes([v]) * 30 for v in (1, 2, 3)]
    copy = again.read_copy({}, None)
    assert_bits(copy.weights, flat().weights)
    assert copy.digest == copy.full_digest()
    again.close()


def test_a_file_that_no_manifest_names_does_not_count_and_is_removed(tmp_path):
    begun(tmp_path, 1).close()
    before = names(tmp_path)
    for name in ("2-00000000.patch", "9-12345678.copy"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "versions.partial").write_bytes(b"half")
    disk = Disk.open(tmp_path)
    assert targets(disk) == [1]
    assert names(tmp_path) == before
    disk.close()


def test_a_flipped_bit_at_any_byte_of_the_manifest_is_refused(tmp_path):
    begun(tmp_path, 2).close()
    path = tmp_path / "versions.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(StoreDamagedError, match=r"versions\.json of .* is damaged"):
            Disk.open(tmp_path, cut_damage=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreDamagedError):
            Disk.open(tmp_path)


def test_a_folder_of_another_format_is_refused(tmp_path):
    begun(tmp_path).close()
    text = json.dumps(json.loads((tmp_path / "versions.json").read_bytes().partition(b"\n")[2]) | {"format": 99}).encode()
    (tmp_path / "versions.json").write_bytes(b"%08x\n" % zlib.crc32(text) + text)
    with pytest.raises(StoreDamagedError, match="is damaged; got: another checksum, or another format"):
        Disk.open(tmp_path)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "grow"])
def test_a_damaged_patch_is_named_and_given_up_with_what_leads_on_from_it(tmp_path, harm):
    disk = begun(tmp_path, 4)
    disk.rewind(4, flat())
    hit = disk.held.patches[2]
    disk.close()
    path = tmp_path / hit.name
    content = path.read_bytes()
    changed = {"flip": content[:7] + b"X" + content[8:], "cut": content[:-1], "grow": content + b"\0"}
    path.unlink() if harm == "remove" else path.write_bytes(changed[harm])
    with pytest.raises(StoreDamagedError, match=hit.name):
        Disk.open(tmp_path)
    disk = Disk.open(tmp_path, cut_damage=True)
    assert targets(disk) == [1, 2]
    assert hit.name in disk.cut
    disk.close()
    again = Disk.open(tmp_path)
    assert (targets(again), again.cut) == ([1, 2], None)
    again.close()


def test_damage_below_the_copy_gives_up_what_is_older(tmp_path):
    disk = begun(tmp_path, 4)
    held = disk.held
    disk._commit(replace(held, copy=disk._write_copy(3, flat())))
    disk.close()
    (tmp_path / held.patches[1].name).write_bytes(b"X")
    disk = Disk.open(tmp_path, cut_damage=True)
    assert targets(disk) == [3, 4]
    disk.close()


def test_a_damaged_copy_is_refused_in_any_case(tmp_path):
    begun(tmp_path, 1).close()
    (path,) = tmp_path.glob("*.copy")
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(StoreDamagedError, match=path.name):
        Disk.open(tmp_path, cut_damage=True)


def test_damage_that_comes_after_opening_is_noticed_on_reading(tmp_path):
    disk = begun(tmp_path, 2)
    (tmp_path / disk.held.patches[0].name).write_bytes(b"X" * 30)
    with pytest.raises(StoreDamagedError):
        disk.read(disk.held.patches[0])
    assert bytes(disk.read(disk.held.patches[1])) == b"\2" * 30
    disk.close()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_folder_as_it_was_and_later_appends_work(tmp_path, monkeypatch, call):
    disk = begun(tmp_path, 1)
    held = disk.held

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, call, refuse)
        with pytest.raises(StoreWriteError, match="No space left on device"):
            disk.append(patch_to(2), b"payload")
        with pytest.raises(StoreWriteError):
            disk.rewind(0, flat())
        assert disk.held == held
    disk.append(patch_to(2), b"after")
    disk.close()
    again = Disk.open(tmp_path)
    assert [bytes(again.read(patch)) for patch in again.held.patches] == [b"\1" * 30, b"after"]
    again.close()


@pytest.mark.parametrize("after", [False, True])
def test_a_change_that_breaks_off_around_its_rename_loses_nothing(tmp_path, monkeypatch, after):
    disk = begun(tmp_path, 2)

    def replace_file(source, target, real=os.replace):
        if after:
            real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk_module.os, "replace", replace_file)
        with pytest.raises(KeyboardInterrupt):
            disk.rewind(1, flat())
    disk.close()
    again = Disk.open(tmp_path)
    assert targets(again) == ([1] if after else [1, 2])
    again.close()


def test_a_rewind_keeps_a_copy_that_is_old_enough_and_writes_one_where_it_is_not(tmp_path):
    disk = begun(tmp_path, 3)
    copy = disk.held.copy
    disk.rewind(2, flat(2.0))
    assert (disk.held.copy, targets(disk)) == (copy, [1, 2])
    disk._commit(replace(disk.held, copy=disk._write_copy(2, flat(2.0))))
    disk.rewind(1, flat(1.0))
    assert (disk.held.copy.target, targets(disk)) == (1, [1])
    assert_bits(disk.read_copy({}, None).weights, flat(1.0).weights)
    disk.close()


def test_patches_to_what_is_not_needed_leave_once_they_lead_nowhere_or_outweigh_a_copy(tmp_path):
    disk = begun(tmp_path)
    copy_bytes = flat().num_bytes
    for version in (1, 2, 3, 4):
        disk.append(patch_to(version), bytes([version]) * (copy_bytes // 2))
    disk.drop(1, 4, flat())
    assert (disk.held.oldest, disk.held.copy.target, targets(disk)) == (1, 0, [1, 2, 3, 4])
    disk.drop(4, 4, flat(4.0))
    assert (disk.held.oldest, disk.held.copy.target, targets(disk)) == (4, 4, [])
    assert names(tmp_path) == {disk.held.copy.name}
    disk.close()


def test_a_second_owner_is_refused_in_one_process_and_told_who_the_first_is(tmp_path):
    disk = begun(tmp_path)
    for opening in (Disk.open, Disk.create):
        with pytest.raises(StoreBusyError, match=f"the first is process {os.getpid()}"):
            opening(tmp_path)
    disk.close()
    Disk.open(tmp_path).close()


@pytest.mark.slow
def test_a_second_process_is_refused_and_served_once_the_first_has_died(tmp_path):
    begun(tmp_path).close()
    program = (
        "import pathlib, sys; from oldlogits.versions.disk import Disk; "
        f"disk = Disk.open(pathlib.Path({str(tmp_path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(oldlogits.__file__).parents[1])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreBusyError, match=f"the first is process {other.pid}"):
            Disk.open(tmp_path)
        other.kill()
    Disk.open(tmp_path).close()


def test_a_folder_is_neither_created_twice_nor_opened_from_nothing(tmp_path):
    with pytest.raises(StoreDamagedError, match="holds no versions"):
        Disk.open(tmp_path)
    Disk.create(tmp_path).close()
    begun(tmp_path).close()
    with pytest.raises(StoreWriteError, match="holds versions already"):
        Disk.create(tmp_path)
    Disk.open(tmp_path).close()


def test_a_closed_folder_says_so_and_a_dropped_one_is_free(tmp_path):
    disk = begun(tmp_path)
    disk.close()
    disk.close()
    with pytest.raises(StoreUseError, match="is closed"):
        disk.append(patch_to(1), b"late")
    disk = Disk.open(tmp_path)
    del disk
    Disk.open(tmp_path).close()
