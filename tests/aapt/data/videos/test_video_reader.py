"""Decoding: times, orientation, streams, fields, colours, and damaged files."""

import io
import os
from fractions import Fraction
from itertools import groupby, pairwise

import av
import numpy as np
import pytest
from av.stream import Disposition

from aapt.data.videos.colours import PRIMARIES, with_primaries_of_bt709
from aapt.data.videos.sample import Skipped
from aapt.data.videos.video_reader import DAY, MAX_GAP, at_rate, pictures
from aapt.media.video import open_video

from .videos import (
    ORIENTATIONS,
    corners,
    grey,
    numbers,
    plain,
    retimed,
    seen_corners,
    sound,
    streams,
    video,
    with_display_matrix,
)

NOISE = np.random.default_rng(0).integers(0, 255, (24, 32, 48, 3), dtype=np.uint8)


def read(data):
    """The pictures, and the reason why reading ended or None."""
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


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_pictures_are_shown_in_each_of_the_eight_orientations(name):
    matrix, expected = ORIENTATIONS[name]
    data = video(corners(3, 32, 48), codec="libx264", container="mp4", aspect=2)
    for picture in read(with_display_matrix(data, matrix))[0]:
        turned = matrix[0] == 0
        assert picture.size == ((32, 48) if turned else (48, 32))
        assert picture.pixel_aspect == (0.5 if turned else 2)
        assert seen_corners(picture.pixels(*picture.size)) == expected
        assert seen_corners(picture.pixels(16, 24)) == expected


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize("degrees, expected", [(90, "GWRB"), (180, "WBGR"), (-90, "BRWG")])
def test_containers_that_store_an_angle(container, degrees, expected):
    data = video(corners(2), codec="libx264", container=container, rotation=degrees)
    picture = read(data)[0][0]
    assert seen_corners(picture.pixels(*picture.size)) == expected


NONE, DEFAULT = Disposition(0), Disposition.default
VIDEO, PREVIEW = grey(6, 64, 96), grey(6, 32, 48)
COVER = corners(1, 200, 200)


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize(
    "given, expected",
    [
        ([("libx264", PREVIEW, NONE), ("libx264", VIDEO, DEFAULT)], (96, 64)),
        ([("libx264", PREVIEW, DEFAULT), ("libx264", VIDEO, DEFAULT)], (96, 64)),
        ([("libx264", VIDEO, NONE), ("libx264", PREVIEW, DEFAULT)], (48, 32)),
        ([("libx264", VIDEO, DEFAULT), ("mjpeg", COVER, Disposition.attached_pic)], (96, 64)),
    ],
)
def test_the_default_stream_is_read_and_of_several_the_largest(container, given, expected):
    found, error = read(streams(container, *given))
    assert error is None and len(found) == 6 and {p.size for p in found} == {expected}


@pytest.mark.parametrize("disposition", [NONE, DEFAULT])
def test_a_cover_that_is_the_first_track_is_not_the_video(disposition):
    """Matroska has no flag for covers."""
    data = streams("matroska", ("mjpeg", COVER, disposition), ("libx264", VIDEO, NONE))
    found, error = read(data)
    assert error is None and len(found) == 6 and found[0].size == (96, 64)


def test_a_song_with_a_cover_has_no_video():
    data = streams("mp4", ("mjpeg", COVER, Disposition.attached_pic))
    assert read(data) == ([], "no video: the file has no video stream")


TWO_FIELDS = {"flags": "+ilme+ildct", "b": "6000000"}


def moving_bar(count=24, interlaced=True):
    """MPEG-2: a bar that moves 8 pixels a frame. In interlaced video it has moved 4 in the rows of
    the second field, which is the upper one (PyAV cannot tell the encoder another order)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpeg") as output:
        stream = output.add_stream("mpeg2video", rate=25, options=TWO_FIELDS if interlaced else {})
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        for number in range(count):
            pixels = np.full((128, 160, 3), 40, np.uint8)
            for field in (0, 1):
                left = (8 * number + 4 * (interlaced and field == 0)) % 140
                pixels[field::2, left : left + 16] = 220
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def combing(picture):
    """Difference between neighbouring rows; rows of one field do not differ."""
    pixels = picture.pixels(*picture.size).astype(float).mean(axis=-1)
    return np.abs(np.diff(pixels, axis=0)).mean()


def test_interlaced_video_is_deinterlaced():
    with av.open(io.BytesIO(moving_bar())) as container:
        woven = list(container.decode(video=0))
    assert all(frame.interlaced_frame for frame in woven)
    assert np.abs(np.diff(woven[9].to_ndarray(format="gray").astype(float), axis=0)).mean() > 5
    found, error = read(moving_bar())
    assert error is None and [picture.index for picture in found] == list(range(24))
    assert [picture.time for picture in found] == pytest.approx([n / 25 for n in range(24)])
    assert max(map(combing, found)) < 1
    # At the time of the first field, in each picture
    lit = [(picture.pixels(160, 128)[64, :, 0] > 130).nonzero()[0].mean() for picture in found]
    np.testing.assert_allclose(lit, [(8 * n) % 140 + 7.5 for n in range(24)], atol=1.5)


def test_progressive_video_is_not_filtered():
    found, _ = read(moving_bar(interlaced=False))
    with av.open(io.BytesIO(moving_bar(interlaced=False))) as container:
        for picture, frame in zip(found, container.decode(video=0), strict=True):
            assert bytes(picture.frame.planes[0]) == bytes(frame.planes[0])


def test_damage_in_interlaced_video_costs_no_picture_before_it():
    data = moving_bar()
    found, _ = read(data[: len(data) // 2])
    with av.open(io.BytesIO(data[: len(data) // 2])) as container:
        good = 0
        for frame in container.decode(video=0):
            if frame.is_corrupt:
                break
            good += 1
    assert len(found) == good > 5


def test_colours_are_those_of_the_file(tmp_path):
    """A file of `aapt generate`, tagged BT.709. Read as BT.601, pure red would be (255, 24, 0)."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 180, 30)]
    with open_video(str(tmp_path / "a.mp4"), 32, 48, fps=24, scale=1) as writer:
        for colour in colours:
            writer.write(np.full((1, 32, 48, 3), colour, np.uint8))
    found, _ = read((tmp_path / "a.mp4").read_bytes())
    for picture, colour in zip(found, colours, strict=True):
        assert np.abs(picture.pixels(24, 16)[8, 12].astype(int) - colour).max() <= 4


PQ = {"color_primaries": 9, "color_trc": 16, "colorspace": 9, "color_range": 1}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "transfer SMPTE2084; convert"),
        ({"color_trc": 18}, "transfer ARIB_STD_B67; convert"),
        ({"color_trc": 8}, "transfer LINEAR; convert"),
        ({"color_trc": 14, "color_primaries": 11}, "primaries SMPTE431; convert"),
        ({"color_trc": 1, "color_primaries": 1, "colorspace": 8}, "matrix 8; convert"),
        ({"color_trc": 18, "colorspace": 14}, "transfer ARIB_STD_B67, matrix 14; convert"),
    ],
)
def test_high_dynamic_range_is_skipped_by_name(changes, expected):
    tags = PQ | changes
    parameters = "colorprim={color_primaries}:transfer={color_trc}:colormatrix={colorspace}"
    options = {"x265-params": "log-level=none:range=limited:" + parameters.format(**tags)}
    data = plain((500, 512, 512), form="yuv420p10le", codec="libx265", options=options, **tags)
    found, error = read(data)
    assert found == []
    assert error.startswith("hdr: expected colours of standard range, got " + expected)


@pytest.mark.parametrize("transfer", [1, 2, 4, 5, 6, 7, 11, 13, 14, 15])
def test_curves_of_standard_range_are_shown_alike(transfer):
    data = plain((126, 128, 128), color_trc=transfer, color_primaries=1, colorspace=1)
    found, error = read(data)
    assert error is None and abs(int(found[0].pixels(96, 64)[32, 48, 0]) - 128) <= 1


# From linear light of ITU-R BT.2020 to BT.709, as printed in ITU-R BT.2407 (section 2).
BT2020_TO_BT709 = [
    [1.6605, -0.5876, -0.0728],
    [-0.1246, 1.1329, -0.0083],
    [-0.0182, -0.1006, 1.1187],
]


def test_wide_primaries_are_converted():
    y, blue, red = 110, 120, 140
    scaled = (y - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = scaled[0] + 1.4746 * scaled[2], scaled[0] + 1.8814 * scaled[1]
    g = (scaled[0] - 0.2627 * r - 0.0593 * b) / 0.6780
    expected = 255 * (np.array(BT2020_TO_BT709) @ np.power([r, g, b], 2.4)) ** (1 / 2.4)
    tags = {"color_primaries": 9, "color_trc": 14, "colorspace": 9}
    found, error = read(plain((y, blue, red), **tags))
    assert error is None
    assert np.abs(found[0].pixels(96, 64)[32, 48] - expected).max() <= 2


@pytest.mark.parametrize("primaries", sorted(PRIMARIES))
def test_white_and_grey_stay_in_all_primaries(primaries):
    grey_levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    converted = with_primaries_of_bt709(grey_levels, primaries)
    assert np.abs(converted.astype(int) - grey_levels).max() <= 1
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert with_primaries_of_bt709(red, primaries)[0, 0, 0] >= 240


def yuv(rgb, red=0.2126, blue=0.0722):
    """Limited range, by the matrix of BT.709."""
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    return [
        round(16 + 219 * luma / 255),
        round(128 + 224 * (rgb[2] - luma) / (2 - 2 * blue) / 255),
        round(128 + 224 * (rgb[0] - luma) / (2 - 2 * red) / 255),
    ]


BT601 = {"red": 0.299, "blue": 0.114}


@pytest.mark.parametrize(
    "size, matrix, tags",
    [
        ((1280, 64), {}, {}),
        ((96, 720), {}, {}),
        ((1278, 718), BT601, {}),
        ((1280, 720), BT601, {"colorspace": 5}),
        ((1280, 720), BT601, {"colorspace": 6}),
        ((96, 64), {}, {"colorspace": 1}),
    ],
)
def test_untagged_video_is_of_bt709_from_720_lines_or_1280_columns_on(size, matrix, tags):
    colour = (200, 60, 30)
    found, _ = read(plain(yuv(colour, **matrix), size=size, count=2, **tags))
    assert np.abs(found[0].pixels(48, 32)[16, 24].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("form, luma", [("yuv420p", 126), ("yuvj420p", 128)])
def test_full_and_limited_range(form, luma):
    found, _ = read(plain((luma, 128, 128), form=form, color_range=2 if "j" in form else 1))
    assert np.abs(found[0].pixels(96, 64).astype(int) - 128).max() <= 1


CONTAINERS = [
    *(("avi", "mpeg4"), ("avi", "msmpeg4"), ("3gp", "mpeg4"), ("flv", "flv"), ("asf", "wmv2")),
    *(("vob", "mpeg2video"), ("mpegts", "libx265"), ("mpegts", "mpeg2video"), ("mov", "libx264")),
    *(("webm", "libvpx-vp9"), ("webm", "libvpx"), ("mp4", "libsvtav1")),
]


def scheduling() -> tuple[int, int] | None:
    """Policy and priority of this thread, where the system has such."""
    if not hasattr(os, "sched_getparam"):
        return None
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


@pytest.fixture
def usual_priority():
    """SVT-AV1 makes the thread that encodes a real-time one, if it may. Without this the tests that
    follow, and the processes they start, would take the cores from everything else."""
    before = scheduling()
    yield
    if scheduling() != before:
        policy, priority = before
        os.sched_setscheduler(0, policy, os.sched_param(priority))


@pytest.mark.parametrize("container, codec", CONTAINERS)
def test_containers_and_codecs(container, codec, usual_priority):
    found, error = read(video(corners(12, 96, 128), codec=codec, container=container))
    assert error is None and [picture.index for picture in found] == list(range(12))
    assert {seen_corners(p.pixels(*p.size)) for p in found} == {"RGBW"}
    steps = np.diff([picture.time for picture in found])
    np.testing.assert_allclose(steps, 1 / 24, atol=1.1e-3)


@pytest.mark.parametrize("aspect", [Fraction(1, 255), Fraction(4, 3), 100])
def test_pixels_that_are_not_square(aspect):
    data = video(grey(2, 128, 288), codec="libx264", container="mp4", aspect=aspect)
    picture = read(data)[0][0]
    assert picture.pixel_aspect == pytest.approx(float(aspect)) and picture.size == (288, 128)


def test_fragments_of_mp4():
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    data = video(grey(12), codec="mpeg4", container="mp4", muxer=fragments)
    found, error = read(data)
    assert b"moof" in data and error is None and len(found) == 12


def test_clocks_that_start_late_start_at_zero():
    found, _ = read(video(grey(4), codec="libx264", container="mpegts"))
    assert [p.time for p in found] == pytest.approx([n / 24 for n in range(4)])


def test_24_to_24_is_every_picture_once():
    """Matroska's clock has milliseconds: 42 instead of 41.67 must not change the picture."""
    assert shown(video(grey(30)), 24) == [(n / 24, n) for n in range(30)]


@pytest.mark.parametrize("rate", [6, 12, 15, 25, 30, Fraction(30000, 1001), 60, 120])
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
    """Pictures share times at 10^15 s: few are left, and each of them is shown once."""
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
    (b"", "cannot be decoded: at once: the file is empty"),
    (b"not a video" * 50, "cannot be decoded: at once: "),
    (sound(), "no video: the file has no video stream"),
]


@pytest.mark.parametrize("data, expected", BROKEN)
def test_files_without_video(tmp_path, data, expected):
    """Videos in memory and on the disk: errors differ if FFmpeg reads before the start."""
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
def test_a_file_that_ends_early_gives_its_whole_pictures(container, codec, error):
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
def test_a_video_ends_before_its_damage(first, last, expected):
    """A packet of zeros, and a packet with zeros in its middle. MPEG-4, because its encoder always
    writes the same file, and because H.264 hides most damage: arithmetic coding reads anything."""
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


def test_an_error_of_the_disk_is_raised():
    class Disk(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output error"):
        list(pictures(Disk(video(grey(24)))))
