"""User errors: the exception, helpers for its message, and how a command runs and reports it."""

import ctypes
import errno
import importlib
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NoReturn


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


class InputError(ValueError):
    """Raised for a file or value given by the user that cannot be used. The message says what was got and what to do.

    Commands print it as one line; any other unexpected exception keeps its traceback.
    """

    def __str__(self) -> str:
        """Return the message alone: an error raised in a DataLoader worker arrives with its traceback in front."""
        return super().__str__().rpartition(f"{type(self).__module__}.{type(self).__name__}: ")[-1].strip()


class BrokenInputError(InputError):
    """Raised where a command did its work and the data or the file is not as it should be, such as a broken image."""


_WRONG_PATH = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
)  # fmt: skip
"""Errors of the system that another path or other permissions mend, unlike those of a full or failing disk."""


def exit_status(error: Exception) -> int:
    """Return the status with which an error ends a command: 2 for wrong use, 1 for everything found during the work.

    Example:

    ```python
    >>> exit_status(InputError()), exit_status(ImportError()), exit_status(FileNotFoundError(errno.ENOENT, "gone"))
    (2, 2, 2)
    >>> exit_status(BrokenInputError()), exit_status(OSError(errno.ENOSPC, "full")), exit_status(FloatingPointError())
    (1, 1, 1)

    ```
    """
    wrong_use = isinstance(error, InputError | ImportError) and not isinstance(error, BrokenInputError)
    return 2 if wrong_use or getattr(error, "errno", None) in _WRONG_PATH else 1


def summarize_list(items: Iterable[object], limit: int = 5) -> str:
    """Join the first items by commas and add how many more there are.

    Example:

    ```python
    >>> summarize_list("abcdef", limit=3)
    'a, b, c and 3 more'

    ```
    """
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Join a number and a noun in singular or plural.

    Example:

    ```python
    >>> count_of(1, "image"), count_of(2, "image"), count_of(3, "box", "boxes")
    ('1 image', '2 images', '3 boxes')
    >>> count_of(1200, "near-duplicate")
    '1,200 near-duplicates'

    ```
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with the status that `main` returns; report errors that are not bugs as one line.

    These are user errors, missing packages, I/O errors and non-finite losses; [`exit_status`] tells their status.
    Memory is kept for later tensors: see [`keep_freed_memory`].
    """
    keep_freed_memory()
    try:
        status = main()
    except (InputError, ImportError, OSError, FloatingPointError) as error:
        traceback.clear_frames(error.__traceback__)  # frees DataLoaders, whose workers would delay the exit
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(exit_status(error)) from None
    raise SystemExit(status)


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for later ones.

    By default, glibc returns large tensors to the system, which clears every page of the next ones: a tenth of a
    training step on a CPU. Nothing changes with another C library, or where the environment already says which memory
    is kept: `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_`, `MALLOC_MMAP_THRESHOLD_` or the same in `GLIBC_TUNABLES`.
    """
    settings = {name for name in os.environ if name.startswith(("MALLOC_MMAP_", "MALLOC_TRIM_"))}
    if platform.libc_ver()[0] == "glibc" and not (settings or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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


def import_if_available(module: str) -> ModuleType | None:
    """Import a module of the standard library that some systems lack; return `None` there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
