"""Every code block of the README runs as printed; files, links, commands and functions that the pages name exist."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2ImageProcessorPil, MobileNetV2Model

import wsss_hf
from wsss_hf.cli.main import app
from wsss_hf.recipes import recipe_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_cards/results.md")]
README = (ROOT / "README.md").read_text()
BACKBONE = "google/mobilenet_v2_1.0_224"

_spec = importlib.util.spec_from_file_location("readme_hub", ROOT / "tests" / "hub" / "conftest.py")
sys.path.append(str(ROOT / "tests" / "hub"))
_hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_hub)
OWNER = sys.modules["loopback_hub"].OWNER
hub, client_environment = _hub.hub, _hub.client_environment


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What a reader has in the working folder: photographs, a small backbone of random weights, the scripts."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    files = [f"photos/{name}/{number}.jpg" for name in ("cat", "dog") for number in range(4)]
    for file in (*files, "new_photos/one.jpg", "new_photos/two.jpg", "photo.jpg"):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (48, 64, 3), dtype=np.uint8)
        pixels[8:40, 16:48, 0 if "cat" in file else 2] += 150  # what even an untrained backbone can learn
        Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, expand_ratio=2.0, image_size=64)
    MobileNetV2Model(config).save_pretrained(BACKBONE)
    MobileNetV2ImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(BACKBONE)
    Path("scripts").symlink_to(ROOT / "scripts")
    return tmp_path


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every code block; the account on the Hub is the test's.

    An untrained backbone needs a longer training until its maps are certain of anything.
    """
    text = README.replace("your-name/", f"{OWNER}/")
    changes = ["image.size=96", "cam.train.lr=0.01", "cam.train.epochs=20", "cam.train.freeze_batch_norm=false"]
    text = text.replace("wsss run ", f"wsss run {' '.join(f'--set {change}' for change in changes)} ")
    text = text.replace('"segmenter.train.epochs=3"]', f'"segmenter.train.epochs=3", {json.dumps(changes)[1:]}')
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_program(text: str) -> str:
    """What a program that imports the package prints, in a fork: without the price of a new interpreter."""
    out, into = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
            into.send((printed.getvalue(), None))
        except BaseException:
            into.send((printed.getvalue(), traceback.format_exc()))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    printed, error = out.recv()
    process.join()
    assert error is None, f"{text}\n{error}"
    return printed


def run_python(text: str, environment: dict[str, str]) -> str:
    """What the program prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout


def run_command(words: list[str]) -> None:
    """A line of a shell block."""
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.*)\]", words[2])
        wanted = {name for names in extras for name in names.split(",")}
        assert wanted <= extras_of_the_package() and words[2].startswith(".")
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "wsss":
        app(words[1:], standalone_mode=False)
    else:
        pytest.fail(f"no way to test the command {words[0]}")


def extras_of_the_package() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


@pytest.mark.slow
def test_every_code_block_runs_in_the_order_of_the_page(workplace, client_environment):
    done = []
    for language, text in blocks():
        if language == "python":
            # Loading a model must not need the package; the other programs import it.
            done.append(run_program(text) if "wsss_hf" in text else run_python(text, client_environment))
        else:
            assert language == "bash"
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    run_command(words)
                    done.append(line)
    assert len(done) > 8
    assert Path("runs/photos/report.html").is_file() and Path("runs/affinity/model.safetensors").is_file()
    assert len(list(Path("runs/predicted").rglob("*.png"))) == 2
    own_method = next(text for text in done if "'spread'" in text)
    assert "'spread': 0." in own_method and "'classification': 0." in own_method


def test_the_pages_are_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_is_named_exists(page):
    commands = typer.main.get_command(app).commands
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for name in re.findall(r"wsss ([a-z][a-z-]+)", text):
        assert name in commands, name
    for name, rest in re.findall(r"wsss ([a-z][a-z-]+) ([^`\n]*)", text):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", rest.split("#")[0])) <= options, rest
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_script_that_is_named_exists(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    for script, rest in re.findall(r"python (scripts/\w+\.py)([^`\n]*)", text):
        options = re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text())
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= set(options), rest


def test_every_python_function_of_the_table_of_stages_is_public():
    rows = re.findall(r"^\| `wsss ([a-z-]+)`.*\| `(\w+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 7
    for command, function in rows:
        assert function == command.replace("-", "_") and function in wsss_hf.__all__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_or_named_file_exists(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert all((page.parent / link).exists() for link in links)
    named = re.findall(r"\b(?:scripts|tests|wsss_hf|model_cards)/[\w/.]+\.\w+", page.read_text())
    assert all((ROOT / name).exists() for name in named), named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_that_is_named_exists(page):
    for name in re.findall(r"--recipe ([\w/.+-]+)", page.read_text()):
        assert (ROOT / name).is_file() or name in (*recipe_names(), "FILE"), name


def test_the_import_graph_is_the_one_that_the_tests_hold():
    (sentence,) = re.findall(r"^package imports only from those to its left: (.*?)\.$", README, re.DOTALL | re.M)
    rooms = [set(re.findall(r"`(\w+)`", part)) for part in sentence.split("←")]
    here = {
        path.stem for path in (ROOT / "wsss_hf").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set().union(*rooms) == here - {"__init__", "__main__", "version"}


def test_every_table_of_results_has_a_command_that_writes_it():
    text = (ROOT / "model_cards" / "results.md").read_text()
    tables = re.findall(r"<!-- ([\w-]+) table: written by `python scripts/update_results.py` from ", text)
    assert tables and tables == re.findall(r"<!-- end of ([\w-]+) table -->", text)
    for name in tables:
        assert (ROOT / "scripts/plans" / f"{name}.yaml").is_file() or name in (
            "demo",
            "photographs",
            "photographs-saliency",
            "photographs-walk",
            "costs",
            "throughput",
            "exports",
        )
