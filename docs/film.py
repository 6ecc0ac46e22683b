"""Films the page for README: `python docs/film.py` writes docs/play.gif.

The bundled world is played in Chromium without a window: a walk, a rewind, a branch, another
prompt, two futures. Screenshots are slow, so the world is played 24 times slower, and the film is
shown at its own pace. Needs the extras serve and browser, and chromium.
"""

import asyncio
import io
import shutil
import socket
import threading
import time
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from aapt import StreamingGenerator
from aapt.serve.app import create_app
from aapt.serve.session import Session
from aapt.serve.settings import Settings

OUT = Path(__file__).parent / "play.gif"
SIZE = {"width": 1000, "height": 920}
SHOWN = (650, 598)
SLOWER = 24
# The page's own clock runs slower too, so that it paces, counts and tells times as ever
CLOCK = f"""
const now = performance.now.bind(performance);
performance.now = () => now() / {SLOWER};
const frame = requestAnimationFrame;
window.requestAnimationFrame = (call) => frame((time) => call(time / {SLOWER}));
const stamp = Object.getOwnPropertyDescriptor(Event.prototype, "timeStamp").get;
Object.defineProperty(Event.prototype, "timeStamp", {{
  get() {{ return stamp.call(this) / {SLOWER}; }},
}});
"""
MODEL = "tiny-world"
COLOURS = 128


class Film:
    """Screenshots of a page, one for every two video frames."""

    def __init__(self, tab: Page, fps: int):
        self.tab, self.interval = tab, 2 * SLOWER / fps  # seconds
        self.images: list[Image.Image] = []

    def roll(self, seconds: float) -> None:
        """Films for some seconds of the film."""
        for _ in range(round(seconds * SLOWER / self.interval)):
            began = time.monotonic()
            image = Image.open(io.BytesIO(self.tab.screenshot())).convert("RGB")
            self.images.append(image.resize(SHOWN, Image.Resampling.LANCZOS))
            rest = self.interval - (time.monotonic() - began)
            self.tab.wait_for_timeout(max(0.0, 1e3 * rest))

    def hold(self, *keys: str, seconds: float) -> None:
        """Films while keys are held."""
        for key in keys:
            self.tab.keyboard.down(key)
        self.roll(seconds)
        for key in keys:
            self.tab.keyboard.up(key)

    def save(self, out: Path) -> None:
        """Writes the film as a GIF."""
        palette = [image.quantize(COLOURS, dither=Image.Dither.NONE) for image in self.images]
        pace = round(1e3 * self.interval / SLOWER)
        palette[0].save(out, save_all=True, append_images=palette[1:], duration=pace, loop=0)


def act(film: Film) -> None:
    """Plays the scenes of the film."""
    tab = film.tab
    tab.keyboard.press("h")  # the figures would be those of the slow pace
    film.roll(0.4)
    film.hold("w", seconds=1.6)
    film.hold("w", "d", seconds=0.8)
    film.hold("w", "a", seconds=1.2)
    tab.keyboard.press(" ")
    for _ in range(2):  # back in time
        tab.keyboard.press("z")
        film.roll(0.4)
    film.hold("a", seconds=1.2)  # a branch
    tab.click("text=snowy peaks in winter")
    film.hold("w", "d", seconds=1.2)
    film.hold("a", seconds=1.6)
    tab.keyboard.press("x")  # two futures: the first half follows keys, the second a control
    film.hold("a", seconds=1.4)


def main() -> None:
    generator = StreamingGenerator.from_pretrained(MODEL)
    app = create_app(generator, MODEL, Settings())
    begin = Session.__init__

    def begin_slower(session: Session, *arguments) -> None:
        begin(session, *arguments)
        session.period *= SLOWER

    Session.__init__ = begin_slower
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    serving = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
    serving.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport=SIZE, color_scheme="dark")
        tab.add_init_script(CLOCK)
        tab.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        tab.wait_for_selector("body[data-state=ready]")
        film = Film(tab, generator.fps)
        act(film)
        browser.close()
    server.should_exit = True
    serving.join()
    film.save(OUT)
    print(f"{OUT.name}: {len(film.images)} frames, {OUT.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
