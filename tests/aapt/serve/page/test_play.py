"""The page, played in a real browser without a window: what it shows is what the server made."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.serve.protocol import REDO
from aapt.streaming.actions import Replay, Walk

from ..conftest import HANGS, Running
from ..test_prompt_start import save
from .tab import decoded, page_end, received, turn, warmth


def test_plays_from_the_first_key_and_asks_no_other_host(page, tiny_world):
    assert page.text("status") == "Ready" and page.tab.is_visible("#hint")
    first = page.picture()
    assert first.std() > 20  # the sample, before any key
    page.hold("w", until=8)
    assert page.text("status") == "Live"
    page.pause()
    assert np.abs(page.picture().astype(int) - first).mean() > 5
    assert page.text("play") == "" and page.tab.get_attribute("#play", "aria-label") == "Play"
    assert page.hosts == {tiny_world.address}
    assert page.tab.is_hidden("#hint")


@pytest.mark.parametrize("key, sign", [("d", -1), ("a", 1), ("ArrowRight", -1)])
def test_keys_turn_the_camera_on_pixels(page, key, sign):
    """Turning right moves the picture to the left."""
    page.hold(key, until=4)
    shown = [received(page, step) for step in range(5)]
    moves = [turn(a, b) for a, b in zip(shown, shown[1:])]
    assert np.sign(np.median([move for move in moves if move])) == sign, moves


def test_a_dragged_stick_turns_and_lets_go(page):
    box = page.tab.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.tab.mouse.move(x, y)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 90, y, steps=4)
    assert page.tab.is_visible("#stick")
    page.wait_step(2)
    assert turn(received(page, 0), received(page, 2)) < 0
    page.tab.mouse.up()
    assert page.tab.is_hidden("#stick")
    page.wait(lambda: page.inputs()[-1]["yaw"] == 0)
    assert max(message["yaw"] for message in page.inputs()) == 1


PAD = """() => {
  const pad = {axes: [0, 0, 0, 0], buttons: Array.from({length: 16}, () => ({pressed: false}))};
  window.pad = pad;
  navigator.getGamepads = () => [null, pad];
  dispatchEvent(new Event("gamepadconnected"));
}"""


def test_a_gamepad_steers_and_plays(page):
    """A pad as the browser reports it: the left stick walks and turns, button 0 plays."""
    page.tab.evaluate(PAD)
    page.tab.evaluate("pad.axes[0] = 0.9")
    page.wait_step(3)
    assert turn(received(page, 0), received(page, 3)) < 0
    page.tab.evaluate("pad.axes[0] = 0.05; pad.axes[1] = -1")  # within the dead zone; ahead
    page.wait(lambda: (page.inputs()[-1]["yaw"], page.inputs()[-1]["forward"]) == (0, 1))
    page.tab.evaluate("pad.buttons[0].pressed = true")
    page.wait_state("paused")
    page.tab.evaluate("navigator.getGamepads = () => [null, null]; pad.buttons[0].pressed = false")
    page.wait(lambda: page.inputs()[-1]["forward"] == 0)


def test_tall_video_is_decoded_by_the_browser(open_page, tiny_world):
    running = Running(tiny_world.play.generator, "tiny-world", h264_above=1)
    try:
        page = open_page(running).wait_state("ready")
        module = "import('./static/decoding.js')"
        if "h264" not in page.tab.evaluate(f"{module}.then((m) => m.decodableFormats())"):
            pytest.skip("needs a browser with H.264")
        page.hold("w", until=6)
        page.pause()
        header, _ = page.frames[-1]
        assert header.format == 2
        walk = next(iter(running.play.sessions.values())).place.walk
        replay = Replay(tiny_world.play.generator, walk)
        last = [replay.step(step)[-1] for step in walk.path(0, page.step)][-1]
        page.wait(lambda: np.abs(page.picture().astype(int) - last).mean() < 6, "the last frame")
        page.seek(page.step - 2)
    finally:
        page.context.close()
        running.stop()


def test_losing_the_focus_lets_the_keys_go(page):
    page.tab.keyboard.down("w")
    page.wait_step(2)
    assert "held" in page.tab.get_attribute("#keys [data-key=w]", "class")
    assert page.inputs()[-1]["forward"] == 1
    page.tab.evaluate("dispatchEvent(new Event('blur'))")
    page.wait(lambda: page.inputs()[-1]["forward"] == 0)
    assert "held" not in (page.tab.get_attribute("#keys [data-key=w]", "class") or "")
    count = len(page.inputs())
    page.tab.keyboard.up("w")  # of a key that is no longer held
    page.wait_step(page.step + 2)
    assert len(page.inputs()) == count


def test_a_prompt_changes_the_theme(page):
    page.hold("w", until=3)
    warm = warmth(page.picture())
    page.tab.click("#themes button:has-text('snowy')")
    assert page.tab.input_value("#prompt") == "snowy peaks in winter"
    page.wait(lambda: warmth(page.picture()) < warm - 60, "snow")
    page.wait(lambda: page.tab.query_selector("#tree .prompts"), "the mark of the prompt")
    # Written by hand, sent by Enter; the keys are the world's again.
    page.tab.keyboard.press("p")
    page.tab.keyboard.type("desert dunes at sunset")
    page.tab.keyboard.press("Enter")
    assert page.tab.evaluate("document.activeElement.id") == "stage"
    page.wait(lambda: warmth(page.picture()) > 0, "the desert")


def halves():
    """A picture that is red on the left and blue on the right, as a PNG."""
    pixels = np.zeros((160, 256, 3), np.uint8)
    pixels[:, :128] = 200, 40, 40
    pixels[:, 128:] = 40, 60, 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shows_halves(page):
    picture = page.picture()
    return warmth(picture[:, :50]) > 60 and warmth(picture[:, 78:]) < -60


def test_a_world_begins_from_an_uploaded_picture(page):
    assert not shows_halves(page)
    page.tab.click("#new")
    page.tab.set_input_files(
        "#upload", {"name": "halves.png", "mimeType": "image/png", "buffer": halves()}
    )
    page.tab.wait_for_selector("#images .chosen")
    page.tab.fill("#world-prompt", "pink candy land")
    page.tab.fill("#seed", "7")
    page.tab.click("#start")
    page.wait(lambda: shows_halves(page), "the uploaded picture")
    page.wait_state("ready")
    assert page.tab.input_value("#prompt") == "pink candy land"
    page.tab.click("#new")
    assert page.tab.input_value("#seed") == "7"


@pytest.mark.parametrize("event, field", [("paste", "clipboardData"), ("drop", "dataTransfer")])
def test_a_world_begins_from_a_pasted_or_dropped_picture(page, event, field):
    page.tab.evaluate(
        """([kind, field, bytes]) => {
            const carrier = new DataTransfer();
            carrier.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
            const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
            dispatchEvent(new Kind(kind, { [field]: carrier, cancelable: true }));
        }""",
        [event, field, list(halves())],
    )
    page.wait(lambda: shows_halves(page), "the picture")


def test_a_file_that_is_no_picture_is_refused_in_words(open_page, tiny_world):
    page = open_page(tiny_world, faults=True).wait_state("ready")
    page.tab.click("#new")
    page.tab.set_input_files(
        "#upload", {"name": "no.png", "mimeType": "image/png", "buffer": b"not a picture"}
    )
    page.tab.wait_for_selector("#upload-error:visible")
    assert "expected" in page.text("upload-error")


def test_a_recording_plays(page, tmp_path):
    page.hold("w", until=2)
    page.tab.keyboard.press("g")
    page.wait(lambda: page.tab.is_visible("#recording"))
    start = page.step
    page.wait_step(start + 6)
    with page.tab.expect_download(timeout=1000 * HANGS) as download:
        page.tab.keyboard.press("g")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    with av.open(path) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert path.suffix == ".mp4" and len(pictures) >= 4 * 6
    assert np.abs(pictures[-1].astype(int) - pictures[0]).mean() > 1


def test_rewinding_and_the_same_keys_give_the_same_frames(page):
    page.hold("w", until=12)
    page.pause()
    page.seek(5)
    assert page.text("past-by") == f"{(page_end(page) - 5) / 6:.1f} s in the past."
    page.hold("w", until=11)
    page.pause()
    assert page.place[0] == 1
    both = [step for step in range(6, 12) if page.images(1, step) and page.images(0, step)]
    assert both  # a busy machine drops some
    for step in both:
        assert page.images(1, step) == page.images(0, step), step
    # The picture on the page is that of the step: its last frame, decoded.
    page.seek(9)
    page.wait(lambda: page.images(1, 9))
    page.wait(lambda: np.abs(page.picture().astype(int) - decoded(page, 1, 9)).mean() < 3)


def test_scrubbing_shows_the_past_before_the_server_answers(page):
    page.hold("w", until=10)
    page.pause()
    box = page.tab.locator("#timeline").bounding_box()
    y = box["y"] + box["height"] / 2
    page.tab.mouse.move(box["x"] + box["width"] * 0.2, y)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] * 0.12, y, steps=3)
    step = page.step
    assert 0 < step < 10
    page.wait(lambda: np.abs(page.picture().astype(int) - decoded(page, 0, step)).mean() < 3)
    page.tab.mouse.up()
    page.wait(lambda: "replayed" in page.text("past-cost"))
    assert page.step == step


def test_branches_are_a_tree_to_step_through(page):
    page.hold("w", until=9)
    page.pause()
    page.seek(4)
    page.hold("a", until=8)
    page.pause()
    assert page.place[0] == 1
    page.wait(lambda: len(page.tab.query_selector_all("#tree .branch")) == 2, "two branches")
    value = page.tab.get_attribute("#timeline", "aria-valuetext")
    assert "branch 2 of 2" in value
    page.tab.keyboard.press("[")
    page.wait(lambda: "branch 1 of 2" in page.tab.get_attribute("#timeline", "aria-valuetext"))
    page.wait(lambda: page.images(*page.place))
    page.wait(lambda: np.abs(page.picture().astype(int) - decoded(page, *page.place)).mean() < 3)
    assert page.place[0] == 0
    # The steps before the fork are the parent's.
    page.tab.keyboard.press("]")
    page.tab.focus("#timeline")
    page.tab.keyboard.press("Home")
    page.wait(lambda: page.place == (0, 0))


def test_keys_are_replayed_under_another_prompt_in_the_past(page):
    page.hold("w", until=10)
    page.pause()
    end = page_end(page)
    page.seek(2)
    page.tab.click("#themes button:has-text('snowy')")
    page.replay("Replaying your keys")
    page.wait_state("paused")
    page.wait_step(end)
    assert page.place == (1, end)
    assert page.images(1, end) != page.images(0, end)


def test_split_screen_shows_one_past_and_two_futures(page):
    page.hold("w", until=4)
    page.pause()
    page.tab.keyboard.press("x")
    page.wait(lambda: page.tab.is_visible("#lane1"))
    page.wait(lambda: {0, 1} <= {header.lane for header, _ in page.frames}, "both lanes")
    # A frame that has come is painted later.
    page.wait(lambda: np.abs(page.picture(0).astype(int) - page.picture(1)).mean() < 3, "one past")
    page.hold("a", "ArrowRight", until=page.step + 8)
    page.pause()
    steered = {message["lane"]: message["yaw"] for message in page.inputs() if message["yaw"]}
    assert steered == {0: -1, 1: 1}
    assert "arrow keys" in page.text("tag1")
    assert np.abs(page.picture(0).astype(int) - page.picture(1)).mean() > 8
    assert len({header.branch for header, _ in page.frames[-6:]}) == 2
    second = next(header for header, _ in reversed(page.frames) if header.lane == 1)
    picture = decoded(page, second.branch, second.step)
    page.wait(lambda: np.abs(page.picture(1).astype(int) - picture).mean() < 3, "the last frame")
    page.tab.click("#keep1")
    page.wait(lambda: page.tab.is_hidden("#lane1") and page.place[0] == second.branch)
    page.wait(lambda: np.abs(page.picture().astype(int) - picture).mean() < 3)


def test_half_of_a_split_screen_holds_a_control(page):
    page.hold("w", until=3)
    page.tab.keyboard.press("x")
    page.wait(lambda: {0, 1} <= {header.lane for header, _ in page.frames}, "both lanes")
    page.tab.select_option("#control0", label="turn left")
    page.wait(lambda: "turn left" in page.text("tag0"))
    assert page.inputs()[-1]["yaw"] < 0 and page.inputs()[-1]["lane"] == 0
    assert page.state == "playing"
    step = page.step
    page.wait_step(step + 4)
    page.tab.click("#keep0")
    page.wait(lambda: page.tab.is_hidden("#lane1"))
    page.wait_step(page.step + 3)  # plays on


def test_redo_makes_a_pass_again_when_a_key_changes(open_page, checkpoint):
    """The steps of the small model take far less than their period, so there is time to redo."""
    generator = StreamingGenerator.from_pretrained(checkpoint)
    generator.fps = 24
    running = Running(generator, str(checkpoint))
    try:
        page = open_page(running).wait_state("ready")
        page.tab.click("#redo")
        assert page.tab.get_attribute("#redo", "aria-checked") == "true"
        page.hold("w", until=2)
        for key in 20 * "adws":
            page.hold(key, until=page.step + 1)
            redone = [header for header, _ in page.frames if header.flags & REDO]
            if redone:
                break
        assert redone and 0 <= redone[0].first_shown < 4
        assert all("shown" in message for message in page.inputs()[1:])
        page.show_figures()
        page.wait(lambda: "redone" in page.text("hud"), "the figure")
    finally:
        page.context.close()
        running.stop()


def test_a_model_that_starts_from_its_prompt_opens_and_plays(open_page, tmp_path):
    path = save(tmp_path / "few-step")
    running = Running(StreamingGenerator.from_pretrained(path), str(path))
    try:
        page = open_page(running).wait_state("ready")
        assert "P goes to its prompt" in page.tab.get_attribute("#stage", "aria-label")
        page.tab.keyboard.press("Space")
        page.wait_step(2)
    finally:
        page.context.close()
        running.stop()


def test_a_refused_walk_leaves_the_world_that_is_played(page, tiny_world):
    """A walk of another model is dropped on the page."""
    page.hold("w", until=4)
    page.pause()
    place = page.place
    generator = tiny_world.play.generator
    start = np.zeros((generator.height, generator.width, 3), np.uint8)
    walk = Walk("other", "0" * 64, start, "ab", 0)
    page.tab.evaluate(
        """(text) => {
            const carrier = new DataTransfer();
            carrier.items.add(new File([text], "walk.jsonl", { type: "application/json" }));
            dispatchEvent(new DragEvent("drop", { dataTransfer: carrier, cancelable: true }));
        }""",
        "\n".join(walk.lines("0")),
    )
    page.wait(lambda: "log: expected a walk of tiny-world" in page.text("toasts"), "the refusal")
    page.wait_state("paused")
    page.wait(lambda: page.place == place, "the world before")
    page.hold("w", until=place[1] + 2)


def test_a_shared_link_plays_the_walk_again(page, open_page, tiny_world):
    page.hold("w", "d", until=7)
    page.pause()
    page.tab.click("#share")
    page.tab.wait_for_selector("#sharing[open]")
    link = page.tab.input_value("#link")
    other = open_page(tiny_world, link="#" + link.split("#")[1]).wait_state("paused")
    end = other.step
    assert end == page_end(page)
    page.wait(lambda: other.images(0, end) == page.images(0, end), "the same frames")
