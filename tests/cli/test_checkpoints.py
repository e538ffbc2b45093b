"""`hf-dino checkpoints`: it lists what can be converted and what is downloaded, and deletes only the latter."""

import io
import logging
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.command_line import hf_dino
from hf_dino.cli.checkpoints import format_size, print_columns
from hf_dino.cli.options import log_to_terminal
from hf_dino.conversion.known import KNOWN_CHECKPOINTS
from hf_dino.utils.download import lock_path, partial_path
from hf_dino.utils.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DINO_CACHE", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def downloads(cache) -> list[Path]:
    """A complete and a partial file of known checkpoints, and one from a URL."""
    known = KNOWN_CHECKPOINTS["official/dino-4scale-r50-12ep"].cached_path
    partial = partial_path(KNOWN_CHECKPOINTS["detrex/dino_r50_4scale_24ep"].cached_path)
    paths = [known, partial, cache / "urls" / "0" / "x.pth"]
    for size, path in enumerate(paths, start=1):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1000 * size))
    return paths


def test_all_are_listed_with_source_and_license(capsys):
    assert hf_dino(["checkpoints"]) == 0
    report = capsys.readouterr().out
    for known in KNOWN_CHECKPOINTS.values():
        row = rf"^  {re.escape(known.name)} +{known.backbone_name} .* {100 * known.box_ap:.1f} .* no$"
        assert re.search(row, report, flags=re.MULTILINE)
        assert known.ap_source in report
    assert report.count("license Apache-2.0") == 3
    for source in ("https://drive.google.com/drive/folders/", "github.com", "download.openmmlab.com"):
        assert f"{source}" in report
    assert report.count(" unknown ") == sum(known.size is None for known in KNOWN_CHECKPOINTS.values())


def test_list_tells_what_is_downloaded(downloads, capsys):
    hf_dino(["checkpoints"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" yes")]
    assert len(rows) == 1
    assert "official/dino-4scale-r50-12ep " in rows[0]
    assert " 1.0 kB " in rows[0]


def test_downloads_are_listed_with_their_sizes(downloads, cache, capsys):
    assert hf_dino(["checkpoints", "--cached"]) == 0
    report = capsys.readouterr().out
    for path, size in zip(downloads, ("1.0 kB", "2.0 kB", "3.0 kB")):
        assert re.search(rf"^  {path.relative_to(cache)} +{size}$", report, flags=re.MULTILINE)
    assert re.search(r"^  total +6.0 kB$", report, flags=re.MULTILINE)
    assert f"in {cache}" in report


def test_no_downloads(cache, capsys):
    for options in (["--cached"], ["--clear"]):
        assert hf_dino(["checkpoints", *options]) == 0
        assert "total  0 B" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "deleted"), [("y\n", True), ("n\n", False), ("", False)])
def test_files_are_deleted_after_a_question(downloads, answer, deleted, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert hf_dino(["checkpoints", "--clear"]) == (0 if deleted else 1)
    assert [path.exists() for path in downloads] == 3 * [not deleted]
    report = capsys.readouterr().out
    assert "Delete these 3 files?" in report
    assert all(path.name in report for path in downloads)
    assert ("deleted 3 files, 6.0 kB" in report) == deleted


def test_files_of_others_are_kept(downloads, cache):
    """HF_DINO_CACHE may be a directory with more than downloads."""
    mine = cache / "mine.pth"
    mine.touch()
    assert hf_dino(["checkpoints", "--clear", "--yes"]) == 0
    assert mine.exists()
    assert not any(path.exists() for path in downloads)


def test_files_of_a_running_download_are_kept(downloads):
    with FileLock(lock_path(downloads[0])), pytest.raises(InputError, match="another process is downloading"):
        hf_dino(["checkpoints", "--clear", "--yes"])
    assert all(path.exists() for path in downloads)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1000, "1.0 kB"), (999_999, "1000.0 kB"), (10**15, "1000.0 TB"), (10**16, "10000.0 TB")],
)
def test_sizes_have_a_unit(size, text):
    assert format_size(size) == text


def test_columns_are_aligned(capsys):
    print_columns([("a", "bcd"), ("efgh", "i")])
    assert capsys.readouterr().out == "  a     bcd\n  efgh  i\n"


def test_only_warnings_of_other_packages_are_printed(monkeypatch, capsys, request):
    """The HTTP client informs of each URL, in which there may be a token."""
    monkeypatch.setattr(logging.root, "handlers", [])
    request.addfinalizer(partial(logging.root.setLevel, logging.root.level))
    log_to_terminal(logging.INFO)
    for name in ("httpx", "httpx2", "hf_dino.utils.download"):
        logging.getLogger(name).info("information of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if "information" in line] == ["INFO information of hf_dino.utils.download"]
    assert len(printed) == 4
