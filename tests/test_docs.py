"""The documents say what the code does: generated tables are current, and the snippets run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

from oldlogits.cli.show import TABLES
from oldlogits.cli.train import TrainOptions
from oldlogits.config.load import load_config, override
from oldlogits.config.schema import RunConfig
from oldlogits.envs.base import load_environment
from oldlogits.record.event_log import read_events
from oldlogits.run.run import run
from order_desk.data import ruling

from .runs import recipe
from .waiting import HUNG_S

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
NUMBER_GUESS = ROOT / "examples" / "number_guess"


def snippets(text: str) -> dict[str, str]:
    """The fenced blocks that name a file, by that name."""
    return dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", text, flags=re.DOTALL))


def test_the_variant_table_of_the_documents_is_the_one_in_code() -> None:
    assert TABLES["variants"].markdown() in (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["objectives", "presets"])
def test_the_tables_of_losses_and_presets_of_the_documents_are_those_in_code_and_hold_nothing_else(name: str) -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    table = TABLES[name].markdown()
    assert table in page
    after = page.partition(table)[2]
    assert not after.startswith("\n|"), "a row that the code does not have"


def test_every_relative_link_of_the_documents_leads_to_a_file() -> None:
    beside = [path for folder in ("examples", "studies", "benchmarks") for path in (ROOT / folder).rglob("*.md")]
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *beside]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def documented_trainings() -> list[list[str]]:
    """What follows ``oldlogits train RECIPE`` wherever a document writes such a command with keys of a recipe."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for inline, line in re.findall(r"`oldlogits train ([^`]+)`|^(?:\$ )?oldlogits train (.+)", text, flags=re.MULTILINE):
            words = shlex.split((inline or line).partition(" #")[0].partition(" > ")[0])
            found.append([word for word in words[not words[0].startswith("-") :] if word != "..."])
    return [words for words in found if any("." in word for word in words if word.startswith("--"))]


def test_every_key_of_a_documented_command_is_read() -> None:
    commands = documented_trainings()
    assert len(commands) > 10
    for words in commands:
        _, overrides = tyro.cli(TrainOptions, args=words, return_unknown_args=True)
        assert isinstance(override(RunConfig(), overrides), RunConfig), words


def test_every_test_that_the_page_on_reliability_names_exists_and_every_row_names_one() -> None:
    rows = [row for row in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    for row in (row for row in rows if not row.startswith(("| what can happen |", "| --- |"))):
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.rpartition(" | ")[2])
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_policy_table_in_the_documents_is_the_desks_policy() -> None:
    page = (ROOT / "examples" / "order_desk" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\| (cancel|refund|track) \|", line)]
    assert len(lines) == 3
    for line in lines:
        kind, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for case, cell in zip(("pending", "shipped", "fresh", "expired", "food"), cells, strict=True):
            ruled = ruling(kind, case)
            assert re.search(r"\*(\w+)\*", cell)[1] == ruled.told
            assert cell.split(",")[0].split()[0] == (ruled.action or ("tell" if kind == "track" else "refuse"))


def test_the_files_of_the_documents_are_those_of_the_example() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in NUMBER_GUESS.iterdir() if path.is_file()}
    assert snippets(ENVIRONMENTS) == files


@pytest.mark.slow
def test_the_environment_of_the_documents_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chatml_llama: Path) -> None:
    for path in filter(Path.is_file, NUMBER_GUESS.iterdir()):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_environment("number_guess:NumberGuess").__name__ == "NumberGuess"
    overrides = ["--model.path", str(chatml_llama), "--runtime.type", "lockstep", "--num-updates", "1"]
    config = load_config(tmp_path / "guess.toml", overrides)
    assert isinstance(config, RunConfig)
    small = ["--eval.num-episodes", "2", "--rollout.prompts-per-update", "2", "--lockstep.max_lag", "1", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "oldlogits", "train", "guess.toml", *overrides, *small],
        capture_output=True,
        text=True,
        timeout=HUNG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_updates"] == 1


def documented_metrics() -> set[str]:
    """The names in the tables of docs/metrics.md; `area/name_q01`, `_q05` stands for `area/name_q01` and `area/name_q05`."""
    names: set[str] = set()
    for row in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        last = ""
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("|") else ():
            last = last.rpartition("_")[0] + name if name.startswith("_") else name
            names |= {last} if "/" in last else set()
    return names


def emitted_metrics(tmp_path: Path, name: str, config: RunConfig) -> set[str]:
    """The names in the updates of a run, without the staleness that they are restricted to."""
    assert run(config, tmp_path / name).error is None
    updates = [e for e in read_events(tmp_path / name / "events.jsonl") if e.kind == "update"]
    return {metric.partition("@")[0] for update in updates for metric in update.metrics}


@pytest.mark.slow
def test_every_emitted_metric_is_documented_and_every_documented_one_is_emitted(tmp_path, tiny_folder, tiny_moe_folder) -> None:
    average = {"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma", "decay": "auto"}}
    rescored = {"variant": "rescore_train_infer", "proximal": {"source": "rescore"}, "engine": {"precision": "int8"}}
    audited = {"variant": "ppo_ewma_train_infer", "proximal": {"decay": "audited"}, "audit": {"share": 1.0}}
    runs = {
        "average": recipe(tiny_folder, **average),
        "audited": recipe(tiny_folder, **audited),
        "measured band": recipe(tiny_folder, num_updates=2, band="auto"),
        "rescored": recipe(tiny_folder, num_updates=2, **rescored),
        "eager": recipe(tiny_folder, num_updates=2, proximal={"source": "eager"}),
        "reference": recipe(
            tiny_folder,
            num_updates=2,
            objective={"kl_coefficient": 0.1, "kl_in": "reward"},
            trainer={"lr_by_staleness": "inverse"},
        ),
        "mixture": recipe(tiny_moe_folder, num_updates=2),
        "replayed": recipe(tiny_moe_folder, num_updates=2, model={"routing": "replayed"}),
        "program": recipe(tiny_folder, runtime={"type": "local"}, env={"program": "tests.rollout.agent_programs:talks"}),
    }
    emitted = set().union(*(emitted_metrics(tmp_path, name, config) for name, config in runs.items()))
    assert emitted - documented_metrics() == set(), "emitted and not documented"
    assert documented_metrics() - emitted == set(), "documented and not emitted"


def test_the_objective_of_the_readme_computes_a_loss() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = (block for block in blocks if "split_ratio" in block)
    theta = torch.tensor([-1.0, -2.0], requires_grad=True)
    names = {"logp_mu": torch.tensor([-1.0, -2.0]), "logp_old": torch.tensor([-1.0, -2.0]), "logp_theta": theta}
    names |= {"advantages": torch.tensor([1.0, -1.0]), "loss_mask": torch.tensor([True, True])}
    exec(code, names)
    names["loss"].backward()
    assert torch.equal(theta.grad, torch.tensor([-0.5, 0.5]))


def test_the_snippet_that_keeps_versions_in_another_trainer_scores_every_token_at_its_version() -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    published: list[torch.Tensor] = []
    scored: list[tuple[int, int]] = []

    def train_some_steps(model: torch.nn.Module) -> None:
        published.append(model.weight.detach().to(torch.bfloat16))
        model.weight.data += 1e-3 * torch.randn_like(model.weight)

    def score_with(weights, version: int) -> None:
        assert torch.equal(weights["weight"], published[version])
        scored.append((len(published) - 1, version))

    class Window:
        """The versions of a batch are the last three."""

        def __iter__(self):
            return iter(range(max(0, len(published) - 3), len(published)))

    names = {"torch": torch, "model": model, "num_versions": 6, "versions_in_batch": Window(), "oldest_version_in_flight": 0}
    exec(snippet, {**names, "train_some_steps": train_some_steps, "score_with": score_with})
    assert scored == [(n, v) for n in range(6) for v in range(n, max(-1, n - 3), -1)]
