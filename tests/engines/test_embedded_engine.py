import asyncio
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from oldlogits.core.engine import EngineSpec, RolloutEngine, Sampling, Span
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.core.trajectory import Context
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.decoder import Decoder
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.placement import WARM_STEPS
from oldlogits.engines.embedded.stepwise import EmbeddedEngine
from oldlogits.models.mixed_kv import cache_keyword
from oldlogits.rollout.turns import sampled_segments

from .reference import VOCAB, expected_logprobs, kept_logprobs, load, logp_of, make_model, perturbed, save, weights_of

CONTEXT = 96


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def versions(model, folder):
    """Weights of versions 0, 1, 2, ..."""
    first = weights_of(model)
    return {version: perturbed(first, version, 0.05) if version else first for version in range(7)}


@pytest.fixture
def make_core(folder):
    def make(max_num_seqs=8, seed=0, **options):
        return EngineCore(EngineSpec(model_path=folder, max_num_seqs=max_num_seqs, max_context=CONTEXT, seed=seed, **options))

    return make


def prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def run(core):
    finished = {}
    while not core.idle:
        finished.update(core.step())
    return finished


def steps(core, count):
    finished = {}
    for _ in range(count):
        finished.update(core.step())
    return finished


def update(core, weights, version, kv="recompute"):
    core.pause("keep", kv)
    core.update_weights(weights, version)
    core.resume()


def assert_exact(model, versions, prompts, finished, temperature=1.0):
    for name, generation in finished.items():
        expected = expected_logprobs(model, versions, prompts[name], generation, temperature)
        assert list(generation.logprobs) == pytest.approx(expected, abs=1e-5)
        assert [span.start for span in generation.spans] == [0, *(span.end for span in generation.spans)][:-1]
        assert len(generation.output_ids) == (generation.spans[-1].end if generation.spans else 0)


def assert_kept(model, versions, prompts, finished):
    """Every token attends to entries of the versions that `kept_logprobs` says."""
    for name, generation in finished.items():
        segments = [Context(token_ids=tuple(prompts[name])), *sampled_segments(generation, 1.0)]
        assert list(generation.logprobs) == pytest.approx(kept_logprobs(model, versions, segments), abs=1e-5)


def test_logprobs_are_those_of_a_full_forward_with_more_requests_than_slots(make_core, model, versions):
    core = make_core(max_num_seqs=5)
    prompts = {str(i): prompt(1 + 3 * i, i) for i in range(12)}
    for name, tokens in prompts.items():
        core.add(name, tokens, Sampling(max_tokens=5 + int(name), temperature=0.7))
    finished = run(core)
    assert finished.keys() == prompts.keys()
    assert [len(finished[str(i)].output_ids) for i in range(12)] == [5 + i for i in range(12)]
    assert_exact(model, versions, prompts, finished, temperature=0.7)


def test_after_an_update_in_mid_flight_every_token_belongs_to_its_version_also_in_a_group(make_core, model, versions):
    core = make_core(max_num_seqs=12)
    prompts = {f"group {i}": prompt(37, 1) for i in range(6)} | {f"single {i}": prompt(9 + i, 50 + i) for i in range(4)}
    for name, tokens in prompts.items():
        core.add(name, tokens, Sampling(max_tokens=30))
    finished = {}
    for version in (1, 2):
        finished |= steps(core, 8)
        update(core, versions[version], version)
    finished |= run(core)
    spans = (Span(version=0, start=0, end=8), Span(version=1, start=8, end=16), Span(version=2, start=16, end=30))
    assert all(generation.spans == spans for generation in finished.values())
    assert_exact(model, versions, prompts, finished)


def test_a_group_computes_its_prompt_once_and_a_next_turn_only_its_new_tokens(make_core, model, versions):
    core = make_core()
    shared, sampling = prompt(40, 1), Sampling(max_tokens=10)
    prompts = {str(i): shared for i in range(8)}
    for name in prompts:
        core.add(name, shared, sampling)
    finished = run(core)
    assert (core.stats.num_prefill_tokens, core.stats.num_prefix_hit_tokens) == (39, 7 * 39)
    assert_exact(model, versions, prompts, finished)
    second = {f"{i}.2": [*shared, *finished[str(i)].output_ids, *prompt(5, 70 + i)] for i in range(8)}
    for name, tokens in second.items():
        core.add(name, tokens, sampling)
    finished = run(core)
    assert core.stats.num_prefill_tokens == 39 + 8 * 5  # the newest output token and four of the five new ones
    assert_exact(model, versions, second, finished)


def test_a_member_that_arrives_later_finds_the_prompt_of_its_group_while_another_samples_and_after_it_has_ended(make_core):
    core, shared = make_core(), prompt(40, 1)
    for name, num_steps in (("first", 3), ("meanwhile", 30), ("after all", 1)):
        core.add(name, shared, Sampling(max_tokens=8))
        steps(core, num_steps)
    assert core.stats.num_prefill_tokens == 39
    assert core.stats.num_prefix_hit_tokens == 2 * 39


@pytest.fixture
def passes(monkeypatch):
    """The tokens of each forward pass."""
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(
        Decoder, "forward", lambda self, ids, *args, **kw: seen.append(len(ids)) or forward(self, ids, *args, **kw)
    )
    return seen


def test_a_step_computes_the_rows_that_decode_and_reads_a_few_tokens_of_a_next_turn_beside_them(
    make_core, model, versions, passes
):
    core = make_core(max_num_seqs=24)
    prompts = {f"{i}/0": prompt(20, i) for i in range(24)}
    for i, (name, ids) in enumerate(prompts.items()):
        core.add(name, ids, Sampling(max_tokens=2 if i < 18 else 12))
    finished = steps(core, 3)
    assert len(finished) == 18
    del passes[:]
    core.step()
    assert passes == [6]
    prompts["3/1"] = [*prompts["3/0"], *finished["3/0"].output_ids, *prompt(7, 99)]
    core.add("3/1", prompts["3/1"], Sampling(max_tokens=3))
    core.step()
    assert passes == [6, 7 + 7]  # the newest output and six of the new ones beside seven rows
    assert_exact(model, versions, prompts, finished | run(core))


def test_a_long_prompt_and_one_whose_log_probs_are_asked_for_have_a_pass_of_their_own(make_core, passes):
    core = make_core()
    core.add("long", prompt(80, 1), Sampling(max_tokens=2))
    core.step()
    core.add("asked", prompt(9, 2), Sampling(max_tokens=1, prompt_logprobs=True))
    core.step()
    assert passes[0] == 79
    assert passes[2] == 8
    assert len(passes) == 4


@pytest.mark.slow
def test_few_shapes_give_what_the_rows_that_decode_give(make_core, versions):
    """What a GPU computes."""

    def play(has_few_shapes):
        core = make_core(max_num_seqs=40)
        core.decode_step.has_few_shapes = has_few_shapes
        for i in range(60):
            core.add(f"{i}/0", prompt(3 + i % 30, i % 7), Sampling(max_tokens=2 + 5 * (i % 6), top_k=3 * (i % 2)))
        finished = steps(core, 9)
        update(core, versions[1], 1)
        return finished | run(core)

    rows, shapes = play(False), play(True)
    assert {name: (one.output_ids, one.spans) for name, one in rows.items()} == {
        name: (one.output_ids, one.spans) for name, one in shapes.items()
    }
    for name, one in rows.items():
        assert list(one.logprobs) == pytest.approx(shapes[name].logprobs, abs=1e-5)


def test_a_recomputation_shares_the_common_prefix_again(make_core, versions):
    core = make_core()
    for i in range(8):
        core.add(str(i), [*prompt(32, 1), *prompt(4, i)], Sampling(max_tokens=20))
    steps(core, 10)
    before = core.stats.num_prefill_tokens
    update(core, versions[1], 1)
    core.step()
    assert core.stats.num_prefill_tokens - before == 32 + 8 * (4 + 10 - 1)


def test_prefix_sharing_is_never_across_an_update(make_core, model, versions):
    core = make_core()
    core.add("old", prompt(40, 1), Sampling(max_tokens=4))
    run(core)
    update(core, versions[1], 1)
    core.add("new", prompt(40, 1), Sampling(max_tokens=4))
    finished = run(core)
    assert core.stats.num_prefix_hit_tokens == 0
    assert finished["new"].spans == (Span(version=1, start=0, end=4),)
    assert_exact(model, versions, {"new": prompt(40, 1)}, finished)


def test_a_slot_stays_warm_for_its_next_turn_while_others_come_and_go(make_core):
    core = make_core(max_num_seqs=4)
    core.add("agent", prompt(20, 1), Sampling(max_tokens=4))
    output = run(core)["agent"].output_ids
    for i in range(3):
        core.add(f"passer-by {i}", prompt(20, 10 + i), Sampling(max_tokens=4))
        run(core)
    hits = core.stats.num_prefix_hit_tokens
    core.add("agent.2", [*prompt(20, 1), *output, 5], Sampling(max_tokens=4))
    run(core)
    assert core.stats.num_prefix_hit_tokens - hits == 23
    assert core.stats.num_steps < WARM_STEPS


def test_the_longest_of_several_known_prefixes_is_found(make_core):
    core, first = make_core(), prompt(16, 1)
    core.add("a", first, Sampling(max_tokens=21))
    output = list(run(core)["a"].output_ids)
    core.add("b", [*first, *output[:16], 60 - output[16]], Sampling(max_tokens=1))
    run(core)
    hits = core.stats.num_prefix_hit_tokens
    core.add("a.2", [*first, *output, 5], Sampling(max_tokens=1))
    run(core)
    assert core.stats.num_prefix_hit_tokens - hits == 36


def test_a_next_turn_goes_on_in_its_own_slot_and_a_stranger_leaves_it_alone(make_core):
    core, system = make_core(max_num_seqs=3), prompt(16, 1)
    texts = {"b": [*system, 2, *prompt(9, 2)], "a": [*system, 3, *prompt(9, 3)]}
    for name, ids in texts.items():
        core.add(name, ids, Sampling(max_tokens=4))
        texts[name] = [*ids, *run(core)[name].output_ids]

    def hits_of(name, ids):
        before = core.stats.num_prefix_hit_tokens
        core.add(name, ids, Sampling(max_tokens=4))
        run(core)
        return core.stats.num_prefix_hit_tokens - before

    assert hits_of("stranger", [*system, 4, *prompt(9, 4)]) == 16
    assert hits_of("a.2", [*texts["a"], 5]) == 29
    assert hits_of("b.2", [*texts["b"], 5]) == 29


@pytest.mark.parametrize(("wait", "slot"), [(0, 3), (WARM_STEPS, 0)])
def test_the_slot_freed_longest_ago_is_taken_until_they_cool_down_then_the_lowest(make_core, wait, slot):
    core = make_core(max_num_seqs=4)
    for i in range(4):
        core.add(str(i), prompt(20, i), Sampling(max_tokens=6 - i))  # slot 3 is free first, slot 0 last
    run(core)
    if wait:
        core.add("long", [1], Sampling(max_tokens=wait + 1))  # takes slot 3
        core.set_quota("long", wait)
        run(core)
        core.abort("long")
    core.add("next", prompt(20, 10), Sampling(max_tokens=2))
    core.step()
    assert set(core._decoding) == {slot}


@torch.no_grad()
def stale_logp(model, old, new, ids, num_old):
    """Of the tokens after the first `num_old + 1`: entries before that index are of the old weights."""
    cached = {cache_keyword(model): DynamicCache()}
    load(model, old)(torch.tensor([ids[:num_old]]), **cached)
    logits = load(model, new)(torch.tensor([ids[num_old:]]), **cached).logits[0, :-1]
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[num_old + 1 :])[:, None]).squeeze(1).tolist()


def test_stale_keeps_the_old_entries_and_marks_what_attends_to_them(make_core, model, versions):
    core, ids = make_core(), prompt(20, 1)
    core.add("a", ids, Sampling(max_tokens=16))
    steps(core, 6)
    update(core, versions[1], 1, kv="stale")
    assert core.stats.num_prefill_tokens == 19
    generation = run(core)["a"]
    assert generation.spans == (Span(version=0, start=0, end=6), Span(version=1, start=6, end=16, kv="mixed"))
    full = [*ids, *generation.output_ids]
    stale = stale_logp(model, versions[0], versions[1], full, 25)
    assert list(generation.logprobs[6:]) == pytest.approx(stale, abs=1e-5)
    fresh = logp_of(load(model, versions[1]), full)[25:]
    assert max(abs(a - b) for a, b in zip(generation.logprobs[6:], fresh, strict=True)) > 1e-3


def test_after_a_stale_update_a_group_shares_only_what_the_new_version_computed(make_core, model, versions):
    core, shared = make_core(), prompt(40, 1)
    for name in ("a", "b"):
        core.add(name, shared, Sampling(max_tokens=12))
    core.add("ended", shared, Sampling(max_tokens=2))
    finished = steps(core, 4)
    hits, computed = core.stats.num_prefix_hit_tokens, core.stats.num_prefill_tokens
    update(core, versions[1], 1, kv="stale")
    for name in ("c", "d"):
        core.add(name, shared, Sampling(max_tokens=12))
    finished |= run(core)
    assert (core.stats.num_prefill_tokens - computed, core.stats.num_prefix_hit_tokens - hits) == (39, 39)
    assert finished["b"].spans == (Span(version=0, start=0, end=4), Span(version=1, start=4, end=12, kv="mixed"))
    assert finished["d"].spans == (Span(version=1, start=0, end=12),)
    assert_kept(model, versions, dict.fromkeys("abcd", shared), {name: finished[name] for name in "abcd"})


def test_a_next_turn_goes_on_over_its_own_older_entries_and_a_stranger_with_the_same_tokens_does_not(
    make_core, model, versions
):
    core, ids = make_core(), prompt(20, 1)
    core.add("a/0", ids, Sampling(max_tokens=8))
    steps(core, 4)
    update(core, versions[1], 1, kv="stale")
    first = run(core)["a/0"]
    update(core, versions[2], 2, kv="stale")
    computed, following = core.stats.num_prefill_tokens, [*ids, *first.output_ids, 5, 6]
    for name in ("b/1", "a/1"):
        core.add(name, following, Sampling(max_tokens=4))
    finished = run(core)
    assert core.stats.num_prefill_tokens - computed == 29 + 2  # all of the stranger's; the newest output and one read
    assert finished["b/1"].spans == (Span(version=2, start=0, end=4),)
    assert finished["a/1"].spans == (Span(version=2, start=0, end=4, kv="mixed"),)
    assert_exact(model, versions, {"b/1": following}, {"b/1": finished["b/1"]})
    segments = [Context(token_ids=tuple(ids)), *sampled_segments(first, 1.0), Context(token_ids=(5, 6))]
    expected = kept_logprobs(model, versions, [*segments, *sampled_segments(finished["a/1"], 1.0)])
    assert [*first.logprobs, *finished["a/1"].logprobs] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lost", ["to another request", "by a recomputing update", "since the tokens differ"])
def test_a_next_turn_that_has_lost_its_older_entries_is_computed_anew_and_fresh(make_core, model, versions, lost):
    core, ids = make_core(max_num_seqs=1), prompt(20, 1)
    core.add("a/0", ids, Sampling(max_tokens=8))
    steps(core, 4)
    update(core, versions[1], 1, kv="stale")
    following = [*ids, *run(core)["a/0"].output_ids, 5]
    if lost == "to another request":
        core.add("b/0", prompt(3, 2), Sampling(max_tokens=1))
        run(core)
    elif lost == "by a recomputing update":
        update(core, versions[1], 1)
        update(core, versions[1], 1, kv="stale")
    else:
        following[3] ^= 1
    core.add("a/1", following, Sampling(max_tokens=4))
    finished = run(core)
    assert core.stats.num_prefix_hit_tokens == 0
    assert finished["a/1"].spans == (Span(version=1, start=0, end=4),)
    assert_exact(model, versions, {"a/1": following}, finished)


def test_weights_change_only_while_paused_and_never_go_back(make_core, model, versions):
    core = make_core()
    core.add("a", prompt(5, 1), Sampling(max_tokens=6))
    with pytest.raises(ConfigError, match="only between pause and resume"):
        core.update_weights(versions[1], 1)
    core.pause("keep", "recompute")
    core.update_weights(versions[2], 2)
    with pytest.raises(ConfigError, match="version 1 while version 2 is paused"):
        core.update_weights(versions[1], 1)
    with pytest.raises(ModelFolderError):
        core.update_weights({}, 3)
    core.resume()
    finished = run(core)
    assert finished["a"].spans == (Span(version=2, start=0, end=6),)
    assert_exact(model, versions, {"a": prompt(5, 1)}, finished)


def test_a_pause_without_an_update_changes_nothing(make_core):
    quiet, paused = make_core(), make_core()
    for core in (quiet, paused):
        core.add("a", prompt(20, 1), Sampling(max_tokens=20))
    steps(paused, 7)
    paused.pause("keep", "recompute")
    assert paused.idle
    assert paused.step() == []
    partial = paused.partials()["a"]
    paused.resume()
    expected = run(quiet)
    assert run(paused) == expected
    assert partial.output_ids == expected["a"].output_ids[:7]
    assert partial.logprobs == expected["a"].logprobs[:7]
    assert partial.spans == (Span(version=0, start=0, end=7),)


@pytest.mark.parametrize("kv", ["recompute", "stale"])
def test_what_turns_have_sampled_since_is_told_with_its_versions_and_changes_nothing(make_core, versions, kv):
    """From every token on; of the trajectories that are asked for."""
    quiet, asked = make_core(max_num_seqs=2), make_core(max_num_seqs=2)
    for core in (quiet, asked):
        for name in ("a/0", "b/0", "waiting/0"):
            core.add(name, prompt(10, ord(name[0])), Sampling(max_tokens=12))
        for version in (1, 2):
            for _ in range(4):
                core.step()
                if core is asked:
                    core.grown({"a": 1, "b": 0, "waiting": 0})
            core.pause("keep", kv)
            core.update_weights(versions[version], version)
            core.resume()
        core.step()
    whole = asked.partials()["a/0"]
    assert [(span.version, span.start, span.end) for span in whole.spans] == [(0, 0, 4), (1, 4, 8), (2, 8, 9)]
    for start in range(11):
        (told,) = asked.grown({"a": start, "nobody": 0}).values()
        assert (told.output_ids, told.logprobs) == (whole.output_ids[start:], whole.logprobs[start:])
        kept = [(span, max(span.start, start), span.end) for span in whole.spans if span.end > start]
        assert told.spans == tuple(replace(span, start=first - start, end=end - start) for span, first, end in kept)
    assert asked.grown({"waiting": 0})["waiting/0"].output_ids == ()
    assert run(asked) == run(quiet)


def test_pause_with_abort_returns_what_was_sampled_and_frees_the_slots(make_core):
    core, quiet = make_core(max_num_seqs=2), make_core(max_num_seqs=2)
    for name in ("a", "b", "pending"):
        core.add(name, prompt(10, ord(name[0])), Sampling(max_tokens=20))
        quiet.add(name, prompt(10, ord(name[0])), Sampling(max_tokens=20))
    steps(core, 4)
    aborted = dict(core.pause("abort", "recompute"))
    expected = run(quiet)
    assert {name: len(generation.output_ids) for name, generation in aborted.items()} == {"a": 4, "b": 4, "pending": 0}
    assert aborted["a"].output_ids == expected["a"].output_ids[:4]
    assert {generation.finish_reason for generation in aborted.values()} == {"abort"}
    assert aborted["pending"].spans == ()
    core.resume()
    assert core.idle
    for name in ("a", "b"):
        core.add(name, prompt(5, 1), Sampling(max_tokens=1))
    assert len(core.step()) == 2


def test_abort_ends_one_request_and_leaves_the_others_alone(make_core, model, versions):
    core = make_core(max_num_seqs=2)
    prompts = {name: prompt(8, i) for i, name in enumerate("abc")}
    for name, ids in prompts.items():
        core.add(name, ids, Sampling(max_tokens=12))
    steps(core, 5)
    partial = core.abort("a")
    assert (len(partial.output_ids), partial.finish_reason) == (5, "abort")
    assert core.abort("a") is None
    finished = {"a": partial, **run(core)}
    assert finished.keys() == prompts.keys()
    assert_exact(model, versions, prompts, finished)


def test_a_quota_holds_a_request_in_its_slot_until_it_is_raised(make_core, model, versions):
    core = make_core(max_num_seqs=2)
    prompts = {"held": prompt(20, 1), "free": prompt(20, 2)}
    for name, ids in prompts.items():
        core.add(name, ids, Sampling(max_tokens=12))
    core.set_quota("held", 5)
    finished = run(core)
    assert finished.keys() == {"free"}
    assert len(core.partials()["held"].output_ids) == 5
    prefilled = core.stats.num_prefill_tokens
    update(core, versions[1], 1)
    assert core.idle
    update(core, versions[2], 2)
    assert core.stats.num_prefill_tokens == prefilled  # recomputed when it goes on, not before
    core.set_quota("held", 8)
    assert run(core) == {}
    assert core.stats.num_prefill_tokens == prefilled + 24
    core.set_quota("held", None)
    finished |= run(core)
    assert finished["held"].spans == (Span(version=0, start=0, end=5), Span(version=2, start=5, end=12))
    assert_exact(model, versions, prompts, finished)


def test_a_quota_of_zero_keeps_a_request_from_starting_and_a_lowered_one_holds_at_once(make_core):
    core = make_core()
    core.add("a", prompt(5, 1), Sampling(max_tokens=9))
    core.set_quota("a", 0)
    assert core.idle
    core.set_quota("a", 6)
    steps(core, 3)
    core.set_quota("a", 2)
    assert core.idle
    core.set_quota("a", 9)
    assert len(run(core)["a"].output_ids) == 9
    core.set_quota("a", 0)  # it has finished: without effect
    assert core.idle


def test_held_requests_that_fill_all_slots_leave_the_engine_idle(make_core):
    core = make_core(max_num_seqs=1)
    core.add("held", prompt(5, 1), Sampling(max_tokens=9))
    core.add("waits", prompt(5, 2), Sampling(max_tokens=9))
    core.set_quota("held", 2)
    assert run(core) == {}
    core.set_quota("held", None)
    assert run(core).keys() == {"held", "waits"}


def test_one_seed_and_one_order_of_calls_give_one_result(make_core, versions):
    def play(seed):
        core = make_core(max_num_seqs=3, seed=seed)
        for i in range(6):
            core.add(str(i), prompt(18, i % 2), Sampling(max_tokens=10))
        finished = steps(core, 4)
        update(core, versions[1], 1)
        return finished | run(core)

    assert play(0) == play(0)
    assert play(0) != play(1)


@pytest.mark.slow
def test_tokens_are_drawn_from_the_models_distribution(make_core, model, versions):
    core, ids, n = make_core(max_num_seqs=64), prompt(4, 3), 4000
    for i in range(n):
        core.add(str(i), ids, Sampling(max_tokens=1, temperature=1.5))
    counts = torch.zeros(VOCAB)
    for generation in run(core).values():
        counts[generation.output_ids[0]] += 1
    with torch.no_grad():
        expected = n * torch.softmax(load(model, versions[0])(torch.tensor([ids])).logits[0, -1] / 1.5, dim=-1)
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert degrees > 10
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


def test_greedy_follows_the_argmax_and_reports_logprobs_at_temperature_one(make_core, model, versions):
    core, ids = make_core(), prompt(12, 4)
    core.add("a", ids, Sampling(max_tokens=10, temperature=0.0))
    generation = run(core)["a"]
    load(model, versions[0])
    expected = list(ids)
    for _ in range(10):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert list(generation.output_ids) == expected[12:]
    assert list(generation.logprobs) == pytest.approx(logp_of(model, expected)[11:], abs=1e-5)


def test_a_restricted_support_is_renormalised(make_core, model, versions):
    core, ids = make_core(), prompt(12, 4)
    core.add("k", ids, Sampling(max_tokens=20, top_k=3))
    core.add("full", prompt(7, 5), Sampling(max_tokens=20))
    finished = run(core)
    generation, full = finished["k"], [*ids, *finished["k"].output_ids]
    with torch.no_grad():
        logits = load(model, versions[0])(torch.tensor([full])).logits[0, 11:-1]
    best, tokens = logits.topk(3, dim=-1)
    for i, (token, logprob) in enumerate(zip(generation.output_ids, generation.logprobs, strict=True)):
        assert token in tokens[i].tolist()
        rank = tokens[i].tolist().index(token)
        assert logprob == pytest.approx(torch.log_softmax(best[i], dim=-1)[rank].item(), abs=1e-5)
    assert_exact(model, versions, {"full": prompt(7, 5)}, {"full": finished["full"]})


def test_sampling_ends_at_a_stop_token_at_max_tokens_and_at_the_context(make_core):
    core = make_core()
    core.add("free", prompt(5, 1), Sampling(max_tokens=30))
    free = run(core)["free"].output_ids
    core = make_core()
    stop = free[12]
    core.add("free", prompt(5, 1), Sampling(max_tokens=30, stop_token_ids=(VOCAB + 5, stop)))
    stopped = run(core)["free"]
    assert stopped.output_ids == free[: free.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    core.add("context", prompt(CONTEXT - 3, 1), Sampling(max_tokens=30))
    core.add("last", prompt(CONTEXT - 1, 2), Sampling(max_tokens=30))
    core.add("max", prompt(5, 1), Sampling(max_tokens=2))
    finished = run(core)
    assert {name: len(generation.output_ids) for name, generation in finished.items()} == {"context": 3, "last": 1, "max": 2}
    assert {generation.finish_reason for generation in finished.values()} == {"length"}


def test_prompt_logprobs_are_those_at_temperature_one_also_of_a_known_prompt(make_core, model, versions):
    core, ids = make_core(), prompt(40, 6)
    core.add("plain", ids, Sampling(max_tokens=3))
    run(core)
    core.add("asked", ids, Sampling(max_tokens=3, temperature=0.5, prompt_logprobs=True))
    core.add("one token", ids[:1], Sampling(max_tokens=3, prompt_logprobs=True))
    core.step()
    update(core, versions[1], 1)  # they stay those of the version that read the prompt first
    finished = run(core)
    assert list(finished["asked"].prompt_logprobs) == pytest.approx(logp_of(load(model, versions[0]), ids), abs=1e-5)
    assert finished["one token"].prompt_logprobs == ()


def test_weights_that_are_not_finite_leave_no_trace_after_the_next_update(make_core, model, versions):
    core = make_core(max_num_seqs=3)
    for i in range(3):
        core.add(f"poisoned {i}", prompt(30, i), Sampling(max_tokens=6))
    core.step()
    update(core, {name: torch.full_like(tensor, math.nan) for name, tensor in versions[0].items()}, 1)
    steps(core, 2)
    core.abort("poisoned 0")
    core.abort("poisoned 1")
    update(core, versions[2], 2)
    prompts = {"long": prompt(45, 4), "short": prompt(3, 5)}  # the short one is masked where the cache was poisoned
    for name, ids in prompts.items():
        core.add(name, ids, Sampling(max_tokens=10))
    finished = run(core)
    assert [math.isnan(x) for x in finished.pop("poisoned 2").logprobs] == [False, True, True, False, False, False]
    assert_exact(model, versions, prompts, finished)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 tokens; allowed: 1 to 95"),
        ([1] * CONTEXT, "96 tokens; allowed: 1 to 95"),
        ([1, VOCAB], "from 1 to 61; allowed: 0 to 60"),
        ([-1], "from -1 to -1"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_at_the_door(make_core, ids, message):
    core = make_core()
    with pytest.raises(ConfigError, match=message):
        core.add("a", ids, Sampling(max_tokens=1))
    assert core.idle


def test_an_id_in_use_is_refused(make_core):
    core = make_core()
    core.add("a", [1], Sampling(max_tokens=2))
    with pytest.raises(ConfigError, match="in use; got: a"):
        core.add("a", [1], Sampling(max_tokens=2))


@pytest.mark.parametrize("change", [{"max_num_seqs": 0}, {"max_context": 1}, {"max_context": 2049}, {"numerics": "int3"}])
def test_a_spec_out_of_range_is_refused(folder, change):
    with pytest.raises(ConfigError):
        EngineCore(EngineSpec(**{"model_path": folder, "max_context": 64, **change}))


@pytest.mark.slow
@pytest.mark.parametrize("kv", [["recompute"], ["stale"], ["recompute", "stale"]])
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_each_request_one_result_whose_every_token_belongs_to_its_version(
    make_core, model, versions, seed, kv
):
    rng, core = random.Random(seed), make_core(max_num_seqs=6, seed=seed)
    prompts, finished, version = {}, {}, 0
    texts = [prompt(rng.randrange(1, 50), i) for i in range(5)]
    for _ in range(120):
        action = rng.random()
        if action < 0.25 and len(prompts) < 30:
            name = str(len(prompts))
            base = rng.choice(texts)
            prompts[name] = base[: rng.randrange(1, len(base) + 1)] + prompt(rng.randrange(8), rng.randrange(99))
            core.add(name, prompts[name], Sampling(max_tokens=rng.randrange(1, 25), stop_token_ids=(7,)))
            if rng.random() < 0.3:
                core.set_quota(name, rng.randrange(6))
        elif action < 0.30 and version < 5:
            version += 1
            update(core, versions[version], version, kv[version % len(kv)])
        elif action < 0.35 and prompts:
            name = rng.choice(list(prompts))
            generation = core.abort(name)
            assert (generation is None) == (name in finished)
            finished.setdefault(name, generation)
        elif action < 0.45:
            for name in core.partials():
                core.set_quota(name, rng.choice([None, 3, 9]))
        else:
            new = dict(core.step())
            assert not new.keys() & finished.keys()
            finished |= new
    for name in core.partials():
        core.set_quota(name, None)
    prompts["last"] = prompt(20, 99)  # meets one more update while it runs, whatever was drawn
    core.add("last", prompts["last"], Sampling(max_tokens=25))
    while not ((partial := core.partials().get("last")) and partial.output_ids):
        finished |= dict(core.step())
    update(core, versions[version + 1], version + 1, kv[-1])
    finished |= run(core)
    assert finished.keys() == prompts.keys()
    spans = [span for generation in finished.values() for span in generation.spans]
    assert {span.kv for span in spans} == ({"fresh"} if kv == ["recompute"] else {"fresh", "mixed"})
    assert all(generation.spans[0].kv == "fresh" for generation in finished.values() if generation.spans)
    assert core.stats.num_decode_tokens == sum(len(generation.output_ids) for generation in finished.values())
    check = assert_exact if kv == ["recompute"] else assert_kept
    check(model, versions, prompts, finished)


def test_the_facade_resolves_what_its_driver_steps(make_core, model, versions):
    async def play():
        engine = EmbeddedEngine(make_core(max_num_seqs=4))
        assert isinstance(engine, RolloutEngine)
        tasks = {name: asyncio.create_task(engine.generate(prompt(9, 1), Sampling(max_tokens=8), name)) for name in "abc"}
        await asyncio.sleep(0)
        assert all(engine.drive_once() for _ in range(3))
        await engine.abort("b")
        tasks["c"].cancel()
        await asyncio.wait([tasks["b"], tasks["c"]])
        await engine.pause("keep", "recompute")
        assert not engine.drive_once()
        assert {name: len(partial.output_ids) for name, partial in (await engine.partials()).items()} == {"a": 3}
        await engine.update_weights(FullWeights(tensors=versions[1]), 1)
        await engine.resume()
        while engine.drive_once():
            await asyncio.sleep(0)
        assert tasks["c"].cancelled()
        return {"a": await tasks["a"], "b": await tasks["b"]}

    finished = asyncio.run(play())
    assert [len(finished[name].output_ids) for name in "ab"] == [8, 3]
    assert finished["a"].spans == (Span(version=0, start=0, end=3), Span(version=1, start=3, end=8))
    assert_exact(model, versions, {"a": prompt(9, 1), "b": prompt(9, 1)}, finished)
