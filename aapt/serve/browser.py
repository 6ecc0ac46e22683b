"""Key to pixel in a real browser: headless Chromium plays the page, on the cores of the server."""

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

from .latency import BETWEEN

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
MOTIONS = ("walk", "wave", "dance")  # of a model that follows poses, in place of keys
KEYS = (("w",), ("w", "a"), ("w", "d"), ("a",), ("d",), ())
WARMUP_SECONDS = 3.0
OPENING_MS = 120_000  # until the page is ready, on a busy machine too


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the Chromium of this machine without a window.

    RuntimeError, with the mend, if there is none.
    """
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        names = ", ".join(CHROMIUM)
        raise RuntimeError(f"browser: expected one of {names} on PATH, got none; install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


def measure_in_browser(url: str, seconds: float) -> list[dict[str, Any]]:
    """Plays the page at `url` for `seconds` seconds without redo and as many with it; returns both
    figures.

    The page itself measures, from a key event to the painted frame that first honours it, and the
    figures are those that it shows. RuntimeError without a browser, and for a page that does not
    play.
    """
    with chromium() as browser:
        try:
            return [play_page(browser, url, seconds, redo) for redo in (False, True)]
        except Error as error:
            reason = error.message.splitlines()[0]
            raise RuntimeError(f"browser: the page at {url} does not play: {reason}") from None


def play_page(browser: Browser, url: str, seconds: float, redo: bool) -> dict[str, Any]:
    """Plays a page in a new tab, with or without redo, and returns its figures."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(OPENING_MS)
    page.goto(url)
    _wait_state(page, "ready")
    if page.get_attribute("#figures", "aria-pressed") != "true":
        page.click("#figures")
    if redo != (page.get_attribute("#redo", "aria-checked") == "true"):
        page.click("#redo")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    _wait_state(page, "playing")
    page.wait_for_timeout(1e3 * WARMUP_SECONDS)
    rates = _press_keys(page, seconds)
    found = page.evaluate("({...document.getElementById('hud').dataset})")
    page.close()
    if not rates or found["key50"] == "null":
        raise RuntimeError(
            f"seconds: expected frames and honoured keys in {seconds:g} s, got none; use more"
        )
    return {
        "redo": redo,
        "fps": median(rates),
        "keys": int(found["presses"]),
        "key_to_pixel_ms": {"p50": float(found["key50"]), "p99": float(found["key99"])},
        "step_ms": {"p50": float(found["step50"]), "p99": float(found["step99"])},
        "period_ms": float(found["period"]),
        "redone": int(found["redone"]),
    }


def _wait_state(page: Page, state: str) -> None:
    page.wait_for_selector(f'body[data-state="{state}"]')


def _press_keys(page: Page, seconds: float) -> list[float]:
    """Changes the held keys, or the figure's motion, at random times; returns the frame rates that
    the page showed."""
    draw, held, rates = random.Random(0), (), []
    posed = page.get_attribute("body", "data-driven-by") == "pose"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(1e3 * draw.uniform(*BETWEEN))
        if posed:
            page.click(f"#motions [value={draw.choice(MOTIONS)}]")
        else:
            keys = draw.choice([keys for keys in KEYS if keys != held])
            for key in set(held) - set(keys):
                page.keyboard.up(key)
            for key in set(keys) - set(held):
                page.keyboard.down(key)
            held = keys
        rates.append(page.get_attribute("#hud", "data-fps"))
    for key in held:
        page.keyboard.up(key)
    page.wait_for_timeout(1e3)  # the last presses are honoured
    return [float(rate) for rate in rates if rate != "null"]
