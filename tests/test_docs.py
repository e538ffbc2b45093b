"""README and docs are run: their Python as it stands, their shell commands as far as their options go."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.models import tiny_model
from helpers.videos import make_video
from hf_dino import DinoDetrImageProcessor


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    fence = rf"^```{language}\n(.*?)^```"
    return [
        code
        for page in PAGES
        for code in re.findall(fence, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture(scope="module")
def readers_directory(tmp_path_factory) -> Path:
    """What the reader has: a converted model, an image and a video."""
    directory = tmp_path_factory.mktemp("reader")
    model = directory / "dino-4scale-r50"
    tiny_model().save_pretrained(model)
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(model)
    Image.new("RGB", (160, 120), "teal").save(directory / "image.jpg")
    make_video(directory / "clip.mp4", 3)
    return directory


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs_as_it_stands(code, readers_directory, monkeypatch):
    monkeypatch.chdir(readers_directory)
    torch.manual_seed(0)
    exec(compile(code, "docs", "exec"), {})


def shell_commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def program_and_options(command: list[str]) -> tuple[list[str], list[str]]:
    """Split a command into a Python program with its subcommands, and the options given to it."""
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "hf-dino":
        words = ["python", "-m", "hf_dino", *words[1:]]
    start = next(i for i, word in enumerate(words) if word.endswith(".py") or (word == "-m" and i))
    program = words[start : start + 1] if words[start].endswith(".py") else words[start : start + 2]
    rest = words[start + len(program) :]
    depth = {"data": 2}.get(rest[0], 1) if program == ["-m", "hf_dino"] else 0
    return program + rest[:depth], [word.partition("=")[0] for word in rest[depth:] if word.startswith("--")]


COMMANDS = [c for c in shell_commands() if re.search(r"hf[-_]dino|\.py\b", " ".join(c)) and c[0] not in ("pip", "rm")]


@cache
def help_of(*program: str) -> str:
    process = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    return process.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_shell_commands_name_programs_and_options_that_exist(command):
    program, options = program_and_options(command)
    listed = help_of(*program)
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", listed), option


@pytest.mark.parametrize("command", [c for c in shell_commands() if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_readme_is_short_and_shows_an_image_and_a_detection_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert any(line.startswith("![") for line in lines[:25])
    assert any('pipeline("object-detection"' in line for line in lines[:50])
