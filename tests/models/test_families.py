"""Any decoder of transformers can be trained; what the embedded engine cannot sample is for servers, and so it is said."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM as AnyModel
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ModelFolderError
from oldlogits.models.load import decoder_layers, load_model, recompute_layers
from oldlogits.models.scorer import score_tokens
from oldlogits.run.cost import estimate

from ..builders import batch_of, sampled, trajectory

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama 3": LlamaConfig(**SHAPE, rope_parameters=LLAMA_3),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma 2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0),
    "gemma 3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, sliding_window_pattern=2),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "phi 3": Phi3Config(**SHAPE),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "gpt 2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2),
}
BATCH = batch_of(
    [
        trajectory([3, 9, 10], sampled([11, 12, 2], temperature=0.7), [13, 14], sampled([15, 2, 7, 7, 9], temperature=0.7)),
        trajectory([9], sampled([4]), id="g0.1"),
    ]
)
TOKENS = np.flatnonzero(BATCH.loss_mask)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tiny_folder, tmp_path_factory):
    """A random model of the family, with a tokenizer beside it."""
    path = tmp_path_factory.mktemp("model")
    for file in tiny_folder.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, path)
    torch.manual_seed(0)
    model = AnyModel.from_config(FAMILIES[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    return path


def recipe(folder, **engine):
    return config_from_table({"model": {"path": str(folder)}, "runtime": {"type": "local"}, "engine": engine})


@pytest.mark.slow
def test_the_scorer_gives_what_the_models_own_forward_gives(folder):
    model, expected = AnyModel.from_pretrained(folder).double().eval(), []
    for start, end in zip(BATCH.starts[:-1], BATCH.starts[1:], strict=True):
        ids = torch.from_numpy(BATCH.token_ids[start:end])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1] / torch.from_numpy(BATCH.temperature[start + 1 : end, None]).clamp(min=0.1)
        expected.append(torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0][BATCH.loss_mask[start + 1 : end]])
    found = score_tokens(load_model(folder), BATCH, TOKENS, micro_batch_tokens=64, head_chunk_tokens=3)
    np.testing.assert_allclose(found, torch.cat(expected), atol=2e-5)


@pytest.mark.slow
def test_layers_are_found_and_computed_again_in_the_backward_pass(folder):
    model = load_model(folder)
    assert len(decoder_layers(model)) == 2
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = model(ids, use_cache=False).logits
    recompute_layers(model)
    after = model(ids, use_cache=False).logits
    after.sum().backward()
    torch.testing.assert_close(after, before)
    assert any(parameter.grad is not None for parameter in decoder_layers(model).parameters())


def test_a_recipe_over_servers_takes_it_and_says_what_it_costs(folder):
    config = recipe(folder, type="vllm")
    check(config)
    assert estimate(config).shape.layers == 2


def test_the_embedded_engine_refuses_it_and_names_the_engine_that_may(folder):
    for engine in ({"type": "embedded"}, {"type": "vllm", "server": "embedded"}):
        with pytest.raises(ModelFolderError, match=r"the embedded engine does not support.*engine\.type = 'vllm'"):
            estimate(recipe(folder, **engine))
