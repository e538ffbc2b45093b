"""The error for input that a user can repair, words for it, and the end that it makes of a command."""

import importlib
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NoReturn


class InputError(ValueError):
    """A file or a value given by the user cannot be used; the message says what was got and what to do.

    Command line programs print it as one line, while any other exception keeps its traceback.
    """

    def __str__(self) -> str:
        """The message alone: a process that reads images sends it with the traceback in front."""
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[-1].strip()


def summarize_list(items: Iterable[str], limit: int = 5) -> str:
    """Name the first few and say how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the exit status that `main` returns; a user's mistake ends it with one line.

    So does what is no mistake of ours either: a library that is not installed, a full disk, a loss that is not finite.
    """
    try:
        status = main()
    except (InputError, ImportError, OSError, FloatingPointError) as error:
        traceback.clear_frames(error.__traceback__)  # what reads images ahead for them ends now, not at its own pace
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(status)


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, an optional dependency that `pip install 'hf-dino[extra]'` installs.

    Raises:
        ImportError: If it is not installed. The message states what it is needed for and how to install it.
    """
    try:
        with warnings.catch_warnings():
            # supervision warns on import that OpenCV is missing, and uses numpy instead
            warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.split('.')[0]}: pip install 'hf-dino[{extra}]'") from error
