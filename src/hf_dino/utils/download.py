"""Download large files: resumed after a cut, verified before they appear, and once for all processes."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError  # of httpx, in whichever version huggingface_hub uses
from tqdm import tqdm

from .errors import InputError
from .io import fsync, sha256


logger = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row without a byte received, until a download is given up
RETRY_DELAY = 1.0  # seconds, times the number of failed attempts
TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses of HTTP after which it may help to ask again

Transfer = Callable[[str, Path], int | None]


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    digest: str | None = None,
    check: Callable[[Path], None] = lambda path: None,
    transfer: Transfer | None = None,
) -> Path:
    """Download a file unless it is there. It appears at `path` complete and verified, or not at all.

    What an interrupted download received is kept next to `path`, and the next one resumes it. A file whose hash is not
    known is downloaded from its beginning instead, because it may have changed in the meantime.

    Args:
        url (`str`): Address, http or https.
        path (`Path`): File to write. Other processes that download it wait for this one.
        size (`int`, *optional*): Size in bytes, if known.
        digest (`str`, *optional*): SHA-256 in hexadecimal, or its beginning. If not known, only the length is
            verified, with a warning.
        check (`Callable`, *optional*): Called with the path of the downloaded file; raises an `InputError` if the
            content cannot be that of the file.
        transfer (`Callable`, *optional*): Appends what a file lacks, and returns the length that the server stated. By
            default over HTTP.

    Returns:
        `Path`: `path`.

    Raises:
        InputError: If the file cannot be downloaded or written, or is not the expected one.
    """
    try:
        with _lock(path):
            if not path.exists():
                _download(url, path, size, digest, check, transfer or transfer_over_http)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space, or set HF_DINO_CACHE to another "
            f"directory"
        ) from error
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(path))  # which the system releases after kill -9
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that downloads %s", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(path: Path) -> Path:
    """Return the file whose lock a process holds while it downloads `path`."""
    return path.with_name(f".{path.name}.lock")


def partial_path(path: Path) -> Path:
    """Return the file in which a download to `path` is collected."""
    return path.with_name(f".{path.name}.part")


def _download(
    url: str, path: Path, size: int | None, digest: str | None, check: Callable[[Path], None], transfer: Transfer
) -> None:
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{display_url(url)}: cannot be downloaded, because HF_HUB_OFFLINE is set; unset it")
    logger.info("downloading %s to %s", display_url(url), path.parent)
    partial = partial_path(path)
    if not digest:
        partial.unlink(missing_ok=True)
    while True:
        resumed = partial.exists() and partial.stat().st_size > 0
        length = transfer(url, partial)
        try:
            check(partial)
            _verify(url, partial, length if size is None else size, digest)
            break
        except InputError:
            partial.unlink()
            if not resumed:  # otherwise its beginning may be at fault
                raise
    if not digest:
        verified = "neither is its length: it was not verified" if length is None else "only its length was verified"
        logger.warning("%s: its SHA-256 is not known; %s", path.name, verified)
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


def _verify(url: str, partial: Path, size: int | None, digest: str | None) -> None:
    got_size = partial.stat().st_size
    if size is not None and got_size != size:
        raise InputError(f"{display_url(url)}: sent {got_size:,} bytes instead of {size:,}; nothing was kept")
    if digest and not (got := sha256(partial)).startswith(digest):
        raise InputError(
            f"{display_url(url)}: sent a file with SHA-256 {got}, expected {digest}; it was deleted. Try again, or "
            f"download it by other means and pass its path"
        )


def display_url(url: str) -> str:
    """Return a URL without user name, password and query, which may be secret.

    Example:

    ```python
    >>> display_url("https://me:secret@example.org/model.pth?token=secret")
    'https://example.org/model.pth'

    ```
    """
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def url_file_name(url: str) -> str:
    """Return the name of the file that a URL ends with.

    Raises:
        InputError: If it is not an http or https URL of a file.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")  # raises an error if a part of it is empty or too long
        supported = parts.scheme in ("http", "https") and host and host.isascii() and parts.port != 0
    except ValueError:
        supported = False
    name = Path(unquote(parts.path)).name if supported else ""
    if name in ("", "..") or not (url + name).isprintable():
        raise InputError(f"{url}: is not the http or https URL of a file")
    return name


def transfer_over_http(url: str, partial: Path) -> int | None:
    """Append what a file lacks; after a cut, resume where it ended.

    huggingface_hub's HTTP client is a dependency already, unlike pooch or requests. It follows redirects, respects
    proxies and HF_HUB_DOWNLOAD_TIMEOUT, and lets a download be resumed, unlike `torch.hub`.

    Args:
        url (`str`): Address, http or https.
        partial (`Path`): Beginning of the file. It is made if it does not exist.

    Returns:
        `int` or `None`: Length of the file in bytes, if the server states it.

    Raises:
        InputError: If the server cannot be reached, refuses the file, or fails several times in a row.
    """
    failures, same_file = 0, dict[str, str]()
    with partial.open("ab") as file:
        while True:
            start = file.tell()
            try:
                return _append_rest(url, file, same_file)
            except (HTTPError, _TransientError) as error:
                failures = 1 if file.tell() > start else failures + 1
                reason = str(error) or type(error).__name__
            if failures == ATTEMPTS:
                raise InputError(
                    f"{display_url(url)}: cannot be downloaded ({reason}); check the network and repeat the command"
                )
            logger.info("resuming the download after %s bytes (%s)", f"{file.tell():,}", reason)
            time.sleep(failures * RETRY_DELAY)


class _TransientError(Exception):
    """Raised for an answer of a server that may be better next time."""


def _append_rest(url: str, file: BinaryIO, same_file: dict[str, str]) -> int | None:
    """Ask for a file from the end of `file` on, and append what is sent.

    Args:
        same_file (`dict[str, str]`): Header after which a server sends all of a file that has changed. It is filled.

    Returns:
        `int` or `None`: Length of the whole file in bytes, if the server states it.
    """
    start = file.tell()
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-", **same_file} if start else {})}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.headers.get("Content-Range") == f"bytes */{start}":  # an earlier process had received it all
            return start
        _check_response(url, response)
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _restart(file, response)
        if response.headers.get("ETag", "").startswith('"'):  # not a weak one
            same_file["If-Range"] = response.headers["ETag"]
        stated = response.headers.get("Content-Length")
        length = file.tell() + int(stated) if stated else None
        _append_body(response, file, length)
    return length


def _check_response(url: str, response: Any) -> None:
    status = f"the server answered {response.status_code} {response.reason_phrase}"
    if response.status_code in TRANSIENT:
        raise _TransientError(status)
    if response.status_code not in (200, 206, 416):
        raise InputError(f"{display_url(url)}: {status}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise InputError(f"{display_url(url)}: the server sent a web page instead of a file; open it in a browser")


def _restart(file: BinaryIO, response: Any) -> None:
    """Empty the file: the server has another one by now, or does not resume."""
    file.seek(0)
    file.truncate()
    if response.status_code != 200:
        raise _TransientError("the server sent another part of the file than was asked for")


def _append_body(response: Any, file: BinaryIO, length: int | None) -> None:
    name = Path(urlsplit(str(response.url)).path).name
    with tqdm(desc=name, total=length, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
        for block in response.iter_raw():
            file.write(block)
            bar.update(len(block))


def delete_downloads(files: Iterable[Path]) -> None:
    """Delete downloaded and partial files.

    Raises:
        InputError: If a process is downloading one of them; nothing is deleted then.
    """
    paths = list(files)
    locks = {lock for path in paths for lock in path.parent.glob(".*.lock")}
    with ExitStack() as held:
        for lock in sorted(locks):
            try:
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                raise InputError(f"{lock.parent}: another process is downloading a file; wait, or end it") from None
        for path in paths:
            path.unlink()
