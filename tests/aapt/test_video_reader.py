"""Decoding: times, orientation, and files that are not what they should be."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from aapt.data.sources import Skipped
from aapt.data.video_reader import at_rate, pictures
from aapt.media import open_video

from .videos import grey, numbers, sound, video

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
    data = video(grey(5), times=[0, 40, 300, 333, 375])
    assert [n for _, n in shown(data, 24)] == [0, 1, 1, 1, 1, 2, 2, 2, 3, 4]
    # at 0, 42, 83, 125, 167, 208, 250, 292, 333, 375 ms: 167 is 127 from 40 and 133 from 300


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
