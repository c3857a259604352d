import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import LogBusyError, LogDamagedError, LogWriteError, StoreUseError
from oldlogits.versions.disk import log as log_module
from oldlogits.versions.disk.log import VersionLog
from oldlogits.versions.disk.log_format import Cut, Kind

payloads = st.lists(st.binary(max_size=40), max_size=3)
entries = st.lists(st.tuples(st.sampled_from(Kind), st.integers(-(2**63), 2**63 - 1), payloads), max_size=6)


def contents(log):
    return [(record.kind, record.version, log.read(record)) for record in log.records]


def written(folder, *payloads):
    """A log of these payloads, closed; its bytes and where its records end."""
    log = VersionLog.create(folder)
    ends = [log.num_bytes] + [log.append(Kind.PATCH, version, [payload]).end for version, payload in enumerate(payloads)]
    log.close()
    return (folder / "versions.log").read_bytes(), ends


@given(entries)
def test_what_is_appended_is_read_back_before_and_after_reopening(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("log")
    log = VersionLog.create(folder, sync=False)
    for kind, version, parts in entries:
        log.append(kind, version, parts)
    expected = [(kind, version, b"".join(parts)) for kind, version, parts in entries]
    assert contents(log) == expected
    log.close()
    again = VersionLog.open(folder)
    assert contents(again) == expected
    assert again.cut is None
    assert again.num_bytes == (folder / "versions.log").stat().st_size
    again.close()


def test_a_log_cut_at_any_byte_gives_back_every_whole_record_and_reports_the_rest(tmp_path):
    whole, ends = written(tmp_path, b"first", b"", b"third" * 9)
    path = tmp_path / "versions.log"
    for size in range(ends[0], len(whole) + 1):
        path.write_bytes(whole[:size])
        log = VersionLog.open(tmp_path)
        kept = max(end for end in ends if end <= size)
        assert contents(log) == [(Kind.PATCH, v, p) for v, p in enumerate([b"first", b"", b"third" * 9]) if ends[v + 1] <= size]
        assert log.cut == (None if kept == size else Cut(offset=kept, num_bytes=size - kept, reason="a torn record"))
        assert path.stat().st_size == kept
        record = log.append(Kind.RETAIN, 7)
        log.close()
        again = VersionLog.open(tmp_path)
        assert again.records[-1] == record
        again.close()


def test_a_file_that_is_shorter_than_its_header_is_named(tmp_path):
    whole, ends = written(tmp_path, b"first")
    for size in range(ends[0]):
        (tmp_path / "versions.log").write_bytes(whole[:size])
        with pytest.raises(LogDamagedError, match="does not begin as a log"):
            VersionLog.open(tmp_path)


def test_a_flipped_bit_at_any_byte_is_named_with_its_record_and_never_read(tmp_path):
    whole, ends = written(tmp_path, b"first", b"second", b"third")
    path = tmp_path / "versions.log"
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(LogDamagedError) as caught:
            VersionLog.open(tmp_path)
        hit = sum(end <= position for end in ends) - 1
        expected = "does not begin as a log" if hit < 0 else f"record {hit} "
        assert expected in caught.value.what
        if hit >= 0:
            assert f"at byte {ends[hit]}" in caught.value.what
            kept = VersionLog.open(tmp_path, cut_damage=True)
            assert [record.version for record in kept.records] == list(range(hit))
            assert kept.cut is not None
            assert kept.cut.num_bytes == len(whole) - ends[hit]
            kept.close()


def test_damage_that_comes_after_opening_is_noticed_on_reading(tmp_path):
    log = VersionLog.create(tmp_path)
    record = log.append(Kind.PATCH, 4, [b"payload"])
    with (tmp_path / "versions.log").open("r+b") as file:
        file.seek(record.start + 3)
        file.write(b"X")
    with pytest.raises(LogDamagedError, match=r"record 0 \(patch of version 4\)"):
        log.read(record)
    with (tmp_path / "versions.log").open("r+b") as file:
        file.truncate(record.start + 2)
    with pytest.raises(LogDamagedError):
        log.read(record)
    log.close()


def test_zeros_at_the_end_are_a_torn_record(tmp_path):
    whole, _ = written(tmp_path, b"first")
    (tmp_path / "versions.log").write_bytes(whole + bytes(100))
    log = VersionLog.open(tmp_path)
    assert log.cut == Cut(offset=len(whole), num_bytes=100, reason="a torn record")
    log.close()


@pytest.mark.parametrize("room", [0, 10, 33, 40])
def test_a_full_disk_leaves_the_log_as_it_was_and_later_appends_work(tmp_path, monkeypatch, room):
    log = VersionLog.create(tmp_path)
    log.append(Kind.COPY, 0, [b"before"])
    size, left = log.num_bytes, [room]

    def pwrite(file, data, offset, real=os.pwrite):
        count = min(left[0], len(data))
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= count
        return real(file, data[:count], offset)

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "pwrite", pwrite)
        with pytest.raises(LogWriteError, match="No space left on device") as caught:
            log.append(Kind.PATCH, 1, [b"a payload of some length"])
        assert "version 1" in caught.value.what
        with pytest.raises(LogWriteError):
            log.rewrite([(Kind.COPY, 1, [b"other" * 9])])
    assert (tmp_path / "versions.log").stat().st_size == size
    assert not (tmp_path / "versions.log.partial").exists()
    log.append(Kind.PATCH, 1, [b"after"])
    log.close()
    again = VersionLog.open(tmp_path)
    assert contents(again) == [(Kind.COPY, 0, b"before"), (Kind.PATCH, 1, b"after")]
    again.close()


def test_what_a_failed_append_could_not_cut_back_is_cut_by_the_next(tmp_path, monkeypatch):
    log = VersionLog.create(tmp_path)

    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "fdatasync", refuse)
        patch.setattr(log_module.os, "ftruncate", refuse)
        with pytest.raises(LogWriteError, match="broken"):
            log.append(Kind.PATCH, 1, [b"long " * 20])
    log.append(Kind.PATCH, 1, [b"short"])
    log.close()
    again = VersionLog.open(tmp_path)
    assert contents(again) == [(Kind.PATCH, 1, b"short")]
    again.close()


@pytest.mark.parametrize("strike", ["pwrite", "fdatasync"])
def test_an_interrupt_in_the_middle_of_an_append_leaves_no_record(tmp_path, monkeypatch, strike):
    log = VersionLog.create(tmp_path)
    log.append(Kind.COPY, 0, [b"before"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, strike, interrupt)
        with pytest.raises(KeyboardInterrupt):
            log.append(Kind.PATCH, 1, [b"payload"])
    log.close()
    again = VersionLog.open(tmp_path)
    assert contents(again) == [(Kind.COPY, 0, b"before")]
    again.close()


def test_a_rewritten_log_holds_the_new_records_and_the_old_are_readable_meanwhile(tmp_path):
    log = VersionLog.create(tmp_path)
    old = [log.append(Kind.PATCH, version, [bytes([version]) * 50]) for version in range(5)]
    new = log.rewrite((Kind.PATCH, record.version, [log.read(record)]) for record in old[3:])
    assert [(r.index, r.version) for r in new] == [(0, 3), (1, 4)]
    log.append(Kind.PATCH, 5, [b"next"])
    log.close()
    again = VersionLog.open(tmp_path)
    assert contents(again) == [(Kind.PATCH, 3, b"\3" * 50), (Kind.PATCH, 4, b"\4" * 50), (Kind.PATCH, 5, b"next")]
    again.close()


@pytest.mark.parametrize("after", [False, True])
def test_a_rewrite_that_is_interrupted_around_its_rename_loses_nothing(tmp_path, monkeypatch, after):
    log = VersionLog.create(tmp_path)
    log.append(Kind.COPY, 0, [b"old"])

    def replace(source, target, real=os.replace):
        if after:
            real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            log.rewrite([(Kind.COPY, 1, [b"new"])])
    log.append(Kind.PATCH, 2, [b"next"])
    log.close()
    again = VersionLog.open(tmp_path)
    assert contents(again) == [(Kind.COPY, 1, b"new") if after else (Kind.COPY, 0, b"old"), (Kind.PATCH, 2, b"next")]
    again.close()


def test_a_log_that_was_being_rewritten_when_the_process_died_is_forgotten(tmp_path):
    written(tmp_path, b"first")
    (tmp_path / "versions.log.partial").write_bytes(b"half a log")
    log = VersionLog.open(tmp_path)
    assert contents(log) == [(Kind.PATCH, 0, b"first")]
    assert not (tmp_path / "versions.log.partial").exists()
    log.close()


def test_a_second_owner_is_refused_in_one_process_and_told_who_the_first_is(tmp_path):
    log = VersionLog.create(tmp_path)
    for opening in (VersionLog.open, VersionLog.create):
        with pytest.raises(LogBusyError, match=f"the first is process {os.getpid()}"):
            opening(tmp_path)
    log.close()
    VersionLog.open(tmp_path).close()


@pytest.mark.slow
def test_a_second_process_is_refused_and_served_once_the_first_has_died(tmp_path):
    VersionLog.create(tmp_path).close()
    program = (
        "import pathlib, sys; from oldlogits.versions.disk.log import VersionLog; "
        f"log = VersionLog.open(pathlib.Path({str(tmp_path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(log_module.__file__).parents[2])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(LogBusyError, match=f"the first is process {other.pid}"):
            VersionLog.open(tmp_path)
        other.kill()
    VersionLog.open(tmp_path).close()


def test_a_log_is_neither_created_twice_nor_opened_from_nothing(tmp_path):
    with pytest.raises(LogDamagedError, match="holds no versions"):
        VersionLog.open(tmp_path)
    VersionLog.create(tmp_path).close()
    log = VersionLog.create(tmp_path)
    log.append(Kind.COPY, 0, [b"x"])
    log.close()
    with pytest.raises(LogWriteError, match="holds versions already"):
        VersionLog.create(tmp_path)
    VersionLog.open(tmp_path).close()


def test_a_closed_log_says_so_and_a_dropped_one_frees_its_folder(tmp_path):
    log = VersionLog.create(tmp_path)
    log.close()
    log.close()
    with pytest.raises(StoreUseError, match="is closed"):
        log.append(Kind.RETAIN, 1)
    log = VersionLog.open(tmp_path)
    del log
    VersionLog.open(tmp_path).close()
