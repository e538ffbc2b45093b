"""Downloads: whatever the server, the network or the disk does, a file is complete and verified, or absent."""

import errno
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants

from helpers.http_server import serving
from hf_dino.utils import download as downloads
from hf_dino.utils.download import display_url, download, lock_path, partial_path, url_file_name
from hf_dino.utils.errors import InputError


CONTENT = random.Random(0).randbytes(300_000)
FORK = multiprocessing.get_context("fork")
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(downloads, "RETRY_DELAY", 0)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "model.pth"


def left_over(path: Path) -> set[Path]:
    """All files but the lock, which shows nothing."""
    return set(path.parent.iterdir()) - {lock_path(path)}


def test_file_is_downloaded_once(path):
    with serving(CONTENT) as server:
        for _ in range(2):
            assert download(server.url, path, size=len(CONTENT), digest=DIGEST) == path
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert left_over(path) == {path}


def test_100_downloads_that_are_cut_anywhere_end_verified(tmp_path):
    """With and without a known hash, from servers that resume, do not, or have another file after the first cut."""
    chance = random.Random(1)
    for number in range(100):
        content = chance.randbytes(chance.randint(1, 60_000))
        digest = hashlib.sha256(content).hexdigest()
        cuts = [chance.randint(0, len(content) // 3) for _ in range(chance.randint(1, 4))]
        plan = [{"cut": cut, "resume": chance.random() < 0.7} for cut in cuts]
        path = tmp_path / f"{number}.pth"
        with serving(content, plan) as server:
            download(server.url, path, digest=chance.choice([digest, digest[:8], None]))
        assert path.read_bytes() == content, plan
        assert left_over(path) & {partial_path(path)} == set()
        assert len(server.ranges) == len(plan) + 1


def test_cut_download_is_resumed_where_it_ended(path):
    with serving(CONTENT, [{"cut": 100_001}, {"cut": 7}]) as server:
        download(server.url, path, digest=DIGEST)
    assert server.ranges == [None, "bytes=100001-", "bytes=100008-"]


def test_another_run_resumes_a_file_of_known_hash(path):
    with serving(CONTENT, [{"cut": 100_000}, *[{"cut": 0}] * downloads.ATTEMPTS]) as server:
        with pytest.raises(InputError, match=r"cannot be downloaded .*repeat the command"):
            download(server.url, path, digest=DIGEST)
        assert left_over(path) == {partial_path(path)}
        server.plan.clear()
        download(server.url, path, digest=DIGEST)
    assert server.ranges[-1] == "bytes=100000-"
    assert path.read_bytes() == CONTENT


def test_length_that_is_stated_wrongly_does_not_matter_if_the_hash_is_right(path):
    with serving(CONTENT, [{"length": 400_000}]) as server:
        download(server.url, path, digest=DIGEST)
    assert path.read_bytes() == CONTENT


def test_another_run_starts_again_without_a_hash(path):
    path.parent.mkdir()
    partial_path(path).write_bytes(b"of another version")
    with serving(CONTENT) as server:
        download(server.url, path)
    assert server.ranges == [None]
    assert path.read_bytes() == CONTENT


def test_process_that_is_killed_leaves_no_file_and_is_resumed(path):
    with serving(CONTENT, [{"cut": 100_000}, {"delay": 30}]) as server:
        process = FORK.Process(target=download, args=(server.url, path), kwargs={"digest": DIGEST})
        process.start()
        while len(server.ranges) < 2:
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not path.exists()
        server.plan.clear()
        download(server.url, path, digest=DIGEST)
    assert path.read_bytes() == CONTENT


def test_all_was_received_but_not_verified_when_a_run_ended(path):
    path.parent.mkdir()
    partial_path(path).write_bytes(CONTENT)
    with serving(CONTENT) as server:
        download(server.url, path, digest=DIGEST)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("length", [10, 400_000], ids=["damaged", "too long"])
def test_useless_beginning_is_replaced(path, length):
    path.parent.mkdir()
    partial_path(path).write_bytes(bytes(length))
    with serving(CONTENT) as server:
        download(server.url, path, digest=DIGEST)
    assert path.read_bytes() == CONTENT


def test_file_that_changes_while_it_is_downloaded_is_not_mixed(path):
    with serving(CONTENT, [{"cut": 100_000, "ETag": '"0"'}]) as server:
        download(server.url, path)
    assert server.ranges == [None, "bytes=100000-"]
    assert path.read_bytes() == CONTENT


def test_server_that_sends_another_part_is_asked_again(path):
    with serving(CONTENT, [{"cut": 100_000}, {"shift": 7}]) as server:
        download(server.url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again(path, status):
    with serving(CONTENT, [{"status": status}, {"cut": 10}, {"status": status}]) as server:
        download(server.url, path, digest=DIGEST)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 404}, "answered 404 Not Found"),
        ({"status": 403}, "answered 403 Forbidden"),
        ({"status": 401}, "answered 401 Unauthorized"),
        ({"body": b"<!DOCTYPE html>", "Content_Type": "text/html; charset=utf-8"}, "a web page instead of a file"),
        ({"body": CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])}, f"expected {DIGEST}; it was deleted"),
        ({"body": CONTENT[:1000]}, "sent 1,000 bytes instead of 300,000"),
        ({"length": 1000}, "sent 1,000 bytes instead of 300,000"),
    ],
    ids=["404", "403", "401", "web page", "wrong hash", "short file", "short length"],
)
def test_wrong_answer_is_an_error_and_leaves_nothing_that_looks_complete(path, answer, message):
    with serving(CONTENT, [answer] * 9) as server, pytest.raises(InputError) as error:
        download(server.url, path, size=len(CONTENT), digest=DIGEST)
    assert message in str(error.value)
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)
    assert not path.exists()
    assert len(server.ranges) == 1


@pytest.mark.parametrize(
    "answer",
    [{"delay": 0.6}, {"length": 400_000, "resume": False}, {"cut": 0}, {"status": 503}],
    ids=["too slow", "states too many bytes", "sends nothing", "overloaded"],
)
def test_server_that_never_sends_the_file_is_given_up(path, answer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    with serving(CONTENT, [answer] * 20) as server, pytest.raises(InputError, match="cannot be downloaded"):
        download(server.url, path, digest=DIGEST)
    assert not path.exists()
    assert downloads.ATTEMPTS <= len(server.ranges) <= downloads.ATTEMPTS + 1


def test_unreachable_server_is_an_error(path):
    with serving(CONTENT) as server:
        pass
    with pytest.raises(InputError, match=r"127\.0\.0\.1.*cannot be downloaded"):
        download(server.url, path)


@pytest.mark.parametrize(
    ("answer", "warning"),
    [({}, "only its length was verified"), ({"length": "none"}, "it was not verified")],
    ids=["length", "nothing"],
)
def test_what_was_not_verified_is_said(path, answer, warning, caplog):
    with serving(CONTENT, [answer]) as server:
        download(server.url, path)
    assert f"model.pth: its SHA-256 is not known; {warning}" in caplog.text.replace("neither is its length: ", "")
    assert path.read_bytes() == CONTENT


def test_content_is_checked_before_the_file_appears(path):
    def check(partial: Path) -> None:
        raise InputError(f"{partial.stat().st_size} bytes of nonsense")

    with serving(CONTENT) as server, pytest.raises(InputError, match="300000 bytes of nonsense"):
        download(server.url, path, check=check)
    assert left_over(path) == set()


def test_offline_is_an_error_that_names_the_variable(path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with serving(CONTENT) as server, pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        download(server.url, path)
    assert server.ranges == []
    path.write_bytes(CONTENT)
    assert download(server.url, path) == path


def test_secrets_in_a_url_are_not_shown(path):
    with serving(CONTENT, [{"status": 403}]) as server, pytest.raises(InputError) as error:
        download(server.url.replace("//", "//me:password@") + "?token=secret", path)
    assert "password" not in str(error.value)
    assert "secret" not in str(error.value)
    assert display_url("https://u:p@host:1/a/b.pth?c#d") == "https://host:1/a/b.pth"


ADDRESSES = ["ftp://host/model.pth", "file:///model.pth", "https:///model.pth", "https://host", "https://host/"]
ADDRESSES += ["http://[a/b", "http://host:abc/b", "http://host:99999/b", "http://a..b/c", f"http://{'a' * 99}/b"]
ADDRESSES += ["http://host/a\nb", "http://host/%00", "http://host/%2e%2e", "http://\u2603.example/a", "://"]


@pytest.mark.parametrize("url", ADDRESSES)
def test_address_that_is_not_of_a_file_is_an_error(url):
    with pytest.raises(InputError, match="is not the http or https URL of a file"):
        url_file_name(url)


def _limited_download(url: str, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        download(url, path, digest=DIGEST)
    except InputError as error:
        sys.exit(0 if "free disk space" in str(error) and "HF_DINO_CACHE" in str(error) else str(error))


def test_full_disk_is_an_error_and_the_download_is_resumed_later(path):
    with serving(CONTENT) as server:
        process = FORK.Process(target=_limited_download, args=(server.url, path))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert not path.exists()
        assert 0 < partial_path(path).stat().st_size <= 100_000
        download(server.url, path, digest=DIGEST)
    assert server.ranges[0] is None
    assert server.ranges[1].startswith("bytes=")
    assert path.read_bytes() == CONTENT


def test_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with serving(CONTENT) as server, pytest.raises(InputError, match="HF_DINO_CACHE") as error:
        download(server.url, tmp_path / "file" / "model.pth")
    assert os.strerror(errno.EEXIST) in str(error.value) or os.strerror(errno.ENOTDIR) in str(error.value)


def test_processes_download_one_at_a_time(path):
    """The second finds what the first has downloaded."""
    path.parent.mkdir()
    with serving(CONTENT, [{"delay": 0.2}]) as server:
        processes = [FORK.Process(target=download, args=(server.url, path)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.ranges == [None]
    assert path.read_bytes() == CONTENT


def _hold(lock: Path, held: Any, release: Any) -> None:
    with FileLock(lock):
        held.set()
        release.wait()


def test_waiting_for_another_process_is_said(path, monkeypatch):
    path.parent.mkdir()
    held, release = FORK.Event(), FORK.Event()
    FORK.Process(target=_hold, args=(lock_path(path), held, release)).start()
    held.wait()
    warnings = []
    monkeypatch.setattr(downloads.logger, "warning", lambda *parts: (warnings.append(parts), release.set()))
    with serving(CONTENT) as server:
        download(server.url, path, digest=DIGEST)
    assert warnings == [("waiting for another process that downloads %s", "model.pth")]
