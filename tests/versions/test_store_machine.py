"""Any sequence of calls, exceptions, kills and reopenings gives back exactly the published bits."""

import gc
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from oldlogits.core.errors import StoreUseError, VersionEvictedError
from oldlogits.versions import PatchStore
from tests.versions.states import assert_bits, changed, state


class Boom(BaseException):
    """An exception in the middle of a block, such as Ctrl-C."""


class StoreMachine(RuleBasedStateMachine):
    """Compares a store with plain copies of what was published."""

    folder = None

    @initialize(
        on_disk=st.booleans(),
        hot=st.integers(0, 3),
        budget_bytes=st.sampled_from([None, 0, 300, 3000]),
        first=st.integers(0, 5),
    )
    def begin(self, on_disk, hot, budget_bytes, first):
        self.settings = {"hot": hot, "budget_bytes": budget_bytes}
        self.folder = Path(tempfile.mkdtemp()) if on_disk else None
        self.store = PatchStore(self.folder, **self.settings)
        self.weights, self.number = state(), 0
        self.there, self.oldest, self.pinned = {}, 0, None
        self.publish(gap=first + 1, kind="none")

    @rule(gap=st.integers(1, 3), kind=st.sampled_from(["none", "sparse", "many", "dense", "special"]))
    def publish(self, gap, kind):
        self.number += 1
        version, weights = self.newest + gap, changed(self.weights, self.number, kind)
        assert self.store.publish(version, weights).version == version
        self.weights = self.there[version] = weights
        self.drop()

    @rule(data=st.data(), breaks=st.booleans())
    def check_out(self, data, breaks):
        version = data.draw(st.sampled_from(sorted(self.there)))
        with suppress(Boom), self.store.checkout(version) as found:
            assert_bits(found, self.there[version])
            if breaks:
                raise Boom

    @rule(data=st.data())
    def nest(self, data):
        outer, inner = (data.draw(st.sampled_from(sorted(self.there))) for _ in range(2))
        with suppress(Boom), self.store.checkout(outer) as found:
            with pytest.raises(StoreUseError):
                self.store.publish(self.newest + 1, self.weights)
            try:
                with self.store.checkout(inner) as again:
                    assert outer == inner
                    assert_bits(again, self.there[inner])
                    raise Boom
            except StoreUseError:
                assert outer != inner
            assert_bits(found, self.there[outer])

    @rule(behind=st.integers(-1, 6), pinned=st.none() | st.integers(0, 9))
    def retain(self, behind, pinned):
        self.oldest, self.pinned = self.newest - behind, None if pinned is None else self.newest - pinned
        before = set(self.there)
        dropped = self.store.retain(self.oldest, self.pinned)
        self.drop()
        assert set(dropped) == before - set(self.there)

    @rule(behind=st.integers(0, 6), data=st.data())
    def retain_inside_a_checkout(self, behind, data):
        version = data.draw(st.sampled_from(sorted(self.there)))
        with self.store.checkout(version) as found:
            self.oldest = self.newest - behind
            self.store.retain(self.oldest, self.pinned)
            assert_bits(found, self.there[version])
        self.drop()

    @rule(version=st.integers(0, 30))
    def ask_for_what_is_gone(self, version):
        if version not in self.there:
            with pytest.raises(VersionEvictedError), self.store.checkout(version):
                pass

    @rule(data=st.data())
    def rewind(self, data):
        version = data.draw(st.sampled_from(sorted(self.there)))
        self.store.rewind(version)
        self.there = {v: weights for v, weights in self.there.items() if v <= version}
        self.weights = self.there[version]
        self.drop()

    @precondition(lambda self: self.folder is not None)
    @rule(torn=st.binary(max_size=30))
    def kill_and_open(self, torn):
        self.store = None  # the process is gone, and with it who retained what
        gc.collect(0)
        (self.folder / f"{self.newest + 1}-00000000.patch").write_bytes(torn)
        (self.folder / "versions.partial").write_bytes(torn)
        self.store = PatchStore.open(self.folder, **self.settings)
        assert self.store.cut is None
        self.oldest, self.pinned = 0, None

    @rule()
    def verify(self):
        self.store.verify()

    @invariant()
    def exactly_what_is_needed_is_there(self):
        if getattr(self, "there", None):
            assert self.store.versions == tuple(sorted(self.there))
            budget = self.settings["budget_bytes"]
            assert budget is None or self.folder is None or self.store.patch_bytes <= budget
            assert_bits(self.store._chain.flat.weights, self.there[self.store._chain.at])

    @property
    def newest(self):
        return max(self.there, default=-1)

    def drop(self):
        oldest = min((v for v in self.there if v >= self.oldest), default=self.newest)
        kept = self.pinned if self.pinned in self.there and self.pinned < oldest else oldest
        oldest = oldest if self.folder is None else kept
        self.there = {v: weights for v, weights in self.there.items() if v >= oldest or v == kept}

    def teardown(self):
        self.store = None
        if self.folder is not None:
            shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestAnySequenceOfCallsGivesBackThePublishedBits = pytest.mark.slow(StoreMachine.TestCase)
