"""Read the frames of videos and cameras, and write drawn frames as an MP4 file that browsers play."""

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ..image_processing_dino_detr import convert_to_rgb
from ..utils.errors import InputError, count_of, import_extra
from ..utils.io import atomic_write
from .detector import map_ahead
from .sources import ImageInput, Video


logger = logging.getLogger(__name__)

DECODED_AHEAD = 4  # frames
LIVE_TIMEOUT = 30.0  # seconds without data, until a stream is given up
_DEVICES: dict[str, tuple[str, str, dict[str, str]]] = {  # by `sys.platform`: name in FFmpeg, address, options
    "linux": ("v4l2", "/dev/video{}", {}),
    "darwin": ("avfoundation", "{}:none", {"framerate": "30"}),
    "win32": ("dshow", "video={}", {}),
}

_MP4_AUDIO = frozenset({"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"})  # which players know in an MP4 file
# without B-frames, frames are stored in order, so that the last one also lasts as long as it should
_X264 = {"preset": "veryfast", "crf": "20", "bf": "0"}
_MPEG_RANGE, _BT709, _BT601 = 1, 1, 5
_COLOR_SPACES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9}  # in frames -> of swscale
_TAGS = {number: tag for tag, number in _COLOR_SPACES.items()}
_HDR_TRANSFERS = (16, 18)  # PQ, HLG
_MIN_STEP = Fraction(1, 1000)  # seconds, between frames whose time stamps do not increase
_DEFAULT_RATE = Fraction(25)  # frames per second
_MISSING = Fraction(1, 5)  # seconds at the end of a video that may be missing without a word

# by the signs of a display matrix (a b; c d): how the stored pixels are turned
_TRANSPOSES = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {transpose for signs, transpose in _TRANSPOSES.items() if signs[1]}


def import_av() -> ModuleType:
    """Import PyAV, which has FFmpeg's libraries.

    Raises:
        ImportError: If it is not installed.
    """
    return import_extra("av", "train", "reading and writing videos")


@dataclass(eq=False)
class VideoFrame:
    """A frame of a video.

    Attributes:
        video (`Video`): The video.
        index (`int`): Number of the frame, from 0, among those that are read.
        time (`Fraction`): Time stamp in seconds from the start of the video.
        duration (`Fraction`): Seconds for which it is shown, as far as the file states it.
        pixels (`av.VideoFrame`): The stored pixels.
        transpose (`Image.Transpose`, *optional*): How they have to be turned.
        pixel_ratio (`Fraction`): Width of a pixel of the upright image divided by its height.
    """

    video: Video
    index: int
    time: Fraction
    duration: Fraction
    pixels: Any
    transpose: Image.Transpose | None
    pixel_ratio: Fraction

    def __str__(self) -> str:
        return str(self.video)

    @property
    def seconds(self) -> float:
        """Time stamp in seconds from the start of the video."""
        return round(float(self.time), 6)

    def to_image(self) -> Image.Image:
        """Return the pixels in RGB, upright, with transparent parts blended with white."""
        pixel_format = "rgba" if self.has_alpha else "rgb24"
        pixels = self.pixels.to_ndarray(format=pixel_format, src_colorspace=self.color_space)
        image = convert_to_rgb(Image.fromarray(pixels))
        return image if self.transpose is None else image.transpose(self.transpose)

    @property
    def has_alpha(self) -> bool:
        """`True` if parts may be transparent."""
        return any(component.is_alpha for component in self.pixels.format.components)

    @property
    def color_space(self) -> int:
        """The color space of YUV values. If it is unspecified, it follows from the height, as in players."""
        return _COLOR_SPACES.get(self.pixels.colorspace, _BT709 if self.pixels.height > 576 else _BT601)


def _get_transpose(pixels: Any) -> Image.Transpose | None:
    """Return how the stored pixels of a frame have to be turned."""
    matrix = pixels.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(bytes(matrix), np.int32)[:5] / 65536
    return _TRANSPOSES.get((round(a), round(b), round(c), round(d)))


def open_video(video: Video) -> Any:
    """Open the container of a video.

    Raises:
        InputError: If it cannot be opened.
    """
    av = import_av()
    try:
        if video.is_camera:
            return _open_camera(video.address)
        return av.open(video.address, timeout=LIVE_TIMEOUT if "://" in video.address else None)
    except (av.FFmpegError, IndexError) as error:  # the latter if there is no stream
        reason = getattr(error, "strerror", None) or "it contains nothing"
        what = "cannot be opened" if video.is_live else "cannot be read as a video"
        raise InputError(f"{video}: {what} ({reason})") from None


def _open_camera(address: str) -> Any:
    device, pattern, options = _DEVICES.get(sys.platform, _DEVICES["linux"])
    return import_av().open(pattern.format(address.partition(":")[2]), format=device, options=options)


class VideoReader:
    """Read the frames of a video once. A few are decoded ahead in another thread.

    Args:
        video (`Video`): The video.
        start (`float` or `Fraction`, *optional*, defaults to 0): Time of the first frame in seconds.
        end (`float` or `Fraction`, *optional*): Time in seconds at which reading ends, by default that of the video.

    Attributes:
        num_frames (`int`): Number of frames read so far.
        faults (`list[str]`): After the last frame, what could not be read.
        is_complete (`bool`): Whether the last frame of the file was reached.

    Raises:
        InputError: If the video cannot be opened, or has no frame.
    """

    def __init__(self, video: Video, start: float | Fraction = 0, end: float | Fraction | None = None):
        self.video = video
        self.start = Fraction(start).limit_denominator(1_000_000)
        self.end = None if end is None else Fraction(end).limit_denominator(1_000_000)
        self.container = open_video(video)
        self.stream = self._find_stream()
        self.stream.thread_type = "AUTO"
        self.rate = self.stream.average_rate or self.stream.guessed_rate or _DEFAULT_RATE
        self._stored_ratio = self.stream.sample_aspect_ratio or Fraction(1)
        self._transpose: Image.Transpose | None = None
        # in seconds, if the file states it
        self.duration = self.container.duration and Fraction(self.container.duration, 1_000_000)
        self.stream_frames = self.stream.frames  # 0 if the file does not state it
        self.num_frames = self.num_packets = self.num_damaged = self.num_moved = 0
        self.faults: list[str] = []
        self.is_complete = False
        self._last_end = Fraction(0)  # of any stream
        self._last_time = Fraction(-1_000_000)

    def _find_stream(self) -> Any:
        streams = self.container.streams
        for stream in streams.video:
            if not stream.disposition & import_av().stream.Disposition.attached_pic:  # the cover of a song
                return stream
        kinds = ", ".join(sorted({each.type for each in streams} - {"video"})) or "nothing"
        raise InputError(f"{self.video}: is not a video, it contains only {kinds}")

    @property
    def expected_frames(self) -> int | None:
        """Approximate number of frames, if the file states its duration."""
        ends = [each for each in (self.end, self.duration) if each is not None]
        return max(1, round((min(ends) - self.start) * self.rate)) if ends else None

    def __iter__(self) -> Iterator[VideoFrame]:
        frames = self._frames()
        with self.container, ThreadPoolExecutor(1) as decoder:
            decoded = map_ahead(lambda _: next(frames, None), count(), decoder, DECODED_AHEAD)
            for frame in decoded:
                if frame is None:
                    break
                yield frame

    def _frames(self) -> Iterator[VideoFrame]:
        origin = None if self.video.is_live else _seek(self.container, self.start)
        next_time = Fraction(0)
        for pixels in self._decode():
            stamp = None if pixels.pts is None else pixels.pts * pixels.time_base
            origin = stamp if origin is None else origin
            duration = (pixels.duration or 0) * pixels.time_base or 1 / self.rate
            time = next_time if stamp is None or origin is None else stamp - origin
            if time <= self._last_time:
                self.num_moved += 1
                time = self._last_time + _MIN_STEP
            if self.end is not None and time >= self.end:
                break
            self._last_time, next_time = time, time + duration
            if time >= self.start:
                yield self._to_frame(pixels, time, duration)
        else:
            self.is_complete = True
        self._note_faults(origin or Fraction(0))

    def _decode(self) -> Iterator[Any]:
        packets = self.container.demux()
        while packet := self._next_packet(packets):
            if packet.stream.index == self.stream.index:
                self.num_packets += packet.size > 0
                yield from self._decode_packet(packet)

    def _next_packet(self, packets: Iterator[Any]) -> Any:
        try:
            packet = next(packets, None)
        except import_av().FFmpegError as error:
            self.faults.append(f"cannot be read any further ({error.strerror})")
            return None
        if packet is not None:
            self.num_damaged += packet.is_corrupt
            self._last_end = max(self._last_end, _end_of(packet))
        return packet

    def _decode_packet(self, packet: Any) -> list[Any]:
        try:
            frames = packet.decode()
        except import_av().FFmpegError:
            self.num_damaged += 1
            return []
        self.num_damaged += sum(frame.is_corrupt for frame in frames)
        return frames

    def _to_frame(self, pixels: Any, time: Fraction, duration: Fraction) -> VideoFrame:
        # only of the first frame, since reading it makes a cycle of references, which keeps the pixels for long
        self._transpose = self._transpose if self.num_frames else _get_transpose(pixels)
        ratio = 1 / self._stored_ratio if self._transpose in _SWAPS_SIDES else self._stored_ratio
        frame = VideoFrame(self.video, self.num_frames, time, duration, pixels, self._transpose, ratio)
        self.num_frames += 1
        if frame.index == 0 and frame.has_alpha:
            logger.warning("%s: transparent parts, if any, are blended with white", self.video)
        if frame.index == 0 and pixels.color_trc in _HDR_TRANSFERS:
            logger.warning("%s: its HDR colors are used as they are, paler than those of images", self.video)
        return frame

    def _note_faults(self, origin: Fraction) -> None:
        if self.num_moved:
            moved = count_of(self.num_moved, "frame is", "frames are")
            logger.warning("%s: %s moved, since the time stamps do not increase", self.video, moved)
        if self.num_damaged:
            self.faults.append(f"{count_of(self.num_damaged, 'frame is', 'frames are')} damaged")
        reached = self._last_end - origin
        if self.is_complete and self.duration and reached + _MISSING + 2 / self.rate < self.duration:
            self.faults.append(f"it is cut short, at {float(reached):.1f} of {float(self.duration):.1f} s")
        elif self.is_complete and not self.start and self.num_packets < 0.95 * self.stream_frames:
            self.faults.append(f"it is cut short, at frame {self.num_packets} of {self.stream_frames}")
        if not self.num_frames:
            raise InputError(f"{self.video}: {'; '.join([self._no_frames(), *self.faults])}")

    def _no_frames(self) -> str:
        part = f" from {float(self.start):g} s on" * bool(self.start)
        part += f" before {float(self.end):g} s" if self.end is not None else ""
        return f"contains no frames{part}" + (f" ({float(self.duration):.1f} s long)" if self.duration else "")


def read_video(path: str | Path, start: float = 0, end: float | None = None, every: int = 1) -> Iterator[ImageInput]:
    """Read the frames of a video as inputs of [`Detector.stream`].

    Args:
        path (`str` or `Path`): A video file, a URL, or a camera: `"camera:0"`.
        start (`float`, *optional*, defaults to 0): Time of the first frame in seconds.
        end (`float`, *optional*): Time in seconds at which reading ends, by default that of the video.
        every (`int`, *optional*, defaults to 1): Yield only every N-th frame.

    Yields:
        `ImageInput`: The source is a [`VideoFrame`].

    Raises:
        InputError: If the video cannot be opened, or has no frames. Damage is logged at the end.
    """
    reader = VideoReader(Video(str(path)), start, end)
    for frame in reader:
        if frame.index % every == 0:
            yield to_input(frame, reader.video.name)
    if reader.faults:
        logger.warning("%s: %s", reader.video, "; ".join(reader.faults))


def to_input(frame: VideoFrame, name: str) -> ImageInput:
    """Return a frame as an input of [`Detector.stream`], named after its video: `clip/000012` of `clip.mp4`."""
    return ImageInput(frame, f"{PurePosixPath(name).with_suffix('')}/{frame.index:06}")


@contextmanager
def write_video(path: str | Path, audio: Video | None = None, is_excerpt: bool = False) -> Iterator["VideoWriter"]:
    """Write images as an MP4 file of H.264 that browsers play. It appears at `path` when it is complete.

    An odd width or height is extended by a pixel, since H.264 has one color for 2 x 2 pixels. Without any image, no
    file is written.

    Args:
        path (`str` or `Path`): The file; may exist.
        audio (`Video`, *optional*): The video whose audio is copied, as far as there are images.
        is_excerpt (`bool`, *optional*, defaults to `False`): Whether the file begins with the first image, whatever
            its time stamp.

    Example:

    ```python
    with write_video("drawn.mp4", audio=Video("clip.mp4")) as writer:
        for result in detector.stream(read_video("clip.mp4")):
            writer.write(draw_rows(result.image, result.detections, detector.names), result.input.source)
    ```
    """
    with ExitStack() as files:
        writer = VideoWriter(Path(path), audio, is_excerpt, files)
        yield writer
        writer.finish()


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turn errors of FFmpeg, such as that of a full disk, into those of Python, which can be given a file name."""
    try:
        yield
    except import_av().FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class VideoWriter:
    """Append images to an MP4 file; see [`write_video`]."""

    def __init__(self, path: Path, audio: Video | None, is_excerpt: bool, files: ExitStack):
        self.path, self._audio_source, self._is_excerpt, self._files = path, audio, is_excerpt, files
        self._size: tuple[int, int] | None = None  # of the first image

    def write(self, image: Image.Image, frame: VideoFrame) -> None:
        """Append an image.

        Args:
            image (`PIL.Image.Image`): The image, in RGB; resized if its size is not that of the first one.
            frame (`VideoFrame`): The frame that it shows, whose time stamp it gets.
        """
        if self._size is None:
            self._begin(image, frame)
        self._container.mux(self._stream.encode(self._to_yuv(image, frame)))
        self._audio.copy_until(frame.time - self._origin + frame.duration)

    def copy_remaining_audio(self) -> None:
        """Copy the audio that follows the last image."""
        if self._size is not None:
            self._audio.copy_until(math.inf)

    def finish(self) -> None:
        """Write what the encoder still has."""
        if self._size is not None:
            self._container.mux(self._stream.encode(None))

    def _begin(self, image: Image.Image, frame: VideoFrame) -> None:
        temporary = self._files.enter_context(atomic_write(self.path))
        self._files.enter_context(_plain_errors(self.path))
        options = {"movflags": "faststart"}  # so that players need not read the end of the file first
        self._container = self._files.enter_context(import_av().open(str(temporary), "w", container_options=options))
        self._stream = self._container.add_stream("libx264", options=_X264)
        self._stream.width, self._stream.height = (length + length % 2 for length in image.size)
        self._size = image.size
        self._set_codec(self._stream.codec_context, frame)
        # the first frame of a whole video may come after its audio; an excerpt begins with its first frame
        self._origin = frame.time if self._is_excerpt else Fraction(0)
        self._audio = _AudioCopy(self._audio_source, self._container, self._origin, self._files)

    def _set_codec(self, codec: Any, frame: VideoFrame) -> None:
        pixels = frame.pixels
        codec.pix_fmt, codec.sample_aspect_ratio = "yuv420p", frame.pixel_ratio
        codec.framerate, codec.time_base = 1 / frame.duration, pixels.time_base
        codec.flags |= import_av().codec.context.Flags.frame_duration
        codec.color_range, codec.colorspace = _MPEG_RANGE, _TAGS[frame.color_space]
        codec.color_primaries, codec.color_trc = pixels.color_primaries, pixels.color_trc

    def _to_yuv(self, image: Image.Image, frame: VideoFrame) -> Any:
        if self._size and image.size != self._size:
            image = image.resize(self._size)
        missing = [(0, image.height % 2), (0, image.width % 2), (0, 0)]
        rgb = import_av().VideoFrame.from_ndarray(np.pad(np.asarray(image), missing, mode="edge"), format="rgb24")
        yuv = rgb.reformat(format="yuv420p", dst_colorspace=frame.color_space, dst_color_range=_MPEG_RANGE)
        base = frame.pixels.time_base
        yuv.time_base = base
        yuv.pts, yuv.duration = round((frame.time - self._origin) / base), round(frame.duration / base)
        return yuv


class _AudioCopy:
    """The audio of a video, written packet by packet next to drawn frames.

    Args:
        video (`Video`, *optional*): Where the audio is.
        output (`av.container.OutputContainer`): Where it is written.
        origin (`Fraction`): Time of the video in seconds at which the output begins.
        files (`ExitStack`): Closes the video.
    """

    def __init__(self, video: Video | None, output: Any, origin: Fraction, files: ExitStack):
        self.video, self.output, self.origin = video, output, origin
        self._packets: Iterator[Any] = iter(())
        if video is not None:
            container = files.enter_context(open_video(video))
            targets = {stream.index: self._add_stream(stream) for stream in container.streams.audio}
            self._packets = self._convert(container, targets) if targets else self._packets
        self._next = next(self._packets, None)

    def _add_stream(self, source: Any) -> Any:
        if source.codec_context.codec.canonical_name in _MP4_AUDIO:
            return self.output.add_stream_from_template(source)
        return self.output.add_stream("aac", rate=source.rate, layout=source.layout)

    def copy_until(self, time: Fraction | float) -> None:
        """Write the packets that begin before a time of the output in seconds."""
        while self._next is not None and (self._next.pts or 0) * self._next.time_base < time:
            self.output.mux(self._next)
            self._next = next(self._packets, None)

    def _convert(self, container: Any, targets: Mapping[int, Any]) -> Iterator[Any]:
        """Yield packets as they are to be written, with time stamps of the output."""
        shift = _seek(container, self.origin) + self.origin
        try:
            for packet in container.demux(*container.streams.audio):
                target = targets[packet.stream.index]
                if target.codec_context.is_encoder:
                    yield from self._encode(packet, target, shift)
                elif packet.dts is not None and _move(packet, shift):
                    packet.stream = target
                    yield packet
        except import_av().FFmpegError as error:
            logger.warning("%s: the audio cannot be read any further (%s)", self.video, error.strerror)

    def _encode(self, packet: Any, target: Any, shift: Fraction) -> Iterator[Any]:
        for frame in packet.decode():
            if _move(frame, shift):
                yield from target.encode(frame)
        if packet.dts is None:
            yield from target.encode(None)


def _move(item: Any, shift: Fraction) -> bool:
    """Subtract seconds from the time stamps of a packet or audio frame, and return whether it is not before 0."""
    ticks = round(shift / item.time_base)
    item.pts, item.dts = (None if stamp is None else stamp - ticks for stamp in (item.pts, item.dts))
    return not shift or item.pts is None or item.pts >= 0


def _seek(container: Any, start: Fraction) -> Fraction:
    """Jump before a time of a video in seconds, and return the time stamp with which the video begins."""
    stamps = [each.start_time * each.time_base for each in container.streams if each.start_time is not None]
    begin = Fraction(container.start_time or 0, 1_000_000)  # rounded
    begin = min(stamps, key=lambda stamp: abs(stamp - begin), default=begin)
    with suppress(import_av().FFmpegError):  # not every format can; what precedes `start` is read then
        if start:
            container.seek(math.floor((begin + start) * 1_000_000))
    return begin


def _end_of(packet: Any) -> Fraction:
    return (packet.pts + (packet.duration or 0)) * packet.time_base if packet.pts is not None else Fraction(0)
