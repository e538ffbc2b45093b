"""Files are flushed to the disk whatever their permissions are."""

import os
import sys

import pytest

from hf_dino.utils.io import fsync_tree


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes only what is open for writing")
def test_flushing_needs_no_permission_to_write(tmp_path, monkeypatch):
    import fcntl

    (tmp_path / "read_only").write_text("content")
    (tmp_path / "read_only").chmod(0o444)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    fsync_tree(tmp_path)
    assert modes == [os.O_RDONLY] * 2  # the file and its directory
