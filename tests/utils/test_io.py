"""Files are flushed to the disk whatever their permissions are, and the cache is where the environment says."""

import os
import sys
from pathlib import Path

import pytest

from hf_dino.utils.io import atomic_write, cache_folder, fsync_tree


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes only what is open for writing")
def test_flushing_needs_no_permission_to_write(tmp_path, monkeypatch):
    import fcntl

    (tmp_path / "read_only").write_text("content")
    (tmp_path / "read_only").chmod(0o444)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    fsync_tree(tmp_path)
    assert modes == [os.O_RDONLY] * 2  # the file and its directory


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_DINO_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine/kernels"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/hf_dino/kernels"),
        ({"HOME": "/home/me", "HF_DINO_CACHE": ""}, "/home/me/.cache/hf_dino/kernels"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another home")
def test_cache_is_moved_by_the_environment(environment, folder, monkeypatch):
    for name in ("HF_DINO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("kernels") == Path(folder)


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "é" * 125 + ".json"])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        assert temporary.suffix == (tmp_path / name).suffix
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
