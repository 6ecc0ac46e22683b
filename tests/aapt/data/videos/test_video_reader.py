"""Decoding: times, orientation, and files that are not what they should be."""

import io
from fractions import Fraction
from itertools import groupby, pairwise

import av
import numpy as np
import pytest

from aapt.data.videos.sources import Skipped
from aapt.data.videos.video_reader import DAY, MAX_GAP, at_rate, pictures
from aapt.media.video import open_video

from .videos import grey, numbers, retimed, sound, video

NOISE = np.random.default_rng(0).integers(0, 255, (24, 32, 48, 3), dtype=np.uint8)
CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = 200, 100, 50


def read(data):
    """(pictures, the reason reading ended or None)."""
    found = []
    try:
        found.extend(pictures(io.BytesIO(data)))  # keeps what came before an error
    except Skipped as skipped:
        return found, str(skipped)
    return found, None


def shown(data, fps, start=0.0, end=float("inf")):
    """[(time, number of the picture)]"""
    found = at_rate(pictures(io.BytesIO(data)), fps, start, end)
    return [(time, numbers(picture.pixels(*picture.size))) for time, picture in found]


def test_pictures_have_times_and_numbers():
    found, error = read(video(grey(6)))
    assert error is None and numbers([p.pixels(*p.size) for p in found]) == list(range(6))
    assert [p.index for p in found] == list(range(6))
    assert [p.time for p in found] == pytest.approx([n / 24 for n in range(6)], abs=6e-4)
    assert found[0].size == (48, 32) and found[0].pixel_aspect == 1


@pytest.mark.parametrize("height, width", [(33, 17), (1, 1), (2, 95)])
def test_odd_sizes(height, width):
    found, _ = read(video(grey(2, height, width)))
    assert found[1].size == (width, height) and found[1].pixels(*found[1].size).shape == (
        height,
        width,
        3,
    )


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotated_videos_are_turned_upright(rotation):
    data = video([CORNERS] * 2, codec="libx264", container="mp4", rotation=rotation, aspect=2)
    picture = read(data)[0][0]
    expected = np.rot90(CORNERS, rotation // 90)  # anticlockwise, as the file asks
    assert picture.size == expected.shape[1::-1]
    assert picture.pixel_aspect == (0.5 if rotation in (90, -90) else 2)
    for row in (0.2, 0.8):
        for column in (0.2, 0.8):
            y, x = int(row * expected.shape[0]), int(column * expected.shape[1])
            assert abs(int(picture.pixels(*picture.size)[y, x, 0]) - int(expected[y, x, 0])) < 8
    small = picture.pixels(*np.floor_divide(picture.size, 2)).astype(int)
    assert np.abs(small[4::8, 4::8, 0] - expected[8::16, 8::16, 0]).max() < 16


def test_colours_are_those_of_the_file(tmp_path):
    """Tagged BT.709, as `aapt generate` writes it; as BT.601 pure red would be (255, 24, 0)."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 180, 30)]
    with open_video(str(tmp_path / "a.mp4"), 32, 48, fps=24, scale=1) as writer:
        for colour in colours:
            writer.write(np.full((1, 32, 48, 3), colour, np.uint8))
    found, _ = read((tmp_path / "a.mp4").read_bytes())
    for picture, colour in zip(found, colours, strict=True):
        assert np.abs(picture.pixels(24, 16)[8, 12].astype(int) - colour).max() <= 4


def test_clocks_that_start_late_start_at_zero():
    found, _ = read(video(grey(4), codec="libx264", container="mpegts"))
    assert [p.time for p in found] == pytest.approx([n / 24 for n in range(4)])


def test_24_to_24_is_every_picture_once():
    """Matroska's clock has milliseconds: 42 is not 41.67, and is the same picture."""
    assert shown(video(grey(30)), 24) == [(n / 24, n) for n in range(30)]


@pytest.mark.parametrize("rate", [12, 25, 30, Fraction(30000, 1001), 60])
def test_other_rates_show_the_nearest_picture(rate):
    count = int(rate)
    found = shown(video(grey(count), rate=rate), 24)
    times = [n / float(rate) for n in range(count)]
    for number, (time, picture) in enumerate(found):
        assert time == number / 24
        assert abs(times[picture] - time) <= min(abs(t - time) for t in times) + 1.1e-3
    assert len(found) == int((times[-1] + 0.5 / 24) * 24) + 1


def test_a_variable_rate_follows_the_clock():
    data = video(grey(5), times=[0, 40, 230, 290, 333])
    assert [n for _, n in shown(data, 24)] == [0, 1, 1, 1, 2, 2, 2, 3, 4]
    # at 0, 42, 83, 125, 167, 208, 250, 292, 333 ms: 125 is 85 from 40 and 105 from 230


EVEN = [round(1000 * n / 24) for n in range(12)]
LOSSLESS = video(grey(12))
MP4 = video(grey(12), codec="mpeg4", container="mp4")


def takes(times, data=LOSSLESS, container="matroska"):
    """The pictures of each take, and the time at which each take begins."""
    found, error = read(retimed(data, times, container))
    assert error is None and all(a.time < b.time for a, b in pairwise(found))
    parts = [list(part) for _, part in groupby(found, key=lambda picture: picture.take)]
    assert [part[0].take for part in parts] == list(range(len(parts)))
    return [[p.index for p in part] for part in parts], [part[0].time for part in parts]


def test_a_clock_may_stand_still_or_fall_back_a_little():
    times = [0, 40, 40, 80, 60, 120, 160, 200, 240, 280, 320, 360]
    assert takes(times) == ([[0, 1, 3, 5, 6, 7, 8, 9, 10, 11]], [0.0])


@pytest.mark.parametrize("fps", [5, 24])
def test_below_5_fps_every_picture_is_a_take(fps):
    assert takes([n * 1000 / fps for n in range(12)]) == ([list(range(12))], [0.0])
    parts, _ = takes([n * 210 for n in range(12)])
    assert parts == [[n] for n in range(12)]


JUMPS = [("matroska", LOSSLESS, s) for s in (0.3, 1e4, 2e6, 2**62 // 1000)]
JUMPS += [("mp4", MP4, s) for s in (0.3, 1e4)]


@pytest.mark.parametrize("container, data, seconds", JUMPS)
@pytest.mark.parametrize("place", [6, 10])
def test_a_wrong_time_costs_its_picture(container, data, seconds, place):
    for time in (EVEN[place] + round(1000 * seconds), 0):
        times = EVEN[:place] + [time] + EVEN[place + 1 :]
        kept = [n for n in range(12) if n != place]
        assert takes(times, data, container) == ([kept], [0.0])


@pytest.mark.parametrize("container, data, seconds", [jump for jump in JUMPS if jump[2] < 1e9])
def test_a_jump_begins_a_take(container, data, seconds):
    times = EVEN[:6] + [time + round(1000 * seconds) for time in EVEN[6:]]
    parts, starts = takes(times, data, container)
    assert parts == [list(range(6)), list(range(6, 12))]
    pause = seconds + 1 / 24 if seconds < DAY else MAX_GAP
    assert starts == [0.0, pytest.approx(5 / 24 + pause, abs=1e-3)]


def test_frames_after_a_jump_begin_with_its_first_picture():
    """The last frame of a take is at most half a frame after its last picture."""
    times = EVEN[:6] + [time + 20_000_007 for time in EVEN[6:]]
    found = shown(retimed(LOSSLESS, times), 24)
    assert [n for _, n in found] == list(range(12))
    expected = [n / 24 for n in range(6)] + [20_000.257 + n / 24 for n in range(6)]
    np.testing.assert_allclose([time for time, _ in found], expected, rtol=0, atol=1e-6)
    assert shown(retimed(LOSSLESS, times), 24, start=3.0)[0] == (20_000.257, 6)
    assert [n for _, n in shown(retimed(LOSSLESS, times), 24, end=9.0)] == list(range(6))


def test_a_clock_of_64_bits_ends():
    """At 10^15 s its pictures share times: few are left, and each of them is shown once."""
    times = EVEN[:6] + [time + 2**62 for time in EVEN[6:]]
    assert [n for _, n in shown(retimed(LOSSLESS, times), 24)] == list(range(7))
    times[8:] = EVEN[8:]
    assert [n for _, n in shown(retimed(LOSSLESS, times), 24)] == [*range(7), *range(8, 12)]


@pytest.mark.parametrize("container, data", [("matroska", LOSSLESS), ("mp4", MP4)])
def test_joined_files_are_takes_of_one_clock(container, data):
    times = [*EVEN[:6], *EVEN[:6]]
    parts, starts = takes(times, data, container)
    assert parts == [list(range(6)), list(range(6, 12))]
    assert starts == [0.0, pytest.approx(EVEN[5] / 1000 + MAX_GAP, abs=1e-3)]
    first_wrong = [5_000_000, *EVEN[1:]]
    assert takes(first_wrong)[0] == [[0], list(range(1, 12))]
    last_wrong = [*EVEN[:11], 5_000_000]
    assert takes(last_wrong)[0] == [list(range(11)), [11]]
    two_wrong = [*EVEN[:5], 5_000_000, 5_000_042, *EVEN[7:]]
    assert takes(two_wrong)[0] == [list(range(5)), [5, 6], list(range(7, 12))]


def test_pictures_without_times_follow_at_the_rate_of_the_file():
    found, _ = read(video(grey(4), codec="libx264", container="h264"))
    with av.open(io.BytesIO(video(grey(4), codec="libx264", container="h264"))) as container:
        assert {packet.pts for packet in container.demux(video=0)} == {None}
        rate = float(container.streams.video[0].average_rate)
    assert [p.time for p in found] == pytest.approx([n / rate for n in range(4)])
    assert {p.take for p in found} == {0}


def test_a_span_of_a_video():
    found = shown(video(grey(24)), 24, start=0.25, end=0.5 + 1e-9)
    assert [n for _, n in found] == list(range(6, 13)) and found[0][0] == 0.25
    assert shown(video(grey(4)), 24, start=5.0) == []


BROKEN = [
    (b"", "cannot be decoded: at once: "),
    (b"not a video" * 50, "cannot be decoded: at once: "),
    (sound(), "no video: the file has no video stream"),
]


@pytest.mark.parametrize("data, expected", BROKEN)
def test_files_without_video(tmp_path, data, expected):
    """In memory and on the disk, which refuses to be read from before its start otherwise."""
    (tmp_path / "a").write_bytes(data)
    for file in (io.BytesIO(data), (tmp_path / "a").open("rb")):
        with file, pytest.raises(Skipped, match="^" + expected):
            list(pictures(file))


@pytest.mark.parametrize(
    "container, codec, error",
    [
        ("matroska", "ffv1", None),  # the file ends between two pictures
        ("mpegts", "libx264", "cannot be decoded: after 0.417 s: a damaged picture"),
        ("mp4", "libx264", "cannot be decoded: at once: "),  # its index is at the end
    ],
)
def test_a_file_that_ends_early_gives_what_is_whole(container, codec, error):
    data = video(NOISE, codec=codec, container=container)
    whole, _ = read(data)
    found, got = read(data[: len(data) // 2])
    assert got is None if error is None else got.startswith(error)
    assert len(found) == (0 if container == "mp4" else 11)
    for a, b in zip(whole, found):
        assert np.array_equal(a.pixels(*a.size), b.pixels(*b.size))


@pytest.mark.parametrize(
    "first, last, expected", [(0.0, 1.0, "Invalid data found"), (0.5, 0.6, "a damaged picture")]
)
def test_damage_ends_a_video_where_it_is(first, last, expected):
    """A packet of zeros, and one with some in its middle. MPEG-4 because its encoder writes the
    same file every time; H.264 hides most damage, as arithmetic coding reads anything."""
    data = bytearray(video(NOISE, codec="mpeg4", container="mp4"))
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
    whole, _ = read(bytes(data))
    span = slice(*(packet.pos + int(share * packet.size) for share in (first, last)))
    data[span] = bytes(span.stop - span.start)
    found, error = read(bytes(data))
    assert error.startswith(f"cannot be decoded: after {11 / 24:.3f} s: {expected}")
    for a, b in zip(whole[:12], found, strict=True):
        assert np.array_equal(a.pixels(*a.size), b.pixels(*b.size))


def test_an_error_of_the_disk_is_no_error_of_the_video():
    class Disk(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error"):
        list(pictures(Disk(video(grey(24)))))
