"""README and docs are run: their Python, and their commands, by the real parser and where it is cheap for real.

Each block and each command gets a directory of its own with what the reader has: models, datasets and images.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from PIL import Image

from helpers.command_line import hf_dino, train_arguments
from helpers.conversion_sources import checkpoint, narrow_config, save
from helpers.detectors import small_detector
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.videos import make_video
from hf_dino import DinoDetrImageProcessor
from hf_dino.cli import app
from hf_dino.data import convert_data, read_data
from hf_dino.data.shapes import OUTLINES, generate_shapes
from hf_dino.hub import save_detector


NOTEBOOKS = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))
PAGES = [ROOT / "README.md", ROOT / "conversion" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands that do not run here, by a pattern and the reason. Their options are checked all the same.
NOT_RUN = {
    r"accelerate launch": "starts processes: tests/training/test_distributed.py does",
    r"BCCD_Dataset|https://": "downloads",
    r"--device cuda": "needs a GPU",
    r"OWNER/": "needs the Hub: tests/test_publishing.py pushes and loads",
    r"hf-dino demo": "serves until Ctrl-C: tests/demo starts the page and a Space",
    r"camera:": "needs a camera",
    r"finetune-large\.yaml": "trains on images of 1200 pixels",
    r"small\.json": "trains a model from scratch for an hour",
    r"--architecture": "trains a model of full size from scratch",
}
SLOW = r"hf-dino (train|export)|--compile|dino\.onnx"


class Block(NamedTuple):
    """A block of code of a page."""

    page: Path
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [Block(page, language, code) for language, code in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def split_commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    before_pipes = [re.split(r" [|>] ", line)[0] for line in lines if line.strip()]
    commands = [shlex.split(line, comments=True) for line in before_pipes]
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)] for words in commands if words]


COMMANDS = list(
    {" ".join(words): words for block in BLOCKS if block.language == "bash" for words in split_commands(block.code)}
    .values()
)  # fmt: skip
HF_DINO = [words for words in COMMANDS if words[0] == "hf-dino" and words[1:] != ["--help"]]
SCRIPTS = [words for words in COMMANDS if any(word.endswith(".py") for word in words) and words[0] != "hf-dino"]
LAUNCHED = [words for words in COMMANDS if "hf_dino" in words]
RUN = [words for words in HF_DINO if not any(re.search(pattern, " ".join(words)) for pattern in NOT_RUN)]


def marked(values: Sequence[Any], text: Any = " ".join) -> list[Any]:
    """Return parameters of a test; those that take long are marked."""
    return [pytest.param(each, marks=[pytest.mark.slow] * bool(re.search(SLOW, text(each)))) for each in values]


@pytest.fixture(scope="session")
def reader(tmp_path_factory) -> Path:
    """What the reader has, in a directory that no test writes to."""
    folder = tmp_path_factory.mktemp("reader")
    model = folder / "dino-4scale-r50"
    tiny_model(id2label=dict(enumerate([*OUTLINES, "person", "car"]))).save_pretrained(model)
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(model)
    shutil.copytree(model, folder / "runs" / "mine")
    rt_detr = small_detector("rt_detr", id2label=dict(enumerate(OUTLINES)))
    square = DinoDetrImageProcessor(size={"height": 96, "width": 96})
    save_detector(folder / "runs" / "rtdetr", rt_detr, square, card="")
    generate_shapes(folder / "mine", image_size=96, num_train=8, num_val=4, num_test=4)
    convert_data(read_data(folder / "mine"), folder / "yolo-dataset", "yolo")
    shutil.copytree(folder / "mine" / "val", folder / "images")
    shutil.copytree(folder / "mine" / "val", folder / "scans")
    shutil.copy(folder / "mine" / "val.json", folder / "annotations.json")
    Image.new("RGB", (160, 120), "teal").save(folder / "image.jpg")
    Image.new("RGB", (1000, 700), "teal").save(folder / "large.tif")
    make_video(folder / "clip.mp4", 24, times=[number / 2 for number in range(24)], last_duration=0.5)
    config = narrow_config(id2label={label: str(label) for label in range(91)})
    save(checkpoint("official", config), folder / "checkpoint0011_4scale.pth")
    save(checkpoint("mmdet"), folder / "epoch_12.pth", zipped=False)
    return folder


# Where some code finds something else, or nothing, under a name: (pattern, name, fixture with what is there).
REPLACED = (
    (r"dino\.onnx(?<!--output dino\.onnx)", "dino.onnx", "exported"),
    (r"dino-4scale-r50 --to ", "dino-4scale-r50", "converted"),
    (r"from-mmdet --to ", "from-mmdet", "converted_from_mmdet"),
    (r"data split", "mine", "one_part"),
    (r"(--output_dir|import convert_checkpoint.*)\W.*dino-4scale-r50", "dino-4scale-r50", ""),
    (r"--output_dir runs/", "runs", ""),
)


@pytest.fixture(scope="session")
def exported(reader, tmp_path_factory) -> Path:
    """The file that the page about exporting writes."""
    path = tmp_path_factory.mktemp("exported") / "dino.onnx"
    assert hf_dino(["export", reader / "dino-4scale-r50", "--output", path]) == 0
    return path


@pytest.fixture(scope="session")
def converted(reader, tmp_path_factory) -> Path:
    """A model that the official code can express."""
    return convert(reader / "checkpoint0011_4scale.pth", tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="session")
def converted_from_mmdet(reader, tmp_path_factory) -> Path:
    """A model that MMDetection can express."""
    return convert(reader / "epoch_12.pth", tmp_path_factory.mktemp("converted") / "model")


def convert(file: Path, folder: Path) -> Path:
    assert hf_dino(["convert", file, "--output_dir", folder]) == 0
    return folder


@pytest.fixture(scope="session")
def one_part(tmp_path_factory) -> Path:
    """A dataset without a validation split, as annotation tools export it."""
    whole = generate_shapes(tmp_path_factory.mktemp("whole") / "shapes", image_size=32, num_train=24, num_val=1)
    part = tmp_path_factory.mktemp("part")
    for name in ("train", "train.json"):
        (whole / name).rename(part / name)
    return part


@pytest.fixture
def enter(reader, tmp_path, monkeypatch, request):
    """Go to a copy of the reader's directory, in which the named code finds what it reads."""

    def enter(code: str) -> None:
        replaced = {name: fixture for pattern, name, fixture in REPLACED if re.search(pattern, code, re.DOTALL)}
        found = {item.name: item for item in [*reader.iterdir(), ROOT / "examples"]}
        found |= {name: request.getfixturevalue(fixture) for name, fixture in replaced.items() if fixture}
        for name in found.keys() - {name for name, fixture in replaced.items() if not fixture}:
            (shutil.copytree if name == "runs" else os.symlink)(found[name], tmp_path / name)
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)

    return enter


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", marked(PYTHON, lambda block: block.code), ids=lambda block: block.page.stem)
def test_python_runs_as_it_stands(block, enter):
    enter(block.code)
    exec(compile(block.code, block.page.name, "exec"), {})


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "text"], ids=lambda b: b.page.stem)
def test_no_python_hides_in_a_block_of_text(block):
    assert not re.search(r"^(from|import) \w|^\w+ = \w+\(", block.code, re.MULTILINE)


def test_no_block_escapes_by_its_language():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "text"}


@pytest.mark.parametrize("words", marked(RUN), ids=" ".join)
def test_command_runs(words, enter):
    enter(" ".join(words))
    if "--resume" in words:  # continues what the same command without it began
        assert hf_dino(word for word in words[1:] if word != "--resume") == 0
    assert hf_dino(words[1:]) == 0


def test_reasons_for_commands_that_do_not_run_are_needed():
    lines = [" ".join(words) for words in COMMANDS]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)]


@pytest.mark.slow
@pytest.mark.parametrize("page", NOTEBOOKS["PAGES"], ids=lambda page: page.stem)
def test_notebook_runs(page, enter, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    notebook = NOTEBOOKS["make_notebook"](page)
    enter("--output_dir runs/ " if "hf-dino train" in page.read_text(encoding="utf-8") else "")
    program = tmp_path / "bin" / "hf-dino"  # of this checkout, wherever the installed one comes from
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom hf_dino.cli import main\n\nmain()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


def parse(arguments: Sequence[str]) -> None:
    """Parse a command line of `hf-dino` without running it."""
    group, parsed = typer.main.get_command(app), []
    for command in commands_of(group).values():
        command.callback = lambda **options: parsed.append(options)
    with pytest.raises(SystemExit) as end:
        group(list(arguments), prog_name="hf-dino")
    assert not end.value.code
    assert len(parsed) == 1
    if arguments[0] == "train":
        train_arguments(arguments[1:])


def commands_of(group: Any, prefix: str = "") -> dict[str, Any]:
    """Return the commands by their names, such as `data check`."""
    commands = {}
    for name, command in group.commands.items():
        commands |= commands_of(command, f"{name} ") if hasattr(command, "commands") else {prefix + name: command}
    return commands


@pytest.mark.parametrize("words", HF_DINO, ids=" ".join)
def test_command_is_parsed(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the recipes are
    parse(words[1:])


LAUNCHERS = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}


@pytest.mark.parametrize("words", LAUNCHED, ids=" ".join)
def test_launched_command_is_parsed(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(words[words.index("hf_dino") + 1 :])
    launcher = [word for word in words[: words.index("hf_dino")] if word.startswith("--")]
    assert all(re.search(rf"{word}\b".replace("_", "[-_]"), help_of("-m", LAUNCHERS[words[0]])) for word in launcher)


INLINE = [(page, code) for page in PAGES for code in re.findall(r"`(hf-dino [a-z][^`]*)`", page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "code"), INLINE, ids=lambda each: getattr(each, "name", each))
def test_inline_command_and_its_options_exist(page, code):
    words = code.split()[1:]
    known = commands_of(typer.main.get_command(app))
    names = [name for name in known if " ".join(words).startswith(name)]
    groups = {name.split()[0] for name in known} - set(known)
    assert names or words[0].strip(",") in groups, code
    options = {option for name in names for each in known[name].params for option in each.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


@cache
def help_of(*program: str) -> str:
    process = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    return process.stdout


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_scripts_and_their_options_exist(words):
    start = next(index for index, word in enumerate(words) if word.endswith(".py"))
    listed = help_of(words[start])
    for word in words[start + 1 :]:
        assert not word.startswith("--") or re.search(rf"{re.escape(word.partition('=')[0])}\b", listed), word


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "make"], ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_readme_is_short_and_shows_an_image_and_a_detection_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert any(line.startswith("![") for line in lines[:25])
    assert any('pipeline("object-detection"' in line for line in lines[:50])
