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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oldlogits.config import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.envs.desk import OrderDesk
from oldlogits.envs.desk_clerk import Clerk, ErrorRates, demonstrator
from oldlogits.envs.desk_data import WORDS, DeskRow
from oldlogits.envs.desk_long import LongOrderDesk
from oldlogits.envs.shape import Malformed, ToolCall, bind, parse_plain, render_result, tool_names, tool_schemas, write_hermes
from oldlogits.models.cache import cache_folder, cached
from oldlogits.models.chat import ChatFormat, Message
from oldlogits.models.load import load_model, load_tokenizer
from oldlogits.models.tiny import TinyMoeSize, TinySize, save_tiny, tiny_model, tiny_tokenizer

_NUM_HASHED: Final = 64
"""Demonstrations that enter the cache key: a change of desk, demonstrators, tokenizer or template changes them."""

MIXTURE: Final = ErrorRates(
    skip_question=0.6,
    skip_status=0.08,
    grant_shipped=0.72,
    grant_refused=0.3,
    skip_age=0.1,
    refund_expired=0.52,
    refund_food=0.3,
    refuse_allowed=0.08,
    only_say=0.05,
    misreport=0.04,
)
"""Demonstrators whose likeliest decision is wrong in some places: greedy decoding fails there, sampling does not always."""


LONG_MIXTURE: Final = ErrorRates(**{decision: 0.7 * rate for decision, rate in asdict(MIXTURE).items()})
"""Demonstrators of long episodes err less often, since one mistake of five wishes loses the reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartSpec:
    """All that a warm-started model depends on.

    Args:
        seed: Of the weights, the demonstrators and their rows.
        steps: Optimizer steps; 0 leaves the weights as they are initialised.
        batch_size: Demonstrations a step; none is used twice.
        lr: Peak learning rate of AdamW.
        min_lr_ratio: Learning rate at the end of the cosine, as a share of the peak.
        warmup_steps: Steps over which the learning rate rises.
        beta2: AdamW's second-moment decay.
        max_grad_norm: Largest norm of the gradient.
        size: The model's size.
        errors: How the demonstrators err.
        desk: Makes the rows that they serve.
        parser: How they write their calls: a name of `PARSERS`.
        folder: Of the model that is trained instead of a fresh one of `size`; its tokenizer and template are kept. Empty: none.
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


def spec_of(config: RunConfig) -> WarmStartSpec:
    """The warm start of a recipe; that of a folder has no steps unless the recipe says so."""
    if config.model.is_tiny:
        spec = WarmStartSpec(seed=config.model_seed, size=TinyMoeSize() if config.model.path == "tiny-moe" else TinySize())
    else:
        spec = replace(FOLDER, seed=config.model_seed, parser=config.env.parser, folder=config.model.path)
    if config.env.target == "desk_long":
        spec = replace(spec, desk=LongOrderDesk, errors=LONG_MIXTURE, batch_size=8)
    steps = config.model.warm_start_steps
    return spec if steps == "auto" else replace(spec, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode of a demonstrator; `loss_mask` is True on what the demonstrator wrote, end-of-turn tokens included."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    reward: float


Progress = Callable[[int, float], None]
"""Called after every step with the number of steps done and the loss in nats per token."""


def warm_start(spec: WarmStartSpec, progress: Progress = lambda step, loss: None) -> Path:
    """The folder of the warm-started model, trained now unless it is in the cache."""
    begun = Path(spec.folder)
    tokenizer = load_tokenizer(begun) if spec.folder else tiny_tokenizer([*WORDS, *tool_names(OrderDesk)])
    chat = ChatFormat(tokenizer)
    key = _key(spec, chat, tokenizer)

    def fill(unfinished: Path) -> None:
        if not spec.folder:
            model = tiny_model(spec.size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, spec.seed)
            save_tiny(unfinished, imitate(model, spec, chat, progress), tokenizer)
        else:
            imitate(load_model(begun), spec, chat, progress).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)

    return cached(cache_folder() / f"{begun.name if spec.folder else 'tiny'}-{key}", fill)


def _key(spec: WarmStartSpec, chat: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The content hash: specification, vocabulary, template and the first demonstrations, in which the desk shows.

    A folder enters with the sizes and times of its weights.
    """
    shown = [demonstration.token_ids for demonstration, _ in zip(demonstrations(spec, chat), range(_NUM_HASHED), strict=False)]
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    numbers = {name: value for name, value in asdict(spec).items() if name != "desk"}
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
    desk = OrderDesk()
    seen: str | None = desk.reset(**row)
    messages: list[Message] = [{"role": "system", "content": OrderDesk.system_prompt}, {"role": "user", "content": seen or ""}]
    ids = chat.prompt_ids(messages, tool_schemas(OrderDesk))
    mask = [False] * len(ids)
    next(clerk)
    while seen is not None:
        text = clerk.send(seen)
        call = parse_plain(text)
        if parser == "hermes" and isinstance(call, ToolCall):
            text = write_hermes(OrderDesk, call)
        turn = chat.turn_ids(text)
        ids, mask = ids + turn, mask + [True] * len(turn)
        if call is None:
            role, seen = "user", desk.reply(text)
        else:
            ready = call if isinstance(call, Malformed) else bind(desk, call)
            role, seen = "tool", ready.reason if isinstance(ready, Malformed) else render_result(ready())
        if seen is not None:
            read = chat.continuation_ids("tool" if role == "tool" else "user", seen)
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
