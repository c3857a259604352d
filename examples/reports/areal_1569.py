"""AReaL pull request 1569: tokens are labelled with the version that the client has when their answer has arrived.

AReaL's remote engine, its SGLang backend and its actor are real, and so is HTTP; a tiny model answers in place of SGLang, and
stands in AReaL's actor in place of a sharded one. The weights change while the second turn of each rollout is on its way.

    python -m reports.areal_1569 FOLDER            # the versions that AReaL's engine writes
    python -m reports.areal_1569 FOLDER --right    # those that the server says it has sampled with
"""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import torch
from aiohttp import web
from areal.api import ModelRequest
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig, OptimizerConfig, PPOActorConfig
from areal.engine.sglang_remote import SGLangBackend
from areal.infra import RemoteInfEngine
from areal.trainer.ppo.actor import PPOActor

from oldlogits.integrations.areal import ExactProxLogp
from reports.tiny_versions import NUM_VERSIONS, TinyVersions, doctor

ROLLOUTS, TURNS, TOKENS = 20, 3, 24
SERVED: ContextVar[int] = ContextVar("version that a server has said")


class Server:
    """Answers as SGLang does: all rollouts of a wave ask at once, and get their answers at once."""

    def __init__(self, tiny: TinyVersions) -> None:
        self.tiny, self.version, self.waiting, self.after = tiny, 0, [], lambda: None

    async def generate(self, request: web.Request) -> web.Response:
        """Answer when every rollout of the wave has asked."""
        self.waiting.append(((await request.json())["input_ids"], asyncio.get_running_loop().create_future()))
        mine = self.waiting[-1][1]
        if len(self.waiting) == ROLLOUTS:
            contexts, futures = zip(*self.waiting, strict=True)
            for future, answer in zip(futures, self.tiny.sample(self.version, contexts, TOKENS), strict=True):
                future.set_result((answer, self.version))
            self.waiting = []
            self.after()
        (ids, logps), version = await mine
        told = {"finish_reason": {"type": "length"}, "weight_version": str(version)}
        return web.json_response({"meta_info": told | {"output_token_logprobs": list(zip(logps, ids, strict=True))}})


class TellingBackend(SGLangBackend):
    """Takes the version from the answer."""

    def parse_generation_response(self, response):
        """Note the version, and parse as AReaL does."""
        SERVED.set(int(response["meta_info"]["weight_version"]))
        return super().parse_generation_response(response)


class TellingEngine(RemoteInfEngine):
    """Labels tokens with the version of their answer."""

    def get_version(self) -> int:
        """Give the version of the last answer in this task."""
        return SERVED.get(super().get_version())


async def rollouts(tiny: TinyVersions, *, right: bool) -> list[dict[str, torch.Tensor]]:
    """Three waves of rollouts of three turns, each of which sees one update of the weights."""
    server = Server(tiny)
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    config = InferenceEngineConfig(experiment_name="report", trial_name="1569")
    engine = TellingEngine(config, TellingBackend()) if right else RemoteInfEngine(config, SGLangBackend())
    engine.addresses = [f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"]
    engine.workflow_executor = SimpleNamespace(is_paused=lambda: False)
    sampling = GenerationHyperparameters(max_new_tokens=TOKENS, temperature=1.0)

    async def play(number: int, turn_ends: asyncio.Barrier) -> dict[str, torch.Tensor]:
        """What AReaL's `MultiTurnWorkflow` does, without texts."""
        seq, logps, mask, versions = [], [], [], []
        context = tiny.prompt(number)
        for _ in range(TURNS):
            await turn_ends.wait()
            answer = await engine.agenerate(ModelRequest(input_ids=context, gconfig=sampling, rid=f"{number}"))
            num = len(answer.input_tokens) - len(seq)
            seq = [*answer.input_tokens, *answer.output_tokens]
            logps += [0.0] * num + answer.output_logprobs
            mask += [0] * num + [1] * answer.output_len
            versions += [-1] * num + answer.output_versions
            context = [*seq, 5, 6]
        made = {"input_ids": seq, "loss_mask": mask, "versions": versions}
        made = {name: torch.tensor([values], dtype=torch.int32) for name, values in made.items()}
        made |= {"attention_mask": torch.ones(1, len(seq), dtype=torch.bool), "logprobs": torch.tensor([logps])}
        return made | {"rewards": torch.tensor([float(number % 3)])}

    found = []
    for version in range(NUM_VERSIONS - 1):
        turns = iter(range(TURNS))

        def update(turns=turns, newer=version + 1) -> None:
            if next(turns) == 1:  # the second turn was sampled, and is not answered yet
                server.version = newer
                engine.set_version(newer)

        server.after, turn_ends = update, asyncio.Barrier(ROLLOUTS)
        found += await asyncio.gather(*(play(number, turn_ends) for number in range(ROLLOUTS)))
    await runner.cleanup()
    return found


class PlainActor:
    """What AReaL's FSDPPPOActor is around its PPOActor, around a plain module."""

    def __init__(self, config: PPOActorConfig, model: torch.nn.Module) -> None:
        self.config, self.model, self.version = config, model, 0
        self.actor = PPOActor(config, self)

    def eval(self) -> None:
        """Leave training mode."""
        self.model.eval()

    def get_version(self) -> int:
        """Give the trainer's version."""
        return self.version

    def logps(self, batch):
        """Give log-probs; entry i is of token i + 1, the last one of the first token, as AReaL rolls."""
        ids = batch["input_ids"].long()
        logits = self.model(ids, attention_mask=batch["attention_mask"]).logits.float().log_softmax(-1)
        return logits.gather(2, ids.roll(-1, dims=1)[..., None])[..., 0]

    @torch.no_grad()
    def forward(self, input_, aggregate_fn):
        """Give log-probs."""
        return self.logps(input_)

    def compute_logp(self, data):
        """Ask AReaL."""
        return self.actor.compute_logp(data)


class ExactActor(ExactProxLogp, PlainActor):
    """OLD at the versions that the tokens are labelled with."""

    max_staleness = NUM_VERSIONS


def train(folder: Path, *, right: bool) -> Path:
    """Let AReaL make a batch for an update that begins with version 3, and save it as its dumps are."""
    tiny = TinyVersions()
    data = asyncio.run(rollouts(tiny, right=right))
    config = PPOActorConfig(
        use_decoupled_loss=True, prox_logp_method="recompute", recompute_logprob=True, adv_norm=None, reward_norm=None,
        kl_ctl=0.0, ppo_n_minibatches=1, optimizer=OptimizerConfig(),
    )  # fmt: skip
    actor = ExactActor(config, tiny.blank())
    for version in range(NUM_VERSIONS):
        actor.version = version
        actor.model.load_state_dict(tiny.models[version].state_dict())
        begun = {name: value[:, :TOKENS] if value.ndim == 2 else value for name, value in data[0].items()}
        old = actor.compute_logp(data if version == NUM_VERSIONS - 1 else [begun])  # once a step, which keeps its version
    for one, values in zip(data, old, strict=True):
        one["prox_logp"] = values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{NUM_VERSIONS - 1:06d}.pt"
    torch.save(actor.actor.compute_advantages(data), path)
    return path


if __name__ == "__main__":
    sys.exit(doctor(train(Path(sys.argv[1]), right="--right" in sys.argv)))
