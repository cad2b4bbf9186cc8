"""What the files of the project say about the package and its versions."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = ("torch", "2.6", "2.13.0")  # why: constraints-lowest.txt


def floors() -> dict[str, str]:
    """Name → lowest version, of all requirements in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"([\w-]+)>=([\d.]+)(?:; python_version (\S+) .*)?"', text)
    return {name.lower(): version for name, version, python in found if python != "<"}


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [re.match(r"([\w-]+)==([\d.]+)", line) for line in lines if "python_version <" not in line]
    return {pair[1].lower().replace("_", "-"): pair[2] for pair in pairs if pair}


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_the_lowest_versions_are_the_floors():
    lowest, wanted = pinned("constraints-lowest.txt"), floors()
    name, floor, installable = TORCH
    assert (wanted.pop(name), lowest.pop(name)) == (floor, installable)
    del wanted["setuptools"]  # builds, and is not installed
    assert {name: numbers(version) for name, version in wanted.items()} == {
        name: numbers(version) for name, version in lowest.items()
    }


def test_the_pinned_versions_are_not_below_the_floors():
    versions, wanted = pinned("constraints.txt"), floors()
    assert all(numbers(versions[name]) >= numbers(wanted[name]) for name in versions.keys() & wanted.keys())


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_says_that_it_is_typed(tmp_path):
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("wsss_hf", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, capture_output=True, cwd=copy)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"wsss_hf/py.typed", "wsss_hf/recipes/toy.yaml", "wsss_hf/models/drs.py"} <= set(names)
    assert all(name.startswith("wsss_hf") for name in names)
