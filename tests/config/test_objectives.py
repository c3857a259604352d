"""A loss's own knobs, the correction of r_d, and other projects' objectives, as a recipe gives them."""

import ast
import dataclasses
import math
import tomllib
from operator import attrgetter

import pytest
import tomli_w

from oldlogits.cli.main import run
from oldlogits.cli.show import TABLES
from oldlogits.config.check import check
from oldlogits.config.guard import cautions
from oldlogits.config.load import config_from_table, known_keys, load_config
from oldlogits.config.objective.losses import options_of
from oldlogits.config.objective.presets import PRESETS, expanded
from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LossCard, card_of
from oldlogits.core.objective.cards import CARDS
from oldlogits.core.objective.options import CispoOptions
from oldlogits.core.policies import VARIANTS


def refused(table, message):
    with pytest.raises(ConfigError, match=message):
        check(config_from_table(table))


def objective(**keys):
    return {"objective": keys}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hgh": 4.0},
            "no such knob; got: objective.options.hgh; allowed: low, high .*; fix: did you mean objective.options.high",
        ),
        ({"high": 0.5}, "high is out of range; got: high = 0.5; allowed: a number >= 1, or inf"),
        ({"high": "4"}, "high takes a number; got: '4'"),
    ],
)
def test_a_knob_that_is_unknown_of_another_type_or_out_of_range_is_refused_with_those_of_the_loss(options, message):
    refused({"variant": "ppo_clip_train_infer", **objective(loss="cispo", options=options)}, message)


def test_knobs_are_read_into_the_class_of_the_losss_card_and_a_level_is_one_of_its_levels():
    assert options_of("cispo", {"high": 4}) == CispoOptions(high=4.0)
    assert options_of("masked_is", {}) is None
    with pytest.raises(ConfigError, match="level has no such choice; got: 'word'; allowed: token, sequence, geometric, prefix"):
        options_of("gspo", {"level": "word"})
    refused(objective(options={"high": 4.0}), "'masked_is' has no knobs of its own")


def test_a_list_of_knobs_is_no_table(tmp_path):
    (tmp_path / "r.toml").write_text("[objective]\noptions = [1]\n")
    with pytest.raises(ConfigError, match="table"):
        load_config(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (objective(loss="gspo", dual_clip=5.0), "objective.dual_clip: loss 'gspo' does not read it"),
        (objective(loss="gspo", clip_by_lag="inverse"), "objective.clip_by_lag: loss 'gspo' does not read it"),
        (objective(loss="cispo", eps_low=0.1), "objective.eps_low: loss 'cispo' does not read it; .*allowed: the loss's own"),
        ({"variant": "ppo_clip", "correction": {"weight_high": 2.0}}, "r_d of variant 'ppo_clip' is 1"),
        ({"variant": "ppo_clip", "correction": {"veto_low": 0.1}}, "correction.ratio = 'total'"),
        ({"correction": {"weight_level": "sequence"}, **objective(mismatch_correction="mask")}, "this is about its weight"),
        ({"correction": {"reject_high": 2.0}}, "no ratio of a sequence is rejected"),
        ({"correction": {"ratio": "total"}}, "there is neither"),
        ({"correction": {"ratio": "total", "veto_low": 0.1}, **objective(loss_aggregation="token-mean-kept")}, "denominator"),
        ({"variant": "loglinear_train_infer", "correction": {"normalise": True}}, "known in the forward pass"),
        ({"variant": "ppo_clip_train_infer", **objective(loss="m2po")}, "before the forward pass of THETA"),
        ({"audit": {"share": 0.5}, **objective(loss="sapo")}, "compares active sets"),
        ({"audit": {"share": 0.5}, **objective(loss="m2po")}, "compares active sets"),
        ({"correction": {"token_low": 1.0}}, r"token_low is out of range; .*; allowed: a number in \[0, 1\)"),
        (objective(preset="verl:geo"), "unknown preset; got: objective.preset = 'verl:geo'"),
    ],
)  # fmt: skip
def test_what_a_loss_does_not_read_and_a_correction_that_cannot_act_are_refused(table, message):
    refused(table, message)


@pytest.mark.parametrize(
    "keys", [{"reject": "geometric"}, {"reject": "k3"}, {"reject": "k3", "reject_low": 0.5, "reject_high": 2.0}]
)
def test_a_rejection_that_rejects_nothing_or_does_not_read_its_bound_is_refused(keys):
    key = "reject_low" if "reject_low" in keys else "reject"
    refused({"correction": keys}, f"correction.{key}: no ratio of a sequence is rejected by it; got: correction.{key} = ")


@pytest.mark.parametrize("name", CARDS)
def test_a_loss_of_one_advantage_a_sequence_refuses_those_of_turns_and_no_other_does(name):
    card = CARDS[name]
    table = {"variant": "decoupled_async", "audit": {"share": 0}, **objective(loss=name, advantage="turn-to-go")}
    if name in ("gmpo", "topr"):
        refused(table, f"'{name}' has one advantage for a whole sequence; got: .*'turn-to-go'")
        return
    assert not card.one_advantage
    check(config_from_table(table))


def test_the_guard_speaks_of_the_ppo_clip_and_of_no_other_loss():
    idle = {"variant": "decoupled_async", "band": math.inf, "trainer": {"minibatches_per_update": 1}}
    assert {one.name for one in cautions(config_from_table(idle))} == {"no-clip", "no-band"}
    assert cautions(config_from_table({**idle, **objective(loss="gspo")})) == ()
    bounded = config_from_table({**idle, "correction": {"weight_high": 2.0}})
    assert {one.name for one in cautions(bounded)} == {"no-clip"}
    only_rejects = {"band": math.inf, "correction": {"reject": "geometric", "reject_high": 1.1}}
    check(config_from_table({**only_rejects, **objective(mismatch_correction="mask")}))


def test_whatever_looks_at_a_whole_step_has_old_scored_before_it():
    assert config_from_table({}).takes_training_forward
    assert not config_from_table({"correction": {"normalise": True}}).takes_training_forward
    assert not config_from_table(objective(loss="m2po")).takes_training_forward


def test_a_loss_from_outside_may_bring_a_card_and_knobs_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "mine_with_card.py").write_text(
        "from oldlogits.core.loss import LossCard\nfrom oldlogits.core.objective.options import CispoOptions\n"
        "def bare(tokens, objective): ...\ndef loss(tokens, objective): ...\n"
        "loss.card = LossCard(what='x', paper='-', variant='-', options=CispoOptions, has_active_set=False)\n"
        "def odd(tokens, objective): ...\nodd.card = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    check(config_from_table(objective(loss="mine_with_card:loss", options={"high": 2.0})))
    check(config_from_table({"audit": {"share": 1.0}, **objective(loss="mine_with_card:bare", dual_clip=9.0)}))
    refused(objective(loss="mine_with_card:loss", options={"up": 2.0}), "no such knob")
    refused({"audit": {"share": 1.0}, **objective(loss="mine_with_card:loss")}, "compares active sets")
    refused(objective(loss="mine_with_card:odd"), "LossCard")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_that_the_door_lets_in_and_a_dry_run_prints(name, tmp_path, capsys):
    preset = PRESETS[name]
    assert set(preset.keys) <= set(known_keys())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[objective]\npreset = "{name}"\n')
    config = load_config(recipe)
    for key, value in preset.keys.items():
        assert attrgetter(key)(config) == value, key
    assert run(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"# preset {name}:" in said
    body = said.partition("\n# ")[0]
    for key in preset.keys:
        assert f"#   {key} = " in said
    recipe.write_text(body)
    assert load_config(recipe) == config  # what it prints is a recipe, and the same one


def test_a_key_beside_a_preset_wins_in_its_place_and_the_dry_run_says_so(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('band = 2.0\n[objective]\npreset = "verl:token-is"\n[correction]\nweight_high = 3.0\n')
    config = load_config(recipe)
    assert (config.band, config.correction.weight_high, config.variant) == (2.0, 3.0, "decoupled_async")
    assert run(["train", str(recipe), "--dry-run"]) == 0
    assert "#   band = inf, but the recipe says 2\n" in capsys.readouterr().out
    words = ["--objective.preset", "verl:token-is"]
    assert load_config(recipe, words).band == math.inf  # the command line's preset is before the recipe's keys
    assert load_config(recipe, [*words, "--band", "4"]).band == 4.0
    assert load_config(recipe, ["--objective.preset=verl:seq-is"]).correction.weight_level == "sequence"


def test_knobs_on_the_command_line_are_a_table_as_json(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('variant = "ppo_clip_train_infer"\n[objective]\nloss = "cispo"\n')
    assert load_config(recipe, ["--objective.options", '{"high": 4}']).objective.options == {"high": 4.0}
    assert load_config(recipe, ["--correction.ratio", "total", "--correction.veto-low", "0.1"]).correction.veto_low == 0.1
    with pytest.raises(ConfigError, match="a table as JSON"):
        load_config(recipe, ["--objective.options", "high=4"])


def test_a_recipe_without_a_preset_is_left_as_it_is_and_is_not_changed_in_place():
    table = {"objective": {"loss": "gspo"}}
    assert expanded(table) is table
    named = {"objective": {"preset": "verl:token-is"}}
    expanded(named)
    assert named == {"objective": {"preset": "verl:token-is"}}


@pytest.mark.parametrize("name", CARDS)
def test_every_card_names_a_variant_and_knobs_whose_defaults_are_allowed(name):
    card = card_of(name)
    assert card.variant in VARIANTS
    keys = {"loss": name}
    if card.options:
        keys["options"] = dataclasses.asdict(card.options())
    config = config_from_table({"variant": card.variant, **objective(**keys)})
    check(config)
    assert tomllib.loads(tomli_w.dumps(dataclasses.asdict(config)))["objective"]["loss"] == name
    assert isinstance(card, LossCard)


def test_the_table_of_losses_shows_the_defaults_of_all_their_knobs():
    for row in TABLES["objectives"].rows():
        card = CARDS[row[0]]
        shown = dict(word.removeprefix("options.").split(" = ") for word in row[4].split(", ") if word.startswith("options."))
        own = card.options() if card.options else None
        assert set(shown) == {field.name for field in dataclasses.fields(own)} if own else shown == {}
        for key, text in shown.items():
            value = math.inf if text == "inf" else ast.literal_eval(text)
            assert value == pytest.approx(getattr(own, key)) if isinstance(value, float | int) else value == getattr(own, key)
