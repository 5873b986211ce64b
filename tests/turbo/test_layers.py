"""Which folder may import which, read from the import lines of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = {
    "turbo": "turbo",
    "kernels": "turbo.kernels",
    "compile": "turbo.compile",
    "bench": "bench",
    "tools": "tools",
}
"""Folder -> the name under which it is imported; folders that are not there are passed over."""
MAY_IMPORT = {
    "turbo": {"turbo", "kernels", "compile"},
    "kernels": {"kernels"},
    "compile": {"compile"},
    "bench": {"bench", "turbo", "kernels", "tools"},
    "tools": {"tools", "turbo"},
}
"""Folder -> folders of ours that it may import; nothing imports tests."""
RUN_TIME = ("turbo", "kernels", "compile")
TEST_ONLY = ("diffusers", "transformers")


def imported_names(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that a file imports anywhere, by statement or by a constant."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function, name = ast.unparse(node.func), node.args[0]
            is_import = function.split(".")[-1] in ("import_module", "__import__")
            if is_import and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def folder_of(name: str) -> str | None:
    """The folder of ours that a dotted name lies in, `?` for a name that only looks like one."""
    first, *rest = name.split(".")
    if first == "turbo":
        return rest[0] if rest and rest[0] in ("kernels", "compile") else "turbo"
    if first in ("kernels", "compile"):
        return "?"  # they are imported as turbo.kernels and turbo.compile only
    return first if first in ("bench", "tests", "tools") else None


def violations(root: Path) -> list[str]:
    """Import lines under `root` that break the rules."""
    found = []
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parents = path.relative_to(root / folder).parent.parts
            for line, name in imported_names(path, ".".join([package, *parents])):
                target = folder_of(name)
                is_forbidden = target is not None and target not in MAY_IMPORT[folder]
                is_test_only = folder in RUN_TIME and name.split(".")[0] in TEST_ONLY
                if is_forbidden or is_test_only:
                    found.append(f"{path.relative_to(root).as_posix()}:{line} imports {name}")
    return found


def test_every_import_keeps_to_the_layers():
    assert violations(REPOSITORY) == []


def test_the_engine_was_looked_at():
    names = {name for _, name in imported_names(REPOSITORY / "turbo" / "engine.py", "turbo")}
    assert {"torch", "turbo.plan.Plan", "turbo.builtin.builtin_model"} <= names


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("turbo/a.py", "import bench.timing"),
        ("turbo/a.py", "from tests import conftest"),
        ("turbo/a.py", "def f():\n    import diffusers"),
        ("turbo/a.py", "if TYPE_CHECKING:\n    from transformers.models import qwen3"),
        ("turbo/a.py", "importlib.import_module('diffusers.models')"),
        ("turbo/a.py", "import kernels"),
        ("turbo/sub/a.py", "__import__('tests.conftest')"),
        ("kernels/a.py", "import turbo"),
        ("kernels/a.py", "from turbo.errors import TurboError"),
        ("kernels/a.py", "from turbo import compile"),
        ("kernels/a.py", "from .. import errors"),
        ("compile/a.py", "from turbo.kernels.norm import rms_norm"),
        ("compile/sub/a.py", "from ... import engine"),
        ("bench/a.py", "from tests.golden import check"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{line}\n")
    [found] = violations(tmp_path)
    assert found.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("turbo/a.py", "from turbo.kernels.norm import rms_norm"),
        ("turbo/a.py", "from turbo import compile, plan"),
        ("turbo/a.py", "from .plan import Plan"),
        ("kernels/a.py", "import triton"),
        ("kernels/a.py", "from .shapes import require"),
        ("kernels/a.py", "from turbo.kernels.shapes import require"),
        ("compile/sub/a.py", "from ..graphs import capture"),
        ("bench/a.py", "import diffusers, turbo, turbo.kernels.norm"),
    ],
)
def test_an_allowed_import_is_passed_over(tmp_path: Path, file: str, line: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{line}\n")
    assert violations(tmp_path) == []
