"""The options of `hf-dino predict` for videos."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from ..inference import VideoOptions


VIDEO_FORMATS = ("images", "json", "jsonl", "csv", "coco", "mot")


def parse_time(text: str) -> Fraction:
    """Parse a time in seconds, minutes:seconds or hours:minutes:seconds.

    Example:

    ```python
    >>> float(parse_time("90.5")), float(parse_time("1:30.5")), float(parse_time("1:00:00"))
    (90.5, 90.5, 3600.0)

    ```
    """
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text, flags=re.ASCII):
        raise typer.BadParameter(f"{text!r} is not a time; give seconds, minutes:seconds or hours:minutes:seconds.")
    seconds = Fraction(0)
    for part in text.split(":"):
        seconds = 60 * seconds + Fraction(part)
    return seconds


EveryOption = Annotated[
    int | None,
    typer.Option(
        metavar="INTEGER",
        min=1,
        help="Detect only in every so many frames of a video; drawn frames in between show the last detections.",
        show_default="1",
    ),
]
StartOption = Annotated[
    Fraction | None,
    typer.Option(
        metavar="TIME",
        parser=parse_time,
        help="Time of a video to begin at, in seconds or as minutes:seconds.",
        show_default="the beginning",
    ),
]
EndOption = Annotated[
    Fraction | None,
    typer.Option(
        metavar="TIME",
        parser=parse_time,
        help="Time of a video to end at, in seconds or as minutes:seconds.",
        show_default="the end",
    ),
]
TrackOption = Annotated[
    bool,
    typer.Option(
        "--track",
        help="Give the objects in a video ids that they keep from frame to frame, and draw where they were in the "
        "last second. Needs the extra `tracking`.",
    ),
]


def check_video_options(
    context: typer.Context, options: "VideoOptions", num_videos: int, formats: Sequence[str]
) -> None:
    """Refuse options that have no effect, and formats that are not those of videos.

    Raises:
        ImportError: If a library that is needed is not installed.
    """
    from ..inference.tracking import import_trackers
    from ..inference.video import import_av

    given = [f"--{name}" for name, value in options.settings().items() if value is not None]
    given += ["--save mot"] * ("mot" in formats)
    unfit = [name for name in formats if name not in VIDEO_FORMATS]
    if given and not num_videos:
        context.fail(f"{given[0]} is for videos, but there are only images.")
    if unfit and num_videos:
        context.fail(f"--save {unfit[0]} is for images; of videos, choose among {', '.join(VIDEO_FORMATS)}.")
    if "mot" in formats and not options.track:
        context.fail("--save mot needs --track.")
    if options.end is not None and options.end <= (options.start or 0):
        context.fail("--end must be later than --start.")
    if num_videos:
        import_av()
    if options.track:
        import_trackers()
