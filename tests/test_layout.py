"""The layout is a promise: imports point one way, the daemon stays free of what only prints, files stay short."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "workers", "ipc")
MAX_LINES = 450

# Package → which of our packages it may import.
MAY_IMPORT = {"gateway": {"gateway", "workers", "ipc"}, "workers": {"workers", "ipc"}, "ipc": {"ipc"}}

# What prints belongs to the commands that print.
PRINTING = {"rich", "click"}
MAY_PRINT = ("gateway/cli/", "gateway/demo/", "gateway/demo.py")

# Project name → the module that it installs; each must earn its place in the product.
REAL_USE = {"pyroute2": "pyroute2", "dpkt": "dpkt", "PySocks": "socks", "msgpack": "msgpack", "psutil": "psutil"}

FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "manager", "types"}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in it."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = here if path.name == "__init__.py" else here[:-1]
                parents = package[: len(package) - node.level + 1]
                yield ".".join((*parents, *([node.module] if node.module else [])))
            elif node.module:
                yield node.module


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if top(name) in {*PACKAGES, "tests"} and top(name) not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_ipc_imports_the_standard_library_and_msgpack() -> None:
    allowed = {*sys.stdlib_module_names, "ipc", "msgpack"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("ipc")
        for name in imports(path)
        if top(name) not in allowed
    ]
    assert wrong == []


def test_only_commands_import_what_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(*PACKAGES)
        for name in imports(path)
        if top(name) in PRINTING and not str(path.relative_to(ROOT)).startswith(MAY_PRINT)
    ]
    assert wrong == []


def test_nothing_but_commands_imports_the_command_line() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        for name in imports(path)
        if name.startswith("gateway.cli")
        and not str(path.relative_to(ROOT)).startswith((*MAY_PRINT, "gateway/__main__.py"))
    ]
    assert wrong == []


@pytest.mark.parametrize("project", REAL_USE)
def test_dependencies_are_in_real_use(project: str) -> None:
    users = [path for path in sources(*PACKAGES) if REAL_USE[project] in map(top, imports(path))]
    assert users, f"no file of the product imports {REAL_USE[project]}"


def test_every_import_is_a_dependency() -> None:
    """An import that pyproject.toml does not list works here and nowhere else."""
    listed = {
        "click",
        "dpkt",
        "msgpack",
        "msgspec",
        "psutil",
        "pyroute2",
        "socks",
        "rich",
        "setproctitle",
        "h11",
        "wsproto",
    }
    allowed = {*sys.stdlib_module_names, *PACKAGES, *listed}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(*PACKAGES)
        for name in imports(path)
        if top(name) not in allowed
    ]
    assert wrong == []


def test_files_are_short() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in sources(*PACKAGES)}
    assert {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MAX_LINES} == {}


def test_no_module_is_named_for_nothing() -> None:
    names = [part for path in sources(*PACKAGES) for part in path.relative_to(ROOT).with_suffix("").parts]
    assert FORBIDDEN_NAMES.isdisjoint(names)


def test_modules_open_with_a_sentence() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_unit_tests_shadow_no_package() -> None:
    assert [package for package in PACKAGES if (ROOT / "tests" / package).exists()] == []
