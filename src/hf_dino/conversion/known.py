"""Checkpoints that the authors of DINO, detrex and MMDetection published: list, recognize and download them.

`known_checkpoints.json` is the list, with the source of every figure. A figure that no source gives is missing there.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..utils.errors import InputError, import_extra
from ..utils.io import cache_folder


logger = logging.getLogger(__name__)

# Architectures that the model can express, by the beginning of `KnownCheckpoint.backbone`.
BACKBONE_NAMES = {
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    **{f"swin_{letter}": f"Swin-{letter}" for letter in "TSBL"},
    **{f"convnext_{letter}": f"ConvNeXt-{letter}" for letter in "TSBL"},
}


FORMATS = ("official", "detrex", "mmdet")


@dataclass(frozen=True)
class KnownCheckpoint:
    """A file that was published, and what is known of it.

    Args:
        name (`str`): Its format and the name of its model there, such as `mmdet/dino-4scale_r50_8xb2-12e_coco`.
        format (`str`): The code that wrote it: `"official"`, `"detrex"` or `"mmdet"`.
        url (`str`): Address of the file or, for `"official"`, of the Google Drive folder that it is in.
        file_name (`str`): Name of the file.
        backbone (`str`): Architecture, and the size and data of its pre-training; official names where there are any.
        num_feature_levels (`int`): Feature levels that the transformer reads.
        num_classes (`int`): Classes.
        epochs (`int`): Epochs of training when the file was saved.
        box_ap (`float`): Published AP on COCO val2017, as a fraction of 1.
        ap_source (`str`): Where it was published.
        license (`str`): SPDX identifier of the license.
        positional_encoding (`tuple[float, float]`, *optional*): Temperature and offset; `None` if the file has them.
        size (`int`, *optional*): Size in bytes.
        sha256 (`str`, *optional*): SHA-256 in hexadecimal, or its first 8 digits.
        hub_copy (`str`, *optional*): Repository on the Hub with a copy by a third party.
    """

    name: str
    format: str
    url: str
    file_name: str
    backbone: str
    num_feature_levels: int
    num_classes: int
    epochs: int
    box_ap: float
    ap_source: str
    license: str
    positional_encoding: tuple[float, float] | None = None
    size: int | None = None
    sha256: str | None = None
    hub_copy: str | None = None

    @property
    def backbone_name(self) -> str | None:
        """Return the display name of the backbone; `None` if the model cannot express it."""
        return next((name for start, name in BACKBONE_NAMES.items() if self.backbone.startswith(start)), None)

    @property
    def host(self) -> str:
        """Return where the file is: a Google Drive folder, or the host of a URL."""
        return self.url if self.format == "official" else str(urlsplit(self.url).hostname)

    @property
    def cached_path(self) -> Path:
        """Return where the file is kept once it is downloaded."""
        return cache_folder("checkpoints") / self.format / self.file_name


def _read_table() -> list[KnownCheckpoint]:
    table = json.loads(Path(__file__).with_name("known_checkpoints.json").read_text(encoding="utf-8"))
    return [_read_row(row, table["origins"]) for row in table["checkpoints"]]


def _read_row(row: dict[str, Any], origins: Mapping[str, Any]) -> KnownCheckpoint:
    format = row["name"].partition("/")[0]
    origin = origins[format]
    encoding = row.pop("positional_encoding", None)
    return KnownCheckpoint(
        **row,
        format=format,
        positional_encoding=tuple(encoding) if encoding else None,
        ap_source=f"{origin['repository']}, {origin['source']}",
        license=origin["license"],
        num_classes=origin["num_classes"],
    )


_TABLE = _read_table()
KNOWN_CHECKPOINTS = {known.name: known for known in _TABLE if known.backbone_name}
"""Checkpoints that can be converted, by name."""
OTHER_CHECKPOINTS = {known.name: known for known in _TABLE if not known.backbone_name}
"""Checkpoints whose backbone the model cannot express, by name."""


def find_known(name: str, digest: str, settings: Mapping[str, Any], epochs: int | None) -> KnownCheckpoint | None:
    """Find the published file with this hash or, if its hash is not known, with this name and content.

    Args:
        name (`str`): Name of the file.
        digest (`str`): Its SHA-256, in hexadecimal.
        settings (`dict`): What is known of its content, under the names `format`, `backbone`, `num_feature_levels` and
            `num_classes`. Those that are missing are not compared.
        epochs (`int`, *optional*): Number of epochs trained. Compared for official files, which contain it.

    Returns:
        `KnownCheckpoint` or `None`: `None`, with a warning, if only the name is that of a published file.
    """
    candidates = KNOWN_CHECKPOINTS.values()
    if same := [known for known in candidates if known.sha256 and digest.startswith(known.sha256)]:
        return same[0]
    namesake = next((known for known in candidates if known.file_name == name), None)
    if namesake is None:
        return None
    if namesake.sha256:
        got, expected = f"SHA-256 {digest}", f"SHA-256 {namesake.sha256}"
    else:
        got = _describe(settings, settings, epochs, namesake.format)
        expected = _describe(vars(namesake), settings, namesake.epochs, namesake.format)
    if got == expected:
        return namesake
    logger.warning(
        "%s has the name of a published file but not its content: %s instead of %s. "
        "The model card will not call it official, nor quote the published AP",
        name,
        got,
        expected,
    )
    return None


_DESCRIPTIONS = {
    "format": "{} format",
    "backbone": "backbone {}",
    "num_feature_levels": "{} feature levels",
    "num_classes": "{} classes",
}


def _describe(values: Mapping[str, Any], keys: Iterable[str], epochs: int | None, format: str) -> str:
    parts = [text.format(values[key]) for key, text in _DESCRIPTIONS.items() if key in keys]
    return ", ".join(parts + [f"{epochs} epochs"] * (format == "official"))


def fetch_checkpoint(source: str | Path) -> tuple[Path, KnownCheckpoint | None]:
    """Return a checkpoint file, downloaded if it is not on this machine.

    Args:
        source (`str` or `Path`): Path of a file, name of a known checkpoint, or URL of a file.

    Returns:
        `tuple[Path, KnownCheckpoint | None]`: The file, and what is known of it if it was found by its name or URL.
        A file given by its path is to be recognized by [`find_known`].

    Raises:
        InputError: If the file is not found, or cannot be downloaded or verified.
    """
    text = str(source)
    if Path(source).exists():
        return Path(source), None
    if known := _BY_NAME_OR_URL.get(text):
        return _fetch_known(known), known
    if "://" in text:
        return _fetch_url(text), None
    raise InputError(f"{text}: is not a file nor the name of a known checkpoint; {_suggest(text)}")


_BY_NAME_OR_URL = {
    **{known.url: known for known in _TABLE if known.format != "official"},
    **{known.name: known for known in _TABLE},
}


def _fetch_known(known: KnownCheckpoint) -> Path:
    if not known.backbone_name:
        raise InputError(
            f"{known.name}: has the backbone {known.backbone}, which cannot be converted; those that can are "
            f"{', '.join(BACKBONE_NAMES.values())}"
        )
    from ..utils.download import download

    transfer = partial(_transfer_from_drive, known) if known.format == "official" else None
    return download(
        known.url,
        known.cached_path,
        size=known.size,
        digest=known.sha256,
        check=_check_is_checkpoint,
        transfer=transfer,
    )


def _fetch_url(url: str) -> Path:
    from ..utils.download import download, url_file_name

    folder = cache_folder("checkpoints") / "urls" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return download(url, folder / url_file_name(url), check=_check_is_checkpoint)


def downloaded_files() -> tuple[Path, list[Path]]:
    """Return the directory of downloads, and the complete and partial files in it."""
    folder = cache_folder("checkpoints")
    # only what is made here: HF_DINO_CACHE may be a directory with a user's own checkpoints
    files = (path for part in (*FORMATS, "urls") for path in (folder / part).rglob("*") if path.is_file())
    return folder, sorted(path for path in files if path.suffix != ".lock")


def _check_is_checkpoint(path: Path) -> None:
    """Check that a file has one of PyTorch's formats, and a complete table of contents if it is a zip file."""
    with path.open("rb") as file:
        header = file.read(24)
    if not (header.startswith(b"\x80") or zipfile.is_zipfile(path)):  # the former begins a pickle
        damage = "is truncated" if header.startswith(b"PK") else f"begins with {header!r}"
        raise InputError(f"what the server sent is not a PyTorch checkpoint: it {damage}; nothing was kept")


def _transfer_from_drive(known: KnownCheckpoint, url: str, path: Path) -> int:
    """Download an official file from its folder on Google Drive; return its length, which gdown has verified."""
    try:
        gdown = import_extra("gdown", "download", "Google Drive")
    except ImportError:
        raise InputError(
            f"{known.name}: is {known.file_name} in {url}. To download it, pip install 'hf-dino[download]', "
            f"{_by_hand(known)}"
        ) from None
    try:
        files = gdown.download_folder(url=url, skip_download=True, quiet=True)
        ids = {Path(file.path).name: file.id for file in files}
        gdown.download(id=ids[known.file_name], output=str(path), resume=True)
    except KeyError:
        raise InputError(f"{known.name}: {known.file_name} is not in {url} any more; {_by_hand(known)}") from None
    except (gdown.exceptions.DownloadError, OSError) as error:  # the latter from requests, too
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{known.name}: {known.file_name} cannot be downloaded from {url} ({reason}); {_by_hand(known)}"
        ) from error
    return path.stat().st_size


def _by_hand(known: KnownCheckpoint) -> str:
    copy = f" (third-party copy: https://huggingface.co/{known.hub_copy})" if known.hub_copy else ""
    return f"or download it in a browser and pass its path{copy}"


def _suggest(text: str) -> str:
    """Return a hint at the known checkpoint with the most similar name or file name."""
    names = {
        key.lower(): known.name
        for known in _TABLE
        for key in (known.name, known.name.partition("/")[2], known.file_name)
    }
    close = get_close_matches(text.lower().removesuffix(".py"), names, n=1, cutoff=0.75)
    return f"did you mean {names[close[0]]}?" if close else "`hf-dino checkpoints` lists those"


def checkpoint_table() -> str:
    """Return the Markdown table of the known checkpoints in the documentation.

    Example:

    ```python
    >>> print("\\n".join(checkpoint_table().splitlines()[:3]))
    | name | backbone | feature levels | epochs | COCO AP | verified by |
    |---|---|---|---|---|---|
    | `official/dino-4scale-r50-12ep` | ResNet-50 | 4 | 12 | 49.0 | SHA-256 |

    ```
    """
    rows = [
        f"| `{known.name}` | {known.backbone_name} | {known.num_feature_levels} | {known.epochs} "
        f"| {100 * known.box_ap:.1f} | {verified_by(known)} |"
        for known in KNOWN_CHECKPOINTS.values()
    ]
    return "\n".join(
        [
            "| name | backbone | feature levels | epochs | COCO AP | verified by |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Epochs of training when the file was saved; the full schedules of the official files are 12, 24 or 36 "
            "epochs. Box AP on COCO val2017: published by the authors, not measured here.",
        ]
    )


def verified_by(known: KnownCheckpoint) -> str:
    """Return by what a downloaded file is verified."""
    return {64: "SHA-256", 8: "8 digits of SHA-256"}.get(len(known.sha256 or ""), "length only")
