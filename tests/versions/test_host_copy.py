"""The canonical copy of a host: patches lead it along, and what cannot be right is refused, so that full weights are sent."""

import multiprocessing
import struct

import pytest
import torch

from oldlogits.core.errors import LayoutError, ReceiverBehindError
from oldlogits.versions.host_copy import HostCopy
from oldlogits.versions.store import PatchStore


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Three tensors of two dtypes, one of them tied."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(300, 8, generator=generator).to(torch.bfloat16)
    return {"embed": embedding, "head": embedding, "norm": torch.randn(8, generator=generator)}


def next_of(before: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """About one value in fifty changes."""
    generator = torch.Generator().manual_seed(seed)
    embedding = before["embed"].clone()
    at = torch.rand(embedding.shape, generator=generator) < 0.02
    embedding[at] += 0.125
    return {"embed": embedding, "head": embedding, "norm": before["norm"].clone()}


def chain(num: int) -> tuple[PatchStore, list[dict[str, torch.Tensor]]]:
    store, versions = PatchStore(), [weights(0)]
    store.publish(0, versions[0])
    for version in range(1, num):
        versions.append(next_of(versions[-1], version))
        store.publish(version, versions[-1])
    return store, versions


def between(store: PatchStore, base: int, target: int) -> list[bytes]:
    return [patch.to_bytes("memory") for patch in store.patch_between(base, target)]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(-1), b[name].view(-1)) for name in a)


def test_patches_lead_the_copy_from_version_to_version(tmp_path):
    store, versions = chain(4)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    for version in (1, 2, 3):
        copy.take(between(store, version - 1, version), version - 1, version)
        with copy.read(version) as held:
            assert same(held, versions[version])


def test_one_step_over_several_versions_is_the_same(tmp_path):
    store, versions = chain(4)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    copy.take(between(store, 0, 3), 0, 3)
    with copy.read(3) as held:
        assert same(held, versions[3])


def test_tied_weights_are_kept_once(tmp_path):
    copy = HostCopy.create(tmp_path / "copy", weights(0), 0)
    assert copy.path.stat().st_size < 300 * 8 * 2 + 8 * 4 + 1024
    with copy.read(0) as held:
        assert held["embed"].data_ptr() == held["head"].data_ptr()


def test_a_copy_that_is_behind_asks_for_full_weights_and_stays_as_it_was(tmp_path):
    store, versions = chain(4)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    with pytest.raises(ReceiverBehindError, match=r"version 0.*version 1"):
        copy.take(between(store, 1, 2), 1, 2)
    with copy.read(0) as held:
        assert same(held, versions[0])
    copy.load(versions[2], 2)
    copy.take(between(store, 2, 3), 2, 3)
    with copy.read(3) as held:
        assert same(held, versions[3])


def test_a_patch_with_any_byte_changed_is_refused_and_changes_nothing(tmp_path):
    store, versions = chain(2)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    [patch] = between(store, 0, 1)
    for at in range(0, len(patch), 7):
        wrong = bytearray(patch)
        wrong[at] ^= 0x10
        with pytest.raises(ReceiverBehindError):
            copy.take([bytes(wrong)], 0, 1)
        assert copy.version == 0
    with copy.read(0) as held:
        assert same(held, versions[0])


def test_a_copy_whose_memory_was_changed_is_noticed_where_the_patch_touches_it(tmp_path):
    store, versions = chain(2)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    at = int((versions[1]["embed"] != versions[0]["embed"]).view(-1).nonzero()[0])
    with copy.read(0) as held:
        held["embed"].view(-1)[at] += 1.0
    with pytest.raises(ReceiverBehindError, match="digest"):
        copy.take(between(store, 0, 1), 0, 1)


def test_a_patch_of_other_tensors_is_refused(tmp_path):
    store, _ = chain(2)
    copy = HostCopy.create(tmp_path / "copy", {"other": torch.zeros(4)}, 0)
    with pytest.raises(ReceiverBehindError, match="other"):
        copy.take(between(store, 0, 1), 0, 1)


def test_a_reader_of_another_version_is_refused(tmp_path):
    copy = HostCopy.create(tmp_path / "copy", weights(0), 3)
    with pytest.raises(ReceiverBehindError, match=r"version 3.*version 4"), copy.read(4):
        pass


def test_a_copy_whose_writer_died_while_it_wrote_is_refused_until_it_is_written_anew(tmp_path):
    copy = HostCopy.create(tmp_path / "copy", weights(0), 0)
    copy._put_state(0, copy._state()[1], False)
    reader = HostCopy(tmp_path / "copy")
    with pytest.raises(ReceiverBehindError, match="half written"), reader.read(0):
        pass
    copy.load(weights(1), 1)
    with reader.read(1) as held:
        assert same(held, weights(1))


def test_a_file_that_is_no_copy_is_refused(tmp_path):
    (tmp_path / "copy").write_bytes(b"something else that is long enough to be one")
    with pytest.raises(LayoutError, match="no copy of weights"):
        HostCopy(tmp_path / "copy")
    (tmp_path / "copy").write_bytes(struct.pack("<8sII", b"oldhost\0", 9, 0) + bytes(64))
    with pytest.raises(LayoutError, match="format 9"):
        HostCopy(tmp_path / "copy")


def _sum(path, version, answers) -> None:
    with HostCopy(path).read(version) as held:
        answers.put(float(held["embed"].double().sum()))


@pytest.mark.slow
def test_another_process_reads_what_was_written(tmp_path):
    store, versions = chain(2)
    copy = HostCopy.create(tmp_path / "copy", versions[0], 0)
    copy.take(between(store, 0, 1), 0, 1)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_sum, args=(tmp_path / "copy", 1, answers))
    process.start()
    process.join(60)
    assert answers.get() == float(versions[1]["embed"].double().sum())
