import itertools

import pytest

from oldlogits.core.errors import ConfigError, MissingPolicyError
from oldlogits.core.policies import (
    AGED,
    ASYNC,
    BALANCE,
    EWMA,
    EXPERIMENTAL_VARIANTS,
    LINEAR,
    LOGLINEAR,
    MU,
    OLD,
    ONE,
    RESCORE,
    THETA,
    VARIANTS,
    Policy,
    Variant,
    find_variant,
)
from oldlogits.core.source import SOURCES, check_source, sources_for

# The paper's table, written again: name -> r_d, r_s, what a source must provide, whether the mismatch is corrected.
PAPER = {
    "ppo_clip": ("1", "theta/old", {OLD}, False),
    "ppo_clip_train_infer": ("1", "theta/mu", set(), True),
    "decoupled_exact": ("old/mu", "theta/old", {OLD}, True),
    "decoupled_async": ("async/mu", "theta/async", {ASYNC}, True),
    "linear_prox": ("1", "theta/linear", set(), False),
    "loglinear_prox": ("1", "theta/loglinear", set(), False),
    "ppo_ewma": ("1", "theta/ewma", {EWMA}, False),
    "ppo_ewma_train_infer": ("ewma/mu", "theta/ewma", {EWMA}, True),
}
EXPERIMENTAL = {
    "linear_train_infer": ("linear/mu", "theta/linear", set(), True),
    "loglinear_train_infer": ("loglinear/mu", "theta/loglinear", set(), True),
    "aged_train_infer": ("aged/mu", "theta/aged", {AGED}, True),
    "rescore_train_infer": ("rescore/mu", "theta/rescore", {RESCORE}, True),
    "mis_balance": ("1", "theta/balance", {BALANCE}, True),
}
ROWS = PAPER | EXPERIMENTAL


def test_the_variants_are_the_papers_rows_and_no_others():
    assert {name: (str(v.r_d), str(v.r_s)) for name, v in VARIANTS.items()} == {n: row[:2] for n, row in PAPER.items()}
    assert {n: (str(v.r_d), str(v.r_s)) for n, v in EXPERIMENTAL_VARIANTS.items()} == {
        n: row[:2] for n, row in EXPERIMENTAL.items()
    }


@pytest.mark.parametrize("name", ROWS)
def test_needs_total_and_correction_follow_from_the_row(name):
    _, r_s, needs, corrects = ROWS[name]
    variant = find_variant(name)
    assert variant.needs == needs
    assert variant.corrects_mismatch is corrects
    assert variant.proximal.value == r_s.removeprefix("theta/")
    assert str(variant.total) == ("theta/mu" if corrects and name != "mis_balance" else r_s)


@pytest.mark.parametrize("top, bottom", list(itertools.product(Policy, Policy)))
def test_a_ratio_is_one_exactly_where_a_policy_stands_over_itself(top, bottom):
    ratio = top / bottom
    assert ratio.is_one is (top is bottom)
    assert str(ratio) == ("1" if top is bottom else f"{top.value}/{bottom.value}")


def test_one_is_neutral_and_a_product_telescopes_over_the_shared_policy():
    ratio = THETA / OLD
    assert ONE * ratio == ratio * ONE == ratio
    assert (OLD / MU) * ratio == THETA / MU


@pytest.mark.parametrize(
    "r_d, r_s",
    [
        (ASYNC / MU, THETA / OLD),  # the semantic mismatch itself
        (OLD / MU, THETA / MU),  # the discrepancy counted twice
        (MU / OLD, THETA / OLD),
        (ONE, OLD / MU),  # nothing is optimised
        (ONE, OLD / THETA),
        (OLD / MU, ONE),
        (ONE, ONE),
    ],
)
def test_a_row_that_does_not_telescope_to_theta_cannot_be_written_down(r_d, r_s):
    with pytest.raises(ConfigError):
        Variant(r_d=r_d, r_s=r_s)


def test_variants_are_hashable_and_their_table_cannot_be_changed():
    assert len(set(VARIANTS.values())) == len(VARIANTS)
    with pytest.raises(TypeError):
        VARIANTS["ppo_clip"] = VARIANTS["ppo_ewma"]


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown variant; got: 'ppo'; allowed: ppo_clip, ") as caught:
        find_variant("ppo")
    assert all(name in caught.value.allowed for name in ROWS)


PROVIDED = {
    "snapshot": {OLD},
    "arrival": {ASYNC},
    "ewma": {EWMA},
    "aged": {AGED},
    "rescore": {RESCORE},
    "balance": {BALANCE},
    "none": set(),
}


@pytest.mark.parametrize("name, source", list(itertools.product(ROWS, PROVIDED)))
def test_a_source_is_accepted_exactly_if_it_provides_what_the_variant_needs(name, source):
    if ROWS[name][2] <= PROVIDED[source]:
        check_source(name, source)
    else:
        with pytest.raises(MissingPolicyError):
            check_source(name, source)


def test_a_missing_policy_is_told_with_what_got_allowed_and_fix():
    with pytest.raises(MissingPolicyError) as caught:
        check_source("decoupled_exact", "arrival")
    assert caught.value.what == "variant 'decoupled_exact' needs log-probs of OLD, but source 'arrival' provides ASYNC"
    assert caught.value.got == "variant = 'decoupled_exact', proximal.source = 'arrival'"
    assert caught.value.allowed == "a source that provides OLD: snapshot, dedicated, interruption, eager"
    assert caught.value.fix == "use source 'snapshot', or variant 'decoupled_async'"


@pytest.mark.parametrize("name, source", list(itertools.product(ROWS, SOURCES.names)))
def test_every_remedy_of_a_missing_policy_works(name, source):
    try:
        check_source(name, source)
    except MissingPolicyError as error:
        remedy = error.fix.removeprefix("use ")
        for part in remedy.split(", or "):
            kind, _, named = part.partition(" '")
            if kind == "source":
                check_source(name, named.rstrip("'"))
            elif kind == "variant":
                check_source(named.rstrip("'"), source)
            else:
                assert part == "another variant"
                assert not sources_for(name)


@pytest.mark.parametrize(
    "source, variant",
    [
        ("snapshot", "decoupled_exact"),
        ("arrival", "decoupled_async"),
        ("ewma", "ppo_ewma_train_infer"),
        ("aged", "aged_train_infer"),
        ("rescore", "rescore_train_infer"),
        ("balance", "mis_balance"),
    ],
)
def test_a_source_of_another_policy_names_the_variant_that_it_feeds_experimental_ones_included(source, variant):
    with pytest.raises(MissingPolicyError) as caught:
        check_source("decoupled_async" if source == "snapshot" else "decoupled_exact", source)
    assert caught.value.fix.endswith(f", or variant '{variant}'")


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown source; got: 'snap'; allowed: proximal\.source = snapshot, .*, none or"):
        check_source("decoupled_exact", "snap")


def test_interpolations_are_formed_from_mu_and_theta_alone():
    for policy in (LINEAR, LOGLINEAR):
        assert Variant(r_d=policy / MU, r_s=THETA / policy).needs == set()
