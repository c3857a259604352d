"""What a chat template writes of an environment's conversations, and the refusal of one that leaves out or rewrites a part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final, Literal, Protocol, cast

from jinja2 import TemplateError

from oldlogits.core.environment import ChatOptions
from oldlogits.core.errors import ConfigError
from oldlogits.models.chat.content import Encoder

Message = Mapping[str, object]
"""``{"role": ..., "content": ...}``; of an assistant that calls tools, also ``"tool_calls"`` as Hugging Face writes them."""

Role = Literal["tool", "user", "assistant", "system"]

Said = tuple[Role, str]
"""A message without its marks: a role and somebody's words. The environment says ones of "tool" and "user"; a conversation that
had begun before has ones of "assistant" as well."""

NAMES_ONLY: Final = "{#- oldlogits: tools by name -#}"
"""A template that holds this comment shows the names of tools and nothing else of them, and means to."""

SENTINEL: Final = "SENTINEL7Q"
"""Stands for somebody's words, to find where the template writes them."""

_HOW_TO_FIX: Final = "set model.chat_tools = 'system' or 'user', or use the chat template of a model that calls tools"


class ChatTokenizer(Encoder, Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None
    chat_template: object

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: object,
        add_generation_prompt: bool,
        tokenize: Literal[False],
        **options: object,
    ) -> str:
        """Write the conversation as text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Give the text of token ids."""


class Template:
    """The chat template of a tokenizer, given the tools of one environment in every rendering."""

    def __init__(self, tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, object]], options: ChatOptions) -> None:
        self._tokenizer, self._tools, self._options = tokenizer, list(tools), options
        self._tells = options.tools_in != "template"
        self._are_written = bool(tools) and not self._tells
        self._takes = cache(self._takes_after_one_another)

    def opening(self, system: str, said: Sequence[Said]) -> str:
        """Return the text up to the start of the first sampled turn; the first message is a user's."""
        return self._render([*self._first(system, said[0][1]), *({"role": role, "content": text} for role, text in said[1:])])

    def conversation(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that others have written, up to the start of the next assistant turn."""
        num_system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        system = "\n\n".join(str(message["content"]) for message in messages[:num_system])
        opening, rest = "", list(messages[num_system:])
        if self._options.tools_in == "user" and rest and rest[0]["role"] == "user":
            opening = str(rest.pop(0)["content"])
        first = self._first(system, opening)
        first = first if opening or (self._options.tools_in == "user" and (system or self._told_tools())) else first[:-1]
        return self._render([*first, *(self._as_known(message) for message in rest)])

    def _as_known(self, message: Message) -> Message:
        """A message in the role that the template knows it by."""
        return self._message("tool", str(message["content"])) if message["role"] == "tool" and self._tells else message

    def around_turn(self) -> tuple[str, str]:
        """Return what stands between the start of an assistant turn and its content, and what follows the content.

        Raises:
            ConfigError: The template leaves out the content of assistant turns.
        """
        messages = [*self._first("", "hi"), {"role": "assistant", "content": SENTINEL}]
        before, after = _around(self._render(messages, add_generation_prompt=False))
        start = self._render(messages[:-1])
        return before.removeprefix(start) if before.startswith(start) else "", after

    def after_turn(self, said: Sequence[Said]) -> str:
        """Return the text from the content of an assistant turn, which messages follow, to the start of the next turn."""
        then = self._messages(said)
        return _around(self._render([*self._first("", "hi"), {"role": "assistant", "content": SENTINEL}, *then]))[1]

    def call_text(self, name: str, arguments: Mapping[str, object]) -> str:
        """Return what an assistant turn that is a call looks like, and what follows it; empty where the template cannot say."""
        call = {"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}
        first = self._first("", "hi")
        try:
            turn = cast(Message, {"role": "assistant", "content": "", "tool_calls": [call]})
            return self._render([*first, turn], add_generation_prompt=False).removeprefix(self._render(first))
        except ConfigError:
            return ""

    def _messages(self, said: Sequence[Said]) -> list[Message]:
        """What the environment says to a turn; messages that the template cannot write after one another are joined."""
        messages: list[Message] = []
        for before, (role, content) in zip([None, *said], said, strict=False):
            message = self._message(role, content)
            if before is not None and before[0] == role and not self._takes(role):
                messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{message['content']}"}
            else:
                messages.append(message)
        return messages

    def _takes_after_one_another(self, role: Role) -> bool:
        """Whether the template writes two messages of a role after one another, and leaves them so later on."""
        answers = [self._message(role, f"{SENTINEL}{part}") for part in ("one", "two")]
        first = self._first("", "hi")
        try:
            self._check_history(first, [answers, answers[:1]])
            text = self._render([*first, {"role": "assistant", "content": "yes"}, *answers])
        except ConfigError:
            return False
        return 0 <= text.find(f"{SENTINEL}one") < text.find(f"{SENTINEL}two")

    def _message(self, role: Role, content: str) -> Message:
        """What the environment says, in the role that the template knows it by."""
        if role == "tool" and self._tells:
            return {"role": "user", "content": f"Result of the call:\n{content}"}
        return {"role": role, "content": content}

    def check(self, has_system: bool) -> None:
        """Refuse a template that leaves out what the model must read, or writes it otherwise when the conversation goes on.

        Raises:
            ConfigError: It does.
        """
        system = f"{SENTINEL}system" if has_system else ""
        first = self._first(system, f"{SENTINEL}user")
        text = self._render(first, tools=[_sentinel_tool(n) for n in (1, 2)])
        wanted = {"the system message": system, "user messages": f"{SENTINEL}user"}
        if self._are_written:
            by_name = NAMES_ONLY in str(self._tokenizer.chat_template)
            for part in ("name",) if by_name else ("name", "description", "parameter"):
                wanted |= {f"the {part} of {which} tool": f"{SENTINEL}{part}{n}" for n, which in ((1, "a"), (2, "a second"))}
        for what, sentinel in wanted.items():
            if sentinel not in text:
                raise _drops(what, text)
        roles: list[Role] = ["tool", "user"] if self._tools else ["user", "user"]
        for role in roles:
            if SENTINEL not in (after := self.after_turn([(role, SENTINEL)])):
                raise _drops("results of tools" if role == "tool" else "user messages", after)
        self._check_history(first, [[self._message(role, f"{SENTINEL}answer{n}")] for n, role in enumerate(roles)])
        if self._tools:
            self._takes("tool")

    def _check_history(self, first: list[Message], answers: Sequence[Sequence[Message]]) -> None:
        """Refuse a template whose text of earlier messages depends on later ones, but for the heads of assistant turns."""
        messages, parts = [*first], [self._render(first, add_generation_prompt=False)]
        for n, answer in enumerate(answers):
            messages += [{"role": "assistant", "content": f"{SENTINEL}turn{n}"}, *answer]
            parts.append(self._render(messages, add_generation_prompt=False).rpartition(f"{SENTINEL}turn{n}")[2])
        whole = self._render(messages, add_generation_prompt=False)
        for n, part in enumerate(parts):
            written, _, whole = whole.partition(f"{SENTINEL}turn{n}")
            if not written.startswith(part):
                raise ConfigError(
                    "the chat template writes earlier messages otherwise when the conversation goes on",
                    got=f"first {part[-200:]!r}, later {written[-200:]!r}",
                    allowed="a template under which what the model has read stays as it is",
                    fix=_HOW_TO_FIX,
                )

    def _first(self, system: str, user: str) -> list[Message]:
        """The messages before the first assistant turn, the tools among them where the template does not write them."""
        told = "\n\n".join(filter(None, [system, self._told_tools()]))
        if self._options.tools_in == "user":
            return [{"role": "user", "content": "\n\n".join(filter(None, [told, user]))}]
        return [*([{"role": "system", "content": told}] if told else []), {"role": "user", "content": user}]

    def _told_tools(self) -> str:
        """The tools in words; empty where there are none or the template writes them."""
        if self._are_written or not self._tools:
            return ""
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in self._tools]
        how = self._options.call_format
        return "\n".join(["These tools can be called:", *lines, *([f"Write a call as {how}"] if how else [])])

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=(tools or self._tools) if self._are_written else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._options.template_kwargs,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                "the chat template refuses a conversation with " + ", ".join(dict.fromkeys(str(m["role"]) for m in messages)),
                got=f"{type(error).__name__}: {error}",
                allowed="a template for system, user, assistant and tool messages",
                fix=_HOW_TO_FIX,
            ) from error


def _sentinel_tool(n: int) -> Mapping[str, object]:
    parameters = {"type": "object", "properties": {f"{SENTINEL}parameter{n}": {"type": "string"}}, "required": []}
    described = {"name": f"{SENTINEL}name{n}", "description": f"{SENTINEL}description{n}", "parameters": parameters}
    return {"type": "function", "function": described}


def _around(text: str) -> tuple[str, str]:
    """What stands before and after the content of an assistant turn, for which the sentinel stands."""
    before, found, after = text.partition(SENTINEL)
    if not found:
        raise _drops("the content of assistant turns", text)
    return before, after


def _drops(what: str, text: str) -> ConfigError:
    return ConfigError(
        f"the chat template drops {what}",
        got=repr(text[:400]),
        allowed="a template that writes all that the model must read",
        fix=_HOW_TO_FIX,
    )
