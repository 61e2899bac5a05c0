"""Who may import whom, and what importing perexfx needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "perexfx"
TOP = (
    *("quantities", "check", "checking", "verify", "profiling", "passes", "views", "bench"),
    *("cli", "demo", "__main__", "__init__"),
)


def imports() -> dict[str, set[str]]:
    """Module -> modules of perexfx that it imports, type-checking blocks left out."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        blocks = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        ignored = {id(inner) for block in blocks for inner in ast.walk(block)}
        names = set()
        for node in ast.walk(tree):
            if id(node) in ignored:
                continue
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("perexfx"):
                names.add(node.module.removeprefix("perexfx").removeprefix(".") or "__init__")
            if isinstance(node, ast.Import):
                names |= {"__init__" for alias in node.names if alias.name == "perexfx"}
        found[name] = names
    return found


def floor(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_ir_stands_on_torch_alone() -> None:
    for module, names in imports().items():
        if floor(module) == "ir":
            assert {floor(name) for name in names} <= {"ir"}, module


def test_layers_and_strategies_know_ir_and_not_each_other() -> None:
    for module, names in imports().items():
        if floor(module) in ("layers", "strategies"):
            assert {floor(name) for name in names} <= {"ir", floor(module)}, module


def test_other_passes_know_ir_alone() -> None:
    for module, names in imports().items():
        if floor(module) == "passes":
            assert {floor(name) for name in names} <= {"ir", "passes"}, module


def test_the_parts_of_the_check_are_its_own() -> None:
    users = {floor(module) for module, names in imports().items() if "checking" in {floor(name) for name in names}}
    assert users == {"check", "checking"}


def test_only_the_api_names_rules_and_strategies() -> None:
    users = {
        floor(module)
        for module, names in imports().items()
        if {floor(name) for name in names} & {"layers", "strategies"} and floor(module) not in ("layers", "strategies")
    }
    assert users == {"api", "bench"}


def test_nothing_below_stands_on_the_top() -> None:
    for module, names in imports().items():
        if floor(module) not in TOP:
            assert not {floor(name) for name in names} & set(TOP), module


def test_there_are_no_cycles() -> None:
    import networkx as nx

    graph = nx.DiGraph((module, name) for module, names in imports().items() for name in names)
    inner = graph.subgraph(node for node in graph if floor(node) not in ("__init__", "bench"))
    assert not list(nx.simple_cycles(inner))


def test_importing_needs_torch_and_networkx_only() -> None:
    code = (
        "import sys, torch, networkx; before = set(sys.modules); import perexfx;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "known = {'perexfx', 'torch', 'networkx', *sys.stdlib_module_names}; print(sorted(new - known))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_nothing_prints_but_the_command_line_bench_and_demo() -> None:
    for path in ROOT.rglob("*.py"):
        if floor(".".join(path.relative_to(ROOT).with_suffix("").parts)) not in ("cli", "bench", "demo"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path
