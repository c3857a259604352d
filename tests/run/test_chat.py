"""From a recipe and a model folder to the chat format: where turns end, how tools are told, and which parser fits."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from oldlogits.cli.main import run as command
from oldlogits.config.check import check
from oldlogits.config.episodes import EnvConfig
from oldlogits.config.schema import ModelConfig, RunConfig
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.engines.chat_api.completions import ChatCompletions
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.messages import ApiError
from oldlogits.models.chat.format import ChatFormat
from oldlogits.run.chat import chat_cautions, chat_format, chat_options, end_ids
from order_desk.environment import OrderDesk
from order_desk.tiny import tiny_tokenizer

from ..models.tokenizers import CHATML, WITH_TOOLS, byte_level


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.mark.parametrize(("listed", "ends"), [([7, 9], (7, 9)), (7, (7,)), (None, ())])
def test_a_turn_ends_at_every_eos_of_the_generation_config(folder: Path, listed: object, ends: tuple[int, ...]):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert end_ids(folder) == ends
    own = chat_format(RunConfig(), folder, OrderDesk)
    assert own.stop_ids == (own.end_of_turn_id, *ends)


def test_without_a_generation_config_it_is_that_of_the_config(folder: Path):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, 5]}))
    assert end_ids(folder) == (3, 5)


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": ["x"]}'])
def test_a_broken_generation_config_is_refused(folder: Path, text: str):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelFolderError, match="the tokens that end a text cannot be read"):
        end_ids(folder)


def recipe(**model: str) -> RunConfig:
    return RunConfig(model=replace(ModelConfig(path="tiny"), **model), env=EnvConfig(target="desk", parser="hermes"))


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 2000])
def test_variables_of_the_template_are_refused_with_the_recipe_where_they_are_no_object(text: str):
    with pytest.raises(ConfigError, match="the variables of the chat template cannot be read"):
        check(recipe(chat_template_kwargs=text), needs_model=False)


def test_the_recipe_says_what_the_template_is_given_and_how_tools_are_told():
    options = chat_options(recipe(chat_template_kwargs='{"enable_thinking": false}', chat_tools="user"))
    assert (options.template_kwargs, options.tools_in) == ({"enable_thinking": False}, "user")
    tools = [{"type": "function", "function": {"name": "look", "description": "See.", "parameters": {}}}]
    chat = ChatFormat(byte_level(CHATML), tools, "be kind", options)
    told = '<tool_call>{"name": "TOOL", "arguments": {"PARAMETER": "VALUE"}}</tool_call>'
    assert f"Write a call as {told}\n\nhello<|im_end|>" in chat.decode(chat.prompt_ids("hello"))


CALLS = "{% for call in m.tool_calls or [] %}OPEN{{ call.function | tojson }}CLOSE{% endfor %}"
WRITES_CALLS = WITH_TOOLS.replace("+ m.content", "+ m.content }}" + CALLS + "{{ ''")
HERMES = WRITES_CALLS.replace("OPEN", "<tool_call>").replace("CLOSE", "</tool_call>")
LOOK = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("template", "parser", "warns"),
    [(HERMES, "hermes", False), (HERMES, "plain", True), (WRITES_CALLS, "hermes", True), (WITH_TOOLS, "plain", False)],
)
def test_a_run_is_warned_of_a_parser_that_does_not_read_the_calls_of_the_template(template: str, parser: str, warns: bool):
    config = replace(recipe(), env=EnvConfig(target="desk", parser=parser))
    cautions = list(
        chat_cautions(config, ChatFormat(byte_level(template), [{"type": "function", "function": {"name": "look"}}]))
    )
    assert [caution.name for caution in cautions] == ["parser_of_another_format"] * warns


def test_the_tiny_model_writes_calls_that_its_parser_reads():
    assert list(chat_cautions(RunConfig(), ChatFormat(tiny_tokenizer(["a"])))) == []


class Offering:
    """An environment with a tool, which only makes the rows of a program."""

    def reset(self):
        return "hello"

    def look(self) -> str:
        """See."""
        return ""

    def get_reward(self):
        return 1.0


@pytest.fixture
def without_tools(chatml_llama: Path, tmp_path: Path) -> Path:
    """A model folder whose chat template writes no tools."""
    model = Path(shutil.copytree(chatml_llama, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(CHATML)
    return model


def test_a_template_without_tools_serves_a_program_that_offers_none_and_the_request_that_does_is_refused(without_tools: Path):
    config = replace(recipe(), env=EnvConfig(target="desk", program="tests.rollout.agent_programs:plays", parser="hermes"))
    with pytest.raises(ConfigError, match="drops the name of a tool"):
        chat_format(recipe(), without_tools, Offering)
    chat = chat_format(config, without_tools, Offering)
    assert chat.conversation_ids([{"role": "user", "content": "hello"}])
    (caution,) = chat_cautions(config, chat)
    assert "requests that offer tools will be refused: the chat template drops the name of a tool" in caution.message
    assert "model.chat_tools" in caution.message
    request = ChatCompletions().read({"messages": [{"role": "user", "content": "hello"}], "tools": [LOOK]})
    formats = ChatFormats(chat.for_tools)
    with pytest.raises(ApiError, match=r"the model cannot be offered the tool look: .*model\.chat_tools = 'system'") as found:
        asyncio.run(formats.of(b"", request.tools, asyncio.to_thread))
    assert (found.value.status, found.value.code) == (400, "unwritten_tools")
    told = chat_format(replace(config, model=replace(config.model, chat_tools="system")), without_tools, Offering)
    assert list(chat_cautions(replace(config, model=replace(config.model, chat_tools="system")), told)) == []
    assert told.for_tools([LOOK])


def test_a_dry_run_of_a_program_says_where_its_rows_come_from_and_what_the_template_lacks(without_tools: Path, capsys):
    path = without_tools.parent / "program.toml"
    path.write_text(f'[env]\nprogram = "tests.rollout.agent_programs:plays"\n[model]\npath = "{without_tools}"\n')
    assert command(["train", str(path), "--dry-run", "--eval.num-episodes", "0"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\n#", " ").split())
    assert "rows training: made by env.target = 'desk', held-out: made by env.target = 'desk'" in shown
    assert "warning: requests that offer tools will be refused" in shown
