"""Who acts in ``oldlogits play``: a person or an oracle, who write text, or a checkpoint, which samples tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import EngineSpec, Generation, RolloutEngine, Sampling, Span
from oldlogits.core.environment import Environment
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import Message

if TYPE_CHECKING:
    from oldlogits.run.checkpoint import NamedModel

LONGEST: Final = 4096
"""The most tokens of an episode that a model folder without a recipe plays, unless the model takes fewer."""
ENDLESS: Final = EnvConfig(max_turns=sys.maxsize, max_tokens_per_turn=sys.maxsize, max_episode_tokens=sys.maxsize)
"""The limits of those who write."""
LEFT: Final = (4,)
"""The turn of one who leaves: the character "end of transmission", without an end of message."""


class Writer:
    """One who reads and writes text: engine, tokenizer and parser at once. A token is a character, and 0 ends a message.

    Args:
        write: Given the last message, returns the next; EOFError and KeyboardInterrupt: nothing more is written.
        tools: A line that begins with one of these names is a call, besides what the plain parser reads.
    """

    eos_token_id, unk_token_id, chat_template, added_tokens_decoder = 0, None, "", {0: "\0"}

    def __init__(self, write: Callable[[str], str], tools: Collection[str] = ()) -> None:
        self._write, self._tools = write, tools

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Ask for a turn; it is `LEFT` where there is no more."""
        try:
            ids = (*self.encode(self._write(self.decode(prompt_ids).split("\0")[-2])), 0)
        except (EOFError, KeyboardInterrupt):
            ids = LEFT
        span = Span(version=0, start=0, end=len(ids))
        return Generation(output_ids=ids, logprobs=(0.0,) * len(ids), spans=(span,), finish_reason="stop")

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Return the call of a turn; none: it is a message."""
        name, *words = text.split() or [""]
        return [ToolCall(name=name, positional=tuple(words))] if name in self._tools else PlainParser().parse(text)

    def apply_chat_template(self, conversation: Sequence[Message], **_: object) -> str:
        """Return the contents, one after the other."""
        return "".join(f"{message['content']}\0" for message in conversation)

    def encode(self, text: str, **_: object) -> list[int]:
        """Return the code points of a text."""
        return list(map(ord, text))

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        """Return the text of code points."""
        return "".join(map(chr, token_ids))


def open_checkpoint(
    model: NamedModel, recipe: RunConfig | None, environment_class: type[Environment], seed: int
) -> tuple[RolloutEngine, ChatFormat, EnvConfig]:
    """Return engine and chat format of a model, and the parser and limits it plays by.

    Args:
        model: The model.
        recipe: What it plays by; None: the recipe of its run, or a default one, within what the model can read.
        environment_class: The environment that is played.
        seed: The seed of the sampler.

    Raises:
        ConfigError: The chat template cannot write what the environment needs.
        ModelFolderError: The model cannot be loaded.
    """
    from oldlogits.engines.embedded.engine import EngineCore  # torch, which those who write do without
    from oldlogits.engines.embedded.model_folder import read_config
    from oldlogits.engines.embedded.stepwise import EmbeddedEngine
    from oldlogits.run.chat import chat_format
    from oldlogits.run.start import prepare_model

    class Engine(EmbeddedEngine):
        async def generate(
            self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, quota: int | None = None
        ) -> Generation:
            self.core.add(request_id, prompt_ids, sampling)
            while not (finished := self.core.step()):
                pass
            return finished[0][1]

    recipe = recipe or model.recipe
    config = model.put_into(recipe or RunConfig())
    path = prepare_model(config, environment_class, lambda said: print(said, file=sys.stderr)).model
    env = config.env if recipe else EnvConfig(max_episode_tokens=min(LONGEST, read_config(path).max_positions))
    core = EngineCore(EngineSpec(model_path=str(path), max_num_seqs=1, max_context=env.max_episode_tokens, seed=seed))
    return Engine(core), chat_format(config, path, environment_class), env
