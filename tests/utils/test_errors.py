"""User errors end a command with one line; bugs keep their traceback."""

import ctypes
import errno
import importlib.util
import os
import platform
import subprocess
import sys
import traceback
import weakref

import pytest

from hf_dino.utils.errors import BrokenInputError, InputError, count_of, keep_freed_memory, run_cli


@pytest.mark.parametrize("status", [None, 0, 1])
def test_a_command_exits_with_the_status_of_main(status):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: status)
    assert end.value.code == status


WRONG_USE = [
    InputError("x"),
    ImportError("x"),
    FileNotFoundError(errno.ENOENT, "x"),
    PermissionError(errno.EACCES, "x"),
]
FOUND = [BrokenInputError("x"), OSError("x"), OSError(errno.ENOSPC, "x"), FloatingPointError("x")]


@pytest.mark.parametrize("error", [*WRONG_USE, *FOUND], ids=repr)
def test_user_errors_are_one_line_with_their_status(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert end.value.code == (2 if error in WRONG_USE else 1)
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize("kind", [InputError, BrokenInputError])
def test_an_error_of_a_worker_is_told_without_its_traceback(kind):
    """A DataLoader puts the traceback, which ends with the name of the class and the message, into the message."""
    try:
        raise kind("a broken image")
    except kind:
        assert str(kind(traceback.format_exc())) == "a broken image"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1234, "1,234 images")]
)
def test_a_number_goes_with_its_noun(number, text):
    assert count_of(number, "image") == text


def test_objects_in_the_traceback_are_freed():
    """DataLoader workers would delay the exit by seconds."""
    held = []

    def main():
        loader = set()
        held.append(weakref.ref(loader))
        raise InputError("a broken image")

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert held[0]() is None, end


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)


COUNT_PAGE_FAULTS = """
import importlib.util, resource, sys
import numpy as np

spec = importlib.util.spec_from_file_location("errors", sys.argv[1])
errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(errors)

def page_faults():
    np.ones(5_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(5_000_000)  # 40 MB: glibc itself keeps up to 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = page_faults()
errors.keep_freed_memory()
print(first, page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(
    ("settings", "is_kept"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False),
    ],
)
def test_freed_memory_is_used_again_unless_the_user_has_settings(settings, is_kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    path = importlib.util.find_spec("hf_dino.utils.errors").origin
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, path]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100  # there may be huge pages
    assert after < before / 10 if is_kept else after > 100


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.delattr(ctypes, "CDLL")
    keep_freed_memory()
