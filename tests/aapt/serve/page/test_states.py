"""The page in every state and on every screen: waiting, lost, ended; a phone; by keyboard alone."""

import contextlib
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from aapt.serve.protocol import REDO

from ..conftest import HANGS, free_port


@pytest.fixture
def command():
    """Starts `aapt serve` on a port of its own, as a process that can be killed."""
    port, processes = free_port(), []

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

    def logged():
        logs = [text["lines"] for text in page.texts if text["type"] == "log"]
        return logs and len(logs[-1]) > place[1]

    page.wait(logged, "the log")  # the page has what it will go on with
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


def test_a_page_that_is_loaded_again_has_its_world(page):
    page.hold("w", until=5)
    page.pause()
    place, last = page.place, page.images(*page.place)
    page.tab.reload()
    page.wait_state("paused")
    page.wait(lambda: page.place == place, "the place before")
    assert page.images(*place) == last


def test_a_visitor_without_a_place_waits_and_is_told(open_page, serve):
    running = serve(sessions=1)
    first = open_page(running).wait_state("ready")
    second = open_page(running).wait_state("waiting")
    assert second.text("card-title") == "You are next" and second.text("card-number") == "1"
    first.context.close()
    second.wait_state("ready")


def test_an_idle_world_ends_and_starts_again(open_page, serve):
    running = serve()
    page = open_page(running).wait_state("ready")
    next(iter(running.play.sessions.values())).touched = float("-inf")
    page.wait_state("ended")
    assert page.text("card-title") == "The world went to sleep"
    page.tab.click("#card-button")
    page.wait_state("ready")


def test_a_refused_walk_is_told_and_the_sample_opens(open_page, tiny_world):
    page = open_page(tiny_world, faults=True, link="#walk=AAAA").wait_state("ready")
    assert "link: expected a whole shared walk" in page.text("toasts")


def test_figures_are_those_of_the_frames(page):
    page.show_figures()

    def figures():
        return page.tab.evaluate("({...document.getElementById('hud').dataset})")

    for count, key in enumerate("wawdw", start=1):
        page.hold(key, until=page.step + 3)
        page.wait(lambda count=count: int(figures()["presses"]) == count, "the receipt")
    page.pause()
    times = [
        header.model_ms + header.pixels_ms + header.encode_ms
        for header, _ in page.frames
        if header.step and not header.flags & ~REDO
    ]
    middle = np.percentile(times, 50, method="inverted_cdf")
    page.wait(lambda: abs(float(figures()["step50"]) - middle) < 0.01, "the figures of all steps")
    shown = figures()
    assert float(shown["step99"]) <= max(times) + 0.01
    assert 0 < float(shown["key50"]) <= float(shown["key99"])
    # A frame honours a key no sooner than the fastest step is made.
    assert float(shown["key50"]) > min(times) / 2
    assert page.tab.query_selector_all("#tree .keys-honoured")


@pytest.mark.parametrize("redo", [False, True])
def test_the_page_is_measured_with_its_own_figures(browser, tiny_world, redo):
    """`aapt bench play --browser`"""
    from aapt.serve.browser import play_page

    for seconds in (3.0, 15.0, 60.0):  # a busy machine has rarely time to redo a step
        found = play_page(browser, f"http://{tiny_world.address}/", seconds, redo)
        if found["keys"] >= 3 and (found["redone"] or not redo):
            break
    assert found["redo"] == redo and found["keys"] >= 3 and found["fps"] > 0
    assert found["redone"] > 0 if redo else found["redone"] == 0
    assert found["period_ms"] == pytest.approx(4000 / 24)
    for name in ("key_to_pixel_ms", "step_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]


def test_a_phone_shows_all_and_is_steered_by_touch(open_page, tiny_world):
    page = open_page(
        tiny_world, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    ).wait_state("ready")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert "drag" in page.text("hint").lower()
    for button in page.tab.query_selector_all("main button:visible, header button:visible"):
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 32, button.get_attribute("id")
    page.painted()  # a browser scrolls until it has painted what takes the touch instead
    box = page.tab.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page.tab)
    for kind, point in (
        ("touchStart", [{"x": x, "y": y}]),
        ("touchMove", [{"x": x, "y": y - 40}]),
        ("touchMove", [{"x": x + 10, "y": y - 70}]),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": point})
        page.painted()
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


def test_no_file_of_the_page_names_another_host():
    folder = Path(__file__).parents[4] / "aapt" / "serve" / "page"
    files = [path for path in folder.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")]
    assert len(files) > 10
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "http://" not in text and "https://" not in text, path.name
