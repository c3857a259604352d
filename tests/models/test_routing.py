"""Routers that follow the engine: a plain NumPy mixture with forced experts is the oracle."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.auto import CONFIG_MAPPING

from oldlogits.batch.pad import MicroBatch
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.shard import shard_micro_batches
from oldlogits.core.errors import ConfigError, TrajectoryError
from oldlogits.models.load import recompute_layers
from oldlogits.models.routing import RoutingCounts, follow, follow_engine, routers_of, take_counts
from oldlogits.models.scorer import action_logps, score_tokens

NUM, CHOSEN, LAYERS, VOCAB = 6, 2, 2, 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": NUM,
    "num_local_experts": NUM,
    "num_experts_per_tok": CHOSEN,
    "pad_token_id": 0,
}
FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "gpt_oss"]
IDS = np.random.default_rng(0).integers(VOCAB, size=(3, 7))


def make(family, seed=0, **changes):
    config = CONFIG_MAPPING[family]()
    for key, value in (SHAPE | {"norm_topk_prob": True} | changes).items():
        if hasattr(config, key):
            setattr(config, key, value)
    config.layer_types = ["full_attention"] * LAYERS if getattr(config, "layer_types", None) else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def micro_of(routing, ids=IDS):
    """Sequences of one length, every token but the first of each scored."""
    rows, columns = (torch.from_numpy(a.ravel()) for a in np.indices((len(ids), ids.shape[1] - 1)))
    return MicroBatch(
        input_ids=torch.from_numpy(ids[:, :-1].copy()),
        row=rows,
        column=columns,
        targets=torch.from_numpy(ids[:, 1:].ravel()),
        temperature=torch.ones(len(rows)),
        flat=torch.arange(len(rows)),
        routing=None if routing is None else torch.from_numpy(routing),
        is_read=None if routing is None else torch.ones(routing.shape[:2], dtype=torch.bool),
    )


def scores(model, routing, **how):
    return action_logps(model, micro_of(routing), head_chunk_tokens=2048, **how)


@torch.no_grad()
def own_choice(family, **changes):
    """What a free model chooses: [row, column, layer, choice]."""
    model, seen = make(family, **changes), {}
    for layer, router in routers_of(model).items():

        def note(module, args, out, layer=layer):
            [seen[layer]] = [part for part in out if part.dtype == torch.int64 and part.shape[-1] == CHOSEN]

        router.register_forward_hook(note)
    scores(model, None)
    found = torch.stack([seen[layer] for layer in range(LAYERS)], 1)
    return found.view(len(IDS), -1, LAYERS, CHOSEN).numpy().astype(np.uint8)


def another(seed=1):
    draw = np.random.default_rng(seed).random((len(IDS), IDS.shape[1] - 1, LAYERS, NUM))
    return draw.argsort(-1)[..., :CHOSEN].astype(np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_its_own_choice_a_model_is_what_it_is_and_with_another_it_is_not(family):
    free, followed = make(family), make(family)
    follow_engine(followed, "replayed")
    expected = scores(free, None)
    assert torch.equal(scores(followed, None), expected), "nothing to follow"
    assert torch.equal(scores(followed, own_choice(family)), expected)
    assert torch.allclose(scores(followed, own_choice(family)[..., ::-1].copy()), expected, atol=1e-5), "a choice has no order"
    assert (scores(followed, another()) - expected).abs().max() > 1e-2


def numpy_mixture(block, x, chosen, *, normed):
    """Scalar loops over tokens and choices: sum_e p_e MLP_e(x), p the softmax over all experts of those that are chosen."""
    gate = block.gate.weight.double().numpy()
    gate_up, down = block.experts.gate_up_proj.double().numpy(), block.experts.down_proj.double().numpy()
    out = np.zeros_like(x)
    for t, state in enumerate(x):
        logits = gate @ state
        p = np.exp(logits - logits.max())
        p /= p.sum()
        total = sum(p[e] for e in chosen[t]) if normed else 1.0
        for e in chosen[t]:
            left, up = np.split(gate_up[e] @ state, 2)
            out[t] += p[e] / total * (down[e] @ (left / (1 + np.exp(-left)) * up))
    return out


@pytest.mark.parametrize("normed", [True, False])
@torch.no_grad()
def test_a_layer_with_forced_experts_is_that_of_a_plain_loop_over_them(normed):
    model = make("qwen3_moe", norm_topk_prob=normed)
    follow_engine(model, "replayed")
    routing = another()
    follow(model, micro_of(routing))
    x = torch.randn(18, 16, generator=torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        block = model.model.layers[layer].mlp
        found = block(x.view(3, 6, 16)).view(18, 16)
        expected = numpy_mixture(block, x.double().numpy(), routing.reshape(18, LAYERS, CHOSEN)[:, layer], normed=normed)
        assert np.abs(found.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


class ForcedRouter(torch.nn.Module):
    """A router that is written anew: its experts are given, their weights are those of Qwen3-MoE."""

    def __init__(self, weight, chosen):
        super().__init__()
        self.weight, self.chosen = weight, chosen

    def forward(self, states):
        logits = states @ self.weight.T
        weights = logits.softmax(-1)[torch.arange(len(logits))[:, None], self.chosen]
        return logits, weights / weights.sum(-1, keepdim=True), self.chosen


def test_scores_and_gradients_are_those_of_a_model_whose_choice_is_forced():
    routing = another()
    followed, forced = make("qwen3_moe"), make("qwen3_moe")
    follow_engine(followed, "replayed")
    chosen = torch.from_numpy(routing.reshape(-1, LAYERS, CHOSEN).astype(np.int64))
    for layer, block in enumerate(forced.model.layers):
        block.mlp.gate = ForcedRouter(block.mlp.gate.weight, chosen[:, layer])
    a, b = scores(followed, routing), scores(forced, None)
    assert torch.allclose(a, b, atol=1e-6)
    a.sum().backward()
    b.sum().backward()
    gradients = dict(forced.named_parameters())
    for name, parameter in followed.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5), name
    assert followed.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-3, "the router learns how much each is worth"


def test_recorded_routing_changes_nothing_and_its_differences_are_counted():
    model, free = make("qwen3_moe"), make("qwen3_moe")
    follow_engine(model, "recorded")
    own = own_choice("qwen3_moe")
    routing = own.copy()
    out = next(e for e in range(NUM) if e not in own[1, 2, 0])
    routing[1, 2, 0, 0] = out
    routing[0, 0, 1] = [e for e in range(NUM) if e not in own[0, 0, 1]][:CHOSEN]
    micro = micro_of(routing)
    micro.is_read[2] = False  # padding
    with torch.no_grad():
        found = action_logps(model, micro, head_chunk_tokens=2048)
    assert torch.equal(found, scores(free, None))
    counts = take_counts(model)
    assert counts == RoutingCounts(num_choices=12 * LAYERS * CHOSEN, num_other_choices=3, num_tokens=12, num_other_tokens=2)
    assert counts.metrics("routing/x") == {"routing/x_other_choices": 3 / 48, "routing/x_other_tokens": 2 / 12}
    assert take_counts(model).metrics("routing/x") == {}, "they are counted from the last look on"
    assert take_counts(free) == RoutingCounts()


def test_a_backward_pass_that_computes_layers_again_follows_the_same_experts_and_counts_once():
    routing, models = another(), [make("qwen3_moe"), make("qwen3_moe")]
    recompute_layers(models[1])
    for model in models:
        follow_engine(model, "replayed")
        scores(model, routing).sum().backward()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a.grad, b.grad)
    counts = [take_counts(model) for model in models]
    assert counts[0] == counts[1]
    assert counts[0].num_tokens == 18


def test_scores_of_sequences_follow_their_own_experts_whatever_the_packing():
    model = make("qwen3_moe")
    follow_engine(model, "replayed")
    lengths, rng = [7, 3, 5, 2], np.random.default_rng(5)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    num = int(starts[-1])
    routing = rng.random((num, LAYERS, NUM)).argsort(-1)[..., :CHOSEN].astype(np.uint16)
    batch = Sequences(
        token_ids=rng.integers(VOCAB, size=num), temperature=np.ones(num, np.float32), starts=starts, routing=routing
    )
    tokens = np.setdiff1d(np.arange(num), starts)
    alone = []
    for start, end in pairwise(starts):
        micro = micro_of(routing[None, start : end - 1], batch.token_ids[None, start:end])
        with torch.no_grad():
            alone.append(action_logps(model, micro, head_chunk_tokens=4).numpy())
    for budget in (1, 14, 100):
        found = score_tokens(model, batch, tokens, micro_batch_tokens=budget, head_chunk_tokens=4)
        assert np.abs(found - np.concatenate(alone)).max() < 1e-5
    [micro] = [one.micro for one in shard_micro_batches(batch, tokens, 100, rank=0, num_ranks=1)]
    assert micro.is_read.sum(1).tolist() == [6, 4, 2, 1]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3", "no routers"),
        ("glm4_moe", "3 calls of top-k"),
        ("phimoe", "0 calls of top-k"),
        ("minimax_m2", "more arguments than the states"),
    ],
)
def test_a_family_whose_choice_cannot_be_replaced_is_refused_with_the_reason(family, why):
    changes = {"first_k_dense_replace": 0, "n_routed_experts": NUM, "head_dim": 8}
    with pytest.raises(ConfigError, match=why):
        follow_engine(make(family, **changes), "recorded")
    follow_engine(make(family, **changes), "off")


@pytest.mark.parametrize(
    ("routing", "allowed"),
    [
        (np.full((3, 6, LAYERS, CHOSEN), NUM, np.uint8), "below 6 in layer 1"),
        (np.zeros((3, 6, 1, CHOSEN), np.uint8), "below 6 in layer 1"),
        (np.zeros((3, 6, LAYERS, 1), np.uint8), "2 for 18"),
    ],
)
def test_routing_of_another_model_is_refused(routing, allowed):
    model = make("qwen3_moe")
    follow_engine(model, "replayed")
    with pytest.raises(TrajectoryError, match=rf"the routing is not that of this model.*{allowed}"):
        scores(model, routing)


def test_layers_without_experts_have_no_router_and_their_rows_do_not_count():
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**(SHAPE | {"head_dim": 8, "num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True}))
    ).eval()
    assert list(routers_of(model)) == [1, 2]
    follow_engine(model, "replayed")
    routing = np.concatenate([np.full((3, 6, 1, CHOSEN), 255, np.uint8), another()], axis=2)
    with torch.no_grad():
        scores(model, routing)
    assert take_counts(model).num_choices == 18 * 2 * CHOSEN
