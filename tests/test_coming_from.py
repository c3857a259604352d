"""What docs/coming-from.md says of this project's own keys holds."""

import re
import shlex
from pathlib import Path

import pytest

from oldlogits.config.load import load_config
from oldlogits.config.objective.presets import PRESETS
from oldlogits.config.reader import fields_by_key
from oldlogits.config.schema import RunConfig
from oldlogits.core.policies import VARIANTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")


def ours():
    """What stands in backticks in the last column of every row."""
    cells = [line.strip("| ").split(" | ")[-1] for line in PAGE.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_key_of_ours_is_a_key_of_a_recipe():
    keys = set(fields_by_key(RunConfig))
    named = [name.partition(" = ")[0] for name in ours()]
    dotted = [name for name in named if re.fullmatch(r"[a-z]+\.\w+", name)]
    assert len(dotted) > 40
    assert [name for name in dotted if name not in keys] == []
    others = set(named) - set(dotted) - {name for name in keys if "." not in name}
    assert others - {"[correction]", "reset", "--resume RUN", *VARIANTS, "loglinear"} == {"oldlogits show presets"}


@pytest.mark.parametrize("section", ["TRL", "verl", "prime-rl", "AReaL"])
def test_every_section_has_a_table_and_a_command(section):
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    assert text.count("\n| ") > 10
    assert text.count("```bash\noldlogits train ") == 1


def test_the_values_that_the_page_gives_are_allowed():
    given = re.findall(r"`([\w.]+) = \"(\w+)\"`", PAGE.replace("\n  ", " "))
    assert ("variant", "decoupled_exact") in given
    assert ("variant", "loglinear_prox") in given
    for key, value in given:
        words = [f"--{key}", value]
        if key != "env.adapter":  # needs a class beside it
            assert isinstance(load_config(ROOT / "recipes" / "desk.toml", words), RunConfig)
    assert {f"{name}:" for name in ("verl", "areal", "prime-rl", "trl")} <= {
        name.lower().partition(":")[0] + ":" for name in PRESETS
    }


def test_the_command_with_a_preset_is_read():
    [preset] = re.findall(r"--objective\.preset (\S+)", PAGE)
    assert preset in PRESETS


def commands():
    text = PAGE.replace("\\\n", "")
    return [shlex.split(line)[2:] for line in re.findall(r"^oldlogits train .+", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1])
def test_every_command_is_a_recipe_once_what_it_names_is_there(words, tmp_path, monkeypatch, chatml_llama):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"question": "?"}\n', encoding="utf-8")
    (tmp_path / "my_agent.py").write_text("async def agent(base_url, api_key, row):\n    return 0.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [str(chatml_llama) if word.startswith("models/") else word for word in words if word != "--dry-run"]
    assert isinstance(load_config(ROOT / words[0], words[1:]), RunConfig)
