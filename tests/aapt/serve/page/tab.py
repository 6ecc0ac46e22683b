"""A tab of a real browser on the page of a server, and what its pictures show."""

import io
import json
import time
import urllib.request

import numpy as np
from PIL import Image

from aapt.serve.protocol import FRAMES, read_frames

from ..conftest import HANGS

QUIET = 120.0  # seconds without any progress after which a wait has failed
SIZE = (128, 80)  # of the bundled model's frames
SENT = """
  window.sent = [];
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    if (typeof data === "string") window.sent.push(data);
    send.call(this, data);
  };
"""
COUNTED = """
  window.WebSocket = class extends WebSocket {
    constructor(...given) {
      super(...given);
      // The name of a tab outlives a reload
      this.addEventListener("message", () => { window.name = Number(window.name) + 1; });
    }
  };
"""
SAID = """
  window.said = [];
  const line = document.getElementById("status");
  new MutationObserver(() => window.said.push(line.textContent))
    .observe(line, {childList: true, characterData: true, subtree: true});
"""


class Tab:
    """A browser's tab on the page of a server, with all that it received.

    Attributes:
        tab: The tab of Playwright.
        frames: (header, images) of every binary message, in the order of arrival.
        texts: Text messages of the server, in the order of arrival.
        faults: Lines that the browser wrote to its console, and exceptions.
        hosts: Hosts that were asked for anything.
    """

    def __init__(self, browser, address, *, link="", **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        self.context.set_default_timeout(1000 * HANGS)
        self.tab = self.context.new_page()
        self.frames, self.texts, self.faults, self.hosts = [], [], [], set()
        self._heard = 0  # messages of the server
        self.tab.add_init_script(SENT + COUNTED)
        self.tab.on("websocket", self._listen)
        self.tab.on("console", lambda message: self.faults.append(message.text))
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.tab.goto(f"http://{address}/{link}")

    def _listen(self, websocket):
        websocket.on("framereceived", self._received)

    def _received(self, payload):
        self._heard += 1
        if isinstance(payload, str):
            self.texts.append(json.loads(payload))
        else:
            header, images = read_frames(payload)
            if header.kind == FRAMES:
                self.frames.append((header, images))

    @property
    def sent(self):
        """Messages of the page since it was loaded."""
        return [json.loads(text) for text in self.tab.evaluate("window.sent")]

    def _ask(self, expression):
        """A value of the page, once all that the page has heard until then has arrived here too."""
        value, heard = self.tab.evaluate(f"[{expression}, Number(window.name)]")
        asked = time.monotonic()
        while self._heard < heard:
            self.tab.wait_for_timeout(5)
            late = time.monotonic() - asked
            assert late < QUIET, f"expected {heard} messages as the page has, got {self._heard}"
        return value

    @property
    def state(self):
        return self._ask("document.body.dataset.state")

    @property
    def place(self):
        """(branch, step) of the picture that is shown."""
        shown = self._ask("({...document.getElementById('stage').dataset})")
        return int(shown.get("branch", 0)), int(shown.get("step", 0))

    @property
    def step(self):
        return self.place[1]

    def text(self, name):
        return self.tab.inner_text(f"#{name}")

    def wait(self, condition, of=""):
        """Waits until the condition holds, as long as anything at all goes on."""
        moved, before = time.monotonic(), None
        while not (value := condition()):
            self.tab.wait_for_timeout(25)  # also lets the events of the tab through
            now = (len(self.frames), self.state, self.place)
            if now != before:
                moved, before = time.monotonic(), now
            assert time.monotonic() - moved < QUIET, f"{of or condition}: nothing happens in {now}"
        return value

    def painted(self):
        """Waits until the browser has painted the page as it is now."""
        self.tab.screenshot()

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
        """Pauses, and waits until all frames that were made have arrived and are painted."""
        count = len(self.texts)
        if self.state == "playing":
            self.tab.keyboard.press("Space")
            self.wait(lambda: any(self.stopped(text) for text in self.texts[count:]), "a pause")
        self.wait_state("paused")
        places = [(header.branch, header.step) for header, _ in self.frames if header.lane == 0]
        self.wait(lambda: self.place == places[-1], f"step {places[-1]}")

    @staticmethod
    def stopped(text):
        return text["type"] == "state" and not text["playing"]

    def replay(self, words):
        """Plays what is recorded after the playhead, and waits until the page has said so."""
        self.tab.evaluate(SAID)
        self.tab.click("#replay")
        self.wait(lambda: words in self.tab.evaluate("window.said"), words)

    def picture(self, lane=0):
        """The image on a canvas: uint8 (80, 128, 3)."""
        url = self.tab.evaluate(f"document.getElementById('lane{lane}').toDataURL()")
        with urllib.request.urlopen(url) as data:
            image = Image.open(io.BytesIO(data.read())).convert("RGB")
        return np.asarray(image.resize(SIZE, Image.Resampling.BOX))

    def show_figures(self):
        if self.tab.get_attribute("#figures", "aria-pressed") != "true":
            self.tab.click("#figures")

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


def page_end(page):
    return max(header.step for header, _ in page.frames if header.branch == 0)


def decoded(page, branch, step):
    image = Image.open(io.BytesIO(page.images(branch, step)[-1])).convert("RGB")
    return np.asarray(image).astype(int)


def received(page, step):
    """The last frame of a step of branch 0; of the step after it if the server dropped it."""
    arrived = [header.step for header, _ in page.frames if header.branch == 0]
    return decoded(page, 0, min(at for at in arrived if at >= step))
