"""The layer rule, read off the import statements: arrows point down only."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import oldlogits

ROOT = Path(oldlogits.__file__).parent
LEVELS = (
    {"core"},
    {"objective", "rpc"},
    {"batch"},
    {"models", "versions", "envs"},
    {"engines"},
    {"sources", "rollout"},
    {"train"},
    {"loop"},
    {"backends"},
    {"run"},
    {"compare", "bench", "doctor", "integrations", "replay"},
    {"cli"},
    {"__main__"},
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
CONFIG_FROM, RECORD_FROM = LEVEL["train"], LEVEL["loop"]
EVENTS = {"oldlogits.record.bus", "oldlogits.record.events"}
HEAVY = ("ray", "vllm", "peft", "deepspeed", "bitsandbytes", "flash_attn", "triton", "accelerate", "trl")
HEAVY += ("wandb", "trackio", "mlflow", "areal", "verl", "prime_rl")


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Every module that a file imports, wherever in the file; `from package import module` counts as the module."""
    return imported_by(ast.parse(path.read_text(encoding="utf-8")), path)


def imported_by(tree, path):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name in NAMES}
            found |= known or {node.module}
    return found


FILES = sorted(ROOT.rglob("*.py"))
NAMES = {module_name(path) for path in FILES}
IMPORTS = {module_name(path): imported(path) for path in FILES}
INTERNAL = {name: {i for i in imports if i.split(".")[0] == "oldlogits"} for name, imports in IMPORTS.items()}


def package_of(module):
    """The folder below `oldlogits`; empty for `oldlogits` itself, which holds the version and imports nothing."""
    return module.partition(".")[2].partition(".")[0]


def is_allowed(module, target):
    """Whether the rule lets `module` import `target`."""
    source, package = package_of(module), package_of(target)
    if package in (source, "core", ""):
        return True
    if source in ("config", "record", ""):
        return False
    if package == "record":
        return target in EVENTS or LEVEL[source] >= RECORD_FROM
    if package == "config":
        return LEVEL[source] >= CONFIG_FROM
    return LEVEL[package] < LEVEL[source]


def test_the_rule_knows_every_package():
    assert {package_of(name) for name in NAMES} <= set(LEVEL) | {"config", "record", ""}
    assert len(IMPORTS) == len(FILES) > 50


@pytest.mark.parametrize("module", sorted(NAMES))
def test_imports_point_down(module):
    upwards = sorted(target for target in INTERNAL[module] if not is_allowed(module, target))
    assert upwards == []


@pytest.mark.parametrize(
    "module, target, allowed",
    [
        ("oldlogits.batch.pad", "oldlogits.objective", True),
        ("oldlogits.objective.masks", "oldlogits.batch", False),
        ("oldlogits.models.scorer", "oldlogits.versions", False),
        ("oldlogits.sources.eager", "oldlogits.rollout.turns", False),
        ("oldlogits.rollout.turns", "oldlogits.record.events", True),
        ("oldlogits.rollout.turns", "oldlogits.record.summary", False),
        ("oldlogits.train.step", "oldlogits.config", True),
        ("oldlogits.rollout.turns", "oldlogits.config", False),
        ("oldlogits.config.check", "oldlogits.core.errors", True),
        ("oldlogits.config.check", "oldlogits.objective", False),
        ("oldlogits.record.report.page", "oldlogits.config", False),
        ("oldlogits.cli.main", "oldlogits.run.run", True),
        ("oldlogits.compare.pool", "oldlogits.bench", False),
        ("oldlogits.core.errors", "oldlogits.record.events", True),
    ],
)
def test_the_rule_itself(module, target, allowed):
    assert is_allowed(module, target) is allowed


def test_no_module_imports_itself_through_others():
    graph = {name: {t for t in targets if t in NAMES and t != name} for name, targets in INTERNAL.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_product_knows_nothing_of_what_studies_and_measures_it():
    outside = {target.split(".")[0] for targets in IMPORTS.values() for target in targets}
    assert outside & {"studies", "benchmarks", "examples", "tests"} == set()


def test_every_import_of_this_package_exists():
    assert {target for targets in INTERNAL.values() for target in targets} <= NAMES


def test_each_heavy_optional_package_is_imported_in_one_file_at_most():
    users = defaultdict(set)
    for module, targets in IMPORTS.items():
        for target in targets:
            users[target.split(".")[0]].add(module)
    assert {name: users[name] for name in HEAVY if len(users[name]) > 1} == {}


def executed(path):
    """What importing a file imports: all but what stands under ``if TYPE_CHECKING:``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return imported_by(tree, path)


EXECUTED = {module_name(path): executed(path) for path in FILES}


def test_the_product_imports_no_example_and_nothing_that_measures_it():
    outside = {target.split(".")[0] for targets in IMPORTS.values() for target in targets}
    assert outside & {"order_desk", "number_guess", "examples", "studies", "benchmarks", "tests"} == set()


def reachable(start):
    """The modules of this package that importing `start` imports, and what they import from elsewhere."""
    inside, outside, todo = set(), set(), [start]
    while todo:
        module = todo.pop()
        if module in inside:
            continue
        inside.add(module)
        parent = module.rpartition(".")[0]
        imports = EXECUTED[module]
        outside |= {t.split(".")[0] for t in imports if t not in NAMES}
        todo += [t for t in (*imports, parent) if t in NAMES]
    return inside, outside


@pytest.mark.parametrize("module", ["oldlogits.record.report.page", "oldlogits.record.events"])
def test_what_reads_recorded_files_needs_nothing_but_records(module):
    inside, outside = reachable(module)
    assert {package_of(name) for name in inside} <= {"record", "core", ""}
    assert not outside & {"torch", "transformers", "tyro", "safetensors"}


def test_events_stand_on_their_lines_alone():
    modules = {name for name in reachable("oldlogits.record.events")[0] if package_of(name) == "record"}
    assert modules == {"oldlogits.record", *EVENTS, "oldlogits.record.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["embedded.kind", "http.kind", "protocols.vllm", "protocols.embedded"])
def test_an_engine_or_a_protocol_that_a_recipe_names_is_imported_without_heavy_packages(module):
    code = f"import sys, oldlogits.engines.{module}; print(sorted({{'torch', 'transformers', 'aiohttp'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_config_does_not_need_torch():
    assert not reachable("oldlogits.config")[1] & {"torch", "transformers", "safetensors"}


def test_there_is_no_drawer_for_odds_and_ends():
    assert {part for name in NAMES for part in name.split(".")} & {"utils", "util", "helpers", "misc", "common"} == set()
