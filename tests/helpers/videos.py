"""Videos generated with PyAV, of any codec, size, rate, rotation and damage; and what is in a video."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np


RATE = 25


def numbered_frame(number: int, size: tuple[int, int]) -> np.ndarray:
    """A gray gradient with a red square that moves by 2 pixels a frame."""
    width, height = size
    pixels = np.broadcast_to(np.linspace(40, 200, width).astype(np.uint8)[None, :, None], (height, width, 3)).copy()
    x = 2 * number % max(1, width - 16)
    pixels[8:24, x : x + 16] = (220, 30, 30)
    return pixels


def make_video(
    path: Path,
    num_frames: int = 12,
    size: tuple[int, int] = (96, 64),
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[float] | None = None,
    last_duration: float = 1 / RATE,
    audio: str | None = None,
    with_video: bool = True,
    rotation: int = 0,
    mirrored: bool = False,
    container_options: dict[str, str] | None = None,
    draw: Callable[[int, tuple[int, int]], np.ndarray] = numbered_frame,
    **options: str,
) -> Path:
    """Write a video.

    Args:
        path: Its suffix chooses the container.
        num_frames: Ignored where there are `times`, in seconds.
        last_duration: Seconds for which the last frame is shown.
        audio: Codec of a tone that is as long as the video, at least a tenth of a second.
        rotation: Degrees, counterclockwise, that a player turns the frames by, before it mirrors them.
        draw: Returns the RGB or RGBA pixels of a frame.
        options: Of the codec.
    """
    times = [number / RATE for number in range(num_frames)] if times is None else list(times)
    ends = [*times[1:], times[-1] + last_duration] if times else []
    base = Fraction(1, RATE) if path.suffix == ".avi" else Fraction(1, 1000)
    with av.open(str(path), "w", container_options=container_options) as container:
        if with_video:
            stream = container.add_stream(codec, rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = *size, pixel_format
            stream.codec_context.time_base = base
            stream.codec_context.flags |= av.codec.context.Flags.frame_duration
            if rotation or mirrored:
                stream.set_display_rotation(rotation, hflip=mirrored)
        sound = container.add_stream(audio, rate=48000, layout="mono") if audio else None
        for number, (time, end) in enumerate(zip(times, ends)):
            pixels = draw(number, size)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = round(time / base), base
            frame.duration = round((end - time) / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None) if times else [])
        if sound:
            num_samples = round(48000 * max([0.1, *ends]))
            tone = (8000 * np.sin(np.arange(num_samples) * 2 * np.pi * 440 / 48000)).astype(np.int16)
            samples = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            samples.rate, samples.pts = 48000, 0
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
    return path


class Facts(NamedTuple):
    """What a player shows of a video."""

    size: tuple[int, int]
    times: list[float]  # seconds
    duration: float  # of the video stream, seconds
    pixels: list[np.ndarray]  # RGB
    codec: str
    pixel_format: str
    audio: list[str]  # codecs
    audio_duration: float


def facts(path: Path) -> Facts:
    with av.open(str(path)) as container:
        sound = list(container.decode(audio=0)) if container.streams.audio else []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        return Facts(
            (stream.width, stream.height),
            [frame.time for frame in frames],
            float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6,
            [frame.to_ndarray(format="rgb24") for frame in frames],
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
            [each.codec_context.codec.canonical_name for each in container.streams.audio],
            sum(each.samples / each.rate for each in sound),
        )
