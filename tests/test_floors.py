"""Who may import whom, how full a folder may be, and what importing perexfx needs.

The order of the floors is data in docs/floors.py, which the picture is drawn from too. Every rule is tried on a house
that breaks it.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT / "perexfx"
FILES_IN_A_FOLDER, FILES_AT_THE_ROOT, LINES = 20, 6, 350


def floors_of_the_docs() -> Any:
    spec = importlib.util.spec_from_file_location("floors", PROJECT / "docs" / "floors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["floors"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


DOCS = floors_of_the_docs()
ROOMS = {room.name: room for rooms in DOCS.FLOORS for room in rooms}
FLOOR = {room.name: at for at, rooms in enumerate(reversed(DOCS.FLOORS)) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Module without `perexfx.` -> its file; a folder's own is that of the folder."""
    found = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def names_of(tree: ast.Module) -> set[str]:
    """The names that a module imports: what a folder's `__init__.py` hands on, a function of its file's name too."""
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imported for alias in node.names}


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> modules of perexfx that it imports, type-checking blocks and functions included."""
    known = modules(root)
    trees = {name: ast.parse(path.read_text()) for name, path in known.items()}
    handed_on = {name: names_of(tree) for name, tree in trees.items()}
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "perexfx":
                assert node.level == 0, f"{name} imports by a relative name"
                module = str(node.module).removeprefix("perexfx").removeprefix(".")
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    is_file = inner in known and alias.name not in handed_on.get(module, set())
                    found[name].add(inner if is_file else module or "__init__")
            if isinstance(node, ast.Import):
                found[name] |= {
                    alias.name.removeprefix("perexfx").removeprefix(".") or "__init__"
                    for alias in node.names
                    if alias.name.split(".")[0] == "perexfx"
                }
    return found


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


# The rules, each as the sentences that a house breaks it with


def unlisted(root: Path) -> Iterator[str]:
    """What lies at the root and is in no list, or is in the list and not there."""
    there = {room_of(name) for name in modules(root)}
    for name in sorted(there - ROOMS.keys()):
        yield f"`{name}` lies at the root, and docs/floors.py does not list it"
    for name in sorted({name for name, room in ROOMS.items() if not room.is_to_come} - there):
        yield f"docs/floors.py lists `{name}`, which is not there"
    for name in sorted({name for name, room in ROOMS.items() if room.is_to_come} & there):
        yield f"`{name}` has come: docs/floors.py still says that it is to come"


def looking_up(root: Path) -> Iterator[str]:
    """Imports that do not go down."""
    for module, names in imports(root).items():
        for name in sorted(names):
            own, other = room_of(module), room_of(name)
            if own != other and own in FLOOR and other in FLOOR and FLOOR[other] >= FLOOR[own]:
                yield f"{module} looks up: it imports {name}"


def beside_the_door(root: Path) -> Iterator[str]:
    """Imports of a room's inner files from other rooms, past what the room hands on."""
    for module, names in imports(root).items():
        for name in sorted(names):
            room, _, inner = name.partition(".")
            if room_of(module) == room or not inner or room not in ROOMS:
                continue
            doors = ROOMS[room].doors
            if "*" not in doors and inner not in doors:
                yield f"{module} imports {name}, past the door of `{room}`"


def circles(root: Path) -> Iterator[str]:
    """Files that import each other."""
    graph = nx.DiGraph((module, name) for module, names in imports(root).items() for name in names)
    for members in nx.strongly_connected_components(graph):
        if len(members) > 1 or any(graph.has_edge(member, member) for member in members):
            yield f"{', '.join(sorted(members))} import each other"


def too_full(root: Path) -> Iterator[str]:
    """Folders and files with too much in them."""
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix in (".py", ".cpp", ".h")]
        count = len([path for path in files if folder == root or path.name != "__init__.py"])
        room = ROOMS.get(folder.relative_to(root).parts[0]) if folder != root else None
        most = FILES_AT_THE_ROOT if folder == root else FILES_IN_A_FOLDER
        if count > most and not (room is not None and room.is_family):
            yield f"{folder.name}/ has {count} files, and {most} are the most"
    for path in sorted(root.rglob("*.py")):
        if (lines := len(path.read_text().splitlines())) > LINES:
            yield f"{path.relative_to(root)} has {lines} lines, and {LINES} are the most"


def without_a_sign(root: Path) -> Iterator[str]:
    """Rooms whose docstring does not say what comes in, what goes out, and which file to open first."""
    for name, room in ROOMS.items():
        path = root / name / "__init__.py"
        if not path.exists() or room.is_family:
            continue
        said = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        if not ("In come" in said and "out go" in said and "Open `" in said):
            yield f"the docstring of {name}/ should say what comes in, what goes out, and which file to open first"


RULES = (unlisted, looking_up, beside_the_door, circles, too_full, without_a_sign)


@pytest.mark.parametrize("rule", RULES)
def test_the_house(rule: Any) -> None:
    assert not list(rule(ROOT))


SIGN = '"""In come sites; out goes a plan. Open `plan.py` first."""\n'
SOUND = {
    **{f"{name}.py": "" for name in ("__main__", "demo", "__init__", "api")},
    **{
        f"{name}/__init__.py": SIGN
        for name, room in ROOMS.items()
        if not room.is_to_come and name not in ("__main__", "demo", "__init__", "api")
    },
    "planning/plan.py": "from perexfx.sites import Site\n",
    "runtime/nodes.py": "from perexfx.planning import Plan\n",
}


def house(folder: Path, changed: dict[str, str]) -> Path:
    for name, text in (SOUND | changed).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_house(rule: Any, tmp_path: Path) -> None:
    assert not list(rule(house(tmp_path, {})))


TO_COME = next(name for name, room in ROOMS.items() if room.is_to_come)
UNDER_TYPE_CHECKING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from perexfx.{} import x\n"


@pytest.mark.parametrize(
    ("rule", "changed", "message"),
    [
        (unlisted, {"helpers.py": ""}, "`helpers` lies at the root"),
        (unlisted, {"helpers/__init__.py": ""}, "`helpers` lies at the root"),
        (unlisted, {f"{TO_COME}/__init__.py": SIGN}, f"`{TO_COME}` has come"),
        (looking_up, {"planning/plan.py": "from perexfx.runtime import Tape\n"}, "planning.plan looks up"),
        (looking_up, {"planning/plan.py": UNDER_TYPE_CHECKING.format("runtime")}, "planning.plan looks up"),
        (looking_up, {"planning/plan.py": "def f():\n    import perexfx\n"}, "planning.plan looks up"),
        (looking_up, {"machine/a.py": "from perexfx.rehearsal import x\n"}, "machine.a looks up"),
        (
            beside_the_door,
            {"runtime/nodes.py": "from perexfx.planning.plan import Plan\n"},
            "runtime.nodes imports planning.plan, past the door",
        ),
        (
            circles,
            {"sites/a.py": "from perexfx.sites.b import x\n", "sites/b.py": UNDER_TYPE_CHECKING.format("sites.a")},
            "sites.a, sites.b import each other",
        ),
        (too_full, {f"sites/file{at}.py": "" for at in range(FILES_IN_A_FOLDER + 1)}, "sites/ has 21 files"),
        (too_full, {f"file{at}.py": "" for at in range(3)}, "has 7 files"),
        (too_full, {"sites/a.py": "x = 1\n" * (LINES + 1)}, "sites/a.py has 351 lines"),
        (without_a_sign, {"sites/__init__.py": '"""Sites."""\n'}, "the docstring of sites/ should say"),
    ],
)
def test_a_house_that_breaks_a_rule(rule: Any, changed: dict[str, str], message: str, tmp_path: Path) -> None:
    assert any(message in said for said in rule(house(tmp_path, changed)))


def test_the_picture_is_drawn_from_the_floors() -> None:
    assert DOCS.PICTURE.read_text() == DOCS.picture()


def test_only_the_api_names_rules_and_strategies() -> None:
    users = {
        room_of(module)
        for module, names in imports(ROOT).items()
        if {room_of(name) for name in names} & {"layers", "strategies"}
        and room_of(module) not in ("layers", "strategies")
    }
    assert users == {"api", "bench"}


def test_tests_are_laid_out_like_the_house() -> None:
    """`tests/ROOM/test_NAME.py` tests `perexfx/ROOM/NAME.py`, or the folder of that name, or the room as a whole."""
    for path in sorted(Path(__file__).parent.glob("*/test_*.py")):
        room, name = path.parent.name, path.stem.removeprefix("test_")
        if room != "whole":
            tested = ROOT / room / name
            assert room == name or tested.is_dir() or tested.with_suffix(".py").exists(), path


def test_importing_needs_torch_and_networkx_only() -> None:
    code = (
        "import sys, torch, networkx; before = set(sys.modules); import perexfx;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "known = {'perexfx', 'torch', 'networkx', *sys.stdlib_module_names}; print(sorted(new - known))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_nothing_prints_but_the_command_line_bench_and_demo() -> None:
    for name, path in modules(ROOT).items():
        if room_of(name) not in ("cli", "bench", "demo"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path
