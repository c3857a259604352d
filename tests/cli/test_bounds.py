"""`oldlogits bounds`: numbers and words agree with each other, with the objective and with docs/bounds.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from oldlogits.cli.bounds import Interval, read, words
from oldlogits.cli.main import run
from oldlogits.config.schema import RunConfig

DOCS = Path(__file__).parents[2] / "docs" / "bounds.md"
TIGHT = {"weight_mu": 0.5, "band": 1.05, "eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def _sentences(**setting) -> dict[tuple[str, str], str]:
    """Each variant's sentence for each sign."""
    sentences, variant = {}, ""
    for line in words(read(**{**TIGHT, **setting})).plain.splitlines():
        if not line.startswith("  "):
            variant = line.split(":")[0]
        else:
            sentences[variant, line[6:11]] = line[len("  for A > 0 a token is ") :]
    return sentences


def test_the_example_in_the_document_is_what_the_command_prints(capsys):
    words = "bounds --interpolation-mu 0.5 --band 1.05 --eps-low 0.2 --eps-high 0.28 --dual-clip 3"
    assert run(words.split()) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed.strip() in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("setting", ["", "--interpolation-mu 0.9 --band 3 --eps-low 0.9 --eps-high 0.01", "--band inf"])
def test_what_is_printed_fits_eighty_columns_and_needs_no_colour(capsys, setting):
    assert run(["bounds", *setting.split()]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_without_options_the_setting_is_the_recipes_default(capsys):
    assert run(["bounds"]) == 0
    default = RunConfig()
    expected = (
        f"interpolation_mu {default.objective.interpolation_mu:g}, band {default.band:g}, eps {default.objective.eps_low:g} / "
        f"{default.objective.eps_high:g}, dual clip {default.objective.dual_clip:g};"
    )
    assert capsys.readouterr().out.startswith(expected)


def test_a_tight_band_leaves_the_clip_nothing_to_do():
    """a = 1/2, c = 1.05: the mask is 2/1.05 - 1 <= R <= 1.1, inside every clip."""
    said = _sentences()
    for sign in ("A > 0", "A < 0"):
        assert said["linear_train_infer", sign] == "trained while 0.905 <= R <= 1.1: the clip never acts"
    assert said["linear_prox", "A > 0"] == "trained while R <= 1.78"
    assert said["linear_prox", "A < 0"] == "trained while R >= 0.667"
    assert said["loglinear_prox", "A < 0"] == "trained while 0.64 <= R <= 9"
    assert said["decoupled_exact", "A > 0"] == "trained while 0.952 <= r_d <= 1.05 and r_s <= 1.28"
    assert said["decoupled_exact", "A < 0"] == "trained while 0.952 <= r_d <= 1.05 and 0.8 <= r_s <= 3"


def test_a_loose_band_leaves_the_mask_nothing_to_do():
    said = _sentences(weight_mu=0.9, band=3.0)
    assert said["loglinear_train_infer", "A < 0"] == f"trained while {0.8 ** (1 / 0.9):.3g} <= R <= 3.39: the mask never acts"
    assert said["loglinear_train_infer", "A > 0"] == f"trained while {3.0**-10:.3g} <= R <= 1.32"  # a bound from each


def test_without_any_bound_a_token_is_always_trained():
    said = _sentences(weight_mu=0.0, band=math.inf, eps_low=1.5, dual_clip=math.inf)
    assert said["linear_train_infer", "A > 0"] == said["loglinear_prox", "A < 0"] == "always trained"
    assert said["decoupled_exact", "A > 0"] == "trained while r_s <= 1.28"
    assert said["decoupled_exact", "A < 0"] == "always trained"


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(ratio="R"), "any R"),
        (Interval(ratio="R", high=1.28), "R <= 1.28"),
        (Interval(ratio="r_s", low=0.8), "r_s >= 0.8"),
        (Interval(ratio="R", low=1 / 3, high=2), "0.333 <= R <= 2"),
    ],
)
def test_an_interval_reads_as_it_is_written(interval, text):
    assert str(interval) == text


@pytest.mark.parametrize(
    "wrong, got",
    [
        (["--band", "0.9"], "band = 0.9"),
        (["--interpolation-mu", "1.5"], "objective.interpolation_mu = 1.5"),
        (["--dual-clip", "1"], "objective.dual_clip = 1.0"),
        (["--eps-high", "nan"], "objective.eps_high = nan"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_says_what_got_allowed_and_fix(capsys, wrong, got):
    assert run(["bounds", *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    parts = dict(line.strip().split(": ", 1) for line in captured.err.splitlines())
    assert list(parts) == ["error", "got", "allowed", "fix"]
    assert parts["got"] == got
