"""The page, played in a real browser without a window: what it shows is what the server made."""

import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.serve.protocol import REDO, read_frames

from .conftest import HANGS, Running

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright; make test-serve")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: apt-get install -y chromium, or make test-serve"
)

ARGUMENTS = "no-sandbox disable-gpu disable-background-networking no-first-run disable-sync"
QUIET = 60.0  # seconds without any progress after which a wait has failed
SIZE = (128, 80)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[f"--{name}" for name in (*ARGUMENTS.split(), "disable-component-update")],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tiny_world():
    """A server of the bundled model, whose worlds have colours and keys that turn."""
    running = Running(StreamingGenerator.from_pretrained("tiny-world"), "tiny-world", sessions=4)
    yield running
    running.stop()


class Page:
    """A browser's tab on the page of a server, with all that it received.

    Attributes:
        tab: The tab of Playwright.
        frames: (header, images) of every binary message, in the order of arrival.
        sent: Messages of the page.
        faults: Lines that the browser wrote to its console, and exceptions.
        hosts: Hosts that were asked for anything.
    """

    def __init__(self, browser, address, *, link="", **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        self.tab = self.context.new_page()
        self.frames, self.sent, self.faults, self.hosts = [], [], [], set()
        self.tab.on("websocket", self._listen)
        self.tab.on("console", lambda message: self.faults.append(message.text))
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.tab.goto(f"http://{address}/{link}")

    def _listen(self, websocket):
        websocket.on("framereceived", self._received)
        websocket.on("framesent", lambda payload: self.sent.append(json.loads(payload)))

    def _received(self, payload):
        if isinstance(payload, bytes):
            self.frames.append(read_frames(payload))

    @property
    def state(self):
        return self.tab.evaluate("document.body.dataset.state")

    @property
    def place(self):
        """(branch, step) of the picture that is shown."""
        shown = self.tab.evaluate("({...document.getElementById('stage').dataset})")
        return int(shown.get("branch", 0)), int(shown.get("step", 0))

    @property
    def step(self):
        return self.place[1]

    def text(self, name):
        return self.tab.inner_text(f"#{name}")

    def wait(self, condition, of=""):
        """Waits until the condition holds, while anything at all goes on."""
        moved, before = time.monotonic(), None
        while not (value := condition()):
            self.tab.wait_for_timeout(25)  # also lets the events of the tab through
            now = (len(self.frames), self.state, self.place)
            if now != before:
                moved, before = time.monotonic(), now
            assert time.monotonic() - moved < QUIET, f"{of or condition}: nothing happens in {now}"
        return value

    def wait_state(self, *states):
        self.wait(lambda: self.state in states, f"a state of {states}")
        return self

    def wait_step(self, step):
        self.wait(lambda: self.step >= step, f"step {step}")

    def hold(self, *keys, until):
        """Holds keys until a step is shown."""
        for key in keys:
            self.tab.keyboard.down(key)
        self.wait_step(until)
        for key in keys:
            self.tab.keyboard.up(key)

    def pause(self):
        if self.state == "playing":
            self.tab.keyboard.press("Space")
        self.wait_state("paused")
        count = -1  # frames that were on their way
        while count != len(self.frames):
            count = len(self.frames)
            self.tab.wait_for_timeout(400)

    def picture(self, lane=0):
        """What a canvas shows: uint8 (80, 128, 3)."""
        url = self.tab.evaluate(f"document.getElementById('lane{lane}').toDataURL()")
        with urllib.request.urlopen(url) as data:
            image = Image.open(io.BytesIO(data.read())).convert("RGB")
        return np.asarray(image.resize(SIZE, Image.Resampling.BOX))

    def inputs(self):
        return [message for message in self.sent if message["type"] == "input"]

    def images(self, branch, step):
        """The images of a step, as they were received last."""
        found = [i for h, i in self.frames if (h.branch, h.step) == (branch, step)]
        return found[-1] if found else None

    def seek(self, step):
        """Goes to a step of the branch with the timeline's keys; waits for the server."""
        self.tab.focus("#timeline")
        while self.step > step:
            self.tab.keyboard.press("ArrowLeft")
        self.wait(lambda: "replayed" in self.text("past-cost"), f"the jump to {step}")
        assert self.step == step


@pytest.fixture
def open_page(browser):
    """Opens pages; they are closed after the test, and must have written no fault."""
    with contextlib.ExitStack() as stack:

        def start(running, *, faults=False, **options):
            page = Page(browser, getattr(running, "address", running), **options)
            stack.callback(page.context.close)
            if not faults:
                stack.callback(lambda: page.faults and pytest.fail(str(page.faults)))
            return page

        yield start


@pytest.fixture
def page(open_page, tiny_world):
    return open_page(tiny_world).wait_state("ready")


def turn(before, after):
    """Columns by which the upper half of a picture has moved; left is negative."""
    before, after = (image[:44].astype(float).mean(2) for image in (before, after))
    reach = 30
    middle = before[:, reach : SIZE[0] - reach]
    costs = [
        np.abs(after[:, reach + d : SIZE[0] - reach + d] - middle).mean()
        for d in range(-reach, reach + 1)
    ]
    return int(np.argmin(costs)) - reach


def warmth(image):
    """Mean of red minus blue: high in the desert, below zero in the snow."""
    return float(image[..., 0].mean() - image[..., 2].mean())


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
    shown = [page.picture()]
    page.tab.keyboard.down(key)
    for step in range(1, 5):
        page.wait_step(step)
        shown.append(page.picture())
    page.tab.keyboard.up(key)
    moves = [turn(a, b) for a, b in zip(shown, shown[1:])]
    assert np.sign(np.median([move for move in moves if move])) == sign, moves


def test_a_dragged_stick_turns_and_lets_go(page):
    box = page.tab.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = page.picture()
    page.tab.mouse.move(x, y)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 90, y, steps=4)
    assert page.tab.is_visible("#stick")
    page.wait_step(2)
    assert turn(before, page.picture()) < 0
    page.tab.mouse.up()
    assert page.tab.is_hidden("#stick")
    page.wait(lambda: page.inputs()[-1]["yaw"] == 0)
    assert max(message["yaw"] for message in page.inputs()) == 1


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
    page.tab.wait_for_selector("#pictures .chosen")
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
    for step in range(6, 12):
        assert page.images(1, step) == page.images(0, step), step
    # The picture on the page is that of the step: its last frame, decoded.
    page.seek(9)
    page.wait(lambda: np.abs(page.picture().astype(int) - decoded(page, 1, 9)).mean() < 3)


def page_end(page):
    return max(header.step for header, _ in page.frames if header.branch == 0)


def decoded(page, branch, step):
    image = Image.open(io.BytesIO(page.images(branch, step)[-1])).convert("RGB")
    return np.asarray(image).astype(int)


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
    page.tab.click("#replay")
    page.wait_state("playing")
    assert page.text("status") == "Replaying your keys"
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
    assert np.abs(page.picture(0).astype(int) - page.picture(1)).mean() < 3
    page.hold("a", until=page.step + 8)
    page.pause()
    assert np.abs(page.picture(0).astype(int) - page.picture(1)).mean() > 8
    assert len({header.branch for header, _ in page.frames[-6:]}) == 2
    second = next(header.branch for header, _ in reversed(page.frames) if header.lane == 1)
    picture = page.picture(1)
    page.tab.click("#keep1")
    page.wait(lambda: page.tab.is_hidden("#lane1") and page.place[0] == second)
    page.wait(lambda: np.abs(page.picture().astype(int) - picture).mean() < 3)


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


@pytest.fixture
def command():
    """Starts `aapt serve` on a port of its own, as a process that can be killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-m", "aapt", "serve", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
        end = time.monotonic() + HANGS
        while time.monotonic() < end:
            assert process.poll() is None, process.stdout.read().decode()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz")
                return process
            time.sleep(0.1)
        pytest.fail("aapt serve: not up")

    yield f"127.0.0.1:{port}", start
    for process in processes:
        process.kill()
        process.wait()


def test_a_restarted_server_gets_the_world_back(command, open_page):
    address, start = command
    process = start()
    page = open_page(address, faults=True).wait_state("ready")
    page.hold("w", until=8)
    page.pause()
    page.wait(lambda: page.images(0, page.step), "frames")
    place, last = page.place, page.images(*page.place)
    process.kill()
    process.wait()
    page.wait_state("lost")
    assert page.tab.is_visible("#card-button") and "Trying again" in page.text("card-text")
    start()
    page.frames.clear()
    page.wait_state("paused")
    page.wait(lambda: page.place == place, "the place before")
    page.wait(lambda: page.images(*place), "frames")
    assert page.images(*place) == last
    page.hold("w", until=place[1] + 3)


def test_a_visitor_without_a_place_waits_and_is_told(open_page, serve):
    running = serve(sessions=1)
    first = open_page(running).wait_state("ready")
    second = open_page(running).wait_state("waiting")
    assert second.text("card-title") == "You are next" and second.text("card-number") == "1"
    first.context.close()
    second.wait_state("ready")


def test_an_idle_world_ends_and_starts_again(open_page, serve):
    page = open_page(serve(idle_seconds=1.0)).wait_state("ended")
    assert page.text("card-title") == "The world went to sleep"
    page.tab.click("#card-button")
    page.wait_state("ready")


def test_figures_are_those_of_the_frames(page):
    page.tab.evaluate(
        "document.getElementById('hud').hidden && document.getElementById('figures').click()"
    )
    for key in "wawdw":
        page.hold(key, until=page.step + 3)
    page.pause()
    figures = page.wait(lambda: page.tab.evaluate("({...document.getElementById('hud').dataset})"))
    times = [
        header.model_ms + header.decode_ms + header.encode_ms
        for header, _ in page.frames
        if header.step and not header.flags & ~REDO
    ]
    assert float(figures["step50"]) == pytest.approx(np.percentile(times, 50), rel=0.35)
    assert float(figures["step99"]) <= max(times) + 0.01
    assert int(figures["presses"]) == 5
    assert 0 < float(figures["key50"]) <= float(figures["key99"])
    # A frame honours a key no sooner than the fastest step is made.
    assert float(figures["key50"]) > min(times) / 2
    assert page.tab.query_selector_all("#tree .keys-honoured")


def test_a_phone_shows_all_and_is_steered_by_touch(open_page, tiny_world):
    page = open_page(
        tiny_world, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    ).wait_state("ready")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert "drag" in page.text("hint").lower()
    for button in page.tab.query_selector_all("main button:visible, header button:visible"):
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 32, button.get_attribute("id")
    box = page.tab.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page.tab)
    for kind, point in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x, "y": y - 40}]),
        ("touchMove", [{"x": x + 10, "y": y - 70}]),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": point})
    page.wait_step(4)
    assert page.tab.is_visible("#stick")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait(lambda: page.tab.is_hidden("#stick"))


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(page):
    page.hold("w", until=2)
    page.pause()
    reached = set()
    for _ in range(60):
        page.tab.keyboard.press("Tab")
        name, outline = page.tab.evaluate(
            """() => {
                const at = document.activeElement;
                const ring = getComputedStyle(at.closest(".time") ?? at);
                return [at.id || at.className || at.tagName, ring.outlineStyle];
            }"""
        )
        if name != "BODY":  # between the last element and the first
            reached.add(name)
            assert outline == "solid", name
    wanted = "new figures theme help stage back play reset redo split record share timeline prompt"
    assert set(wanted.split()) <= reached
    assert "chip" in reached


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_has_the_contrast_of_aa(open_page, tiny_world, scheme):
    page = open_page(tiny_world, color_scheme=scheme).wait_state("ready")
    colours = page.tab.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = "bg surface raised text muted accent on-accent danger edge";
            return Object.fromEntries(`${names} c0 c1 c2 c3 c4 c5`.split(" ").map(
                (name) => [name, style.getPropertyValue(`--${name}`).trim()]));
        }"""
    )

    def light(name):
        value = colours[name].lstrip("#")
        value = "".join(2 * digit for digit in value) if len(value) == 3 else value
        parts = [int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one, other):
        bright, dark = sorted((light(one), light(other)), reverse=True)
        return (bright + 0.05) / (dark + 0.05)

    for ground in ("bg", "surface", "raised"):
        assert contrast("text", ground) >= 7
        assert contrast("muted", ground) >= 4.5
        assert contrast("edge", ground) >= 3, ground
    assert contrast("on-accent", "accent") >= 4.5
    assert contrast("accent", "bg") >= 4.5 and contrast("danger", "surface") >= 4.5
    for branch in range(6):
        assert contrast(f"c{branch}", "surface") >= 3


def test_reduced_motion_stops_the_decoration(open_page, tiny_world):
    page = open_page(tiny_world, reduced_motion="reduce").wait_state("ready")
    page.hold("w", until=3)
    durations = page.tab.evaluate(
        """() => [...document.querySelectorAll(".dot, .spinner, .lane")].flatMap(
            (at) => [getComputedStyle(at), getComputedStyle(at, "::after")]
                .map((style) => parseFloat(style.animationDuration)))"""
    )
    assert max(durations) < 0.001


def test_the_pacer_spaces_frames_evenly_and_drains_a_backlog(page):
    times = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            const arrivals = [0, 160, 390, 480, 640, 800, 960, 1120, 1280]; // the third is late
            for (let now = 0, next = 0; now < 1500; now += 1) {
                if (now === arrivals[next]) {
                    const step = next += 1;
                    pacer.push([0, 1, 2, 3].map((index) => ({ step, index })), now);
                }
                const frame = pacer.take(now);
                if (frame) shown.push([now, frame.step, frame.index]);
            }
            return shown;
        }"""
    )
    assert [(step, index) for _, step, index in times] == [
        (step, index) for step in range(1, 10) for index in range(4)
    ]
    gaps = np.diff([now for now, _, _ in times])
    assert gaps[:7].tolist() == [40] * 7
    late = int(np.argmax(gaps))
    assert gaps[late] > 80 and late == 7  # before the first frame of the late pass
    assert gaps[late + 1 :].min() >= 28  # the backlog drains without a jump
    assert times[-4][0] - 1280 < 40  # and is gone


def test_a_pass_made_again_replaces_what_is_not_shown(page):
    shown = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            pacer.push([0, 1, 2, 3].map((index) => ({ step: 5, index, made: 1 })), 0);
            for (let now = 0; now < 200; now += 1) {
                if (now === 50) pacer.replace([2, 3].map((index) => ({ step: 5, index, made: 2 })));
                const frame = pacer.take(now);
                if (frame) shown.push([frame.index, frame.made]);
            }
            return shown;
        }"""
    )
    assert shown == [[0, 1], [1, 1], [2, 2], [3, 2]]


def test_no_file_of_the_page_names_another_host():
    folder = Path(__file__).parents[3] / "aapt" / "serve" / "page"
    files = [path for path in folder.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")]
    assert len(files) > 10
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "http://" not in text and "https://" not in text, path.name
