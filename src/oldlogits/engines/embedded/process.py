"""The embedded engine in a process of its own, behind `RolloutEngine`.

A request is answered in the step that ends it; other calls are answered between two steps. A turn brings the tokens after the
prompt of its trajectory's last turn, which it names by number; where the process has none of that number, the whole is sent.

    controller process                      engine process
    generate, abort, pause, ...  --calls--> drain calls; block on the pipe only when idle
                                <-replies-- step; the generations of one step travel together
    update_weights: the host's copy in shared memory takes a patch or full weights; a call says to load from it
"""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from oldlogits.core.engine import (
    EngineControls,
    EngineSpec,
    Generation,
    GrowingEngine,
    KVMode,
    PauseMode,
    Sampling,
    trajectory_of,
)
from oldlogits.core.engine_stats import EngineCapabilities, EngineStats
from oldlogits.core.errors import OldLogitsError
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.model_folder import decoder_config
from oldlogits.engines.embedded.slots import Request, check_request
from oldlogits.engines.prompts import Prompts, flat
from oldlogits.engines.shared_memory import HostWeights
from oldlogits.models.device import configure_process
from oldlogits.rpc.child import Call, Inbox, Reply, answer
from oldlogits.rpc.client import Dispatcher, client
from oldlogits.rpc.process import ChildProcess, Deadline
from oldlogits.versions import HostCopy

_FIX: Final = "read its messages on stderr; a killed process often means too little memory: lower max_num_seqs or max_context"


class EngineCalls(EngineControls, GrowingEngine, Protocol):
    """What the controller asks of the engine process, and waits for with a deadline; `generate` and `abort` come beside it."""

    async def load(self, copy: Path, held: PolicyVersion, version: PolicyVersion) -> None:
        """Replace the weights by those that a `HostCopy` holds as version `held`; later tokens are tagged with `version`."""


class EngineProcess:
    """Starts an engine process and speaks to it; use `close` when done.

    The constructor returns at once; calls wait until the engine is ready.
    """

    def __init__(self, spec: EngineSpec, *, control_timeout_s: float = 300.0, heartbeat_timeout_s: float = 60.0) -> None:
        self._vocab_size, self._spec, self._weights = decoder_config(spec).vocab_size, spec, HostWeights()
        self._process = ChildProcess(
            "engine", _serve, (spec,), fix=_FIX, is_pipelined=True, heartbeat_timeout_s=heartbeat_timeout_s
        )
        self._deadline = Deadline(self._process, control_timeout_s)
        self._prompts = Prompts[str, int]()  # that were sent last, with their numbers, by trajectory
        self._numbers = itertools.count(1)
        self._is_aborted: dict[str, bool] = {}  # of the requests that are not answered
        self.capabilities = EngineCapabilities(partials=True, growth=True, num_host_copies=1)
        calls = client(EngineCalls, self._deadline)  # type: ignore[type-abstract]
        self.pause, self.partials, self.load = calls.pause, calls.partials, calls.load
        self.resume, self.stats, self.grown = calls.resume, calls.stats, calls.grown

    async def ready(self) -> None:
        """Wait until the engine has loaded its weights."""
        await self._deadline.call("", ())

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion; waits through pauses and weight updates."""
        prompt, name, number = flat(prompt_ids), trajectory_of(request_id), next(self._numbers)
        num_known, before = self._prompts.begun(name, prompt) or (0, 0)
        check_request(prompt, self._vocab_size, self._spec.max_context, num_known)
        if name:
            self._prompts.keep(name, prompt, number)
        self._is_aborted[request_id] = False
        try:
            asked = request_id, sampling, number
            generation = await self._process.call("generate", (*asked, before, prompt[num_known:]))
            if generation is None and self._is_aborted.get(request_id):
                return Generation(output_ids=(), logprobs=(), spans=(), finish_reason="abort")
            if generation is None:  # it does not know the one before any more
                generation = await self._process.call("generate", (*asked, 0, prompt))
        except asyncio.CancelledError:
            await self.abort(request_id)
            raise
        finally:
            self._is_aborted.pop(request_id, None)
        assert isinstance(generation, Generation)
        return generation

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""
        if request_id in self._is_aborted:
            self._is_aborted[request_id] = True
        self._process.tell("abort", (request_id,))

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights; later tokens are tagged with `version`. Blocks while the host's copy takes them."""
        await self.load(self._weights.take(update, version), version, version)

    async def watch(self) -> None:
        """Wait until the engine process ends by itself, which is a `WorkerDiedError`."""
        await self._process.watch()

    def close(self) -> None:
        """End the process; pending calls fail. Leaves no process, thread or file."""
        self._process.close()
        self._weights.close()


def _serve(inbox: Inbox, spec: EngineSpec) -> None:
    configure_process(num_threads=1, seed=spec.seed)
    _Server(inbox, EngineCore(spec)).run()


class _Server:
    """The loop of the engine process; it carries out `EngineCalls`."""

    def __init__(self, inbox: Inbox, core: EngineCore) -> None:
        self._inbox, self._core = inbox, core
        self._dispatcher = Dispatcher(EngineCalls, self, core)
        self._numbers: dict[str, int] = {}  # of the calls that wait for a request, by its id
        self._prompts = Prompts[int, Sequence[int]]()  # that came last, with the keys of their blocks, by number
        self._copy: HostCopy | None = None
        self._waiting_s = 0.0

    def run(self) -> None:
        """Serve until the pipe closes."""
        while True:
            while self._core.idle or self._inbox.poll():
                self._handle(self._receive())
            self._finish(self._core.step())

    def pause(self, mode: PauseMode, kv: KVMode) -> None:
        """Stop sampling."""
        self._finish(self._core.pause(mode, kv))

    def load(self, copy: Path, held: PolicyVersion, version: PolicyVersion) -> None:
        """Replace the weights."""
        if self._copy is None or self._copy.path != copy:
            self._copy = HostCopy(copy)
        with self._copy.read(held) as weights:
            self._core.update_weights(weights, version)

    def stats(self) -> EngineStats:
        """The counters."""
        return replace(self._core.stats, waiting_s=self._waiting_s)

    def _receive(self) -> Call:
        """The next call; counts the time for which an idle engine waits for it."""
        started = time.perf_counter()
        call = self._inbox.receive()
        if self._core.idle:
            self._waiting_s += time.perf_counter() - started
        return call

    def _handle(self, call: Call) -> None:
        match call.method, call.arguments:
            case "generate", (str(request_id), Sampling() as sampling, int(number), int(before), array() as new):
                known, keys = self._prompts.take(before) or (array("i"), ())
                if before and not known:
                    self._inbox.reply([Reply(number=call.number)])
                    return
                prompt = known + new
                request = Request.of(request_id, prompt, sampling, self._core.spec.max_context, keys)
                if trajectory_of(request_id):
                    self._prompts.keep(number, prompt, request.keys)
                try:
                    self._core.queue(request)
                except OldLogitsError as error:
                    self._inbox.reply([Reply(number=call.number, error=error)])
                else:
                    self._numbers[request_id] = call.number
            case "abort", (str(request_id),):
                generation = self._core.abort(request_id)
                self._finish([] if generation is None else [(request_id, generation)])
            case _:
                self._inbox.reply([answer(call, self._dispatcher.call)])

    def _finish(self, generations: Sequence[tuple[str, Generation]]) -> None:
        self._inbox.reply([Reply(number=self._numbers.pop(name), value=generation) for name, generation in generations])
