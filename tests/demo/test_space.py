"""A Space is complete: it starts with `python app.py`, without the package, and nothing is overwritten."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from PIL import Image

from helpers.command_line import exit_status, hf_dino
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.utils.errors import InputError


pytest.importorskip("gradio")

from hf_dino.demo.space import requirements, write_space


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mine"
    tiny_model().save_pretrained(directory)
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(directory)
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "optimizer.bin").write_bytes(b"large")
    (directory / "images").mkdir()
    Image.new("RGB", (60, 40), "teal").save(directory / "images" / "teal.png")
    return directory


@pytest.fixture(scope="module")
def space(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces") / "my: space"
    assert hf_dino(["demo", "--model", model, "--examples", model / "images", "--space", folder]) == 0
    return folder


def test_the_readme_has_what_the_hub_reads(space):
    from gradio import __version__

    card = metadata_load(space / "README.md")
    assert card["title"] == "my: space"
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == __version__
    assert card["app_file"] == "app.py"
    assert card["license"] == "apache-2.0"
    assert card["pinned"] is False
    assert card["python_version"] == ".".join(map(str, sys.version_info[:2]))
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colors
    assert not card["emoji"].isascii()
    assert "models" not in card


def test_model_examples_and_source_are_copied_but_no_checkpoints(space):
    names = {str(path.relative_to(space)) for path in space.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "examples/teal.png"} <= names
    assert {
        "models/mine/config.json",
        "models/mine/model.safetensors",
        "models/mine/preprocessor_config.json",
    } <= names
    assert {"hf_dino/cli/demo.py", "hf_dino/kernel_sources/csrc/cpu/attention.cpp"} & names
    assert not [name for name in names if "checkpoints" in Path(name).parts or name.endswith(".pyc")]
    assert str(space.parent) not in (space / "app.py").read_text() + (space / "README.md").read_text()


def test_requirements_are_those_of_the_page():
    names = {re.split(r"[^\w-]", line)[0] for line in requirements([])}
    assert {"torch", "transformers", "supervision", "matplotlib", "gradio"} <= names
    assert names.isdisjoint({"pytest", "onnxruntime", "hf-dino", "accelerate"})
    assert requirements([])[-1].startswith("gradio==")


def test_models_of_the_hub_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dino.demo.space.load_config", lambda name: None)
    write_space(tmp_path / "space", ["owner/name", str(model)])
    assert metadata_load(tmp_path / "space" / "README.md")["models"] == ["owner/name"]
    assert '"--model", "owner/name", "--model", "models/mine"' in (tmp_path / "space" / "app.py").read_text()


def test_exported_models_bring_what_runs_them(tmp_path):
    (tmp_path / "model.onnx").touch()
    write_space(tmp_path / "space", [str(tmp_path / "model.onnx")])
    assert (tmp_path / "space" / "models" / "model.onnx").is_file()
    assert "onnxruntime" in (tmp_path / "space" / "requirements.txt").read_text()


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        write_space(tmp_path, [str(model)])
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["not/a/model"], "not/a/model: is neither a directory nor a model on the Hub"),
        (["images"], "images: is not a model directory"),
        ([".", "copy/mine"], "., copy/mine: have the same name"),
    ],
)
def test_a_model_that_cannot_be_shown_is_refused(models, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    (model / "copy").mkdir(exist_ok=True)
    shutil.copytree(model, model / "copy" / "mine", ignore=shutil.ignore_patterns("copy"), dirs_exist_ok=True)
    with pytest.raises(InputError, match=re.escape(message)):
        write_space(tmp_path / "space", models)
    assert not (tmp_path / "space").exists()


def test_options_of_the_page_are_refused_with_a_space(model, tmp_path, capsys):
    assert hf_dino(["demo", "--model", model, "--port", "7000", "--space", tmp_path / "space"]) == 2
    assert "not read with --space" in capsys.readouterr().err


def test_a_missing_model_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert exit_status(["demo", "--model", "empty"]) == 2
    assert capsys.readouterr().err == "error: empty: is not a model directory (it has no config.json)\n"


@pytest.mark.slow
def test_app_starts_in_its_folder(space):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=20) as answer:
                    assert b"How DINO looked" in answer.read()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(30)
