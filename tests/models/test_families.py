"""Any causal decoder of transformers is trained, and gives what transformers gives; an engine says what it cannot sample.

The folders, of random weights, are those of `python -m benchmarks.families`, whose table is in docs/models.md.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertGenerationConfig, BertGenerationDecoder

from benchmarks.families.checks import MAX_CONTEXT, Checked, chat_of, plain_logps, recipe_of, tools_in
from benchmarks.families.folders import describe, write_folder
from benchmarks.families.served import Ranked, embedded_error
from benchmarks.families.shapes import FAMILIES, SHORT, WINDOW
from oldlogits.config.check import check
from oldlogits.core.engine import EngineSpec
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.engines.embedded.model_folder import decoder_config, read_config
from oldlogits.engines.embedded.rope import rotations
from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.load import decoder_layers, load_model, named_weights, recompute_layers
from oldlogits.models.rope import fix_frequencies
from oldlogits.run.cost import estimate
from oldlogits.run.run import run
from oldlogits.run.specs import engine_spec

from ..runs import events_of, recipe, summary_of

EMBEDDED = ("Llama 3", "Mistral, no window", "Qwen 2.5", "Qwen 3", "Qwen3-MoE")
ROUNDING = 2e-5
"""Nats between float32 and float64 in models whose every weight is drawn wide."""
NOISE = 1e-5
"""Nats between two packings, in float32."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_folder(FAMILIES[family], tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(scope="module")
def described(family, tmp_path_factory):
    """The folder without weights, as a dry run may find it."""
    return described_as(family, tmp_path_factory.mktemp("described"))


def described_as(name, folder):
    describe(FAMILIES[name], folder)
    return folder


@pytest.fixture(scope="module")
def checked(folder):
    return Checked(folder)


@pytest.mark.slow
def test_the_scorer_gives_what_the_models_own_forward_gives_one_sequence_at_a_time(checked):
    np.testing.assert_allclose(checked.scored(), plain_logps(checked.folder, checked.batch), atol=ROUNDING)


@pytest.mark.slow
def test_with_bf16_weights_it_gives_what_these_give(folder):
    checked = Checked(folder, "bf16")
    expected = plain_logps(folder, checked.batch, forward_dtype="bf16")
    np.testing.assert_allclose(checked.scored(), expected, atol=ROUNDING)
    assert np.abs(expected - plain_logps(folder, checked.batch)).max() > 1e-3


@pytest.mark.slow
def test_in_bf16_arithmetic_it_gives_what_transformers_gives_in_bf16_or_says_that_it_cannot(folder, family):
    model, arithmetic = load_model(folder), Arithmetic(compute=torch.bfloat16, head=torch.bfloat16)
    if family == "Mamba 2":
        with pytest.raises(ModelFolderError, match=r"model_type 'mamba2', trainer\.compute = 'bf16'.*allowed: .*'fp32'"):
            round_at_use(model, torch.bfloat16, arithmetic)
        return
    round_at_use(model, torch.bfloat16, arithmetic)
    attention = model.config._attn_implementation
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).eval()
    ids = torch.arange(40).remainder(27).view(2, 20)
    with torch.no_grad():
        found, expected = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    if family == "Falcon-H1":  # its multipliers, which are no weights, stay float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
        return
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_neither_other_sequences_nor_what_comes_later_move_a_log_prob(checked):
    assert checked.noise().largest <= NOISE


@pytest.mark.slow
def test_training_scores_as_the_models_own_forward_moves_every_weight_and_is_resumed_to_the_last_bit(folder, tmp_path):
    checked = Checked(folder)
    before = {name: weight.clone() for name, weight in named_weights(checked.trainer.live.model).items()}
    theta, lag0 = checked.update()
    np.testing.assert_allclose(theta, plain_logps(folder, checked.batch), atol=ROUNDING)
    assert lag0 <= NOISE
    after = named_weights(checked.trainer.live.model)
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == []
    now = checked.scored()
    resumed, started = checked.reloaded(tmp_path)
    assert np.array_equal(resumed, now)
    assert np.array_equal(started, now)
    names = [set(load_file(path / "model.safetensors")) for path in (folder, tmp_path / "model")]
    assert names[0] == names[1], "engines find the names that the folder had"
    np.testing.assert_allclose(now, plain_logps(tmp_path / "model", checked.batch), atol=5e-5)


@pytest.mark.slow
def test_layers_are_found_and_computed_again_in_the_backward_pass(folder):
    model = load_model(folder)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = model(ids, use_cache=False).logits
    recompute_layers(model)
    after = model(ids, use_cache=False).logits
    after.sum().backward()
    torch.testing.assert_close(after, before)
    assert any(parameter.grad is not None for parameter in decoder_layers(model).parameters())


def test_a_conversation_turn_by_turn_is_the_whole_one_with_the_tools_in_it_once(described, family):
    chat = FAMILIES[family].chat
    assert tools_in(described, chat.kwargs)[0] == chat.tools_in
    if not chat.tools_in:
        return
    written = chat_of(described, chat.tools_in, chat.kwargs)
    turn = "<|channel|>final<|message|>it is" if family == "GPT-OSS" else "it is"  # it names its channel itself
    ids = [*written.prompt_ids("o17 ?"), *written.turn_ids(turn), *written.continuation_ids([("tool", "42")])]
    assert written.decode(ids).count("Look a word up.") == written.decode(ids).count("be kind") == 1
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "o17 ?"},
        {"role": "assistant", "content": "it is"},
        {"role": "tool", "content": "42"},
    ]
    assert without_thoughts(written, ids) == without_thoughts(written, written.conversation_ids(messages))


def without_thoughts(written, ids):
    """Empty thoughts begin a turn that is sampled, and are not kept."""
    return written.decode(ids).replace("<think>\n\n</think>\n\n", "").replace("<think>\n\n</think>\n", "")


def test_a_template_whose_turns_end_where_the_next_message_begins_is_refused(tmp_path):
    described_as("GLM-4", tmp_path)
    with pytest.raises(ConfigError, match="does not end an assistant turn with a token of its own"):
        chat_of(tmp_path, "system", "{}")


def test_a_recipe_over_servers_takes_it_and_says_what_it_costs(described):
    config = recipe_of(described)
    check(config, needs_model=False)
    assert estimate(config).shape.layers >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_engine_samples_what_transformers_gives(name, tmp_path):
    assert embedded_error(write_folder(FAMILIES[name], tmp_path)) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3", "Mistral, no window"])
def test_the_embedded_engine_trains_it(name, tmp_path):
    family, out = FAMILIES[name], tmp_path / "run"
    folder = write_folder(family, tmp_path / "model")
    config = recipe(
        folder,
        num_updates=2,
        model={"path": str(folder), "chat_tools": family.chat.tools_in},
        env={"target": f"{Ranked.__module__}:Ranked", "max_episode_tokens": 512, "max_turns": 1},
    )
    assert run(config, out).error is None
    assert [event.version for event in events_of(out, "probe")] == [0, 1, 2]
    assert max(event.max_abs_error for event in events_of(out, "probe")) <= ROUNDING
    assert summary_of(out)["consistency_lag0_max_abs_error"] <= NOISE


def test_the_embedded_engine_refuses_the_others_and_names_the_engine_that_may(described, family):
    if family in EMBEDDED:
        return
    config = recipe_of(described, engine={"type": "embedded"})
    with pytest.raises(ModelFolderError, match=r"the embedded engine does not support.*engine\.type = 'vllm'"):
        decoder_config(engine_spec(config, described))
    if family == "Mistral":
        return  # it has windows, which are asked about when the longest sequence is known
    for engine in ({"type": "embedded"}, {"type": "vllm", "server": "embedded"}):
        with pytest.raises(ModelFolderError, match=r"the embedded engine does not support.*engine\.type = 'vllm'"):
            estimate(recipe_of(described, engine=engine))


def test_the_embedded_engine_samples_a_model_with_a_window_where_no_sequence_is_longer(tmp_path):
    folder = described_as("Mistral", tmp_path)
    spec = EngineSpec(model_path=str(folder), max_context=WINDOW)
    assert decoder_config(spec).window == WINDOW
    with pytest.raises(ModelFolderError, match=f"sliding_window = {WINDOW} .*allowed: .* no less than .* {WINDOW + 1}"):
        decoder_config(replace(spec, max_context=WINDOW + 1))


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_scaled_rotary_embeddings_that_lack_a_figure_are_refused_by_the_embedded_engine(missing, tmp_path):
    folder = described_as("Llama 3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"][missing]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=r"rope_parameters = .*allowed: rope_parameters = one with factor"):
        read_config(folder)


def test_scaled_rotary_embeddings_of_an_older_config_are_the_same_ones(tmp_path):
    folder = described_as("Llama 3", tmp_path)
    expected = rotations(read_config(folder), 64)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(rotations(read_config(folder), 64), expected)
    plain = rotations(replace_rope(folder, {"rope_type": "default"}), 64)
    assert (plain - expected).abs().max() > 0.1


def replace_rope(folder, scaling):
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Phi-3", "Phi-4-mini"])
@pytest.mark.parametrize("max_context", [SHORT, MAX_CONTEXT])
def test_frequencies_are_those_of_the_longest_sequence_of_the_run_whatever_is_read(name, max_context, tmp_path):
    folder = write_folder(FAMILIES[name], tmp_path)
    ids = torch.arange(MAX_CONTEXT)[None]

    def logits(model, length):
        with torch.no_grad():
            return model(ids[:, :length], use_cache=False).logits[0, :SHORT]

    expected = logits(load_model(folder), max_context)
    model = load_model(folder)
    fix_frequencies(model, max_context)
    for length in (SHORT, MAX_CONTEXT, SHORT):
        torch.testing.assert_close(logits(model, length), expected, rtol=0, atol=1e-5)
    assert (logits(load_model(folder), SHORT + MAX_CONTEXT - max_context) - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_frequencies_that_grow_with_what_is_read_are_fixed_too(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    family = replace(FAMILIES["Llama 3"], options={"rope_parameters": rope, "max_position_embeddings": SHORT})
    folder = write_folder(family, tmp_path)
    checked = Checked(folder)
    assert checked.noise().largest <= NOISE


def test_a_model_that_reads_what_follows_a_token_is_refused(tmp_path):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    model = BertGenerationDecoder(BertGenerationConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"read what stands behind them.*model_type 'bert-generation'.*is_decoder: true"):
        load_model(tmp_path)
