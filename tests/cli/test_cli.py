"""The command line `hf-dino`: its help is fast, its options have two spellings, its errors are one line."""

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from helpers.command_line import hf_dino, train_arguments
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.cli import data, evaluate, export, train
from hf_dino.data import SPLITS
from hf_dino.data.augmentation import AUGMENTATIONS
from hf_dino.data.convert import WRITERS
from hf_dino.data.split import SIMILARITY
from hf_dino.evaluation import ENGINES
from hf_dino.export import ATTENTIONS, FORMATS, PRECISIONS
from hf_dino.image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from hf_dino.model_card import COCO_MAX_DETECTIONS
from hf_dino.training_arguments import default_of, parse_option


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
COMMANDS = ["", "train", "evaluate", "predict", "convert", "checkpoints", "info", "kernels", "export", "demo"]
COMMANDS += ["verify", "benchmark", "push", "compare"]
COMMANDS += ["data", "data check", "data augment", "data convert", "data split"]
IMPORTED = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"


def run(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **options)


@pytest.fixture(params=["hf-dino", "-m hf_dino"])
def program(request, tmp_path):
    """The arguments that make Python run the command line: the script that an installation writes, or the package."""
    if request.param.startswith("-m"):
        return request.param.split()
    script = tmp_path / "hf-dino"
    script.write_text("import sys\nfrom hf_dino.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    return [script]


def seconds(*arguments):
    start = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - start


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_a_second(command):
    """Plus what Python itself takes to start on a busy machine."""
    times = [(seconds("-m", "hf_dino", *command.split(), "--help"), seconds("-c", "pass")) for _ in range(3)]
    assert min(own - 10 * start for own, start in times) < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(program, command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(IMPORTED)
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    line = [sys.executable, *map(str, program), *command.split(), "--help"]
    done = subprocess.run(line, env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert "hf_dino.cli" in modules
    assert modules.isdisjoint({"torch", "transformers", "numpy", "PIL", "scipy", "accelerate"})
    assert f"Usage: {' '.join(['hf-dino', *command.split()])} [OPTIONS]" in done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("", "data")])
def test_help_spells_options_with_underscores_and_tells_what_they_do(command, capsys):
    assert hf_dino([*command.split(), "--help"]) == 0
    options = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert options
    assert not [option for option in options if "-" in option[2:]]


def test_help_of_train_lists_options_by_what_they_are_about(capsys):
    assert hf_dino(["train", "--help"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["Options:", *(f"{group}:" for group in train.FIRST_OF_GROUP.values())]
    assert set(train.FIRST_OF_GROUP) <= set(train.OPTIONS)


def test_lists_take_several_values_or_none():
    given = ["--model-name-or-path=m", "--dataset=d", "--output-dir=o"]
    assert train_arguments([*given, "--freeze", "stem", "encoder", "--seed", 1]).freeze == ["stem", "encoder"]
    assert train_arguments([*given, "--freeze"]).freeze == []
    assert train_arguments([*given, "--image-size", 480, 640]).image_size == ["480", "640"]


@pytest.mark.parametrize("spelling", ["--num_images", "--num-images"])
def test_options_are_typed_with_underscores_or_dashes(spelling, capsys):
    """Names of options and of choices, and never any other argument."""
    assert hf_dino(["data", "check", "no-such_directory", f"{spelling}=0"]) == 2
    assert "Invalid value for '--num_images'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no-such_directory"):
        hf_dino(["data", "check", "no-such_directory", spelling, "2"])


@pytest.mark.parametrize("spelling", ["--dataset", "--data"])
def test_a_dataset_has_two_spellings(spelling):
    assert train_arguments(["--model_name_or_path=m", "--output_dir=o", f"{spelling}=mine"]).dataset == "mine"
    with pytest.raises(ValueError, match="no-such_directory"):
        hf_dino(["evaluate", "--model_name_or_path=m", spelling, "no-such_directory"])


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_two_spellings_of_an_option_are_one_too_many(command, capsys):
    assert hf_dino([command, "--model_name_or_path=m", "--data=a", "--dataset", "b"]) == 2
    assert "Give only one of --data and --dataset" in capsys.readouterr().err


def test_a_recipe_may_have_every_option(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndataset: mine\noutput_dir: runs/mine\n")
    assert train_arguments(["--recipe", recipe]).output_dir == Path("runs/mine")
    assert train_arguments(["--recipe", recipe, "--output_dir=o"]).output_dir == Path("o")
    with pytest.raises(ValueError, match=r"^give --output_dir, here or in --recipe"):
        hf_dino(["train", "--model_name_or_path=m", "--dataset=mine"])


@pytest.mark.parametrize(
    "columns",
    [
        ["objects"],
        ["objects="],
        ["=digits"],
        ["things=digits"],
        ["objects=a", "objects=b"],
        {"objects": None},
        {1: "a"},
    ],
)
def test_columns_that_say_nothing(columns):
    with pytest.raises(
        ValueError, match=r"^--columns: must be CONTENT=NAME, with CONTENT each at most once of image,"
    ):
        parse_option("columns", columns)
    assert parse_option("columns", ["objects=a=b", "image=c"]) == {"objects": "a=b", "image": "c"}


@pytest.mark.parametrize("spelling", ["faster-coco-eval", "faster_coco_eval"])
def test_choices_have_the_name_that_the_library_knows(spelling, monkeypatch):
    chosen = []
    monkeypatch.setattr("hf_dino.evaluation.check_engine", chosen.append)
    arguments = ["--model_name_or_path=a", "--dataset=no-such_directory", "--coco-backend", spelling]
    with pytest.raises(ValueError, match="no-such_directory"):
        hf_dino(["evaluate", *arguments])
    assert chosen == ["faster-coco-eval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["predict", "a.png"], "Missing option '--model_name_or_path'"),
        (["predict", "--model-name-or-path=a", "--output=b"], "Missing argument"),
        (["predict", "a.png", "--model-name-or-path=a", "--output=b", "--threshold=2"], "'--threshold'"),
        (["evaluate", "--model-name-or-path=a"], "Give either --dataset, or both --images and --annotations"),
        (["evaluate", "--model-name-or-path=a", "--dataset=b", "--images=c"], "Give either --dataset, or both"),
        (["evaluate", "--model-name-or-path=a", "--images=c"], "Give either --dataset, or both"),
        (["evaluate", "--model-name-or-path=a", "--dataset=b", "--split=val"], "'--split'"),
        (["evaluate", "--model-name-or-path=a", "--dataset=b", "--dataloader-num-workers=-1"], "'--dataloader_num"),
        (["data", "check", "a", "--num-images=1.5"], "'--num_images'"),
        (["data", "augment", "a"], "Missing option '--output'"),
        (["data", "convert", "a", "--output-dir=b", "--format=kitti"], "'--format'"),
        (["data", "split", "a"], "Missing option '--output_dir'"),
        (["data", "split", "a", "--output-dir=b", "--similarity=1.5"], "'--similarity'"),
        (["data", "split", "a", "--output-dir=b", "--seed=-1"], "'--seed'"),
        (["data", "split", "--output-dir=b"], "Give either a DATASET, or both"),
        (["data", "split", "--output-dir=b", "--images=c", "--annotations=d", "--streaming"], "need a DATASET"),
        (["export", "a"], "Missing option '--output'"),
        (["kernels", "--biuld"], "No such option: --biuld"),
    ],
)
def test_wrong_arguments_end_with_status_2_before_any_work(arguments, message, capsys):
    assert hf_dino(arguments) == 2
    assert message in capsys.readouterr().err


def test_wrong_input_is_one_line_and_status_2(program, tmp_path):
    done = run(*program, "data", "check", tmp_path / "gone")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'gone'}: ")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_base_installation_is_told_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    arguments = ["--model_name_or_path=a", "--dataset=b"]
    more = [f"--output_dir={tmp_path / 'run'}"] if command == "train" else []
    with pytest.raises(ImportError, match=r"needs accelerate: pip install 'hf-dino\[train\]'"):
        hf_dino([command, *arguments, *more])


def test_a_report_that_cannot_be_written_is_refused_before_the_model_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    arguments = ["--model_name_or_path=a", "--dataset=no-such_directory"]
    with pytest.raises(ImportError, match=r"--report_html needs jinja2: pip install 'hf-dino\[train\]'"):
        hf_dino(["evaluate", *arguments, f"--report_html={tmp_path / 'report.html'}"])


@pytest.mark.parametrize(("script", "command"), [("evaluate_coco.py", "evaluate"), ("predict.py", "predict")])
def test_examples_run_a_command(script, command, capsys):
    assert hf_dino([command, "--help"]) == 0
    assert run(ROOT / "examples" / script, "--help").stdout == capsys.readouterr().out


def test_choices_are_those_of_the_library():
    def choices(command, name):
        return get_args(get_type_hints(command)[name])

    assert choices(evaluate.evaluate, "split") == SPLITS
    assert choices(evaluate.evaluate, "coco_backend") == tuple(ENGINES)
    assert inspect.signature(evaluate.evaluate).parameters["max_detections"].default == COCO_MAX_DETECTIONS
    assert default_of("max_detections") == COCO_MAX_DETECTIONS
    assert choices(export.export, "format") == tuple(FORMATS)
    assert get_args(choices(export.export, "attention")[0]) == tuple(ATTENTIONS)  # or none
    assert choices(export.export, "precision") == PRECISIONS
    assert choices(data.convert, "format") == choices(data.split, "format") == tuple(WRITERS)
    assert inspect.signature(data.split).parameters["similarity"].default == SIMILARITY
    (help,) = get_type_hints(data.augment, include_extras=True)["augmentation"].__metadata__
    assert [name for name in AUGMENTATIONS if name not in help.help] == []
    (help,) = get_type_hints(data.augment, include_extras=True)["image_size"].__metadata__
    assert help.show_default == f"{SHORTEST_EDGE} {LONGEST_EDGE}"


def test_arguments_are_shown_without_their_type(capsys):
    for command, argument in (("predict", "IMAGE"), ("data check", "DATASET")):
        assert hf_dino([*command.split(), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[lines.index("Arguments:") + 1].startswith(f"  {argument}  ")


KNOWN = """
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as names
assert AutoConfig.for_model("dino_detr").model_type == "dino_detr"
config = AutoConfig.for_model("dino_detr")
assert type(config) in AutoModelForObjectDetection._model_mapping
assert type(config) in IMAGE_PROCESSOR_MAPPING
assert "dino_detr" in names
"""
TRANSFORMERS = (
    "from transformers import AutoConfig, AutoModelForObjectDetection\n"
    "from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING\n"
)


@pytest.mark.parametrize("imports", ["import hf_dino\n" + TRANSFORMERS, TRANSFORMERS + "import hf_dino\n"])
@pytest.mark.parametrize("form", ["-m package", "script.py -m hf_dino"])
def test_a_program_finds_the_classes_registered(imports, form, tmp_path):
    """In whichever order it imports them, and even while Python looks for the module that `-m` names."""
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "package" / "__init__.py", tmp_path / "script.py"):
        path.write_text(imports + KNOWN)
    (tmp_path / "package" / "__main__.py").touch()
    done = run(*form.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_registers_them_when_it_loads_a_model(program, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(tmp_path / "model")
    Image.new("RGB", (160, 120), "teal").save(tmp_path / "image.png")
    options = ["--model-name-or-path", tmp_path / "model", "--output", tmp_path / "drawn.png", "--device=cpu"]
    done = run(*program, "predict", tmp_path / "image.png", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn.png").is_file()


def test_public_names_are_listed_and_no_others_found():
    import hf_dino as package

    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name).__module__.startswith("hf_dino.") for name in package.__all__)
    with pytest.raises(AttributeError, match="module 'hf_dino' has no attribute 'DinoDetrNothing'"):
        package.DinoDetrNothing  # noqa: B018
