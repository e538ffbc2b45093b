"""Known checkpoints: the list is consistent, names are found, and what is downloaded is what was published."""

import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.command_line import hf_dino
from helpers.http_server import serving
from hf_dino import conversion
from hf_dino.conversion import key_tables, known
from hf_dino.conversion.known import (
    KNOWN_CHECKPOINTS,
    OTHER_CHECKPOINTS,
    checkpoint_table,
    fetch_checkpoint,
    find_known,
)
from hf_dino.conversion.settings import BACKBONES
from hf_dino.utils.errors import InputError


ROOT = Path(__file__).parents[2]
ALL = [*KNOWN_CHECKPOINTS.values(), *OTHER_CHECKPOINTS.values()]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


@pytest.fixture
def content() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {}}, file)
    return file.getvalue()


@pytest.fixture
def publish(monkeypatch):
    """Replace a known checkpoint by one with other fields."""

    def publish(name: str, **fields: object) -> known.KnownCheckpoint:
        changed = replace(KNOWN_CHECKPOINTS[name], **fields)
        monkeypatch.setitem(known._BY_NAME_OR_URL, name, changed)
        return changed

    return publish


# The list


def test_names_and_files_are_unique():
    assert len({each.name for each in ALL}) == len(ALL)
    assert len({(each.format, each.file_name) for each in ALL}) == len(ALL)
    assert len({each.sha256 for each in ALL if each.sha256}) == sum(bool(each.sha256) for each in ALL)


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_fields_fit_each_other(each):
    assert each.format == each.name.split("/")[0]
    assert each.format in ("official", "detrex", "mmdet")
    assert f"{each.num_feature_levels}scale" in each.name
    assert 0.4 < each.box_ap < 0.65
    assert each.epochs <= int(re.search(r"(\d+)(?:ep|e_)", each.name)[1])
    assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}", each.sha256 or "0" * 8)
    assert each.license == "Apache-2.0"
    assert re.search(r"commit [0-9a-f]{40}$", each.ap_source)


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_only_detrex_files_lack_the_settings_of_their_positional_encoding(each):
    encodings = {"official": [None], "mmdet": [None], "detrex": [(10000, -0.5), (20, 0)]}
    assert each.positional_encoding in encodings[each.format]


def test_formats_are_complete():
    """As the READMEs of the three list them; other backbones are refused by name."""
    counts = {
        format: sum(each.format == format for each in KNOWN_CHECKPOINTS.values())
        for format in ("official", "detrex", "mmdet")
    }
    assert counts == {"official": 10, "detrex": 20, "mmdet": 4}
    assert len(OTHER_CHECKPOINTS) == 12


def test_official_backbones_and_classes_are_those_of_the_conversion():
    for each in KNOWN_CHECKPOINTS.values():
        assert each.format != "official" or each.backbone in BACKBONES
        assert (each.num_classes == key_tables.COCO_NUM_LABELS) == (each.format == "official")


@pytest.mark.parametrize("each", [each for each in ALL if each.format == "official"], ids=lambda each: each.name)
def test_official_files_are_named_by_their_last_epoch(each):
    """Which counts from 0."""
    assert each.file_name.startswith(f"checkpoint{each.epochs - 1:04}_{each.num_feature_levels}scale")


@pytest.mark.parametrize("each", [each for each in ALL if each.format == "mmdet"], ids=lambda each: each.name)
def test_mmdet_files_are_named_by_their_hash(each):
    assert each.file_name.endswith(f"-{each.sha256}.pth")
    assert each.url.endswith(f"/{each.file_name}")


def test_every_row_names_its_sources():
    table = json.loads((ROOT / "src/hf_dino/conversion/known_checkpoints.json").read_text(encoding="utf-8"))
    for origin in table["origins"].values():
        assert origin["repository"].startswith("https://github.com/")
        assert re.search(r"commit [0-9a-f]{40}$", origin["source"])


def test_docs_list_the_known_checkpoints():
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    [table] = re.findall(r"<!-- checkpoints -->\n(.*?)\n<!-- /checkpoints -->", page, flags=re.DOTALL)
    assert table.strip() == checkpoint_table(), "paste what checkpoint_table() returns"


def test_readme_shows_known_checkpoints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `((?:official|detrex|mmdet)/[^`]+)` \| ([^|]+) \| ([\d.]+) \|$", readme, flags=re.MULTILINE
    )
    assert {name.split("/")[0] for name, _, _ in rows} == {"official", "detrex", "mmdet"}
    for name, backbone, ap in rows:
        assert KNOWN_CHECKPOINTS[name].backbone_name in backbone
        assert ap == f"{100 * KNOWN_CHECKPOINTS[name].box_ap:.1f}"


def test_the_table_is_complete():
    table = checkpoint_table()
    for each in KNOWN_CHECKPOINTS.values():
        assert f"| `{each.name}` |" in table
        assert f"| {100 * each.box_ap:.1f} |" in table
    assert "published by the authors, not measured here" in table


# Recognized by hash or name


def test_published_file_is_recognized_by_its_hash():
    official = KNOWN_CHECKPOINTS["official/dino-5scale-r50-12ep"]
    assert find_known("renamed.pth", official.sha256, {}, None) is official
    assert official.box_ap == 0.494


def test_published_file_is_recognized_by_the_first_digits_of_its_hash():
    of_mmdet = KNOWN_CHECKPOINTS["mmdet/dino-5scale_swin-l_8xb2-36e_coco"]
    assert find_known("renamed.pth", of_mmdet.sha256 + 56 * "0", {}, None) is of_mmdet


@pytest.mark.parametrize("name", ["checkpoint0011_4scale.pth", "dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth"])
def test_namesake_with_another_hash_is_not_credited(name, caplog):
    assert find_known(name, "0" * 64, {}, 12) is None
    assert "not its content" in caplog.text


SWIN_LARGE = {"backbone": "swin_L_384_22k", "num_feature_levels": 4, "num_classes": 91}


def test_published_file_without_known_hash_is_recognized_by_all_that_its_name_says():
    found = find_known("checkpoint0029_4scale_swin.pth", "0" * 64, SWIN_LARGE, 30)
    assert found.box_ap == 0.580


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [({"num_feature_levels": 5}, 30), ({"backbone": "resnet50"}, 30), ({"num_classes": 20}, 30), ({}, 29), ({}, None)],
)
def test_namesake_that_does_not_fit_is_not_credited(settings, epochs, caplog):
    name = "checkpoint0029_4scale_swin.pth"
    assert find_known(name, "0" * 64, SWIN_LARGE | settings, epochs) is None
    assert "91 classes, 30 epochs" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{}, {"format": "official"}, {"num_feature_levels": 5}, {"num_classes": 91}], ids=lambda wrong: str(wrong)
)
def test_files_without_hash_and_epochs_are_recognized_by_what_they_hold(wrong, caplog):
    settings = {"format": "detrex", "num_feature_levels": 4, "num_classes": 80}
    found = find_known("dino_r50_4scale_24ep.pth", "0" * 64, settings | wrong, None)
    assert (found is None) == bool(wrong) == bool(caplog.text)
    assert wrong or found.positional_encoding == (20, 0)


def test_other_names_are_not_recognized(caplog):
    assert find_known("model_final.pth", "0" * 64, {}, None) is None
    assert not caplog.text


# Downloaded


def test_file_on_this_machine_is_used_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("official").mkdir()
    Path("official/dino-4scale-r50-12ep").touch()
    assert fetch_checkpoint("official/dino-4scale-r50-12ep") == (Path("official/dino-4scale-r50-12ep"), None)


def test_known_checkpoint_is_downloaded_and_verified(publish, content, cache):
    with serving(content) as server:
        published = publish(
            "mmdet/dino-4scale_r50_8xb2-12e_coco", url=server.url, sha256=hashlib.sha256(content).hexdigest()[:8]
        )
        path, found = fetch_checkpoint(published.name)
    assert path == cache / "mmdet" / published.file_name
    assert path.read_bytes() == content
    assert found is published


def test_known_checkpoint_with_another_hash_is_not_used(publish, content):
    with serving(content) as server:
        published = publish("mmdet/dino-4scale_r50_8xb2-12e_coco", url=server.url)
        with pytest.raises(InputError, match="SHA-256"):
            fetch_checkpoint(published.name)
    assert not published.cached_path.exists()


def test_url_of_a_known_checkpoint_is_known(cache):
    of_detrex = KNOWN_CHECKPOINTS["detrex/dino_r50_4scale_24ep"]
    of_detrex.cached_path.parent.mkdir(parents=True)
    of_detrex.cached_path.touch()
    assert fetch_checkpoint(of_detrex.url) == (of_detrex.cached_path, of_detrex)


def test_other_urls_are_downloaded_once_each(content, cache):
    with serving(content) as server, serving(content) as other:
        paths = [fetch_checkpoint(url) for url in (server.url, server.url, other.url)]
    assert paths[0] == paths[1] != paths[2]
    assert paths[0][0].name == "model.pth"
    assert paths[0][1] is None
    assert len(server.ranges) == len(other.ranges) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"<html>", "begins with b'<html>'"), (b"", "begins with b''"), (b"PK\3\4 and no more", "it is truncated")],
)
def test_what_is_not_a_checkpoint_is_not_kept(body, message, cache):
    with serving(body) as server, pytest.raises(InputError, match=re.escape(message)):
        fetch_checkpoint(server.url)
    assert not list(cache.rglob("*.pth"))


def test_truncated_file_of_unknown_hash_and_length_is_not_kept(content, cache):
    answer = {"length": "none", "cut": len(content) // 2}
    with serving(content, [answer]) as server, pytest.raises(InputError, match="truncated"):
        fetch_checkpoint(server.url)
    assert not list(cache.rglob("*.pth"))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("dino-4scale-r50-12ep", "official/dino-4scale-r50-12ep"),
        ("official/dino-4scale-r50-12", "official/dino-4scale-r50-12ep"),
        ("checkpoint0029_4scale_swin.pth", "official/dino-4scale-swin-l-36ep"),
        ("Detrex/DINO_R50_4scale_24ep", "detrex/dino_r50_4scale_24ep"),
        ("dino-5scale_swin-l_8xb2-36e_coco.py", "mmdet/dino-5scale_swin-l_8xb2-36e_coco"),
    ],
)
def test_similar_name_is_suggested(name, suggested):
    with pytest.raises(InputError, match=f"did you mean {suggested}\\?"):
        fetch_checkpoint(name)


@pytest.mark.parametrize("name", ["runs/mine/checkpoint.pth", "model_final.pth", "nonsense"])
def test_other_names_are_not_corrected(name):
    with pytest.raises(InputError, match="is not a file nor the name of a known checkpoint; `hf-dino checkpoints`"):
        fetch_checkpoint(name)


def test_other_backbones_are_refused_by_name():
    with pytest.raises(InputError, match=r"backbone focalnet_L_384_22k, which cannot be converted; .*ConvNeXt-L"):
        fetch_checkpoint("detrex/dino_focalnet_large_lrf_384_4scale_36ep")


class Drive(SimpleNamespace):
    """The functions of gdown that are used, and the files of a folder."""

    class DownloadError(Exception):
        pass

    def __init__(self, files: dict[str, bytes | Exception]):
        super().__init__(files=files, exceptions=SimpleNamespace(DownloadError=Drive.DownloadError))

    def download_folder(self, *, url, skip_download, quiet):
        assert "drive.google.com/drive/folders/" in url
        return [SimpleNamespace(id=name, path=f"folder/{name}") for name in self.files] if skip_download else None

    def download(self, *, id, output, resume):
        if isinstance(self.files[id], Exception):
            raise self.files[id]
        Path(output).write_bytes(self.files[id])


@pytest.fixture
def drive(monkeypatch):
    def drive(files):
        monkeypatch.setitem(sys.modules, "gdown", Drive(files))

    return drive


def test_official_checkpoint_is_taken_from_its_folder(publish, content, drive):
    official = publish("official/dino-4scale-r50-12ep", sha256=hashlib.sha256(content).hexdigest())
    drive({"checkpoint0011_5scale.pth": b"another", official.file_name: content})
    path, found = fetch_checkpoint(official.name)
    assert path == official.cached_path
    assert path.read_bytes() == content
    assert found is official


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"checkpoint0011_4scale.pth": b"\x80 other"}, "SHA-256"),
        (
            {"checkpoint0011_4scale.pth": Drive.DownloadError("Too many users\nhave viewed")},
            "Too many users have viewed",
        ),
        ({"checkpoint0011_4scale.pth": OSError("no network")}, "no network"),
        ({"README.txt": b""}, "not in https://drive.google.com"),
        ({}, "not in https://drive.google.com"),
    ],
    ids=["wrong hash", "quota", "network", "renamed", "empty folder"],
)
def test_failure_of_google_drive_is_an_error(files, message, drive, cache):
    drive(files)
    with pytest.raises(InputError, match=message) as error:
        fetch_checkpoint("official/dino-4scale-r50-12ep")
    assert "pass its path" in str(error.value)
    assert not list(cache.rglob("*.pth"))


def test_without_gdown_the_folder_and_a_copy_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(InputError) as error:
        fetch_checkpoint("official/dino-4scale-r50-12ep")
    for part in ("checkpoint0011_4scale.pth", "https://drive.google.com/drive/folders/", "hf-dino[download]", "copy"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_command_converts_what_it_has_downloaded(publish, content, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(conversion, "convert_checkpoint", lambda *paths, **options: given.update(options, paths=paths))
    with serving(content) as server:
        published = publish("detrex/dino_r50_4scale_24ep", url=server.url)
        assert hf_dino(["convert", published.name, "--output_dir", tmp_path / "model"]) == 0
    assert given["paths"] == (published.cached_path, tmp_path / "model")
    assert given["known"] is published


def test_output_is_checked_before_the_download(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        hf_dino(["convert", "http://127.0.0.1:9/x.pth", "--output_dir", tmp_path])
