"""The sizes that a video is encoded at, and the crop to them."""

import numpy as np
import pytest

from aapt.data.videos.buckets import Bucket, choose, crop

WIDE, TALL, SQUARE = Bucket(736, 416), Bucket(416, 736), Bucket(512, 512)


@pytest.mark.parametrize("text", ["736", "736x", "x416", "0x16", "-16x16", "1.5x2", "736X416", ""])
def test_a_bucket_is_width_x_height(text):
    assert str(Bucket.parse("736x416", 16)) == "736x416"
    with pytest.raises(ValueError, match="bucket: expected WIDTHxHEIGHT such as 736x416, got '"):
        Bucket.parse(text)
    with pytest.raises(ValueError, match="bucket: expected multiples of 16, got 736x410"):
        Bucket.parse("736x410", 16)


@pytest.mark.parametrize(
    "size, aspect, expected",
    [
        ((1920, 1080), 1.0, WIDE),
        ((1080, 1920), 1.0, TALL),
        ((640, 480), 1.0, SQUARE),  # 3/4 of the picture is kept, wide keeps 0.754
        ((720, 576), 16 / 11, WIDE),  # anamorphic: 16:9 on the screen
        ((333, 335), 1.0, SQUARE),
    ],
)
def test_the_bucket_that_crops_least(size, aspect, expected):
    kept = {}
    for bucket in (WIDE, TALL, SQUARE):
        ratio = size[0] * aspect / size[1] / (bucket.width / bucket.height)
        kept[bucket] = min(ratio, 1 / ratio)
    assert kept[expected] == max(kept.values()) or expected is SQUARE
    for order in ([WIDE, TALL, SQUARE], [SQUARE, TALL, WIDE]):
        (chosen,) = choose([(bucket,) for bucket in order], *size, aspect)
        assert kept[chosen] == pytest.approx(max(kept.values()), abs=0.01)


def test_of_one_shape_the_largest_that_is_not_enlarged():
    buckets = [(Bucket(160, 80),), (Bucket(320, 160),), (Bucket(640, 320),)]
    assert choose(buckets, 500, 250) == [(320, 160)]
    assert choose(buckets, 640, 320) == [(640, 320)]
    assert choose(buckets, 100, 50) == [(160, 80)]
    assert choose(buckets, 4000, 2000) == [(640, 320)]


def test_of_a_family_all_that_are_not_enlarged():
    wide = Bucket.parse_family("1280x720+736x416+640x352", 16)
    families = [wide, (TALL, Bucket(352, 640))]
    assert choose(families, 1920, 1080) == sorted(wide)
    assert choose(families, 1000, 562) == [(640, 352), (736, 416)]
    assert choose(families, 64, 36) == [(640, 352)]
    assert choose(families, 720, 1280) == [(352, 640), TALL]
    with pytest.raises(ValueError, match="bucket: expected multiples of 16, got 640x360"):
        Bucket.parse_family("1280x720+640x360", 16)


def test_crop_by_hand():
    part = crop(200, 100, Bucket(32, 32))  # the middle square
    assert part.scaled == (64, 32) and (part.left, part.top) == (16, 0)
    pixels = np.arange(32 * 64 * 3).reshape(32, 64, 3)
    assert np.array_equal(part.window(pixels), pixels[:, 16:48])
    np.testing.assert_allclose(part.points(np.array([[50, 0], [100, 25]])), [[0, 0], [16, 8]])
    # fx = 0.6 of 200 pixels is 120 of 100; the centre 10 pixels right of the middle stays there
    np.testing.assert_allclose(part.lens(np.array([0.6, 1.2, 0.55, 0.5])), [1.2, 1.2, 0.6, 0.5])


def test_crop_of_odd_sizes_stays_together():
    """The scaled size is rounded to whole pixels; points and lens use the rounded size."""
    part = crop(333, 101, Bucket(64, 32))
    assert part.scaled == (106, 32) and part.left == 21
    centre = part.points(np.array([[333 / 2, 101 / 2]]))[0]
    np.testing.assert_allclose(centre, [32, 16])
    np.testing.assert_allclose(part.lens(np.array([1.0, 1.0, 0.5, 0.5]))[2:], centre / (64, 32))
    point = part.points(np.array([[100.0, 10.0]]))[0]
    np.testing.assert_allclose(point, [100 * 106 / 333 - 21, 320 / 101])


def test_crop_of_wide_pixels():
    part = crop(100, 100, Bucket(64, 32), pixel_aspect=2.0)  # 200 x 100 on the screen
    assert part.scaled == (64, 32) and (part.left, part.top) == (0, 0)
    part = crop(100, 200, Bucket(64, 32), pixel_aspect=0.5)  # 50 x 200: enlarged, and the middle
    assert part.scaled == (64, 256) and (part.left, part.top) == (0, 112)
