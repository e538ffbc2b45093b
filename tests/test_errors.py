"""What a user can repair ends a command as one line; what we have to repair keeps its traceback."""

import weakref

import pytest

from hf_dino.utils.errors import InputError, run_cli


@pytest.mark.parametrize("status", [None, 0, 1])
def test_a_command_ends_with_the_status_of_its_main(status):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: status)
    assert end.value.code == status


@pytest.mark.parametrize("kind", [InputError, ImportError, OSError, FloatingPointError])
def test_what_a_user_can_repair_is_one_line(kind):
    def main():
        raise kind("no such thing")

    with pytest.raises(SystemExit, match=r"^error: no such thing$"):
        run_cli(main)


def test_what_was_at_work_is_let_go_at_once():
    """Processes that read images ahead would end seconds later, each."""
    held = []

    def main():
        reader = set()
        held.append(weakref.ref(reader))
        raise InputError("a broken image")

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert held[0]() is None, end


def test_other_errors_are_ours():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)
