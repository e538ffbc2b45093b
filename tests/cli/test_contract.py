"""The contract of all commands: `--json` prints one document, wrong use is one line and exit status 2."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import typer.main
from huggingface_hub import ModelCard
from PIL import Image

from helpers.command_line import documented_keys, exit_status, hf_dino
from helpers.comparisons import make_up
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.cli import app
from hf_dino.cli.options import print_json
from hf_dino.data.shapes import generate_shapes


ROOT = Path(__file__).parents[2]


def walk(group, path=()):
    """Yield the path and the command of each registered command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from walk(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(walk(typer.main.get_command(app)))
NAMES = [" ".join(path) for path in COMMANDS]
NAMES_OF_SHAPES = ("circle", "square", "triangle", "star", "cross")
SERVES = {("demo",)}  # runs until it is stopped


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, a dataset and an image."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model(id2label=dict(enumerate(NAMES_OF_SHAPES))).save_pretrained(folder / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder / "model")
    generate_shapes(folder / "shapes", num_train=6, num_val=4, num_test=4)
    Image.new("RGB", (160, 120), "teal").save(folder / "image.png")
    make_up(folder / "comparison", rows=("detr", "dino_4scale"), seeds=1)
    return folder


# JSON

QUICK = {
    "checkpoints": (0, {"checkpoints"}),
    "checkpoints --cached": (0, {"directory", "files", "size", "deleted"}),
    "kernels": (0, {"mode", "torch", "cuda", "sources", "cache", "devices"}),
    "info model --image_size 96x128 --device cpu": (
        0,
        {
            "model",
            "backbone",
            "num_feature_levels",
            "num_queries",
            "origin",
            "labels",
            "num_unused_labels",
            "image_size",
        }
        | {"saved_by_transformers", "versions", "kernel", "forward", "parts"},
    ),
    "data check shapes": (0, {"splits", "warnings", "errors", "preview"}),
    "data augment shapes --output OUT.png --image_size 96": (0, {"preview", "augmentation", "image_size", "seed"}),
    "data convert shapes --output_dir OUT --format yolo": (0, {"data", "format", "images", "warnings"}),
    "data split shapes --output_dir OUT --merge": (0, {"data", "format", "splits", "near_duplicates", "warnings"}),
    "evaluate --model model --dataset shapes --dataloader_num_workers 0": (
        0,
        {"model", "data", "split", "images", "coco_backend", "metrics", "written"},
    ),
    "benchmark --model model --sizes 96x128 --rounds 1": (0, {"machine", "threads", "rounds", "candidates"}),
    "compare --output_dir comparison --report_only": (0, {"output_dir", "rows", "order", "failed"}),
    "convert model --to official --output OUT.pth": (0, {"source", "output", "format", "files"}),
}


@pytest.mark.parametrize("path", COMMANDS, ids=NAMES)
def test_every_command_has_json(path):
    options = [option for parameter in COMMANDS[path].params for option in parameter.opts]
    assert ("--json" in options) == (path not in SERVES)


def write_checkpoint(model, output, to):
    print(f"{model}: written in the format of {to}")
    output.touch()


@pytest.mark.parametrize("line", QUICK)
def test_json_is_all_that_stdout_has(line, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_dino.conversion.export_checkpoint", write_checkpoint)
    monkeypatch.chdir(work)
    status, keys = QUICK[line]
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in line.split()]
    assert hf_dino([*arguments, "--json"]) == status
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts.keys() == keys
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in facts)
    assert printed.err  # what is printed without --json


def test_json_of_a_dataset_with_errors_is_printed_with_status_1(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "shapes", "broken")
    image = next(Path("broken", "train").glob("*.png"))
    image.write_bytes(b"broken")
    assert exit_status(["data", "check", "broken", "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert image.name in error


def test_an_evaluation_is_added_to_the_card(work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(work)
    shutil.copytree("model", tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    arguments = ["evaluate", f"--model={tmp_path / 'model'}", "--dataset=shapes", "--dataloader_num_workers=0"]
    assert exit_status([*arguments, "--update_card"]) == 2
    assert f"error: {card}: file not found" in capsys.readouterr().err
    card.write_text("---\nlicense: mit\n---\n\nBy hand.\n")
    assert exit_status([*arguments, "--update_card", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    data = ModelCard.load(card).data
    assert data.license == "mit"
    assert {each.metric_type: each.metric_value for each in data.eval_results} == {
        name: round(value, 4) for name, value in metrics.items() if name != "ap_per_category" and value >= 0
    }


def test_an_error_prints_no_json(capsys):
    assert exit_status(["data", "check", "gone", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_json_has_no_numbers_that_json_lacks(capsys):
    print_json({"a": [float("nan"), 1.5, float("inf")], "path": Path("x"), 1: ("é",)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, None], "path": "x", "1": ["é"]}


def test_the_table_of_the_docs_has_each_command_and_its_keys():
    keys = documented_keys()
    assert keys.keys() >= set(NAMES) - {"demo"}
    for line, (_, expected) in QUICK.items():
        name = next(name for name in sorted(NAMES, key=len, reverse=True) if line.startswith(name))
        assert expected <= keys[name]


# Wrong use

OUTPUT_BELOW_A_FILE = {
    "predict": "predict image.png --model model --output image.png/out",
    "evaluate": "evaluate --model model --dataset shapes --metrics_json image.png/m.json",
    "export": "export model --output image.png/m.onnx",
    "convert": "convert some.pth --output_dir image.png/m",
    "convert --to": "convert model --to official --output image.png/m.pth",
    "train": "train --model_name_or_path model --dataset shapes --output_dir image.png/run",
    "compare": "compare --dataset shapes --output_dir image.png/comparison",
    "data augment": "data augment shapes --output image.png/o.png",
    "data convert": "data convert shapes --output_dir image.png/o --format yolo",
    "data split": "data split shapes --output_dir image.png/o --merge",
    "data check": "data check shapes --preview image.png/o.png",
}
WRONG_INPUT = {
    "predict": "predict gone.png --model model --output OUT",
    "evaluate": "evaluate --model model --dataset gone",
    "export": "export gone --output OUT.onnx",
    "verify": "verify gone.onnx --model model",
    "benchmark": "benchmark --model gone",
    "benchmark FILE": "benchmark --model model gone.onnx",
    "info": "info gone",
    "convert": "convert gone.pth --output_dir OUT",
    "train": "train --model_name_or_path model --dataset gone --output_dir OUT",
    "push": "push gone me/model",
    "compare": "compare --dataset gone --output_dir OUT",
    "compare --report_only": "compare --output_dir gone --report_only",
    "compare --speed": "compare --output_dir gone --speed",
    "compare --rows": "compare --output_dir OUT --rows gone",
    "data check": "data check gone",
    "data augment": "data augment gone --output OUT.png",
    "data convert": "data convert gone --output_dir OUT --format yolo",
    "data split": "data split gone --output_dir OUT",
}
WITHOUT_ARGUMENTS = {("checkpoints",), ("kernels",), ("demo",)}
MISSING = [name for name, path in zip(NAMES, COMMANDS) if path not in WITHOUT_ARGUMENTS]
CASES = {
    **{f"{name} --no_such_option": "No such option: --no_such_option" for name in NAMES},
    **dict.fromkeys(MISSING, ""),
    **dict.fromkeys(WRONG_INPUT.values(), "gone"),
    **dict.fromkeys(OUTPUT_BELOW_A_FILE.values(), "image.png"),
}


@pytest.mark.parametrize("line", CASES)
def test_wrong_use_is_one_line_and_status_2(line, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(work)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    assert exit_status([word.replace("OUT", str(tmp_path / "out")) for word in line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = [text for text in printed.err.splitlines() if text and "Loading weights" not in text]
    assert error.startswith("error: ")
    assert CASES[line] in error
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["predict --no_such_option", "data split a --output_dir b --similarity 7", "predict"])
def test_a_wrong_argument_names_the_help(line, capsys):
    assert exit_status(line.split()) == 2
    name = " ".join(word for word in line.split()[:2] if word in ("data", "split", "predict"))
    assert capsys.readouterr().err.endswith(f" (hf-dino {name} --help)\n")


def test_a_full_disk_is_status_1(work, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.json")

    monkeypatch.chdir(work)
    monkeypatch.setattr("hf_dino.utils.io.atomic_write", full)
    arguments = [
        "--model=model",
        "--dataset=shapes",
        "--dataloader_num_workers=0",
        f"--metrics_json={tmp_path / 'out.json'}",
    ]
    assert exit_status(["evaluate", *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device: 'out.json'"


# Completion and help


def test_a_shell_completes_commands_and_options(monkeypatch, capsys):
    for words, number, expected in (
        ("hf-dino tr", 1, "train"),
        ("hf-dino predict --model_n", 2, "--model_name_or_path"),
    ):
        monkeypatch.setenv("_HF_DINO_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(number))
        assert exit_status([]) == 0
        assert capsys.readouterr().out.split() == [expected]


@pytest.mark.parametrize("name", ["", "data"])
def test_a_group_alone_prints_its_help(name, capsys):
    assert exit_status(name.split()) == 0
    alone = capsys.readouterr().out
    assert exit_status([*name.split(), "--help"]) == 0
    assert alone == capsys.readouterr().out
    assert "Commands:" in alone
