"""User errors end a command with one line; bugs keep their traceback."""

import weakref

import pytest

from hf_dino.utils.errors import InputError, run_cli


@pytest.mark.parametrize("status", [None, 0, 1])
def test_a_command_exits_with_the_status_of_main(status):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: status)
    assert end.value.code == status


@pytest.mark.parametrize("kind", [InputError, ImportError, OSError, FloatingPointError])
def test_user_errors_are_one_line(kind):
    def main():
        raise kind("file not found")

    with pytest.raises(SystemExit, match=r"^error: file not found$"):
        run_cli(main)


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
