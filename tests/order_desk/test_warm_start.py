"""The warm start: what it imitates, that it repeats, and that it is cached under everything it depends on."""

from __future__ import annotations

import copy
import math
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oldlogits.core.environment import MODELS, ChatOptions, ModelOrder
from oldlogits.core.errors import ConfigError
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.load import load_model, load_tokenizer
from order_desk.clerk import LONG_MIXTURE, MIXTURE, ErrorRates, oracle
from order_desk.data import WORDS
from order_desk.environment import LongOrderDesk, OrderDesk
from order_desk.tiny import TinyMoeSize, TinySize, tiny_model, tiny_tokenizer
from order_desk.warm_start import (
    FOLDER,
    WarmStartSpec,
    demonstrate,
    demonstrations,
    folder_spec,
    imitation_loss,
    tiny_spec,
    warm_start,
)

TOKENIZER = tiny_tokenizer([*WORDS, *tool_names(OrderDesk)])
CHAT = ChatFormat(TOKENIZER, tool_schemas(OrderDesk), OrderDesk.system_prompt)
SMALL = TinySize(hidden=16, layers=1, heads=2, kv_heads=1, mlp=24)


def ordered(desk: type[OrderDesk] = OrderDesk, *, seed: int = 0, steps: int | str = "auto", folder: str = "") -> ModelOrder:
    return ModelOrder(seed=seed, steps=steps, environment=desk, parser="plain", folder=folder, cache=Path("unused"))


QUICK = WarmStartSpec(steps=3, batch_size=2, warmup_steps=1, size=SMALL)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLDLOGITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_second_warm_start_reads_the_cache_and_takes_no_step(cache: Path):
    steps: list[int] = []
    first = warm_start(QUICK, lambda step, loss: steps.append(step))
    again = warm_start(QUICK, lambda step, loss: steps.append(step))
    assert (first, steps) == (again, [1, 2, 3])
    assert [path.name for path in cache.iterdir()] == [first.name]


@pytest.mark.slow
def test_the_same_specification_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = warm_start(QUICK)
    monkeypatch.setenv("OLDLOGITS_CACHE", str(tmp_path / "elsewhere"))
    torch.manual_seed(99)
    second = warm_start(QUICK)
    assert first != second
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 1e-3},
        {"size": replace(SMALL, mlp=32)},
        {"size": TinyMoeSize(hidden=16, layers=1, heads=2, kv_heads=1, mlp=24)},
        {"errors": replace(MIXTURE, only_say=0.5)},
        {"desk": LongOrderDesk},
    ],
)
def test_another_specification_gives_another_folder(change: dict[str, object]):
    assert warm_start(QUICK) != warm_start(replace(QUICK, **change))


def test_a_run_decides_the_size_the_desk_and_the_seed_of_its_warm_start():
    assert tiny_spec(ordered(seed=3), TinySize()) == WarmStartSpec(seed=3)
    spec = tiny_spec(ordered(LongOrderDesk, seed=5, steps=7), TinyMoeSize())
    assert (spec.seed, spec.steps, spec.size, spec.desk) == (5, 7, TinyMoeSize(), LongOrderDesk)
    assert (spec.errors, spec.batch_size) == (LONG_MIXTURE, 8)
    assert (MODELS.find("tiny").size, MODELS.find("tiny-moe").size) == (TinySize(), TinyMoeSize())


@pytest.mark.slow
def test_demonstrators_of_long_episodes_are_right_in_a_tenth_to_a_third_of_them():
    spec = tiny_spec(ordered(LongOrderDesk), TinySize())
    shown = list(islice(demonstrations(spec, CHAT), 300))
    assert 0.1 < sum(one.reward for one in shown) / 300 < 0.3
    assert max(len(one.token_ids) for one in shown) < 448  # env.max_episode_tokens of recipes/desk_long.toml


@pytest.mark.slow
def test_a_folder_begins_where_it_is_and_keeps_its_tokenizer_and_template(tmp_path: Path):
    begun = warm_start(QUICK)
    spec = folder_spec(ordered(steps=2, folder=str(begun)))
    assert (spec.steps, spec.folder, spec.parser, spec.lr) == (2, str(begun), "plain", FOLDER.lr)
    steps: list[int] = []
    folder = warm_start(replace(spec, batch_size=2), lambda step, loss: steps.append(step))
    assert steps == [1, 2]
    assert folder.name.startswith(begun.name)
    kept, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (kept.get_vocab(), kept.chat_template) == (TOKENIZER.get_vocab(), TOKENIZER.chat_template)
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), load_model(begun).parameters(), strict=True)]
    assert 0 < max(moved) <= 2.01 * FOLDER.lr  # AdamW moves a weight by its learning rate at most
    assert folder_spec(ordered(folder=str(begun))).steps == 0


@pytest.mark.slow
def test_another_file_of_weights_in_the_folder_is_another_warm_start(tmp_path: Path):
    begun = Path(shutil.copytree(warm_start(QUICK), tmp_path / "mine"))
    spec = replace(QUICK, folder=str(begun))
    first = warm_start(spec)
    assert warm_start(spec) == first
    (begun / "model.safetensors").touch()
    assert warm_start(spec) != first


def test_hermes_demonstrations_differ_in_the_writing_of_calls_alone(chatml_llama: Path):
    chat, row = ChatFormat(load_tokenizer(chatml_llama)), OrderDesk.make_row("train", -1)
    plain, hermes = (demonstrate(copy.deepcopy(row), oracle(), chat, parser=parser) for parser in ("plain", "hermes"))
    texts = [chat.decode(shown.token_ids) for shown in (plain, hermes)]
    assert plain.reward == hermes.reward == 1.0
    as_plain = re.sub(
        r'<tool_call>{"name": "(\w+)", "arguments": {"order": "(\w+)"}}</tool_call>', r"<call> \1 \2 </call>", texts[1]
    )
    assert as_plain == texts[0] != texts[1]


def test_demonstrations_are_written_as_the_recipe_writes_conversations(chatml_llama: Path):
    order = replace(ordered(folder=str(chatml_llama)), chat=ChatOptions(tools_in="user", call_format="<call> tool </call>"))
    spec, tokenizer = folder_spec(order), load_tokenizer(chatml_llama)
    chat = ChatFormat(tokenizer, tool_schemas(OrderDesk), OrderDesk.system_prompt, spec.chat)
    shown = demonstrate(OrderDesk.make_row("train", -1), oracle(), chat)
    text = chat.decode(shown.token_ids)
    assert text.startswith(f"<|im_start|>user\n{OrderDesk.system_prompt}\n\nThese tools can be called:\n")
    assert "Write a call as <call> tool </call>" in text
    assert "<|im_start|>tool" not in text


@pytest.mark.slow
def test_another_desk_gives_another_folder(monkeypatch: pytest.MonkeyPatch):
    before = warm_start(QUICK)
    monkeypatch.setattr(OrderDesk, "system_prompt", "order desk .")
    assert warm_start(QUICK) != before


def test_an_interrupted_warm_start_leaves_no_folder(cache: Path):
    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_start(QUICK, interrupt)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_failed_save_leaves_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path, *_: object) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr("order_desk.warm_start.save_tiny", fail)
    with pytest.raises(OSError, match="disk full"):
        warm_start(QUICK)
    assert not list(cache.iterdir())


def test_the_folder_loads_and_its_vocabulary_is_the_desks():
    folder = warm_start(QUICK)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert model.config.vocab_size == len(tokenizer)


def test_the_loss_is_on_exactly_what_the_demonstrator_wrote():
    row = {
        "customer": "anna",
        "orders": {"o10": {"customer": "anna", "item": "lamp", "status": "delivered", "days": 12}},
        "wishes": [{"kind": "refund", "order": "o10", "withheld": True}],
    }
    shown = demonstrate(row, oracle(), CHAT)
    text = TOKENIZER.decode(shown.token_ids)
    assert text.endswith(
        "<user> anna here : please refund my lamp order <end> <assistant> which order ? <end> "
        "<user> it is o10 <end> <assistant> <call> status o10 </call> <end> "
        "<tool> delivered <end> <assistant> <call> age o10 </call> <end> "
        "<tool> 12 days <end> <assistant> <call> refund o10 </call> <end> "
        "<tool> ok <end> <assistant> it is refunded <end>"
    )
    written = [token for token, counts in zip(shown.token_ids, shown.loss_mask, strict=True) if counts]
    assert TOKENIZER.decode(written) == (
        "which order ? <end> <call> status o10 </call> <end> <call> age o10 </call> <end> "
        "<call> refund o10 </call> <end> it is refunded <end>"
    )
    assert shown.reward == 1.0


def test_the_loss_is_the_mean_over_written_tokens_whatever_the_padding():
    model = tiny_model(SMALL, len(TOKENIZER), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, seed=0).eval()
    batch = list(islice(demonstrations(QUICK, CHAT), 5))
    assert len({len(shown.token_ids) for shown in batch}) > 1
    total, count = 0.0, 0
    with torch.no_grad():
        for shown in batch:
            logp = model(torch.tensor([shown.token_ids])).logits[0].double().log_softmax(-1)
            for i in range(1, len(shown.token_ids)):
                if shown.loss_mask[i]:
                    total, count = total - logp[i - 1, shown.token_ids[i]].item(), count + 1
        assert imitation_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_every_demonstration_has_a_row_of_its_own_that_no_run_and_no_other_seed_uses(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int]] = []
    make_row = OrderDesk.make_row

    def record(split: str, index: int):
        asked.append((split, index))
        return make_row(split, index)

    monkeypatch.setattr(OrderDesk, "make_row", staticmethod(record))
    for seed in range(3):
        list(islice(demonstrations(replace(QUICK, seed=seed), CHAT), QUICK.steps * QUICK.batch_size))
    assert len(set(asked)) == len(asked) == 3 * 3 * 2
    assert all(split == "train" and index < 0 for split, index in asked)


@pytest.mark.slow
def test_the_mixture_is_right_less_than_half_the_time_and_the_oracle_always():
    shown = list(islice(demonstrations(QUICK, CHAT), 800))
    assert 0.35 < sum(one.reward for one in shown) / 800 < 0.5
    flawless = islice(demonstrations(replace(QUICK, errors=ErrorRates()), CHAT), 50)
    assert all(one.reward == 1.0 for one in flawless)


@pytest.mark.slow
def test_every_demonstration_is_short_and_in_the_vocabulary():
    shown = list(islice(demonstrations(QUICK, CHAT), 400))
    assert max(len(one.token_ids) for one in shown) <= 200
    assert all(TOKENIZER.unk_token_id not in one.token_ids for one in shown)


@pytest.mark.slow
def test_training_lowers_the_loss_well_below_that_of_a_uniform_guess():
    losses: list[float] = []
    spec = WarmStartSpec(steps=60, batch_size=8, lr=5e-3, warmup_steps=5, size=replace(SMALL, hidden=32))
    warm_start(spec, lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(len(TOKENIZER)), abs=0.5)
    assert sum(losses[-5:]) / 5 < 1.5


def test_the_number_of_threads_is_given_back():
    num_threads = torch.get_num_threads()
    warm_start(QUICK)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch_size": 0}, {"lr": 0.0}, {"warmup_steps": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="out of range"):
        WarmStartSpec(**wrong)
