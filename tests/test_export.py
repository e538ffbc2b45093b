"""Exported files compute what their model computes; a file that does not is found and never gets its name."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from helpers.command_line import exit_status, hf_dino
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor, export
from hf_dino.export import FORMATS, QuerySelectionMode, compare, describe, export_model, make_inputs, make_program
from hf_dino.exported import ExportedDetector, load_exported
from hf_dino.inference import detect_objects


onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")


@pytest.fixture(scope="module")
def model():
    return tiny_model(encoder_layers=1, decoder_layers=1, num_feature_levels=2)


@pytest.fixture(scope="module")
def processor():
    return DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}, image_mean=[0.5, 0.4, 0.3])


@pytest.fixture(scope="module")
def program(model):
    return make_program(model)


@pytest.fixture(scope="module")
def metadata(model, processor, program):
    return json.dumps(describe(model, processor, program, "OWNER/NAME"))


@pytest.fixture(scope="module")
def written(program, metadata, tmp_path_factory):
    """Return a function that writes the model in a format, once."""
    paths = {}

    def write(name: str) -> Path:
        if name not in paths:
            paths[name] = tmp_path_factory.mktemp(name) / f"model{FORMATS[name].suffix}"
            if not FORMATS[name].suffix:
                paths[name].mkdir()
            FORMATS[name].write(program, paths[name], metadata)
        return paths[name]

    return write


def slow(format: str):
    return pytest.param(format, marks=pytest.mark.slow)


def require(format: str) -> None:
    for package in FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs the extra `{FORMATS[format].extra}`")


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino")])
def test_all_raw_outputs_equal_those_of_the_model(format, written, model):
    require(format)
    comparisons = export.verify(written(format), model)
    assert len({each.shape for each in comparisons}) == 5 and len({each.shape[0] for each in comparisons}) == 3
    for each in comparisons:
        assert each.boxes <= 1e-5 and each.logits <= 2e-4 and each.ties <= 1e-4
    pixel_values, mask = make_inputs((2, 97, 131), seed=9)
    with torch.no_grad():
        expected = model(pixel_values, mask)
    found = ExportedDetector(written(format))(pixel_values, mask)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino")])
def test_an_exported_model_detects_what_the_model_detects(format, written, model, processor):
    require(format)
    detector, own_processor = load_exported(written(format))
    assert own_processor.to_dict() == processor.to_dict()
    assert detector.config.to_dict() | {"auto_map": 0} == model.config.to_dict() | {"auto_map": 0}
    image = Image.effect_mandelbrot((160, 120), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    expected, found = (detect_objects(*each, image, 0.0) for each in ((model, processor), (detector, own_processor)))
    assert len(expected) == len(found) > 10
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["name"] == theirs["name"]
        assert theirs["box"] == pytest.approx(ours["box"], abs=0.01)
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-4)


def test_an_onnx_file_states_its_inputs_and_where_its_model_came_from(written, model, processor):
    file = onnx.load(written("onnx"))
    onnx.checker.check_model(file, full_check=True)
    assert file.opset_import[0].version >= 18

    def axes(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert {each.name: axes(each) for each in file.graph.input} == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
    }
    assert {each.name: axes(each) for each in file.graph.output} == {
        "logits": ["batch", 12, 5],
        "pred_boxes": ["batch", 12, 4],
    }
    (entry,) = file.metadata_props
    facts = json.loads(entry.value)
    assert facts["id2label"] == {str(label): name for label, name in model.config.id2label.items()}
    assert facts["processor"]["image_mean"] == list(processor.image_mean)
    assert {"image_std", "size", "rescale_factor", "do_resize"} <= facts["processor"].keys()
    assert facts["origin"] == "OWNER/NAME" and facts["least_size"] >= facts["least_edge"] > 1


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino")])
def test_a_file_names_no_local_path(format, written):
    require(format)
    here = {str(Path(export.__file__).parents[1]), str(Path.home()), str(Path(torch.__file__).parent), sys.prefix}
    for path in (written(format), *written(format).rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name in here if len(name) > 1 and name.encode() in content]
        assert b'.py"' not in content and b"stack_trace" not in content


def sabotaged(source: Path, target: Path, index: int) -> Path:
    """Change every second number in one weight of an ONNX file by 1 %; normalization would hide a change of all."""
    file = onnx.load(source)
    weights = [each for each in file.graph.initializer if len(each.dims) >= 2 and each.data_type == 1]
    array = onnx.numpy_helper.to_array(weights[index]).copy()
    array.flat[::2] *= 1.01
    weights[index].CopyFrom(onnx.numpy_helper.from_array(array, weights[index].name))
    onnx.save(file, target)
    return target


@pytest.mark.parametrize("index", [0, 10, 20, -1])
def test_a_weight_that_changed_by_1_percent_is_found(index, written, model, tmp_path):
    with pytest.raises(export.DifferenceError, match=r"differs from the model on \d x \d+ x \d+ images: boxes by"):
        export.verify(sabotaged(written("onnx"), tmp_path / "model.onnx", index), model)


def test_a_file_that_differs_never_gets_its_name(written, model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "make_program", lambda *_: None)
    monkeypatch.setattr(export, "describe", lambda *_: {})
    wrong = export.Format(".onnx", "export", (), lambda _, path, __: sabotaged(written("onnx"), path, 1))
    monkeypatch.setitem(FORMATS, "onnx", wrong)
    with pytest.raises(export.DifferenceError):
        export_model(model, processor, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def run_with_swapped_ranks(model, inputs, rank: int):
    """The outputs of a right export that ranks two neighboring tokens the other way around."""
    with torch.no_grad(), QuerySelectionMode() as own:
        model(*inputs)
    tokens = own.selected[0].clone()
    tokens[:, [rank, rank + 1]] = tokens[:, [rank + 1, rank]]
    with torch.no_grad(), QuerySelectionMode(tokens):
        outputs = model(*inputs)
    return outputs, tokens


def test_ranks_may_differ_where_scores_tie_and_nowhere_else(model):
    inputs = make_inputs((2, 96, 128), seed=0)
    outputs, tokens = run_with_swapped_ranks(model, inputs, rank=3)
    swapped = compare(lambda *_: [outputs.logits, outputs.pred_boxes, tokens], model, inputs)
    assert (swapped.ranks, swapped.boxes, swapped.logits) == (4, 0, 0)
    assert swapped.ties > 1e-4 and not swapped.is_equal
    with torch.no_grad(), QuerySelectionMode() as own:
        expected = model(*inputs)
    assert (outputs.logits - expected.logits).abs().max() > 2e-4  # so it is the alignment that makes them equal

    tied = copy.deepcopy(model)
    tied.model.query_selection.class_embed.weight.data *= 1e-6
    outputs, tokens = run_with_swapped_ranks(tied, inputs, rank=3)
    comparison = compare(lambda *_: [outputs.logits, outputs.pred_boxes, tokens], tied, inputs)
    assert comparison.ranks >= 4 and comparison.is_equal
    twice = own.selected[0].clone()
    twice[0, 1] = twice[0, 0]
    assert not compare(lambda *_: [expected.logits, expected.pred_boxes, twice], model, inputs).is_equal


def test_outputs_that_are_not_finite_are_not_equal(model):
    inputs = make_inputs((1, 96, 128), seed=0)
    with torch.no_grad(), QuerySelectionMode() as own:
        expected = model(*inputs)
    nan = torch.full_like(expected.logits, float("nan"))
    assert not compare(lambda *_: [nan, expected.pred_boxes, *own.selected], model, inputs).is_equal


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino")])
def test_images_that_are_too_small_are_refused_with_the_least_size(format, written):
    require(format)
    detector = ExportedDetector(written(format))
    least = detector.session.facts["least_size"]
    assert detector(torch.zeros(1, 3, least, least)).logits.shape == (1, 12, 5)
    with pytest.raises(ValueError, match=f"cannot process an image of 16 x 400 pixels .*least {least} x {least}"):
        detector(torch.zeros(1, 3, 16, 400))


@pytest.mark.parametrize("name", ["gone.onnx", "notes.txt", "empty", "damaged.onnx", "damaged.pt2", "other.onnx"])
def test_what_is_not_an_exported_model_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for damaged in ("notes.txt", "damaged.onnx", "damaged.pt2"):
        (tmp_path / damaged).write_text("no model")
    value = onnx.helper.make_tensor_value_info("a", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["a"], ["b"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("b", 1, [1]))
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"is not an exported model|is damaged, or was not written by") as raised:
        ExportedDetector(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_it_runs_on_the_cpu_and_says_so(written):
    detector = ExportedDetector(written("onnx"))
    assert detector.to("cpu") is detector and detector.device.type == "cpu"
    with pytest.raises(RuntimeError, match="run on the CPU"):
        detector.to("cuda")


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return tmp_path


def test_the_command_writes_a_verified_file(folder, written, program, model, monkeypatch, capsys):
    monkeypatch.setattr(export, "make_program", lambda *_: program)
    copy_file = export.Format(".onnx", "export", (), lambda _, path, __: shutil.copy(written("onnx"), path))
    monkeypatch.setitem(FORMATS, "onnx", copy_file)
    target = folder / "new" / "model.onnx"
    assert hf_dino(["export", folder / "tiny", "--output", target]) == 0
    printed = capsys.readouterr().out
    assert "changed ranks" in printed and f"wrote {target}, " in printed
    assert sorted(path.name for path in target.parent.iterdir()) == ["model.onnx"]
    assert export.verify(target, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--output=there.onnx"], "already exists; use a different path"),
        (["tiny", "--output=model.pt2"], "must end in .onnx"),
        (["tiny", "--format=pt2", "--output=model.onnx"], "must end in .pt2"),
        (["tiny", "--output=there.onnx/model.onnx"], "there.onnx"),
        (["tny", "--output=model.onnx"], "tny: is neither a directory nor a model on the Hub"),
        (["OWNER/nmae", "--output=model.onnx"], "is neither a directory nor a model on the Hub"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Path("there.onnx").write_text("keep")
    before = sorted(path.name for path in folder.iterdir())
    assert exit_status(["export", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert Path("there.onnx").read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_unknown_format_lists_the_known_ones(folder, capsys):
    assert hf_dino(["export", folder / "tiny", "--output=a.tflite", "--format=tflite"]) == 2
    assert "'onnx', 'openvino', 'pt2'" in capsys.readouterr().err


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_its_extra(format, package, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    output = folder / f"model{FORMATS[format].suffix}"
    assert exit_status(["export", folder / "tiny", f"--format={format}", f"--output={output}"]) == 2
    line = f"--format {format} needs {package}: pip install 'hf-dino[{FORMATS[format].extra}]'"
    assert line in capsys.readouterr().err


def test_gathering_computes_what_the_reference_implementation_computes():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (1, 2)]
    value = torch.randn(2, 49, 4, 8, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 6, 4, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    locations[0, 0, 0, 0] = torch.tensor([[0.0, 1.0], [float("nan"), 0.5]])
    locations[0, 1, 0, 0] = torch.tensor([[float("inf"), 0.5], [0.5, -1e9]])
    weights = torch.rand(2, 6, 4, 3, 2, generator=generator, dtype=torch.float64)
    expected, found = (attend(value, shapes, locations, weights) for attend in export.ATTENTIONS.values())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_an_onnx_file_for_tensorrt_has_no_grid_sample(written, model, processor, tmp_path):
    comparisons = export_model(model, processor, tmp_path / "gather.onnx", attention="gather")
    assert max(each.boxes for each in comparisons) <= 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "gather.onnx").graph.node}
    assert "GridSample" not in operators
    assert "GridSample" in {node.op_type for node in onnx.load(written("onnx")).graph.node}


RESNET = """
import resource, sys, torch
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.export import export_model
torch.manual_seed(0)
model = DinoDetrForObjectDetection(DinoDetrConfig()).eval()
for each in export_model(model, DinoDetrImageProcessor(), sys.argv[1], format=sys.argv[2]):
    print(each)
    assert each.boxes <= 1e-5 and each.logits <= 2e-4
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx"])
def test_a_resnet_50_is_exported_in_4_gib(format, tmp_path):
    require(format)
    command = [sys.executable, "-c", RESNET, str(tmp_path / f"model{FORMATS[format].suffix}"), format]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 4
