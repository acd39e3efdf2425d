"""What imports what: no cycle, and no arrow that runs up in the order that docs/architecture.md draws.

The graph is read from the sources, so an import inside a function or under TYPE_CHECKING counts as any other, and so
does a module that is named by a string ("efficient_attn.benchmarks.suites").
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "efficient_attn"
FOLDERS = {
    PACKAGE: ROOT / PACKAGE,
    f"{PACKAGE}.kernels": ROOT / "kernels",
    f"{PACKAGE}.benchmarks": ROOT / "benchmarks",
}
Graph = dict[str, set[str]]


def modules(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Every module: name -> file."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a file names, in whatever way."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            names = [node.value]
        yield from (name for name in names if name in known and name != module)


def graph_of(folders: Mapping[str, Path]) -> Graph:
    """Module -> the modules that it imports."""
    known = modules(folders)
    return {module: set(imported(module, path, known)) for module, path in known.items()}


def room(module: str) -> str:
    """The folder or file below the package; the package itself for its public names; `__main__` for any program."""
    if module.endswith(".__main__"):
        return "__main__"
    return module.split(".")[1] if "." in module else PACKAGE


def rooms_of(graph: Graph) -> Graph:
    """The same between rooms."""
    rooms: Graph = {room(module): set() for module in graph}
    for module, others in graph.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    return rooms


def cycles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that reach one another (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            start = stack.index(node)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for node in graph:
        if node not in index:
            visit(node)
    return [nodes for nodes in found if len(nodes) > 1]


def drawn_order() -> dict[str, int]:
    """Room -> its height in the picture of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"<!-- order: .*? -->\n```\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.partition("#")[0].split() for line in picture.splitlines()]
    return {name: -height for height, names in enumerate(lines) for name in names}


GRAPH = graph_of(FOLDERS)
ORDER = drawn_order()


def test_every_room_has_a_place() -> None:
    assert {room(module) for module in GRAPH} == set(ORDER)


def test_no_arrow_runs_up() -> None:
    arrows = ((module, other) for module, others in GRAPH.items() for other in sorted(others))
    up = [f"{a} -> {b}" for a, b in arrows if ORDER.get(room(a), 0) < ORDER.get(room(b), 0)]
    assert not up, "\n" + "\n".join(up)


def test_no_cycle_between_rooms() -> None:
    found = cycles(rooms_of(GRAPH))
    assert not found, "\n".join(map(str, found))


def test_no_cycle_between_modules() -> None:
    found = cycles(GRAPH)
    assert not found, "\n".join(map(str, found))


def test_no_backend_knows_another() -> None:
    folder = lambda module: ".".join(module.split(".")[:3])  # noqa: E731
    backends = {folder(module) for module in GRAPH if re.match(rf"{PACKAGE}\.backends\.\w+\.", module)}
    assert len(backends) >= 4
    arrows = ((module, other) for module, others in GRAPH.items() for other in others)
    across = [(a, b) for a, b in arrows if {folder(a), folder(b)} <= backends and folder(a) != folder(b)]
    assert not across, "\n".join(f"{a} -> {b}" for a, b in across)


@pytest.mark.parametrize(
    "text",
    [
        "import efficient_attn.b", "from efficient_attn import b", "from . import b", "from .b import name",
        "def f():\n    from .b import name", "if TYPE_CHECKING:\n    from . import b",
        "SUITES = ['efficient_attn.b']", "import_module('efficient_attn.b')", "from .c import name; from .c.d import x",
    ],
)  # fmt: skip
def test_an_import_of_any_kind_counts(text: str, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    sources = {"__init__.py": "", "a.py": text, "b.py": "", "c/__init__.py": "from ..b import name", "c/d.py": ""}
    sources["b.py"] = "from .a import name"
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    graph = graph_of({PACKAGE: tmp_path})
    assert [f"{PACKAGE}.a", f"{PACKAGE}.b"] == [module for module in cycles(graph)[0] if ".c" not in module]
