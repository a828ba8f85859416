"""Odd files of videos: an hour long, turned in every way, without a frame, cut off behind their index."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.videos import number_of, turn, write_video
from vmoe_torch.data import BrokenImageError, ClipTiming, ClipTransform, Video

HOUR = 3600
SIZE = (160, 208)
# Bytes that an hour of frames is, at one a second, and that reading some of them may take.
WHOLE = 3 * HOUR * SIZE[0] * SIZE[1]
MOST = 32 * 2**20


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """Files of an hour at a frame a second, by the number of frames from one key frame to the next."""
    pictures = [np.full(SIZE, 12 + 12 * number, np.uint8) for number in range(20)]
    frames = [pictures[number % 20] for number in range(HOUR)]
    folder = tmp_path_factory.mktemp("hour")
    return {gop: write_video(folder / f"{gop}.avi", frames, rate=1, gop=gop) for gop in (60, 2 * HOUR)}


def _peak() -> int:
    """Most bytes that this process has held in memory since it was last asked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status["VmHWM"].split()[0])


def _grown(read) -> int:
    """Bytes by which the peak of a function lies above what was held before it."""
    _peak()
    before = _peak()
    read()
    return _peak() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("gop", [60, 2 * HOUR])
def test_memory_of_an_hour_is_that_of_its_clips(hour, gop):
    """Though all frames up to the last clip are decoded where there is one key frame alone, they are not kept."""
    video = Video(str(hour[gop]))
    told = []

    def clip_at_the_end():
        times = [HOUR - 16.5 + second for second in range(16)]
        told.extend(number_of(frame) for frame in video.read(lambda seconds, rate: times))

    assert _grown(clip_at_the_end) < MOST < WHOLE / 10
    assert told == [(HOUR - 17 + second) % 20 for second in range(16)]
    # This can tell: an hour of frames, kept, is more. Not every time: a kernel that takes idle pages away meanwhile
    # lowers what is held.
    assert any(_grown(lambda: np.ones(2 * MOST, np.uint8).sum()) > MOST for _ in range(10))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_of_views_of_an_hour_is_that_of_the_views(hour):
    views = ClipTransform(_shrunk, ClipTiming(8), clips=8)
    made = []
    assert _grown(lambda: made.append(views(Video(str(hour[60]))))) < MOST
    assert made[0].shape == (8, 1, 8, 24, 32)
    starts = [round(number * (HOUR - 8) / 7) for number in range(8)]
    assert [number_of(255 * view[0, 0]) for view in made[0]] == [start % 20 for start in starts]


def _shrunk(image):
    return torch.from_numpy(np.asarray(image.convert("L").resize((32, 24)), np.float32)[None] / 255)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_video_is_turned_as_it_says(tmp_path, quarters):
    frame = np.zeros((32, 48), np.uint8)
    frame[:12, :20] = 220
    path = turn(write_video(tmp_path / "a.mp4", [frame] * 3), quarters)
    (upright,) = Video(str(path), "L").read(lambda *_: [0.1])
    want = np.rot90(frame, -quarters)
    assert np.asarray(upright).shape == want.shape
    # Blocks of 4 pixels: the codec blurs the rims.
    assert np.abs(np.asarray(upright, int) - want)[want.shape[0] // 2 - 4 :].mean() < 8
    assert np.abs(np.asarray(upright, int) - want).mean() < 12


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_video_without_a_frame_is_broken(tmp_path, suffix):
    path = _without_frames(tmp_path / f"a{suffix}")
    with pytest.raises(BrokenImageError, match=rf"^video .*a\{suffix} cannot be read: "):
        Video(str(path)).read(lambda *_: [0.0])


def _without_frames(path: Path) -> Path:
    """A whole file whose one stream is empty."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    return path


def test_mp4_that_is_cut_behind_its_index_is_broken_where_it_is_cut(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48), np.uint8)
    path = write_video(tmp_path / "a.mp4", list(noise), gop=4, options={"movflags": "faststart"})
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    assert len(Video(str(path)).read(lambda *_: [0.1, 4.7])) == 2
    path.write_bytes(whole[: 2 * len(whole) // 3])
    assert len(Video(str(path)).read(lambda *_: [0.1, 1.1])) == 2
    with pytest.raises(BrokenImageError, match=r"a\.mp4 cannot be read: "):
        Video(str(path)).read(lambda *_: [4.7])
