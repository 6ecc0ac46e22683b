"""Headless Chromium and a server of the bundled model. Without a browser the tests are skipped."""

import contextlib

import pytest

from aapt import StreamingGenerator

from ..conftest import Running
from .tab import Tab


@pytest.fixture(scope="package")
def browser():
    pytest.importorskip("playwright.sync_api", reason="needs playwright; make test-serve")
    from aapt.serve.browser import chromium

    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(chromium())
        except RuntimeError as error:
            pytest.skip(f"{error}, or make test-serve")


@pytest.fixture(scope="package")
def tiny_world():
    """A server of the bundled model, whose worlds have colours and keys that turn."""
    running = Running(StreamingGenerator.from_pretrained("tiny-world"), "tiny-world", sessions=4)
    yield running
    running.stop()


@pytest.fixture
def open_page(browser):
    """Opens pages; they are closed after the test, and must have written no fault."""
    with contextlib.ExitStack() as stack:

        def start(running, *, faults=False, **options):
            page = Tab(browser, getattr(running, "address", running), **options)
            stack.callback(page.context.close)
            if not faults:
                stack.callback(lambda: page.faults and pytest.fail(str(page.faults)))
            return page

        yield start


@pytest.fixture
def page(open_page, tiny_world):
    return open_page(tiny_world).wait_state("ready")
