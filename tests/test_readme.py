"""The README's programs and commands do what it says."""

import re
import subprocess
import sys
from pathlib import Path

from wsss_hf.cli.main import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_method_of_ones_own_runs_as_printed(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (program,) = [program for program in programs if "register_method" in program]
    assert len(program.splitlines()) < 60
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "'spread': 0." in result.stdout and "'classification': 0." in result.stdout


def test_every_command_that_is_named_exists():
    commands = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    named = set(re.findall(r"wsss ([a-z][a-z-]+)", README))
    assert named <= commands
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((Path(__file__).parent.parent / link).exists() for link in links if "://" not in link)
