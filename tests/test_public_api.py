"""What other trainers import: its names and signatures are those of `public_api.txt`, and importing it costs little.

After a change that is meant: ``python -m tests.test_public_api > tests/public_api.txt``, and a line in CHANGELOG.md.
"""

import difflib
import enum
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("oldlogits.objective", "oldlogits.sources", "oldlogits.versions", "oldlogits.core.loss", "oldlogits.core.policies")
FROZEN = Path(__file__).with_name("public_api.txt")


def public_names(module):
    """`__all__`, or what a module without it defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", module.__name__) == module.__name__]
    return sorted(
        getattr(
            module,
            "__all__",
            [name for name in own if not name.startswith("_") and name not in ("annotations", "TYPE_CHECKING")],
        )
    )


def signature(value):
    """The parameters; a default that is a function has an address, which is left out."""
    return re.sub(r"<function .*? at 0x[0-9a-f]+>", "...", str(inspect.signature(value)))


def described(name, value):
    """A name with its parameters, and of a class the members that it defines, a line each."""
    if inspect.isfunction(value):
        return [name + signature(value)]
    if not inspect.isclass(value):
        return [name]
    is_data = issubclass(value, enum.Enum) or getattr(value, "_is_protocol", False)  # how these are made is Python's affair
    lines = [f"class {name}" if is_data else f"class {name}{signature(value)}"]
    for member, one in sorted(inspect.getmembers_static(value)):
        if member.startswith("_") or member not in vars(value):
            continue
        function = one.__func__ if isinstance(one, classmethod | staticmethod) else one
        if isinstance(one, property) or not inspect.isfunction(function):
            lines.append(f"    {name}.{member}")
        else:
            lines.append(f"    {name}.{member}{signature(function)}")
    return lines


def surface():
    """Every public name of the packages."""
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        lines += [f"# {package}", *(line for name in public_names(module) for line in described(name, getattr(module, name)))]
    return lines


def test_names_and_signatures_are_those_that_others_rely_on():
    frozen, found = FROZEN.read_text().splitlines(), surface()
    changes = list(difflib.unified_diff(frozen, found, "public_api.txt", "the packages", lineterm="", n=0))
    assert changes == [], "\n".join([*changes, "if this is meant: python -m tests.test_public_api > tests/public_api.txt"])


def test_every_public_name_says_what_it_is():
    for package in PACKAGES:
        module = importlib.import_module(package)
        values = {name: getattr(module, name) for name in public_names(module)}
        undocumented = [name for name, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)]
        assert [name for name in undocumented if not inspect.getdoc(values[name])] == []


IMPORTED = """
import sys
before = set(sys.modules)
import {package}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names))
"""


def imported_by(package):
    """The top names of what importing a package brings in, but for Python's own, in an interpreter of its own."""
    code = IMPORTED.format(package=package)
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_itself_imports_nothing():
    assert imported_by("oldlogits") == {"oldlogits"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, needless",
    [
        ("oldlogits.sources", {"torch", "transformers", "pyarrow", "tyro"}),
        ("oldlogits.core.policies", {"torch", "numpy"}),
        ("oldlogits.core.loss", {"torch", "numpy"}),
        ("oldlogits.objective", {"transformers", "pyarrow", "tyro", "rich"}),
        ("oldlogits.versions", {"transformers", "pyarrow", "tyro", "rich"}),
    ],
)
def test_what_other_trainers_import_brings_in_no_more_than_it_computes_with(package, needless):
    found = imported_by(package)
    assert "oldlogits" in found
    assert found & needless == set()


if __name__ == "__main__":
    print("\n".join(surface()))
