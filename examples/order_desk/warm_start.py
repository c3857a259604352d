"""The warm start of an embedded model or a folder: a short training on demonstrators that copy well and decide badly.

    row -> desk <-> demonstrator -> tokens, loss mask -> AdamW on the demonstrator's tokens -> model folder

What comes out knows how calls and messages are written and which order number to copy; which decision is right is left to
reinforcement learning. Model folders are cached under a hash of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oldlogits.core.environment import AS_IT_IS, ChatOptions, ModelOrder
from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import Malformed, ToolCall, call_writer
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import bind, render_result, tool_names, tool_schemas, with_names
from oldlogits.models.cache import cache_folder, cached
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.load import load_model, load_tokenizer
from order_desk.clerk import MIXTURE, Clerk, ErrorRates, demonstrator
from order_desk.data import WORDS, DeskRow
from order_desk.environment import OrderDesk
from order_desk.starting_models import TinySize
from order_desk.tiny import save_tiny, tiny_model, tiny_tokenizer

_NUM_HASHED: Final = 64
"""Demonstrations that enter the cache key: a change of desk, demonstrators, tokenizer or template changes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartSpec:
    """All that a warm-started model depends on.

    Args:
        seed: Seed of the weights, the demonstrators and their rows.
        steps: Optimizer steps; 0 leaves the weights as they are initialised.
        batch_size: Demonstrations a step; none is used twice.
        lr: Peak learning rate of AdamW.
        min_lr_ratio: Learning rate at the end of the cosine, as a share of the peak.
        warmup_steps: Steps over which the learning rate rises.
        beta2: AdamW's second-moment decay.
        max_grad_norm: Largest norm of the gradient.
        size: The model's size.
        errors: How the demonstrators err.
        desk: The class that makes the rows that they serve.
        parser: The `env.parser` in whose form they write their calls.
        chat: How their conversations are written; it is in the cache's key by the demonstrations.
        folder: The model folder that is trained instead of a fresh model of `size`; its tokenizer and template are kept.
            Empty: a fresh model.
    """

    seed: int = 0
    steps: int = 600
    batch_size: int = 16
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 40
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    size: TinySize = field(default_factory=TinySize)
    errors: ErrorRates = MIXTURE
    desk: type[OrderDesk] = OrderDesk
    parser: str = "plain"
    chat: ChatOptions = AS_IT_IS
    folder: str = ""

    def __post_init__(self) -> None:
        """Refuse counts and learning rates out of range."""
        if self.steps < 0 or min(self.batch_size, self.warmup_steps) < 1 or self.lr <= 0 or self.seed < 0:
            raise ConfigError(
                "the warm start's numbers are out of range",
                got=str(self),
                allowed="steps, seed >= 0; batch_size, warmup_steps >= 1; lr > 0",
                fix="correct the specification",
            )


FOLDER: Final = WarmStartSpec(steps=0, batch_size=8, lr=1e-4, warmup_steps=5)
"""For a model that can speak: it learns the form of calls and messages."""


def tiny_spec(order: ModelOrder, size: TinySize) -> WarmStartSpec:
    """Return the warm start of a tiny model for a run."""
    return _at_the_desk(replace(WarmStartSpec(), seed=order.seed, size=size), order)


def folder_spec(order: ModelOrder) -> WarmStartSpec:
    """Return the warm start of a folder for a run; it has no steps unless the run asks for some."""
    return _at_the_desk(replace(FOLDER, seed=order.seed, parser=order.parser, folder=order.folder), order)


def _at_the_desk(spec: WarmStartSpec, order: ModelOrder) -> WarmStartSpec:
    """Return the warm start with the demonstrations of the desk that the model will play."""
    desk = order.environment
    assert issubclass(desk, OrderDesk), "other environments are refused before a model is made"
    return replace(
        spec,
        desk=desk,
        chat=order.chat,
        errors=desk.demonstrators,
        batch_size=min(spec.batch_size, desk.max_demonstrations_per_step),
        steps=spec.steps if order.steps == "auto" else order.steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode of a demonstrator; `loss_mask` is True on what the demonstrator wrote, end-of-turn tokens included."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    reward: float


Progress = Callable[[int, float], None]
"""Called after every step with the number of steps done and the loss in nats per token."""


def desk_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the tiny models: every word that is said at the desk is one token."""
    return tiny_tokenizer([*WORDS, *tool_names(OrderDesk)])


def warm_start_folder(order: ModelOrder) -> Path:
    """Return the folder that a warm start makes of `order.folder`, trained now unless it is in the cache."""
    spec = folder_spec(order)
    return warm_start(spec, lambda step, loss: order.progress(step, spec.steps, loss), cache=order.cache)


def warm_start(spec: WarmStartSpec, progress: Progress = lambda step, loss: None, *, cache: Path | None = None) -> Path:
    """Return the folder of the warm-started model, trained now unless it is in the cache.

    Args:
        spec: Everything that the model depends on.
        progress: Called after every step.
        cache: The folder in which the result is kept; None: that of this machine's user.
    """
    begun = Path(spec.folder)
    tokenizer = load_tokenizer(begun) if spec.folder else desk_tokenizer()
    chat = ChatFormat(tokenizer, tool_schemas(OrderDesk), OrderDesk.system_prompt, spec.chat)
    key = _key(spec, chat, tokenizer)

    def fill(unfinished: Path) -> None:
        if not spec.folder:
            model = tiny_model(spec.size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, spec.seed)
            save_tiny(unfinished, imitate(model, spec, chat, progress), tokenizer)
        else:
            imitate(load_model(begun), spec, chat, progress).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)

    return cached((cache or cache_folder()) / f"{begun.name if spec.folder else 'tiny'}-{key}", fill)


def _key(spec: WarmStartSpec, chat: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The content hash: specification, vocabulary, template and the first demonstrations, in which the desk shows.

    A folder enters with the sizes and times of its weights.
    """
    shown = [demonstration.token_ids for demonstration, _ in zip(demonstrations(spec, chat), range(_NUM_HASHED), strict=False)]
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    numbers = {name: value for name, value in asdict(spec).items() if name not in ("desk", "chat")}
    begun = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(spec.folder).glob("*.safetensors"))
    ]
    content = [numbers, sorted(vocabulary.items()), tokenizer.chat_template, shown, begun if spec.folder else []]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def demonstrations(spec: WarmStartSpec, chat: ChatFormat) -> Iterator[Demonstration]:
    """Endless demonstrations, on training rows of negative index, which no run asks for."""
    rng = random.Random(f"demonstrator {spec.seed}")
    index = -1 - spec.seed * spec.steps * spec.batch_size
    while True:
        yield demonstrate(spec.desk.make_row("train", index), demonstrator(spec.errors, rng), chat, spec.parser)
        index -= 1


def demonstrate(row: DeskRow, clerk: Clerk, chat: ChatFormat, parser: str = "plain") -> Demonstration:
    """Let a clerk serve one row; the tokens are those that the turn loop would produce under that parser."""
    heard, writer = PlainParser(), call_writer(parser)
    if writer is None:
        raise ConfigError(
            "demonstrations need a parser that writes calls",
            got=f"env.parser = '{parser}'",
            allowed="plain, hermes, llama, qwen-coder, or a class of yours with write(call)",
            fix="name one of these, or set model.warm_start_steps = 0",
        )
    desk = OrderDesk()
    seen: str | None = desk.reset(**row)
    ids = chat.prompt_ids(seen or "")
    mask = [False] * len(ids)
    next(clerk)
    while seen is not None:
        text = clerk.send(seen)
        calls = heard.parse(text)
        if calls and isinstance(calls[0], ToolCall):
            text = writer.write(with_names(OrderDesk, calls[0]))
        turn = chat.turn_ids(text)
        ids, mask = ids + turn, mask + [True] * len(turn)
        if not calls:
            role, seen = "user", desk.reply(text)
        else:
            ready = calls[0] if isinstance(calls[0], Malformed) else bind(desk, calls[0])
            role, seen = "tool", ready.reason if isinstance(ready, Malformed) else render_result(ready())
        if seen is not None:
            read = chat.continuation_ids([("tool" if role == "tool" else "user", seen)])
            ids, mask = ids + read, mask + [False] * len(read)
    return Demonstration(token_ids=tuple(ids), loss_mask=tuple(mask), reward=desk.get_reward())


def imitate(model: PreTrainedModel, spec: WarmStartSpec, chat: ChatFormat, progress: Progress) -> PreTrainedModel:
    """Train a model on demonstrations, on one thread: the same specification gives the same weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, spec.beta2), weight_decay=0.0, fused=True)
    shown = demonstrations(spec, chat)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(spec.steps):
            batch = [next(shown) for _ in range(spec.batch_size)]
            optimizer.param_groups[0]["lr"] = _learning_rate(spec, step)
            loss = imitation_loss(model, batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
            optimizer.step()
            progress(step + 1, loss.item())
    finally:
        torch.set_num_threads(num_threads)
    return model.eval()


def _learning_rate(spec: WarmStartSpec, step: int) -> float:
    """Linear warm-up times a cosine from the peak to its final share."""
    cosine = (1 + math.cos(math.pi * step / spec.steps)) / 2
    return spec.lr * min(1.0, (step + 1) / spec.warmup_steps) * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * cosine)


def imitation_loss(model: PreTrainedModel, batch: list[Demonstration]) -> Tensor:
    """Mean negative log-prob of what the demonstrators wrote, in nats per token, over the tokens of the batch."""
    length = max(len(demonstration.token_ids) for demonstration in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros(len(batch), length, dtype=torch.bool)
    for i, demonstration in enumerate(batch):
        ids[i, : len(demonstration.token_ids)] = torch.tensor(demonstration.token_ids)
        mask[i, : len(demonstration.loss_mask)] = torch.tensor(demonstration.loss_mask)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = linear(hidden[:, :-1][mask[:, 1:]], model.lm_head.weight)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
