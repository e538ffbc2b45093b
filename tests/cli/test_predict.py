"""`hf-dino predict`: each image is in the results exactly once, whenever it is stopped; nothing is overwritten."""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import forks
from helpers.command_line import hf_dino
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.cli import predict
from hf_dino.data import InputError
from hf_dino.inference import SAVE_FORMATS, ResultsDirectory


NUM_IMAGES = 14
LAST = {str(number) for number in range(10, NUM_IMAGES)}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A directory with a model and a directory of images of two sizes."""
    directory = tmp_path_factory.mktemp("reader")
    tiny_model().save_pretrained(directory / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(directory / "model")
    (directory / "images").mkdir()
    for number in range(NUM_IMAGES):
        size = (60, 40) if number % 3 else (40, 60)
        Image.effect_noise(size, 50).convert("RGB").save(directory / "images" / f"{number:02}.png")
    return directory


@pytest.fixture
def run(reader, tmp_path, monkeypatch):
    """Run the command in a directory with `model` and `images`, on a CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(reader / "model")
    shutil.copytree(reader / "images", tmp_path / "images")

    def predict(*arguments, output="out", threshold=0.015):
        common = ["--model=model", f"--output={output}", f"--threshold={threshold}", "--device=cpu"]
        return hf_dino(["predict", *arguments, *common])

    return predict


def journal(output="out"):
    return [json.loads(line) for line in Path(output, "results.jsonl").read_text().splitlines()]


def content(folder):
    """The content of all files, except for the order of results, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_killed_at_any_moment_and_resumed_each_image_is_there_once(run, tmp_path):
    arguments = ("images", "--save=jsonl,csv,coco,yolo,json", "--resume", "--batch_size=1")
    start = time.monotonic()
    assert run(*arguments, output="whole") == 0
    seconds = time.monotonic() - start
    moments = random.Random(0)
    for number in range(5):
        output = f"killed{number}"
        common = ["--model=model", f"--output={output}", "--threshold=0.015", "--device=cpu"]
        child = forks.start(["predict", *arguments, *common])
        time.sleep(moments.uniform(0.1, 0.9) * seconds)
        child.kill()
        child.join()
        assert run(*arguments, output=output) == 0
        assert Counter(record["image"] for record in journal(output)) == Counter(
            f"images/{image:02}.png" for image in range(NUM_IMAGES)
        )
        assert content(output) == content("whole")


def test_a_line_that_was_being_written_is_written_again(run):
    arguments = ("images", "--save", "jsonl", "csv", "--batch_size=1")
    assert run(*arguments) == 0
    before = content("out")
    text = Path("out/results.jsonl").read_bytes()
    Path("out/results.jsonl").write_bytes(text[:-30])
    Path("out/results.csv").write_bytes(b"partial")
    assert run(*arguments, "--resume") == 0
    assert content("out") == before


def test_a_resumed_run_detects_only_in_new_images(run, capsys):
    assert run("images/0*.png", "--save=json") == 0
    capsys.readouterr()
    assert run("images", "--save=json", "--resume", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["skipped"]) == (NUM_IMAGES - 10, 10)
    assert len(json.loads(Path("out/results.json").read_text())) == NUM_IMAGES
    assert run("images", "--save=json", "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 0


def test_ctrl_c_leaves_the_finished_results(run, monkeypatch):
    append, finished = ResultsDirectory.append, []

    def interrupted(self, record):
        if len(finished) == 9:
            raise KeyboardInterrupt
        finished.append(record["image"])
        append(self, record)

    monkeypatch.setattr(ResultsDirectory, "append", interrupted)
    assert run("images", "--save=json,coco") != 0
    assert list(json.loads(Path("out/results.json").read_text())) == finished
    assert [image["file_name"] for image in json.loads(Path("out/coco.json").read_text())["images"]] == [
        Path(image).name for image in finished
    ]
    monkeypatch.setattr(ResultsDirectory, "append", append)
    assert run("images", "--save=json,coco", "--resume") == 0
    assert len(json.loads(Path("out/results.json").read_text())) == NUM_IMAGES


def test_nothing_is_overwritten_unless_told_to(run):
    every = f"--save={','.join(SAVE_FORMATS)}"
    assert run("images/0*.png", every) == 0
    for format in SAVE_FORMATS:
        with pytest.raises(InputError, match=r"already exists; add --resume to continue that run, --overwrite"):
            run("images", f"--save={format}")
    with pytest.raises(InputError, match=r"made with threshold 0\.015 \(now 0\.02\).*use the same options"):
        run("images", every, "--resume", threshold=0.02)
    Path("out/mine.txt").write_text("kept")
    assert run("images/1*.png", every, "--overwrite", threshold=0.02) == 0
    assert Path("out/mine.txt").read_text() == "kept"
    assert {record["image"] for record in journal()} == {f"images/{name}.png" for name in LAST}
    assert {path.stem[:2] for path in Path("out/crops").rglob("*.png")} <= LAST
    assert {path.stem for path in Path("out/yolo/labels").iterdir()} == LAST


@pytest.mark.parametrize("format", sorted(set(SAVE_FORMATS) - {"images"}))
def test_files_of_another_origin_are_never_replaced(run, format):
    assert run("images/00.png", f"--save={format}") == 0
    Path("out/.predict.json").unlink()
    before = content("out")
    for option, message in (("--overwrite", "was not made by this command"), ("--resume", "already exists")):
        with pytest.raises(InputError, match=message):
            run("images", f"--save={format}", option)
    assert {name: content("out")[name] for name in before} == before


def test_drawings_are_not_images_to_detect_in(run, caplog):
    assert run("images", output="images/drawn") == 0
    assert len(list(Path("images/drawn").glob("*"))) == NUM_IMAGES
    assert run("images", "--recursive", "--overwrite", output="images/drawn") == 0
    assert f"{NUM_IMAGES} images in the output directory are not used" in caplog.text


def test_broken_images_are_reported_and_tried_again(run, capsys):
    good = Path("images/03.png").read_bytes()
    Path("images/03.png").write_text("broken")
    with pytest.raises(InputError, match=rf"1 of {NUM_IMAGES} images cannot be read:\nimages/03.png: "):
        run("images", "--save=jsonl", "--json")
    assert list(json.loads(capsys.readouterr().out)["errors"]) == ["images/03.png"]
    assert len(journal()) == NUM_IMAGES - 1
    Path("images/03.png").write_bytes(good)
    assert run("images", "--save=jsonl", "--resume") == 0
    assert len(journal()) == NUM_IMAGES


def test_classes_are_chosen_by_name(run, reader):
    def names(*arguments):
        assert run("images/0*.png", "--save=jsonl", "--overwrite", *arguments) == 0
        return {each["name"] for record in journal() for each in record["detections"]}

    assert names() > {"class 1", "class 3"}
    assert names("--classes=class 1,Class_3") == {"class 1", "class 3"}
    assert names("--classes", "class 1", "class 3") == {"class 1", "class 3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save=json,xml"], "'xml' is not one of images, json"),
        (["--save"], "'' is not one of images, json"),
        (["--classes"], "the model has no class ''"),
        (["--resume", "--overwrite"], "Give either --resume or --overwrite"),
        (["--classes=class 1,dog"], "the model has no class 'dog'; it has class 0, class 1"),
        (["--tile_overlap=0.3"], "--tile_overlap needs --tile"),
        (["--batch_size=0"], "'--batch_size'"),
        (["--nms=2"], "'--nms'"),
        (["--top_k=0"], "'--top_k'"),
        (["--dtype=int8"], "'--dtype'"),
    ],
)
def test_wrong_use_is_status_2_and_writes_nothing(run, arguments, message, capsys):
    assert run("images", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_tiles_find_small_objects_in_large_images(run):
    Image.effect_noise((200, 150), 50).convert("RGB").save("large.png")
    for output, options in (("whole", []), ("tiles", ["--tile=80", "--tile_overlap=0.3"])):
        assert run("large.png", "--save=jsonl", *options, output=output, threshold=0.005) == 0
    (whole,), (tiles,) = journal("whole"), journal("tiles")
    assert len(tiles["detections"]) > len(whole["detections"])
    with pytest.raises(InputError, match=r"made with tile 80 \(now None\)"):
        run("large.png", "--save=jsonl", "--resume", output="tiles", threshold=0.005)


def test_a_single_drawing_has_no_other_format(run, capsys):
    assert run("images/00.png", "--save=json", output="drawn.png") == 2
    assert "need a directory" in capsys.readouterr().err
    assert run("images/00.png", output="drawn.png") == 0
    with pytest.raises(InputError, match="already exists"):
        run("images/00.png", output="drawn.png")
    assert run("images/00.png", "--overwrite", output="drawn.png") == 0
    before = Path("images/00.png").read_bytes()
    with pytest.raises(InputError, match=r"images/00\.png: is what is to be drawn"):
        run("images/00.png", "--overwrite", output="images/00.png")
    assert Path("images/00.png").read_bytes() == before


def test_images_of_the_same_name_are_refused_before_the_work(run):
    shutil.copytree("images", "more")
    for arguments in (["images", "more"], ["images", "more", "--save=json"]):
        with pytest.raises(InputError, match="several images would be"):
            run(*arguments)
    assert not Path("out").exists()


def test_an_image_never_replaces_another_one_of_its_name(run):
    shutil.copytree("images", "more")
    assert run("images/00.png", "--save=jsonl,images") == 0
    before = content("out")
    with pytest.raises(InputError, match=r"more/00\.png: has the same name as images/00\.png, which is saved in out"):
        run("more", "--save=jsonl,images", "--resume")
    assert content("out") == before


def test_fp16_needs_a_gpu(run):
    with pytest.raises(InputError, match="--dtype float16 needs a GPU; use bfloat16 or float32"):
        run("images", "--dtype=float16")


def test_formats_are_those_of_the_library():
    assert predict.FORMATS == SAVE_FORMATS


def test_one_image_is_no_plural(run, capsys):
    assert run("images/00.png", "--save=jsonl", threshold=0.99) == 0
    assert run("images/00.png", "images/01.png", "--save=jsonl", "--resume", threshold=0.99) == 0
    assert "1 image, 1 was there already, 0 objects, " in capsys.readouterr().out
    Path("images/02.png").write_text("broken")
    with pytest.raises(InputError, match="1 of 1 image cannot be read:"):
        run("images/02.png", output="broken")


@pytest.mark.parametrize("output", ["notes", "notes/out"])
def test_an_output_that_cannot_be_a_directory_is_said_at_once(run, output):
    Path("notes").touch()
    with pytest.raises(
        InputError, match=rf"^{output}: cannot be a directory, since .*notes is a file; use a different"
    ):
        run("images", "--save=jsonl", output=output)


def test_an_image_is_given_once(run):
    with pytest.raises(InputError, match=r"^images/00\.png: given more than once; give each image once$"):
        run("images", "images/00.png")
    Path("images/sub").mkdir()
    shutil.copy("images/00.png", "images/sub/00b.png")
    with pytest.raises(InputError, match=r"^images/sub/00b\.png: given more than once"):
        run("images", "images/sub/00b.png", "--recursive")


def test_a_finished_run_of_drawings_is_not_resumed_but_said(run):
    assert run("images/00.png") == 0
    assert [path.name for path in Path("out").iterdir()] == ["00.png"]
    with pytest.raises(InputError, match="already exists; there is no unfinished run to resume, --overwrite to"):
        run("images/00.png", "--resume")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_layers_find_the_same(run):
    assert run("images", "--save=jsonl", output="plain") == 0
    assert run("images", "--save=jsonl", "--compile", output="compiled") == 0
    for one, other in zip(journal("compiled"), journal("plain"), strict=True):
        assert one["image"] == other["image"]
        assert [each["name"] for each in one["detections"]] == [each["name"] for each in other["detections"]]
        scores, expected = ([each["score"] for each in record["detections"]] for record in (one, other))
        assert scores == pytest.approx(expected, rel=1e-3)
        boxes, expected = ([each["box"] for each in record["detections"]] for record in (one, other))
        np.testing.assert_allclose(boxes, expected, rtol=0, atol=1e-2)
