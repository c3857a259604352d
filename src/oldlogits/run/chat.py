"""How a recipe's model writes the conversations of a recipe's environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig

from oldlogits.config.check import template_kwargs
from oldlogits.config.guard import Caution
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import ChatOptions, Environment
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.core.parser import ToolCall, call_writer, make_parser
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.delegate import toolsets_of
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.load import load_tokenizer, read_model_config

_CALL = ToolCall(name="TOOL", named={"PARAMETER": "VALUE"})
_TOOL = {
    "type": "function",
    "function": {"name": "TOOL", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def chat_format(config: RunConfig, folder: Path, environment_class: type[Environment]) -> ChatFormat:
    """Open the chat format of a model folder for the environment of a recipe; an agent program brings prompt and tools itself.

    Raises:
        ModelFolderError: There is no tokenizer, it has no chat template, or its generation config cannot be read.
        ConfigError: The template cannot write what the environment needs.
    """
    if config.env.is_program:
        return model_chat(config, folder)
    options = replace(chat_options(config), eos_ids=end_ids(folder))
    tools, system = tool_schemas(environment_class), system_prompt_of(environment_class)
    chat = ChatFormat(load_tokenizer(folder), tools, system, options)
    for others in toolsets_of(environment_class):
        chat.for_tools(others)
    return chat


def model_chat(config: RunConfig, folder: Path) -> ChatFormat:
    """Open the chat format of a model folder for conversations that bring their own system prompt and tools.

    Raises:
        ModelFolderError: There is no tokenizer, it has no chat template, or its generation config cannot be read.
        ConfigError: The template cannot write conversations.
    """
    return ChatFormat(load_tokenizer(folder), options=replace(chat_options(config), eos_ids=end_ids(folder)))


def chat_options(config: RunConfig) -> ChatOptions:
    """How the conversations of a recipe are written, whatever its model folder."""
    writer = call_writer(config.env.parser)
    return ChatOptions(
        tools_in=config.model.chat_tools,
        call_format=writer.write(_CALL) if writer else "",
        template_kwargs=template_kwargs(config),
    )


def chat_cautions(config: RunConfig, chat: ChatFormat) -> Iterator[Caution]:
    """Warn of a parser that does not read the calls that the chat template writes, which the model was taught to write.

    And, of an agent program, where the template writes no tools: whether it offers any is known with its first request.
    """
    if config.env.is_program:
        try:
            chat.for_tools([_TOOL])
        except ConfigError as error:
            message = f"requests that offer tools will be refused: {error.what}; if the program offers any, {error.fix}"
            yield Caution(name="template_without_tools", message=message, figures={})
    written = chat.call_text(_CALL.name, _CALL.named)
    if "VALUE" not in written:
        return
    calls = make_parser(config.env.parser, chat.tokenizer).parse(written)
    if not any(isinstance(call, ToolCall) and call.name == _CALL.name for call in calls):
        yield Caution(
            name="parser_of_another_format",
            message=f"the chat template writes a call as {written!r:.200}, which env.parser = '{config.env.parser}' does not "
            "read as one; if the environment has tools, set env.parser to one that does, such as 'hermes'",
            figures={},
        )


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which a deployed engine stops: those of ``generation_config.json``, else of ``config.json``.

    Raises:
        ModelFolderError: The file cannot be read, or holds something else.
    """
    try:
        if (folder / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        else:
            eos = GenerationConfig.from_model_config(read_model_config(folder)).eos_token_id
        return () if eos is None else tuple(map(int, eos if isinstance(eos, list) else [eos]))
    except (OSError, ValueError, TypeError) as error:
        raise ModelFolderError(
            "the tokens that end a text cannot be read",
            got=f"{folder}: {error}",
            allowed="a generation_config.json, or a config.json, whose eos_token_id is a token or a list of tokens",
            fix="copy the file again",
        ) from error
