"""A report has the numbers of its comparison, states what is missing, and survives files that were edited."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.comparisons import make_up
from hf_dino.compare import report_comparison
from hf_dino.compare.figures import appearance, spread
from hf_dino.compare.plan import run_folder
from hf_dino.compare.report import compare_with_papers
from hf_dino.compare.speed import measure_comparison
from hf_dino.family import FAMILY
from hf_dino.utils.errors import InputError


COMMAND = "hf-dino compare --output_dir 'a & <b>'"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    output = tmp_path_factory.mktemp("family")
    make_up(output, unfinished={("dino_5scale", 2), ("dino_pure", 0), ("dino_pure", 1), ("dino_pure", 2)})
    return output, report_comparison(output, COMMAND)


def measures(output, row, seed):
    return [json.loads(line) for line in (run_folder(output, row, seed) / "measures.jsonl").read_text().splitlines()]


def test_the_numbers_are_those_of_the_runs(family):
    output, report = family
    assert json.loads((output / "report.json").read_text())["rows"].keys() == set(FAMILY)
    for name, row in report["rows"].items():
        seeds = [measures(output, name, seed) for seed in row["finished_seeds"]]
        if seeds:
            last = [seed[-1]["ap"] for seed in seeds]
            assert row["final"]["ap"] == {"mean": pytest.approx(np.mean(last)), "min": min(last), "max": max(last)}
            steps = [next(each["step"] for each in seed if each["ap"] >= 0.9 * seed[-1]["ap"]) for seed in seeds]
            assert row["steps_to_90"]["mean"] == pytest.approx(np.mean(steps))
            assert row["curves"]["ap"]["low"] == [
                min(values) for values in zip(*[[r["ap"] for r in s] for s in seeds])
            ]
    assert report["rows"]["detr"]["steps_to_90_of_dino"] is None, "it is never reached"
    assert report["rows"]["dino_5scale"]["steps_to_90_of_dino"]["mean"] < 1200


def test_unfinished_runs_are_named_and_do_not_count(family):
    output, report = family
    assert report["rows"]["dino_5scale"]["finished_seeds"] == [0, 1]
    assert report["rows"]["dino_pure"]["final"]["ap"] is None
    text = " ".join((output / "report.html").read_text().split())
    assert "<b>pure selection</b>: training of seed 0, 1, 2 is not finished." in text
    assert "<b>DINO-5scale</b>: training of seed 2 is not finished." in text


def test_the_page_needs_no_other_file_and_escapes_text(family):
    output, _ = family
    text = (output / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert text.count('src="data:image/png') == 5
    assert "a &amp; &lt;b&gt;" in text


def test_the_figures_are_images_of_all_rows(family):
    output, _ = family
    for name in ("report", "instability", "recall", "recall_points", "denoising"):
        with Image.open(output / f"{name}.png") as image:
            assert image.width > 800
    looks = [(look["color"], str(look["linestyle"])) for look in map(appearance, FAMILY)]
    assert len(set(looks)) == len(FAMILY), "no two rows look alike"


def rows_with(**aps):
    return {
        name: {
            "final": {"ap": {"mean": sum(ap) / len(ap), "min": min(ap), "max": max(ap)}},
            "finished_seeds": [*range(len(ap))],
        }
        for name, ap in aps.items()
    }


def test_the_order_of_the_papers_is_judged_beyond_the_spread():
    def verdicts(**aps):
        return {(each["lower"], each["higher"]): each["verdict"] for each in compare_with_papers(rows_with(**aps))}

    assert verdicts(detr=[0.1, 0.2], deformable_detr=[0.3, 0.4]) == {("detr", "deformable_detr"): "as published"}
    assert verdicts(detr=[0.3, 0.4], deformable_detr=[0.1, 0.2]) == {("detr", "deformable_detr"): "reversed"}
    overlapping = verdicts(detr=[0.1, 0.3], deformable_detr=[0.2, 0.4])
    assert set(overlapping.values()) == {"within the spread"}
    skipped = verdicts(detr=[0.1], dino_4scale=[0.5])
    assert skipped == {("detr", "dino_4scale"): "as published"}, "the closest ancestor that there is"
    assert ("deformable_detr_two_stage", "dab_deformable_detr") in verdicts(
        deformable_detr_two_stage=[0.1], dab_deformable_detr=[0.5]
    )


def test_names_beside_curves_do_not_overlap_and_stay_in_the_plot():
    for heights in ([0.0] * 14, [1.0] * 14, sorted(np.random.default_rng(0).random(14))):
        moved = spread(heights, 0.05)
        assert min(np.diff(moved)) >= 0.05 - 1e-9
        assert min(moved) >= -1e-9
        assert max(moved) <= 1 + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])


def test_a_run_whose_measures_were_cut_is_left_out_and_said_to_be(tmp_path):
    make_up(tmp_path, rows=("detr", "dino_4scale"), seeds=2)
    path = run_folder(tmp_path, "detr", 1) / "measures.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    report = report_comparison(tmp_path, COMMAND)
    assert report["rows"]["detr"]["finished_seeds"] == [0]
    assert (
        "seed 1 is left out, since its measures do not reach the last step" in (tmp_path / "report.html").read_text()
    )
    shutil.rmtree(tmp_path / "rows" / "detr")
    assert report_comparison(tmp_path, COMMAND)["rows"].keys() == {"dino_4scale"}


def test_one_seed_has_no_spread_and_the_page_says_so(tmp_path):
    make_up(tmp_path, rows=("detr", "dino_4scale"), seeds=1)
    assert [pair["seeds"] for pair in report_comparison(tmp_path, COMMAND)["order"]] == [1]
    assert "as published, but of one seed, whose spread is unknown" in (tmp_path / "report.html").read_text()


def test_a_report_without_training_keeps_the_command_of_the_training(tmp_path):
    make_up(tmp_path, rows=("detr",), seeds=1)
    assert report_comparison(tmp_path)["command"] == ""
    assert "<dt>command</dt>" not in (tmp_path / "report.html").read_text()
    report_comparison(tmp_path, COMMAND)
    assert report_comparison(tmp_path)["command"] == COMMAND
    assert "<dt>command</dt>" in (tmp_path / "report.html").read_text()
    (tmp_path / "report.json").write_text("[]")
    assert report_comparison(tmp_path)["command"] == ""


def test_without_speed_there_is_no_time(tmp_path):
    make_up(tmp_path, rows=("detr",), seeds=1, unfinished={("detr", 0)})
    (tmp_path / "speed.json").unlink()
    report = report_comparison(tmp_path, COMMAND)
    assert report["rows"]["detr"]["cost"] is None
    assert "Not measured yet" in (tmp_path / "report.html").read_text()
    measure_comparison(tmp_path)
    assert not (tmp_path / "speed.json").exists(), "while a run is not finished, the machine is not idle"


def test_what_cannot_be_reported_is_one_line_and_writes_nothing(tmp_path):
    with pytest.raises(InputError, match=r"has no comparison \(comparison\.json not found\)"):
        report_comparison(tmp_path, COMMAND)
    assert not list(tmp_path.iterdir())
    make_up(tmp_path, rows=(), seeds=1)
    with pytest.raises(InputError, match="has no evaluation yet"):
        report_comparison(tmp_path, COMMAND)
    for text in ("{", "null", '{"rows": []}', '{"rows": {"detr": {}}}', '{"rows": {"detr": {"flops": "x"}}}'):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(InputError, match=r"speed\.json: is damaged .*; remove it, and measure again with --speed"):
            report_comparison(tmp_path, COMMAND)
    settings = json.loads((tmp_path / "comparison.json").read_text())
    for changed in ({"max_train_steps": "20"}, {"max_train_steps": 20.5}, {"size": None}, {"models": [1]}):
        (tmp_path / "comparison.json").write_text(json.dumps(settings | changed))
        with pytest.raises(InputError, match=r"comparison\.json: is damaged"):
            report_comparison(tmp_path, COMMAND)
    for text in ("{}", '{"max_train_steps": 3}'):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(InputError, match=r"comparison\.json: is damaged"):
            report_comparison(tmp_path, COMMAND)
