"""The README is run: its Python as it stands, its shell commands as far as their options go."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import tiny_model
from hf_dino import DinoDetrImageProcessor


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory) -> Path:
    """What the reader has: a converted model and an image."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_model().save_pretrained(folder / "dino-4scale-r50")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder / "dino-4scale-r50")
    Image.new("RGB", (160, 120), "teal").save(folder / "image.jpg")
    return folder


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs_as_it_stands(code, readers_folder, monkeypatch):
    monkeypatch.chdir(readers_folder)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def shell_commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@cache
def help_of(*program: str | Path) -> str:
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [c for c in shell_commands() if c[0] in ("python", "accelerate")], ids=" ".join)
def test_shell_commands_name_scripts_and_options_that_exist(command):
    if command[1] == "-m":
        first = next((i for i, word in enumerate(command[3:], start=3) if word.startswith("--")), len(command))
        program, options = command[1:first], command[first:]  # with a word that chooses one of several programs
    else:
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        program, options = [ROOT / command[at]], command[at + 1 :]
    told = help_of(*program)
    for option in (word for word in options if word.startswith("--")):
        assert option in told


@pytest.mark.parametrize("command", [c for c in shell_commands() if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
