"""A directory of results whose hidden files were damaged ends in one line, or detects again."""

import json
from pathlib import Path

import pytest

from hf_dino.inference import ImageInput
from hf_dino.inference.results import SETTINGS, ResultsDirectory, _Log, _whole_lines
from hf_dino.utils.errors import InputError


WHOLE = {"image": "a.png", "file_name": "a.png", "width": 1, "height": 1, "detections": []}


@pytest.mark.parametrize("text", ["[1]", "[]", "{}", "1", "null", "{", "[" * 100_000])
def test_settings_that_are_no_mapping_are_refused(tmp_path, text):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(InputError, match="settings of a run"):
        ResultsDirectory(tmp_path, ["json"], {}).check_previous([], resume=True, overwrite=False)


@pytest.mark.parametrize(
    "change", [{"image": []}, {"file_name": 1}, {"width": None}, {"detections": {}}, {"frame": []}]
)
def test_lines_of_the_journal_that_are_no_record_are_left_out(tmp_path, caplog, change):
    journal = tmp_path / "results.jsonl"
    lines = [json.dumps(WHOLE | change), "[" * 100_000, '{"image": "b.png"}', json.dumps(WHOLE)]
    journal.write_text("".join(line + "\n" for line in lines))
    assert [record["image"] for record, _ in _whole_lines(journal)] == ["a.png"]
    assert "3 lines are damaged" in caplog.text


@pytest.mark.parametrize("name", ["bad\udcff.png", "new\nline.png", "bell\a.png"])
def test_names_that_xml_cannot_hold_are_refused_before_the_work(tmp_path, name):
    with pytest.raises(InputError, match="XML cannot hold"):
        ResultsDirectory(tmp_path, ["voc"], {}).check_inputs([ImageInput(Path(name), name)])


@pytest.mark.parametrize(("written", "expected"), [(3, b"first\n"), (7, b"first\nsecond\n")])
def test_an_interrupted_text_is_there_as_a_whole_or_not_at_all(tmp_path, written, expected):
    """Another process may have read a whole one already."""

    class Interrupted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[:written])
            raise KeyboardInterrupt

    log = _Log(tmp_path / "log", "ab")
    log.append("first\n")
    log.file = Interrupted(log.file)
    with pytest.raises(KeyboardInterrupt):
        log.append("second\n")
    assert (tmp_path / "log").read_bytes() == expected
