"""Pictures in and video out, read back with independent decoders."""

import errno
import os

import av
import numpy as np
import pytest
from PIL import Image

from aapt.media.image import fit_image, load_image
from aapt.media.video import WholeFile, open_video, output_kind

HEIGHT, WIDTH = 80, 128


def video(count, height=HEIGHT, width=WIDTH):
    """Coloured blocks that move by two pixels a frame."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(count)])


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


def test_a_picture_is_cropped_around_its_centre(tmp_path):
    wide = np.zeros((160, 400, 3), np.uint8)
    wide[:, 72:328] = 200  # what a 128 x 80 crop keeps
    Image.fromarray(wide).save(tmp_path / "wide.png")
    frame, note = fit_image(load_image(tmp_path / "wide.png"), HEIGHT, WIDTH)
    assert frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8
    assert frame[:, 1:-1].min() > 190  # Lanczos rings by a level at the edges
    assert note == "400 x 160 picture cropped to 256 x 160 and resized to 128 x 80"


def test_a_picture_of_the_right_size_is_left_alone(tmp_path):
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


def test_grey_palette_alpha_and_deep_pictures_become_rgb(tmp_path):
    path = tmp_path / "picture.png"

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


def test_what_is_no_picture_is_said_in_one_line(tmp_path):
    Image.fromarray(video(1)[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("hello")
    for name, message in [
        ("none.png", "image: expected a PNG or JPEG file, got .*none.png: no such file"),
        ("text.png", "image: expected a PNG or JPEG file, got .*text.png: not a picture"),
        ("cut.jpg", "image: cannot read .*cut.jpg: .*truncated"),
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
    for out, message in [
        (
            tmp_path / "a.avi",
            "expected a .mp4 or .gif file, a folder ending in / or -, got .*a.avi",
        ),
        (tmp_path / "none" / "a.mp4", "expected a path in a folder that exists, got .*none/a.mp4"),
        (f"{tmp_path}/none/frames/", "expected a path in a folder that exists"),
        ("/dev/null", "expected a .mp4 or .gif file, a folder ending in / or -, got /dev/null"),
    ]:
        with pytest.raises(ValueError, match=message):
            output_kind(str(out))


class SmallDisk(WholeFile):
    """A file on a disk with room for `room` bytes."""

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
