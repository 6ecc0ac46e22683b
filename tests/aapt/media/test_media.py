"""Images in and video out, read back with independent decoders."""

import errno
import io
import os
import sys

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from aapt.media import image as images
from aapt.media.image import fit_image, load_image
from aapt.media.video import WholeFile, open_video, output_kind

HEIGHT, WIDTH = 80, 128


def video(count, height=HEIGHT, width=WIDTH):
    """Make coloured blocks that move by two pixels a frame."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(image, 2 * frame, axis=1) for frame in range(count)])


def decode(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [float(frame.pts * frame.time_base) for frame in frames]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times


def write(out, frames, scale=None):
    with open_video(str(out), *frames.shape[1:3], 24, scale) as writer:
        for start in range(0, len(frames), 4):
            writer.write(frames[start : start + 4])
    return writer


def test_an_image_is_cropped_around_its_centre(tmp_path):
    wide = np.zeros((160, 400, 3), np.uint8)
    wide[:, 72:328] = 200  # what a 128 x 80 crop keeps
    Image.fromarray(wide).save(tmp_path / "wide.png")
    frame, note = fit_image(load_image(tmp_path / "wide.png"), HEIGHT, WIDTH)
    assert frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8
    assert frame[:, 1:-1].min() > 190  # Lanczos rings by a level at the edges
    assert note == "400 x 160 image cropped to 256 x 160 and resized to 128 x 80"


def test_an_image_of_the_right_size_is_left_alone(tmp_path):
    Image.fromarray(video(1)[0]).save(tmp_path / "exact.png")
    frame, note = fit_image(load_image(tmp_path / "exact.png"), HEIGHT, WIDTH)
    assert note is None and np.array_equal(frame, video(1)[0])


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (129, 80), (64, 40)])
def test_any_size_fits(size):
    frame, note = fit_image(Image.new("RGB", size, (10, 200, 30)), HEIGHT, WIDTH)
    assert frame.shape == (HEIGHT, WIDTH, 3) and note.endswith("resized to 128 x 80")
    assert (frame == (10, 200, 30)).all()


def test_exif_orientation_is_respected(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: left becomes top
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "phone.jpg")
    assert upright.size == (20, 40)
    assert np.asarray(upright)[:18].min() > 240 and np.asarray(upright)[22:].max() < 15


def test_grey_palette_alpha_and_deep_images_become_rgb(tmp_path):
    path = tmp_path / "image.png"

    def corner(image):
        image.save(path)
        return load_image(path).getpixel((0, 0))

    red = Image.new("RGB", (4, 4), (200, 0, 0))
    assert corner(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert corner(red.quantize(2)) == (200, 0, 0)
    assert corner(Image.new("RGBA", (4, 4), (200, 0, 0, 0))) == (255, 255, 255)
    assert corner(Image.new("RGBA", (4, 4), (200, 0, 0, 255))) == (200, 0, 0)
    assert corner(Image.new("LA", (4, 4), (0, 128))) == (127, 127, 127)
    assert corner(Image.fromarray(np.full((4, 4), 0x8001, np.uint16))) == (128, 128, 128)
    assert corner(Image.new("1", (4, 4), 1)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "pgm"])
def test_sixteen_bits_are_scaled_whatever_mode_pillow_gives_them(tmp_path, monkeypatch, suffix):
    path, grey = tmp_path / f"deep.{suffix}", np.array([[0x0000, 0x40FF, 0xFFFF]], np.uint16)
    if suffix == "png":
        Image.fromarray(grey).save(path)
        # Older Pillows open it as 32-bit integers.
        monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    else:
        path.write_bytes(b"P5 3 1 65535\n" + grey.astype(">u2").tobytes())
    with Image.open(path) as image:
        assert image.mode == "I"
    assert np.asarray(load_image(path))[0].tolist() == [[0] * 3, [0x40] * 3, [0xFF] * 3]


@pytest.mark.parametrize("dtype, kind", [(np.int32, "integers"), (np.float32, "floats")])
def test_more_than_sixteen_bits_are_refused_by_name(tmp_path, dtype, kind):
    Image.fromarray(np.full((2, 2), 7, dtype)).save(tmp_path / "deep.tif")
    message = f"image: expected 8 or 16 bits per channel, got .*deep.tif: 32-bit {kind}; save it as"
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "deep.tif")


def test_an_embedded_colour_profile_is_converted_to_srgb(tmp_path):
    """Check Adobe RGB (1998), made here from its primaries, against its published matrix."""
    image = Image.new("RGB", (2, 2), (100, 180, 60))
    image.save(tmp_path / "a.png", icc_profile=adobe_rgb())
    linear = (np.array([100, 180, 60]) / 255) ** (563 / 256)
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    to_srgb = [
        [3.24097, -1.53738, -0.49861],
        [-0.96924, 1.87597, 0.04156],
        [0.05563, -0.20398, 1.05697],
    ]
    light = np.clip(np.array(to_srgb) @ np.array(to_xyz) @ linear, 0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    found = np.asarray(load_image(tmp_path / "a.png"))[0, 0]
    assert np.abs(found - expected).max() <= 1.5 and found[0] < 60
    image.save(tmp_path / "b.png", icc_profile=b"no profile")
    image.save(
        tmp_path / "c.png",
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    for name in "bc":
        assert load_image(tmp_path / f"{name}.png").getpixel((0, 0)) == (100, 180, 60)


def adobe_rgb():
    """Write an ICC profile (version 2) of Adobe RGB's primaries, white and gamma."""

    def s15(*values):
        return b"".join(
            int(round(value * 65536)).to_bytes(4, "big", signed=True) for value in values
        )

    def xyz(*values):
        return b"XYZ " + bytes(4) + s15(*values)

    gamma = b"curv" + bytes(4) + (1).to_bytes(4, "big") + (563).to_bytes(2, "big") + bytes(2)
    name = b"desc" + bytes(4) + (6).to_bytes(4, "big") + b"Adobe\0" + bytes(78)
    tags = {  # primaries adapted to D50, from the Adobe RGB (1998) specification
        b"desc": name + bytes(-len(name) % 4),
        b"wtpt": xyz(0.95045, 1.0, 1.08905),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        **{curve: gamma for curve in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, body, start = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    header = (start + len(body)).to_bytes(4, "big") + b"lcms" + bytes.fromhex("02400000")
    header += b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + s15(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + body


def test_metadata_of_any_length_is_no_reason_to_refuse(tmp_path):
    """Two MiB of text, as ComfyUI's workflows have, and of a colour profile, compressed."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (2 << 20), zip=True)
    info.add_itxt("prompt", "y" * (2 << 20), zip=True)
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "text.png", pnginfo=info, icc_profile=bytes(2 << 20))
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    assert load_image(tmp_path / "text.png").getpixel((0, 0)) == (255, 0, 0)
    assert limits == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)  # as they were


def test_images_are_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's: 200 would be refused
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    Image.new("RGB", (25, 20), "red").save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png").size == (25, 20)
    Image.new("RGB", (26, 20), "red").save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="image: expected at most 500 pixels, got more in .*huge"):
        load_image(tmp_path / "huge.png")
    assert images.MAX_PIXELS == 500


def test_what_is_no_image_is_said_in_one_line(tmp_path):
    Image.fromarray(video(1)[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait without end
    for name, message in [
        ("none.png", "image: expected a PNG or JPEG file, got .*none.png: no such file"),
        ("text.png", "image: expected a PNG or JPEG file, got .*text.png: not an image"),
        ("pipe.png", "image: expected a PNG or JPEG file, got .*pipe.png: a pipe or a device"),
        ("/dev/zero", "image: expected a PNG or JPEG file, got /dev/zero: a pipe or a device"),
        ("cut.jpg", "image: cannot read .*cut.jpg: .*truncated"),
        (300 * "a", "image: cannot read .*aaa: File name too long"),
        ("whole.jpg/a", "image: cannot read .*whole.jpg/a: Not a directory"),
        (".", "image: cannot read .*: Is a directory"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_mp4_holds_every_frame_in_time_and_colour(tmp_path):
    frames = video(29)
    writer = write(tmp_path / "a.mp4", frames)
    assert (writer.frames, writer.width, writer.height) == (29, 512, 320)
    seen, times = decode(tmp_path / "a.mp4")
    assert seen.shape == (29, 320, 512, 3)
    assert times == pytest.approx([n / 24 for n in range(29)])
    centres = seen[:, 18::32, 18::32]  # of the blocks of frame 0, where chroma is not mixed
    assert np.abs(centres[0].astype(int) - frames[0][4::8, 4::8]).mean() < 6
    errors = np.abs(seen[:, 2::4, 2::4].astype(int) - frames).mean((1, 2, 3))
    assert errors.max() < 12  # a frame out of order is ten times as far
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.frames == 29  # an index: a plain mp4, not fragments
    assert boxes(tmp_path / "a.mp4") == ["ftyp", "moov", "free", "mdat"]  # the index first
    assert os.listdir(tmp_path) == ["a.mp4"]


def boxes(path):
    """List the types of an mp4's outer boxes."""
    found, data = [], io.BytesIO(path.read_bytes())
    while head := data.read(8):
        found.append(head[4:].decode())
        data.seek(int.from_bytes(head[:4], "big") - 8, os.SEEK_CUR)
    return found


def test_an_mp4_without_room_for_a_copy_keeps_its_index_behind(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    write(tmp_path / "a.mp4", video(29))
    assert boxes(tmp_path / "a.mp4") == ["ftyp", "free", "mdat", "moov"]
    assert len(decode(tmp_path / "a.mp4")[0]) == 29


def test_an_mp4_keeps_the_link_and_the_rights_it_was_written_through(tmp_path):
    (tmp_path / "real.mp4").touch(mode=0o640)
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    write(tmp_path / "link.mp4", video(5))
    assert (tmp_path / "link.mp4").is_symlink() and len(decode(tmp_path / "real.mp4")[0]) == 5
    assert (tmp_path / "real.mp4").stat().st_mode & 0o777 == 0o640


def test_mp4_of_odd_size_is_padded_to_even(tmp_path):
    write(tmp_path / "a.mp4", video(2, 80, 128)[:, :79, :127], scale=1)
    assert decode(tmp_path / "a.mp4")[0].shape == (2, 80, 128, 3)


def test_mp4_that_was_never_closed_plays_to_its_last_second(tmp_path):
    writer = open_video(str(tmp_path / "a.mp4"), HEIGHT, WIDTH, 24)
    writer.write(video(100))
    (tmp_path / "killed.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    writer.close()
    with av.open(str(tmp_path / "killed.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert 48 <= len(packets) <= 100


def test_gif_holds_every_frame_at_the_right_speed_and_loops(tmp_path):
    frames = video(25)
    write(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (25, (256, 160), 0)
        durations = []
        for number, frame in enumerate(frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            seen = np.asarray(gif.convert("RGB"))[::2, ::2].astype(int)
            assert np.abs(seen - frame).mean() < 12
    assert set(durations) == {40, 50} and sum(durations) == pytest.approx(25_000 / 24, abs=5)


def test_png_folder_holds_the_very_pixels(tmp_path):
    frames = video(5)
    write(f"{tmp_path}/new/", frames)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [f"frame_{number:05d}.png" for number in range(5)]
    for name, frame in zip(names, frames):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / name)), frame)
    with pytest.raises(ValueError, match="expected a folder without frames, got .*new: has frame_"):
        output_kind(str(tmp_path / "new"))
    write(tmp_path / "large", frames, scale=2)
    assert Image.open(tmp_path / "large" / "frame_00004.png").size == (256, 160)


def test_output_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    kinds = {"a.mp4": "mp4", "a.MP4": "mp4", "a.gif": "gif", "a": "png", "a.b/": "png", ".": "png"}
    for out, kind in {**kinds, "folder.mp4": "png", "-": "raw"}.items():
        assert output_kind(out) == kind, out


def test_impossible_outputs_are_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    for out, message in [
        (
            tmp_path / "a.avi",
            "expected a .mp4 or .gif file, a folder ending in / or -, got .*a.avi",
        ),
        (tmp_path / "none" / "a.mp4", "expected a path in a folder that exists, got .*none/a.mp4"),
        (f"{tmp_path}/none/frames/", "expected a path in a folder that exists"),
        ("/dev/null", "expected a .mp4 or .gif file, a folder ending in / or -, got /dev/null"),
        (tmp_path / (300 * "a"), "cannot write .*aaa: File name too long"),
        (tmp_path / "file" / "a.mp4", "expected a path in a folder that exists"),
        (tmp_path / "pipe.mp4", "expected a file, got .*pipe.mp4: a pipe or a device"),
        ("", "expected a path, got an empty one; ./ is this folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            output_kind(str(out))


def test_raw_video_needs_an_open_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ValueError, match="out: expected an open standard output for -, got a clos"):
        output_kind("-")


class SmallDisk(WholeFile):
    """Stand in for a file on a disk with room for `room` bytes."""

    room = 0

    def _write_some(self, data):
        free = self.room - self.tell()
        if free <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super()._write_some(data[:free])


@pytest.mark.parametrize("room", [100, 2_000, 60_000, 120_000])
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_full_disk_leaves_whole_frames_only(tmp_path, monkeypatch, suffix, room):
    monkeypatch.setattr("aapt.media.video.WholeFile", SmallDisk)
    monkeypatch.setattr(SmallDisk, "room", room)
    out, frames = tmp_path / f"a.{suffix}", video(120)
    writer = open_video(str(out), HEIGHT, WIDTH, 24)
    with pytest.raises(OSError, match="No space left"), writer:
        writer.write(frames)
    if room < 5_000:
        assert writer.frames == 0 and not out.exists()
        return
    assert 0 < writer.frames < 120 and out.stat().st_size <= room
    if suffix == "mp4":
        assert len(decode(out)[0]) == writer.frames
    else:
        with Image.open(out) as gif:
            assert gif.n_frames == writer.frames
            gif.seek(gif.n_frames - 1)
            gif.load()


def test_disk_that_fills_up_while_closing(tmp_path, monkeypatch):
    monkeypatch.setattr("aapt.media.video.WholeFile", SmallDisk)
    monkeypatch.setattr(SmallDisk, "room", 4_000)
    writer = open_video(str(tmp_path / "a.mp4"), HEIGHT, WIDTH, 24)
    writer.write(video(4))  # still in the encoder
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer.frames == 0 and not (tmp_path / "a.mp4").exists()


def test_full_disk_leaves_no_half_png(tmp_path, monkeypatch):
    save = Image.Image.save

    def full(image, path):
        save(image, path)
        if path.name == "frame_00003.png":
            os.truncate(path, 50)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    writer = open_video(f"{tmp_path}/", HEIGHT, WIDTH, 24)
    with pytest.raises(OSError, match="No space left"), writer:
        writer.write(video(5))
    assert writer.frames == 3 == len(list(tmp_path.iterdir()))
