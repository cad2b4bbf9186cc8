"""Every room of the package imports rooms to its left only."""

import ast
from pathlib import Path

import pytest

import wsss_hf

PACKAGE = Path(wsss_hf.__file__).parent
# From left to right; what stands in one entry may not import each other.
ORDER = [
    {"version", "models"},
    {"settings"},
    {"progress", "files"},
    {"data"},
    {"saliency"},
    {"refinement"},
    {"inference"},
    {"pseudo_labels"},
    {"metrics"},
    {"training"},
    {"recipes"},
    {"reporting"},
    {"stages"},
    {"hub"},
    {"cli"},
    {"__main__"},
]
PLACE = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, room) of all imports of the package in a file, those inside functions and for types among them."""
    parts = ("wsss_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(parts[: -node.level]) if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            names = [[*module, alias.name] for alias in node.names]
        found += [(node.lineno, name[1] if len(name) > 1 else "") for name in names if name[0] == "wsss_hf"]
    return found


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} == PLACE.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_rooms_to_its_left(path):
    room = room_of(path)
    wrong = [
        f"{path.name}:{line} imports {other or 'wsss_hf itself'}"
        for line, other in imports(path)
        if other != room and PLACE.get(other, len(ORDER)) >= PLACE.get(room, 0)
    ]
    assert not wrong


def test_models_are_flat_and_import_nothing_of_the_package_but_models():
    """Remote code resolves `from .x import y` one level deep."""
    for path in (PACKAGE / "models").rglob("*.py"):
        assert path.parent == PACKAGE / "models"
        assert {other for _, other in imports(path)} <= {"models"}, path


@pytest.mark.parametrize(
    ("text", "rooms"),
    [
        ("from ..data.tagged import x", ["data"]),
        ("from .. import files", ["files"]),
        ("from . import cache", ["stages"]),
        ("from .cache import x", ["stages"]),
        ("import wsss_hf.hub.push", ["hub"]),
        ("from wsss_hf import load_data", ["load_data"]),
        ("def f():\n    from ..cli import main", ["cli"]),
        ("import os, torch", []),
    ],
)
def test_imports_of_all_forms_are_seen(tmp_path, monkeypatch, text, rooms):
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "run.py").write_text(text)
    assert [room for _, room in imports(tmp_path / "stages" / "run.py")] == rooms
