"""`hf-dino push`, with a stand-in of the Hub: what is listed is what is sent, and loaded with equal outputs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_eval_result
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file

from helpers.command_line import exit_status
from helpers.detectors import small_detector
from helpers.hub_server import READER, WRITER, Repo, serving_hub
from helpers.models import tiny_model
from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor, kernels
from hf_dino.hub import load_model_and_processor, save_detector
from hf_dino.model_card import finetuned_card
from hf_dino.publishing import CODE


SIZE = {"shortest_edge": 96, "longest_edge": 160}
METRICS = {"ap": 0.5, "ap50": 0.75, "ap_small": -1.0}
SPACE_CARD = "---\ntitle: Demo\nsdk: gradio\napp_file: app.py\n---\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What training leaves: the model, and beside it what is not for others."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model()
    card = finetuned_card(model.config, metrics=METRICS, dataset="shapes", command="hf-dino train", split="validation")
    save_detector(folder, model, DinoDetrImageProcessor(size=SIZE), card)
    (folder / "history.jsonl").write_text(f'{{"output": "{Path.home()}/secret"}}\n')
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "optimizer.bin").write_bytes(b"state")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def space(tmp_path):
    folder = tmp_path / "space"
    (folder / "__pycache__").mkdir(parents=True)
    for name, text in {
        "README.md": SPACE_CARD,
        "app.py": "print(1)\n",
        ".env": "X=1",
        "__pycache__/a.pyc": "",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.chdir(tmp_path)
        yield hub


def files_of(folder):
    kept = [path for path in folder.iterdir() if path.is_file() and path.name != "history.jsonl"]
    return {path.name: path.read_bytes() for path in kept}


def states(capsys):
    """Return the state of each file by its path, as `--json` prints them."""
    printed = json.loads(capsys.readouterr().out)
    return {file["path"]: file["state"] for repository in printed["repositories"] for file in repository["files"]}


def test_without_yes_all_is_listed_and_nothing_sent(hub, folder, capsys):
    assert exit_status(["push", folder, "me/model"]) == 0
    printed = capsys.readouterr().out
    names = files_of(folder)
    assert set(names) >= {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", *CODE}
    assert {line.split()[1] for line in printed.splitlines() if line.startswith("  new ")} == set(names)
    assert "not uploaded from" in printed and "checkpoints/, history.jsonl" in printed
    assert f"nothing was sent; --yes uploads {len(names)} files" in printed
    assert "its metadata lacks a license" in printed
    assert (hub.changes, hub.repos) == ([], {})


def test_other_models_need_no_code(hub, tmp_path, capsys):
    folder, model = tmp_path / "other", small_detector("conditional_detr")
    card = finetuned_card(model.config, metrics=METRICS, dataset="shapes", command="hf-dino train", split="validation")
    save_detector(folder, model, DinoDetrImageProcessor(size=SIZE), card)
    assert exit_status(["push", folder, "me/model", "--json"]) == 0
    assert states(capsys).keys() == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}


def test_a_push_is_one_commit_of_what_was_listed(hub, folder, capsys):
    assert exit_status(["push", folder, "me/model", "--json"]) == 0
    listed = states(capsys)
    assert exit_status(["push", folder, "me/model", "--yes", "--commit_message=First"]) == 0
    assert f"uploaded {len(listed)} files: {hub.url}/me/model/commit/" in capsys.readouterr().out
    assert {name: data for name, data in hub.files("me/model").items() if name in listed} == files_of(folder)
    (commit,) = hub.repos["models/me/model"].commits
    assert (commit["message"], commit["branch"], set(commit["paths"])) == ("First", "main", set(listed))
    assert not hub.repos["models/me/model"].private


def test_a_second_push_sends_only_what_changed(hub, folder, capsys):
    exit_status(["push", folder, "me/model", "--yes"])
    hub.files("me/model")["notes.txt"] = b"of the owner"
    assert exit_status(["push", folder, "me/model", "--yes"]) == 0
    assert "nothing to upload, all files are there" in capsys.readouterr().out
    assert len(hub.repos["models/me/model"].commits) == 1

    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "class_embed.0.bias": weights["class_embed.0.bias"] + 1},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "LICENSE").write_text("free")
    assert exit_status(["push", folder, "me/model", "--yes", "--json"]) == 0
    found = states(capsys)
    assert {name: state for name, state in found.items() if state != "unchanged"} == {
        "model.safetensors": "changed",
        "LICENSE": "new",
        "notes.txt": "other",
    }
    assert set(hub.repos["models/me/model"].commits[-1]["paths"]) == {"model.safetensors", "LICENSE"}
    assert hub.files("me/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.files("me/model")["notes.txt"] == b"of the owner"


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, folder, capsys):
    exit_status(["push", folder, "me/model", "--yes"])
    edited = hub.files("me/model")["README.md"] + b"\nBy hand.\n"
    hub.files("me/model")["README.md"] = edited
    capsys.readouterr()
    assert exit_status(["push", folder, "me/model", "--yes"]) == 0
    assert "kept" in (printed := capsys.readouterr().out) and "--overwrite_card replaces it" in printed
    assert hub.files("me/model")["README.md"] == edited
    assert exit_status(["push", folder, "me/model", "--yes", "--overwrite_card"]) == 0
    assert hub.files("me/model")["README.md"] == (folder / "README.md").read_bytes()


def test_private_branches_and_pull_requests(hub, folder):
    assert exit_status(["push", folder, "me/model", "--yes", "--private", "--revision=small"]) == 0
    assert hub.repos["models/me/model"].private
    assert "model.safetensors" in hub.files("me/model", "small").keys() - hub.files("me/model").keys()
    assert exit_status(["push", folder, "me/model", "--yes", "--create_pr"]) == 0
    assert "model.safetensors" in hub.files("me/model", "refs/pr/2").keys() - hub.files("me/model").keys()


def test_other_files_and_a_space_go_along(hub, folder, space, tmp_path, capsys):
    (tmp_path / "dino.onnx").write_bytes(b"onnx")
    (tmp_path / "dino_openvino").mkdir()
    (tmp_path / "dino_openvino" / "model.bin").write_bytes(b"weights")
    (tmp_path / "dino_openvino" / ".env").write_text("SECRET=1")
    options = ["--files", "dino.onnx", "dino_openvino", "--space=me/demo", f"--space_dir={space}", "--yes"]
    assert exit_status(["push", folder, "me/model", *options]) == 0
    assert hub.files("me/model")["dino.onnx"] == b"onnx"
    assert hub.files("me/model")["dino_openvino/model.bin"] == b"weights"
    assert hub.files("me/demo", kind="spaces").keys() == {".gitattributes", "README.md", "app.py"}
    assert hub.repos["spaces/me/demo"].sdk == "gradio"
    assert not [name for name in hub.files("me/model") if name.endswith(".env")]
    printed = capsys.readouterr().out
    assert "dino_openvino/.env" in printed and ": .env, __pycache__/a.pyc" in printed


# What is not sent


def leak(name, text):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "loss_dino_detr.py").unlink(), "loss_dino_detr.py not found"),
        (
            leak("loss_dino_detr.py", "\n# mine\n"),
            "than the installed one (loss_dino_detr.py); save it again",
        ),
        (lambda folder: (folder / "README.md").unlink(), "README.md not found"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no usable image processor"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model directory"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9999), "has no usable weights"),
        (leak("README.md", f"\nfrom {Path.home()}/data\n"), f"README.md: contains the local path {Path.home()}"),
        (leak("README.md", f"\nlog in with {READER}\n"), "README.md: contains a token of the Hub"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "has no valid metadata"),
        (
            lambda folder: (folder / "README.md").write_text("---\nmodel-index:\n- name: x\n---\n"),
            "has no valid metadata",
        ),
    ],
)
def test_what_is_incomplete_or_not_for_others_is_not_sent(hub, folder, spoil, message, capsys):
    spoil(folder)
    assert exit_status(["push", folder, "me/model", "--yes"]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert hub.changes == []


def test_the_header_of_weights_may_not_have_a_local_path(hub, folder, monkeypatch, tmp_path, capsys):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt", "from": f"{tmp_path}/model"})
    assert exit_status(["push", folder, "me/model"]) == 1
    assert f"model.safetensors: contains the local path {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "last.pth", "scheduler.bin"])
def test_training_states_are_not_sent_even_if_named(hub, folder, tmp_path, name, capsys):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).write_bytes(b"state")
    assert exit_status(["push", folder, "me/model", "--yes", "--files", "state"]) == 1
    assert f"state/{name}: is a training state, a log or a pickle" in capsys.readouterr().err
    assert hub.changes == []


# Errors


@pytest.mark.parametrize(
    ("token", "arguments", "status", "message"),
    [
        ("", [], 2, "a token with write access is needed to upload; log in with `hf auth login` or set HF_TOKEN"),
        (READER, [], 2, "me/model: your token has no permission to write to it"),
        (READER, ["--create_pr"], 2, "--create_pr: me/model does not exist"),
        ("hf_wrong" + "x" * 30, [], 2, "me/model: the token is not valid"),
        ("hf_wrong\x01" + "x" * 30, [], 2, "me/model: the token is not valid"),
        ("hf_wröng" + "x" * 30, [], 1, "me/model: the Hub cannot be used"),
        (WRITER, ["--files=gone.onnx"], 2, "gone.onnx: file not found"),
        (WRITER, ["--space=me/demo"], 2, "Give both --space and --space_dir"),
        (WRITER, ["--space=me/demo", "--space_dir=gone"], 2, "gone: is not the directory of a Space"),
    ],
)
def test_errors_are_one_line_without_the_token(hub, folder, token, arguments, status, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    assert exit_status(["push", folder, "me/model", "--yes", *arguments]) == status
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line and "Loading weights" not in line]
    assert line.startswith("error: ") and message in line
    assert not hub.repos
    for secret in filter(None, [token, repr(token)[1:-1], token[-30:]]):
        assert secret not in printed.out + printed.err


def test_a_name_that_is_taken_by_what_one_cannot_see(hub, folder, capsys):
    hub.repos["models/other/model"] = Repo(private=True)
    assert exit_status(["push", folder, "other/model", "--yes"]) == 2
    assert "other/model: the name is taken by a repository that your token cannot see" in capsys.readouterr().err
    hub.repos["models/other/model"].private = False
    assert exit_status(["push", folder, "other/model", "--yes"]) == 2
    assert "other/model: your token has no permission to write to it" in capsys.readouterr().err


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder, capsys):
    hub.repos["models/me/model"] = Repo()
    assert exit_status(["push", folder, "me/model", "--yes", "--private"]) == 2
    assert "me/model exists and is public" in capsys.readouterr().err


def test_a_repository_that_changes_in_between_is_left_alone(hub, folder, capsys, monkeypatch):
    exit_status(["push", folder, "me/model", "--yes"])
    (folder / "LICENSE").write_text("free")
    monkeypatch.setattr("hf_dino.publishing.check_permissions", lambda *_, **__: hub.files("me/model").update(new=b""))
    assert exit_status(["push", folder, "me/model", "--yes"]) == 2
    assert "the repository was changed since its files were listed" in capsys.readouterr().err
    assert "LICENSE" not in hub.files("me/model")


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/", "me/a b", "me/a--b", "../x"])
def test_malformed_names_are_one_line(hub, folder, repo_id, capsys):
    assert exit_status(["push", folder, repo_id]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {repo_id}: must be OWNER/NAME")
    assert not hub.requests


def test_offline_the_files_are_checked_and_not_compared(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert exit_status(["push", folder, "me/model", "--json"]) == 0
    assert set(states(capsys).values()) == {"unknown"}
    assert exit_status(["push", folder, "me/model", "--yes"]) == 1
    assert "offline mode is enabled" in capsys.readouterr().err.splitlines()[-1]
    assert not hub.requests


# Cards


def test_the_results_in_a_card_are_those_that_the_hub_reads(saved):
    card = ModelCard.load(saved / "README.md")
    (entry,) = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results([entry])
    assert {result.metric_type: result.metric_value for result in results} == {"ap": 0.5, "ap50": 0.75}
    expected = metadata_eval_result(
        model_pretty_name=name,
        task_pretty_name="Object Detection",
        task_id="object-detection",
        metrics_pretty_name="AP@[.50:.95]",
        metrics_id="ap",
        metrics_value=0.5,
        dataset_pretty_name="shapes",
        dataset_id="shapes",
        dataset_split="validation",
    )["model-index"][0]
    ours, theirs = entry["results"][0], expected["results"][0]
    for part in ("task", "dataset"):
        assert ours[part].keys() <= theirs[part].keys()
    assert (ours["task"]["type"], ours["dataset"]) == (theirs["task"]["type"], theirs["dataset"])
    assert {"type": "ap", "value": 0.5, "name": "AP@[.50:.95]"}.items() <= ours["metrics"][0].items()
    assert theirs["metrics"][0].items() <= {"verified": False, **ours["metrics"][0]}.items()


# Loaded again


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_dino"] = None  # importing it is an error, installed or not
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection
torch.set_num_threads(1)
repo_id, answer = sys.argv[1:]
model = AutoModelForObjectDetection.from_pretrained(repo_id, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
processor = AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=True)
image = (torch.arange(3 * 90 * 120) % 251).to(torch.uint8).reshape(3, 90, 120)
inputs = processor(images=image, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
torch.save([inputs["pixel_values"], outputs.logits, outputs.pred_boxes], answer)
"""


@torch.no_grad()
def outputs_of(model, processor):
    image = (torch.arange(3 * 90 * 120) % 251).to(torch.uint8).reshape(3, 90, 120)
    inputs = processor(images=image, return_tensors="pt")
    outputs = model.eval()(**inputs)
    return [inputs["pixel_values"], outputs.logits, outputs.pred_boxes]


@pytest.fixture
def pushed(hub, saved, monkeypatch):
    assert exit_status(["push", saved, "me/model", "--yes"]) == 0
    monkeypatch.setitem(kernels._found, "cpu", None)  # a repository contains the reference implementation only
    return outputs_of(*load_model_and_processor(str(saved)))


def assert_bitwise_equal(actual, expected):
    assert [torch.equal(*pair) for pair in zip(actual, expected, strict=True)] == 3 * [True]


def test_a_pushed_model_is_loaded_with_equal_outputs(hub, pushed, tmp_path, monkeypatch):
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    model, processor = (
        kind.from_pretrained("me/model", cache_dir=tmp_path / "cache")
        for kind in (DinoDetrForObjectDetection, DinoDetrImageProcessor)
    )
    assert ("GET", "/me/model/resolve/main/model.safetensors") in [
        (m, re.sub(r"/[0-9a-f]{40}/", "/main/", p)) for m, p in hub.requests
    ]
    assert_bitwise_equal(outputs_of(model, processor), pushed)


def test_a_pushed_model_is_loaded_with_equal_outputs_without_the_package(hub, pushed, tmp_path):
    script, answer = tmp_path / "load.py", tmp_path / "answer.pt"
    script.write_text(WITHOUT_THE_PACKAGE)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-I", script, "me/model", answer]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_bitwise_equal(torch.load(answer), pushed)
