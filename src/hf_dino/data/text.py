"""Text files that users give."""

from pathlib import Path

from .errors import InputError


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without the byte order mark that Windows likes to write.

    Raises:
        InputError: If there is no such file, or it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not in UTF-8 ({error.reason} at byte {error.start}); save it again with the encoding UTF-8, "
            "which every editor offers"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
