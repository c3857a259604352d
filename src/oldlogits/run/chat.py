"""How a recipe's model writes the conversations of a recipe's environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig

from oldlogits.config.schema import ModelConfig
from oldlogits.core.environment import Environment
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.core.text import read_json
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat import ChatFormat, ChatOptions
from oldlogits.models.load import load_tokenizer


def chat_format(config: ModelConfig, folder: Path, environment_class: type[Environment]) -> ChatFormat:
    """Open the chat format of a model folder for an environment.

    Raises:
        ModelFolderError: There is no tokenizer, it has no chat template, or its generation config cannot be read.
        ConfigError: The template cannot write what the environment needs.
    """
    options = ChatOptions(tools_in=config.chat_tools, template_kwargs=template_kwargs(config), eos_ids=end_ids(folder))
    return ChatFormat(load_tokenizer(folder), tool_schemas(environment_class), system_prompt_of(environment_class), options)


def template_kwargs(config: ModelConfig) -> Mapping[str, object]:
    """The variables that a recipe gives to the chat template.

    Raises:
        ConfigError: They are no JSON object.
    """
    try:
        read = read_json(config.chat_template_kwargs or "{}")
        if isinstance(read, dict):
            return read
        error = ValueError("it is no object")
    except ValueError as raised:
        error = raised
    raise ConfigError(
        "the variables of the chat template cannot be read",
        got=f"model.chat_template_kwargs = {config.chat_template_kwargs!r}: {error}",
        allowed="a JSON object",
        fix="""model.chat_template_kwargs = '{"enable_thinking": false}'""",
    ) from error


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens after which a deployed engine stops: those of ``generation_config.json``; none without such a file.

    Raises:
        ModelFolderError: The file cannot be read, or holds something else.
    """
    if not (folder / "generation_config.json").is_file():
        return ()
    try:
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        return () if eos is None else tuple(map(int, eos if isinstance(eos, list) else [eos]))
    except (OSError, ValueError, TypeError) as error:
        raise ModelFolderError(
            "the generation config cannot be read",
            got=f"{folder / 'generation_config.json'}: {error}",
            allowed="JSON with eos_token_id, a token or a list of tokens",
            fix="copy the file again, or remove it",
        ) from error
