"""Frames of video files by their times: every format, any rate, turned, cut, empty, without pictures, very long."""

import builtins
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.videos import CODECS, grey, number_of, turn, write_sound, write_video
from vmoe_torch.data import BrokenImageError, Video, VideoFolder, described, open_data
from vmoe_torch.data.video import OpenVideo


def numbers(path, times, mode="L"):
    """The numbers of the frames that are shown at some times."""
    return [number_of(frame) for frame in Video(str(path), mode).read(lambda seconds, rate: times)]


def known(path):
    """Seconds and rate as they are told to who chooses times."""
    told = []
    Video(str(path)).read(lambda *facts: told.append(facts) or [0.0])
    return told[0]


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_gives_the_frames_of_the_times(tmp_path, suffix, mode):
    path = write_video(tmp_path / f"a{suffix}")
    seconds, rate = known(path)
    assert seconds == pytest.approx(1.5, abs=0.02)
    assert rate == pytest.approx(8, rel=0.05)
    frames = Video(str(path), mode).read(lambda seconds, rate: [0.0, 1.3, 0.2, 0.2, 9.0])
    assert [(frame.mode, frame.size) for frame in frames] == [(mode, (48, 32))] * 5
    assert [number_of(frame) for frame in frames] == [0, 10, 1, 1, 11]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_odd_and_small_counts_of_frames(tmp_path, count):
    path = write_video(tmp_path / "a.mp4", count)
    assert known(path)[0] == pytest.approx(count / 8)
    assert numbers(path, [(i + 0.5) / 8 for i in range(count)]) == list(range(count))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_frames_of_a_variable_rate_are_found_by_their_times(tmp_path, suffix):
    begins = [0.0, 0.04, 0.08, 1.0, 1.04, 3.0, 3.04]
    path = write_video(tmp_path / f"a{suffix}", len(begins), rate=25, times=begins)
    asked = [0.05, 0.5, 0.99, 1.01, 2.0, 2.99, 3.02]
    want = [max(i for i, begin in enumerate(begins) if begin <= time) for time in asked]
    assert numbers(path, asked) == want
    # By their index they would be others.
    assert want != [round(time * known(path)[1]) for time in asked]


def test_video_that_begins_late_begins_at_its_first_frame(tmp_path):
    path = write_video(tmp_path / "a.mkv", 6, times=[5 + i / 8 for i in range(6)])
    assert numbers(path, [0.01, 0.3]) == [0, 2]


def test_turned_video_is_upright(tmp_path):
    frame = np.zeros((32, 48), np.uint8)
    frame[:, :24] = 200
    path = write_video(tmp_path / "a.mp4", [frame] * 3)
    assert Video(str(path)).read(lambda *_: [0.0])[0].size == (48, 32)
    (upright,) = Video(str(turn(path)), "L").read(lambda *_: [0.1])
    assert upright.size == (32, 48)
    # A quarter clockwise brings the left to the top.
    pixels = np.asarray(upright, int)
    assert pixels[:20].mean() > 180
    assert pixels[28:].mean() < 20


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        # Streams of JPEGs may change their size.
        for number, side in enumerate((32, 32, 64, 64)):
            jpeg = io.BytesIO()
            Image.new("L", (side, side), grey(number)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            packet.is_keyframe = True
            container.mux(packet)
    frames = Video(str(path)).read(lambda *_: [0.0, 0.3])
    assert [frame.size for frame in frames] == [(32, 32), (32, 32)]
    assert [number_of(frame) for frame in frames] == [0, 2]


# How a file is made that cannot be read, and what is said of it.
BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "Invalid data found"),
    "text": (lambda path: path.write_bytes(b"no video" * 100), "Invalid data found"),
    "head": (lambda path: path.write_bytes(write_video(path).read_bytes()[:300]), "Invalid data found"),
    "sound": (write_sound, "it holds no video stream"),
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named(tmp_path, kind):
    path = tmp_path / "a.mp4"
    make, said = BROKEN[kind]
    make(path)
    with pytest.raises(BrokenImageError, match=rf"^video .*a\.mp4 .*{said}"):
        Video(str(path)).read(lambda *_: [0.0])


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".webm", ".gif"])
def test_truncated_file_is_broken_where_it_is_cut(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48), np.uint8)
    path = write_video(tmp_path / f"a{suffix}", list(noise), gop=4)
    whole = path.read_bytes()
    assert len(Video(str(path)).read(lambda *_: [0.1, 4.7])) == 2
    path.write_bytes(whole[: len(whole) // 2])
    assert len(Video(str(path)).read(lambda *_: [0.1, 1.1])) == 2
    if suffix == ".gif":
        # It tells of no length, so what is left is all.
        assert known(path)[0] < 3
        return
    with pytest.raises(BrokenImageError, match=r"a\.\w+ cannot be read: "):
        Video(str(path)).read(lambda *_: [0.1, 4.7])


def test_sound_that_goes_on_is_no_cut(tmp_path):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libvpx", rate=8), container.add_stream("libopus", rate=48000)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48), 12 * number, np.uint8), format="gray")
            container.mux(video.encode(frame))
        for _ in range(150):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    assert numbers(path, [0.1, 2.9]) == numbers(path, [0.1, 0.99])


def test_long_video_is_neither_decoded_nor_kept_whole(tmp_path):
    """An hour, of which two clips are read: what is decoded depends on the clips and on the distance of key frames."""
    path = write_video(tmp_path / "hour.avi", 3600 * 4, rate=4, gop=40, size=(16, 16))
    with av.open(str(path)) as container:
        video = OpenVideo(container)
        assert video.seconds == pytest.approx(3600)
        times = [start + i / 4 + 0.125 for start in (1800.0, 3500.0) for i in range(8)]
        frames = video.frames_at(times, "L")
        assert [number_of(frame) for frame in frames] == [int(time * 4) % 20 for time in times]
        assert 16 <= video.decoded <= 2 * (40 + 8 + 1)
        # Times that are far from each other are looked for one by one.
        before = video.decoded
        assert [number_of(f) for f in video.frames_at([10.0, 1000.1, 3000.1], "L")] == [0, 0, 0]
        assert video.decoded - before <= 3 * 42


def test_frames_that_clips_share_are_decoded_once(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40)
    with av.open(str(path)) as container:
        video = OpenVideo(container)
        times = [start + i / 8 + 0.05 for start in (0.0, 0.5, 1.0) for i in range(8)]
        assert len(video.frames_at(times)) == 24
        # And one more to know when the last one ends.
        assert video.decoded == 17


def test_missing_pyav_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "a" / "0.mp4")
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: fail() if name == "av" else real(name, *rest))

    def fail():
        raise ImportError

    with pytest.raises(ValueError, match=r"pip install -e '\.\[video\]' from a clone"):
        VideoFolder(tmp_path)


def test_folder_of_videos_is_read_as_one_of_images(tmp_path):
    for split, name in (("train", "b/0.MP4"), ("train", "a/deep/1.webm"), ("train", "a/2.gif"), ("val", "b/3.mkv")):
        path = tmp_path / split / name
        write_video(path.with_suffix(path.suffix.lower()), 2).rename(path)
    (tmp_path / "train" / "a" / "notes.txt").write_text("")
    (tmp_path / "train" / "a" / "cover.jpg").write_bytes(b"")
    train = open_data("video", tmp_path, "train")
    assert train.class_names == ("a", "b")
    assert [(video.path[len(str(tmp_path)) :], label) for video, label in train] == [
        ("/train/a/2.gif", 0),
        ("/train/a/deep/1.webm", 0),
        ("/train/b/0.MP4", 1),
    ]
    assert described(train).startswith("3 videos in 2 classes; passed over 2 files that are no videos by their ending")
    val = open_data("video", tmp_path, "validation", class_names=train.class_names, mode="L")
    assert val[0] == (Video(str(tmp_path / "val" / "b" / "3.mkv"), "L"), 1)
    assert train.digest() != val.digest()
    with pytest.raises(ValueError, match=r"video folder .*dev does not exist; .*it holds train, val"):
        open_data("video", tmp_path, "dev")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"video folder .* must hold one folder of videos per class, got no video"):
        VideoFolder(tmp_path / "empty")
    write_video(tmp_path / "train" / "loose.mp4")
    with pytest.raises(ValueError, match=r"videos in .* must lie in one folder per class, got .*loose\.mp4"):
        VideoFolder(tmp_path / "train")
