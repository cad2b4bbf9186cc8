"""What the files of the project say about the package and its versions."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import wsss_hf

ROOT = Path(__file__).parent.parent
TORCH = ("torch", "2.6", "2.13.0")  # why: constraints-lowest.txt


def floors(other: str = "<") -> dict[str, str]:
    """Name → lowest version, of all requirements in pyproject.toml; `other` is the Python that does not count."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"([\w-]+)>=([\d.]+)(?:; python_version (\S+) .*)?"', text)
    return {name.lower(): version for name, version, python in found if python != other}


def pinned(file: str, other: str = "<") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [re.match(r"([\w-]+)==([\d.]+)", line) for line in lines if f"python_version {other}" not in line]
    return {pair[1].lower().replace("_", "-"): pair[2] for pair in pairs if pair}


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_the_lowest_versions_are_the_floors():
    lowest, wanted = pinned("constraints-lowest.txt"), floors()
    name, floor, installable = TORCH
    assert (wanted.pop(name), lowest.pop(name)) == (floor, installable)
    assert {name: numbers(version) for name, version in wanted.items()} == {
        name: numbers(version) for name, version in lowest.items()
    }


def test_the_lowest_versions_are_the_floors_with_python_310_too():
    lowest, wanted = pinned("constraints-lowest.txt", ">="), floors(">=")
    assert wanted.keys() == lowest.keys() and wanted["transformers"] == "5.20.2"
    assert all(numbers(version) == numbers(lowest[name]) for name, version in wanted.items())


def test_the_pinned_versions_are_not_below_the_floors():
    versions, wanted = pinned("constraints.txt"), floors()
    assert all(numbers(versions[name]) >= numbers(wanted[name]) for name in versions.keys() & wanted.keys())


def built(hook: str, folder: Path) -> Path:
    """What a hook of setuptools writes into `folder`, from a copy of what the wheel is made of."""
    copy = folder / "source"
    copy.mkdir()
    for name in ("wsss_hf", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    call = f"import sys, setuptools.build_meta; print(setuptools.build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", call, str(folder)], check=True, capture_output=True, cwd=copy, text=True
    )
    return folder / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_says_that_it_is_typed(tmp_path):
    names = zipfile.ZipFile(built("build_wheel", tmp_path)).namelist()
    assert {"wsss_hf/py.typed", "wsss_hf/recipes/toy.yaml", "wsss_hf/models/drs.py", "wsss_hf/__main__.py"} <= set(
        names
    )
    assert all(name.startswith("wsss_hf") for name in names)


@pytest.mark.slow
def test_the_wheel_alone_is_enough_for_accelerate(tmp_path):
    """Installed as pip does it, without the sources: `accelerate launch -m wsss_hf`, on two processes."""
    unpacked = tmp_path / "site"
    zipfile.ZipFile(built("build_wheel", tmp_path)).extractall(unpacked)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "wsss_hf"]
    environment = os.environ | {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "recipe", "toy"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\ncam:") == 2


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    folder = built("prepare_metadata_for_build_wheel", tmp_path_factory.mktemp("metadata"))
    return importlib.metadata.PathDistribution(folder).metadata


def test_every_requirement_has_a_floor(metadata):
    wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    wanted = [one for one in wanted if one.name.lower().replace("-", "_") != metadata["Name"]]
    assert all([part.operator for part in one.specifier] == [">="] for one in wanted)
    assert {one.name.lower() for one in wanted} == floors().keys()


def test_the_metadata_of_the_wheel(metadata):
    assert metadata["Version"] == wsss_hf.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert "class activation maps" in metadata["Keywords"].split(",")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers and "Programming Language :: Python :: 3.10" in classifiers
