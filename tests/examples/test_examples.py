"""The examples run as a user runs them: train, stop, go on, export, evaluate, predict."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from helpers.command_line import hf_dino
from helpers.jobs import Killed, kill_once_there
from hf_dino.data import InputError
from hf_dino.data.shapes import generate_shapes
from hf_dino.training import finetuning


ROOT = Path(__file__).parents[2]
TINY_COCO = ROOT.parent / "shared" / "data" / "tiny_coco"
TINY = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "freeze_backbone_batch_norms": False,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "num_select": 20,
    "num_denoising": 10,
}


@pytest.fixture(scope="module")
def examples():
    sys.path.insert(0, str(ROOT / "examples"))
    yield {name: importlib.import_module(name) for name in ("finetune_coco",)}
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", image_size=64, num_train=10, num_val=4, num_test=4
    )


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def splits(data, *names):
    return [
        f"--{name}_{what}={data / name}{end}"
        for name in names
        for what, end in (("images", ""), ("annotations", ".json"))
    ]


@pytest.fixture
def arguments(shapes, tiny_config):
    """Two epochs of three steps, each step of two accumulated batches, random in every way that training can be."""
    return [
        f"--config_name={tiny_config}",
        *splits(shapes, "train", "val", "test"),
        "--num_train_epochs=2",
        "--global_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--image_size=80",  # smaller, and the last level has one cell, which group norm refuses
        "--dataloader_num_workers=0",
        "--logging_steps=1",
        "--checkpointing_steps=2",
        "--learning_rate=0.001",
    ]


@pytest.fixture(autouse=True)
def no_curves_before_the_end(monkeypatch):
    """Skip the curves of an unfinished run, which take most of the time."""
    monkeypatch.setattr("hf_dino.training.logging.plot_training_curves", lambda history, path: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def train(arguments):
    assert hf_dino(["train", *arguments]) == 0


@pytest.fixture
def finished(examples, arguments, runs):
    """A finished run, trained once for all tests of this module."""
    run = runs / "uninterrupted"
    if not run.exists():
        train([*arguments, f"--output_dir={run}"])
    return run


def test_finetune_leaves_a_model_that_loads(finished, examples, arguments):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "curves.png"} <= names
    assert {"metrics.json", "modeling_dino_detr.py", "checkpoints"} <= names
    model = AutoModelForObjectDetection.from_pretrained(finished)
    processor = AutoImageProcessor.from_pretrained(finished)
    assert dict(processor.size) == {"shortest_edge": 80, "longest_edge": 133}
    assert sorted(model.config.label2id.values()) == list(range(model.config.num_labels))
    report = json.loads((finished / "metrics.json").read_text())
    assert {"validation", "test", "best_step", "command", "versions"} == set(report)
    assert [row["step"] for row in history(finished)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["epoch"] for row in history(finished) if "ap" in row] == [1, 2]
    *program, train_command = shlex.split(report["command"])[:4]
    assert (program, train_command) == (["python", "-m", "hf_dino"], "train")
    words = shlex.split(report["command"])[4:]
    given = [word.partition("=") for word in [*arguments, f"--output_dir={finished}"]]
    expected = [(name, f"path/to/{Path(value).name}" if "/" in value else value) for name, _, value in given]
    assert sorted(zip(words[::2], words[1::2])) == sorted(expected)
    card = (finished / "README.md").read_text()
    assert f"```bash\n{report['command']}\n```" in card
    assert "trained on shapes\n" in card
    best = finished / "checkpoints" / f"step_{report['best_step']:08d}" / "model.safetensors"
    assert all(
        torch.equal(value, load_file(best)[name]) for name, value in load_file(finished / "model.safetensors").items()
    )


@pytest.mark.parametrize("saves_before_the_end", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(
    finished, examples, arguments, tmp_path, monkeypatch, saves_before_the_end
):
    output = f"--output_dir={tmp_path / 'run'}"
    save, calls = finetuning.save_checkpoint, []

    def save_and_die(*args):
        save(*args)
        calls.append(args)
        if len(calls) == saves_before_the_end:
            raise Killed

    monkeypatch.setattr(finetuning, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train([*arguments, output])
    assert not (tmp_path / "run" / "config.json").exists(), "an unfinished run is no model"
    monkeypatch.undo()

    with pytest.raises(
        InputError, match="is not empty; use a different --output_dir, --resume_from_checkpoint or --over"
    ):
        train([*arguments, output])
    with pytest.raises(InputError, match=r"seed: '0' before, '1' now"):
        train([*arguments, output, "--resume_from_checkpoint", "--seed=1"])
    torch.manual_seed(1234)  # nothing may depend on the state of this process
    train([*arguments, output, "--resume_from_checkpoint", "--dataset_label=drawn shapes"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained on drawn shapes\n" in card
    assert "--resume_from_checkpoint" not in card
    assert history(tmp_path / "run") == history(finished)
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_without_a_run_is_an_error(examples, arguments, tmp_path):
    with pytest.raises(InputError, match="has no checkpoint to resume from; remove --resume_from_checkpoint"):
        train([*arguments, f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint"])
    assert not (tmp_path / "run").exists()


def test_bad_input_leaves_the_old_run_alone(finished, examples, arguments, shapes, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = sorted(path.name for path in run.rglob("*"))
    bad = [*arguments, f"--output_dir={run}", "--overwrite_output_dir", f"--train_images={tmp_path / 'gone'}"]
    with pytest.raises(InputError, match="gone: image directory not found"):
        train(bad)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_overwrite_replaces_runs_only(examples, arguments, shapes):
    before = sorted(shapes.rglob("*"))
    with pytest.raises(InputError, match="contains no run or model that --overwrite_output_dir could replace"):
        train([*arguments, f"--output_dir={shapes}", "--overwrite_output_dir"])
    assert sorted(shapes.rglob("*")) == before


def test_an_output_that_cannot_be_written_is_heard_of_before_training(examples, arguments, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(finetuning, "training_loader", None)
    with pytest.raises(InputError, match=r"Not a directory: .*file"):
        train([*arguments, f"--output_dir={tmp_path / 'file' / 'run'}"])


@pytest.mark.parametrize("name", ["training_state.json", "model.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_is_one_error(finished, examples, arguments, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    for path in run.glob(f"checkpoints/*/{name}"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"step_00000006: is damaged or incomplete \(.*\); restore it"):
        train([*arguments, f"--output_dir={run}", "--resume_from_checkpoint"])


def test_a_loss_that_is_not_finite_stops_the_run(examples, arguments, tmp_path):
    broken = [*arguments, f"--output_dir={tmp_path / 'run'}", "--learning_rate=1e30", "--max_grad_norm=inf"]
    with pytest.raises(FloatingPointError, match=r"step \d .*loss is .* image_id \d+ \(.*\.png\), \d+"):
        train(broken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_its_job_scheduler_stops_goes_on(finished, examples, arguments, tmp_path, number):
    """The signal goes to all that the job has started, also to the processes that read images."""
    run = tmp_path / "run"
    script = [sys.executable, str(ROOT / "examples" / "finetune_coco.py"), *arguments, f"--output_dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.Popen([*script, "--dataloader_num_workers=2"], env=environment, start_new_session=True)
    rows = run / "history.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") >= 2):  # of two steps, in an epoch of three
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, number)
    assert job.wait() == (-number if number == signal.SIGKILL else 128 + number)
    train([*arguments, f"--output_dir={run}", "--resume_from_checkpoint"])
    assert history(run) == history(finished)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_that_are_killed_go_on_as_if_nothing_had_been(arguments, tmp_path):
    """On CPUs they find each other; otherwise each would take itself for the only one and write over the other."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port=0"]  # any that is free
    # with fewer images, group norm would get a single number per group
    script = [
        *launch,
        str(ROOT / "examples" / "finetune_coco.py"),
        *arguments,
        "--global_batch_size=8",
        "--max_train_steps=4",
    ]
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    options = {"env": environment, "stdout": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*script, f"--output_dir={whole}"], check=True, **options)
    names = {path.name for path in (whole / "checkpoints" / "step_00000004").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= names
    command = json.loads((whole / "metrics.json").read_text())["command"]
    assert command.startswith("accelerate launch --multi_gpu --num_processes 2 -m hf_dino train ")

    job = subprocess.Popen([*script, f"--output_dir={killed}"], start_new_session=True, **options)
    kill_once_there(job, killed / "checkpoints" / "step_00000002")
    subprocess.run([*script, f"--output_dir={killed}", "--resume_from_checkpoint"], check=True, **options)
    assert history(killed) == history(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fine_tuning_to_other_classes_keeps_what_fits(finished, examples, arguments, shapes, tmp_path):
    annotations = json.loads((shapes / "train.json").read_text())
    kept = annotations["categories"][0]["id"]
    annotations["categories"] = [{"id": kept, "name": "thing"}]
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["category_id"] == kept]
    (tmp_path / "train.json").write_text(json.dumps(annotations))
    files = [f"--{split}_images={shapes / 'train'}" for split in ("train", "val")]
    files += [f"--{split}_annotations={tmp_path / 'train.json'}" for split in ("train", "val")]
    run = tmp_path / "run"
    options = [
        "--max_train_steps=1",
        "--global_batch_size=2",
        "--dataloader_num_workers=0",
        "--image_size=48x64",
        "--gradient_checkpointing",
    ]
    train([f"--model_name_or_path={finished}", f"--output_dir={run}", *files, *options])
    model = AutoModelForObjectDetection.from_pretrained(run)
    assert model.config.id2label == {0: "thing"}
    assert dict(AutoImageProcessor.from_pretrained(run).size) == {"height": 48, "width": 64}
    before, after = (load_file(folder / "model.safetensors") for folder in (finished, run))
    name = "model.encoder.layers.0.mlp.fc1.weight"
    assert (before[name] - after[name]).abs().max() < 1e-3


def test_categories_that_the_model_lacks_are_heard_of_at_once(examples, arguments, shapes, tmp_path):
    annotations = json.loads((shapes / "val.json").read_text())
    annotations["categories"][0]["name"] = "unheard-of"
    (tmp_path / "val.json").write_text(json.dumps(annotations))
    run = tmp_path / "run"
    with pytest.raises(InputError, match="has objects of classes that train does not have: 'unheard-of'"):
        train([*arguments, f"--output_dir={run}", f"--val_annotations={tmp_path / 'val.json'}"])
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--global_batch_size=0"], "global_batch_size: must be at least 1, got 0"),
        (["--per_device_eval_batch_size=0"], "per_device_eval_batch_size: must be at least 1, got 0"),
        (["--dataloader_num_workers=-1"], "dataloader_num_workers: must be at least 0, got -1"),
        (["--test_images=a"], "belong together"),
        (["--learning_rate=nan"], r"learning_rate: must be at least 0 and at most 1e\+38, got nan"),
        (["--weight_decay=-1"], "weight_decay: must be at least 0"),
        (["--max_grad_norm=0"], "max_grad_norm: must be greater than 0, got 0"),
        (["--seed=99999999999"], "seed: must be at least 0 and at most"),
        (["--report_to=foo"], "--report_to foo: is not an installed tracker"),
    ],
)
def test_wrong_arguments(arguments, message):
    required = ["--config_name=a", "--output_dir=b", "--train_images=c", "--train_annotations=d", "--val_images=e"]
    with pytest.raises(InputError, match=message):
        train([*required, "--val_annotations=f", *arguments])


def test_evaluate_gives_what_training_measured(finished, examples, shapes, tmp_path, capsys):
    files = ["--images", str(shapes / "test"), "--annotations", str(shapes / "test.json")]
    numbers, detections = tmp_path / "numbers.json", tmp_path / "detections.json"
    command = ["evaluate", "--model_name_or_path", finished, *files, "--dataloader_num_workers=0"]
    command += ["--metrics_json", numbers, "--results_json", detections]
    assert hf_dino([*command, "--per_device_eval_batch_size=3"]) == 0
    assert "Average Precision" in capsys.readouterr().out
    measured = json.loads((finished / "metrics.json").read_text())["test"]
    written = json.loads(numbers.read_text())
    for one, other in ((measured, written), (measured["ap_per_category"], written["ap_per_category"])):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], abs=1e-6) for name in one if name != "ap_per_category")
    assert {"image_id", "category_id", "bbox", "score"} == set(json.loads(detections.read_text())[0])
    with pytest.raises(InputError, match=r"numbers\.json: already exists"):
        hf_dino(command)
    assert hf_dino([*command, "--per_device_eval_batch_size=0"]) == 2
    assert "Invalid value for '--per_device_eval_batch_size'" in capsys.readouterr().err


def test_predict_draws_one_image_and_a_folder(finished, examples, shapes, tmp_path, capsys):
    predict = ["predict", f"--model_name_or_path={finished}"]
    image = sorted((shapes / "test").iterdir())[0]
    assert hf_dino([*predict, image, f"--output={tmp_path / 'drawn.jpg'}", "--threshold=0"]) == 0
    assert Image.open(tmp_path / "drawn.jpg").format == "JPEG"
    assert hf_dino([*predict, shapes / "test", f"--output={tmp_path / 'drawn'}"]) == 0
    assert len(list((tmp_path / "drawn").iterdir())) == 4
    assert hf_dino([*predict, shapes / "test", f"--output={tmp_path / 'found'}", "--save", "json"]) == 0
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert str(image) in found
    assert f"{image}: " in capsys.readouterr().out

    for arguments, message in (
        ([str(image), f"--output={tmp_path / 'drawn.jpg'}"], r"drawn\.jpg: already exists"),
        ([str(image), f"--output={tmp_path / 'drawn.xyz'}"], r"images of kind '\.xyz' cannot be written"),
        ([str(tmp_path / "gone.png"), f"--output={tmp_path / 'a.png'}"], r"gone\.png: file or directory not found"),
        ([str(image), f"--output={tmp_path / 'a.psd'}"], r"images of kind '\.psd' cannot be written"),
        ([str(image), f"--output={tmp_path / 'a.png'}", "--device=quantum"], "--device quantum: cannot be used"),
        ([str(shapes / "train"), str(image), f"--output={tmp_path / 'b'}"], "several images would be drawn into"),
        ([str(shapes / "train"), f"--output={tmp_path / 'one.png'}"], "is the name of one image, but 10 are to be"),
    ):
        with pytest.raises(InputError, match=message):
            hf_dino([*predict, *arguments])


def test_an_image_that_cannot_be_read_costs_none_of_the_others(finished, examples, shapes, tmp_path):
    images, drawn = tmp_path / "images", tmp_path / "drawn"
    shutil.copytree(shapes / "test", images)
    first, second, *others = sorted(images.iterdir())
    first.write_text("no image")
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"2 of 4 images cannot be read:\n{first}: .*\n{second}: "):
        hf_dino(["predict", f"--model_name_or_path={finished}", images, f"--output={drawn}", "--save=images,json"])
    found = json.loads((drawn / "results.json").read_text())
    assert found.keys() == {str(image) for image in others}
    assert {path.stem for path in drawn.glob("*.png")} == {image.stem for image in others}


def test_an_image_that_is_not_there_is_missed_before_the_model_detects(examples, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    image = min((data / "val").iterdir())
    image.unlink()
    with pytest.raises(InputError, match=image.name):
        hf_dino(["evaluate", "--model_name_or_path=nothing", f"--dataset={data}"])


@pytest.mark.parametrize("name", ["supervision", "matplotlib"])
def test_a_library_for_drawing_is_missed_before_the_work(examples, shapes, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    model = [f"--model_name_or_path={tmp_path}"]
    message = rf"needs {name}: pip install 'hf-dino\[train\]'"
    with pytest.raises(ImportError, match=message):
        hf_dino(["predict", *model, shapes / "test", f"--output={tmp_path / 'drawn'}"])
    with pytest.raises(ImportError, match=message):
        hf_dino(["evaluate", *model, f"--dataset={shapes}", f"--report_html={tmp_path / 'a.html'}"])
    with pytest.raises(ImportError, match=message):
        importlib.import_module("demo").main(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_holds_no_dino_is_named(examples, shapes, tmp_path):
    image, output = str(sorted((shapes / "test").iterdir())[0]), f"--output={tmp_path / 'a.png'}"
    with pytest.raises(InputError, match=r"it has no config\.json"):
        hf_dino(["predict", f"--model_name_or_path={shapes}", image, output])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    with pytest.raises(InputError, match="models of type 'yolos' cannot be used"):
        hf_dino(["predict", f"--model_name_or_path={tmp_path}", image, output])


@pytest.mark.skipif(not TINY_COCO.exists(), reason="needs ../shared/data/tiny_coco")
def test_raw_coco_ids(examples, tmp_path):
    """An 80-category file with COCO's gaps fine-tunes a model whose labels are COCO's raw ids, gaps included."""
    from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor

    annotations = TINY_COCO / "annotations" / "instances_val2017.json"
    names = {entry["id"]: entry["name"] for entry in json.loads(annotations.read_text())["categories"]}
    id2label = {label: names.get(label, "N/A") for label in range(91)}
    config = DinoDetrConfig(**TINY, id2label=id2label)
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "coco")
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}).save_pretrained(tmp_path / "coco")

    files = [f"--{split}_images={TINY_COCO / 'val2017'}" for split in ("train", "val")]
    files += [f"--{split}_annotations={annotations}" for split in ("train", "val")]
    options = [
        "--max_train_steps=2",
        "--global_batch_size=2",
        "--dataloader_num_workers=0",
        f"--output_dir={tmp_path / 'run'}",
    ]
    train([f"--model_name_or_path={tmp_path / 'coco'}", *files, *options])
    trained = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert trained.config.id2label == id2label


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--image_size=16"], "become as small as 10 x 10 pixels: .* too few to choose num_queries=20 from: use"),
        (["--image_size=8x64", "--augmentation=none"], "become as small as 8 x 64 pixels"),
        (
            ["--global_batch_size=5"],
            "a global batch of 5 images cannot be split evenly into 1 processes x 2 acc",
        ),
    ],
)
def test_what_no_step_could_do_is_heard_of_before_there_is_a_folder(arguments, tmp_path, wrong, message):
    others = [word for word in arguments if not word.startswith("--image_size")]
    with pytest.raises(InputError, match=message):
        train([*others, f"--output_dir={tmp_path / 'run'}", *wrong])
    assert not (tmp_path / "run").exists()
