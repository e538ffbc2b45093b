"""What a command cannot do with a model, an image or a machine is an error that says what to do; never a result."""

import logging

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino, train_arguments
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError
from hf_dino.data.loaders import evaluation_loader
from hf_dino.data.readers import read_coco
from hf_dino.training import make_accelerator
from hf_dino.utils import distributed


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # undone after a test that changes it
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_model(folder, value=None):
    """Save a model, with `value` as one of its class biases."""
    model = tiny_model(id2label={0: "dog", 1: "cat"})
    if value is not None:
        torch.nn.init.constant_(model.class_embed[0].bias[:1], value)
    model.save_pretrained(folder)
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    return f"--model_name_or_path={folder}"


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "data", [annotation(1, 3, [1, 2, 30, 20])], sizes=[(120, 160)])


def files(coco):
    return [f"--images={coco[0]}", f"--annotations={coco[1]}"]


def status_of(command):
    try:
        return hf_dino(command)
    except InputError:
        return 1


# Weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_of_damaged_weights_detects_nothing_but_an_error(tmp_path, coco, value):
    model = save_model(tmp_path / "model", value)
    for command in (
        ["evaluate", model, *files(coco), "--dataloader_num_workers=0"],
        ["predict", model, coco[0] / "1.png", f"--output={tmp_path / 'drawn.png'}", "--threshold=0.9"],
        ["predict", model, coco[0], f"--output={tmp_path / 'drawn'}", "--device=cpu"],
    ):
        with pytest.raises(FloatingPointError, match="scores or boxes are NaN or infinite: ") as error:
            hf_dino(command)
        assert "\n" not in str(error.value)
    left = [path.name for path in tmp_path.glob("drawn*/*")]
    assert all(name.startswith(".") for name in left), "only the hidden journal, from which a run is resumed"


# Precision


def test_fp16_on_a_cpu_is_an_error_and_bf16_is_not(tmp_path, coco):
    message = r"^--mixed_precision fp16 needs a GPU, and this machine has none; use bf16 or no$"
    arguments = ["--model_name_or_path=m", "--dataset=d", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(InputError, match=message):
        make_accelerator(train_arguments([*arguments, "--mixed_precision=fp16"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match=message):
        hf_dino(["evaluate", save_model(tmp_path / "model"), *files(coco), "--mixed_precision=fp16"])
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = make_accelerator(train_arguments([*arguments, f"--mixed_precision={precision}"]))
        assert made.mixed_precision == precision


def test_fp16_of_accelerates_configuration_is_an_error_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="--mixed_precision fp16 needs a GPU"):
        distributed.create_accelerator(None)


def test_what_accelerate_says_about_precision_is_an_error_of_the_user(monkeypatch):
    def fail(**options):
        raise ValueError(options.pop("log_with"))

    monkeypatch.setattr(distributed, "Accelerator", fail)
    with pytest.raises(InputError, match=r"^--mixed_precision bf16: bf16 mixed precision requires a supported device"):
        distributed.create_accelerator("bf16", log_with="bf16 mixed precision requires a supported device.")
    with pytest.raises(ValueError, match=r"^another error$") as error:
        distributed.create_accelerator("bf16", log_with="another error")
    assert not isinstance(error.value, InputError)


# Large images


def test_every_command_can_raise_the_limit_of_pillow(tmp_path, coco, monkeypatch):
    model = save_model(tmp_path / "model")
    commands = (
        ["data", "check", *files(coco)],
        ["data", "convert", *files(coco), f"--output_dir={tmp_path / 'converted'}", "--format=yolo"],
        ["data", "augment", *files(coco), f"--output={tmp_path / 'augmented.png'}", "--image_size=96"],
        ["evaluate", model, *files(coco), "--dataloader_num_workers=0"],
        ["predict", model, coco[0] / "1.png", f"--output={tmp_path / 'drawn.png'}"],
    )
    for command in commands:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
        assert status_of(command) == 1
        assert status_of([*command, "--max_image_pixels=19200"]) == 0


def test_training_and_its_workers_have_the_limit(coco, tmp_path):
    arguments = ["--model_name_or_path=m", "--dataset=d", f"--output_dir={tmp_path / 'out'}"]
    assert train_arguments(arguments).max_image_pixels is None
    assert train_arguments([*arguments, "--max_image_pixels=7"]).max_image_pixels == 7
    Image.MAX_IMAGE_PIXELS = 12345
    start_worker = evaluation_loader(read_coco(*coco), DinoDetrImageProcessor(), batch_size=1).worker_init_fn
    Image.MAX_IMAGE_PIXELS = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dino.data.loaders.ignore_stop_signals", lambda: None)
        start_worker(0)
    assert Image.MAX_IMAGE_PIXELS == 12345


# Files that are left out


def test_predict_names_what_it_does_not_read(tmp_path, coco, caplog, capsys):
    (coco[0] / "scan.pdf").touch()
    (coco[0] / "phone.heic").write_bytes(b"no image")
    Image.fromarray(np.zeros((120, 160, 3), dtype=np.uint8)).save(coco[0] / "2.jfif", format="JPEG")
    caplog.set_level(logging.WARNING)
    with pytest.raises(InputError, match=r"1 of 3 images cannot be read:\n.*phone\.heic: .*pip install pillow-heif"):
        hf_dino(["predict", save_model(tmp_path / "model"), coco[0], f"--output={tmp_path / 'drawn'}"])
    assert f"{coco[0]}: 1 entry is not an image: not used; scan.pdf" in caplog.messages
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["1.png", "2.png"]


def test_predict_raises_three_lines_and_prints_the_other_errors(tmp_path, coco, capsys):
    for number in range(5):
        (coco[0] / f"broken{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="5 of 6 images cannot be read:") as caught:
        hf_dino(["predict", save_model(tmp_path / "model"), coco[0], f"--output={tmp_path / 'drawn'}"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[-1].endswith("... and 3 more; --json lists all")
    assert capsys.readouterr().out.count("not read: ") == 3
