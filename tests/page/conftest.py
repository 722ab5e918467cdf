"""The page in a headless Chromium, before a server that plays."""

import page_stub
import pytest
from browsing import chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def _stub():
    with page_stub.Stub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def stub(_stub):
    _stub.reset()
    return _stub


@pytest.fixture
def visit(browser, stub):
    """Opens the page; at the end of the test it must have thrown and been refused nothing."""
    contexts, problems = [], []

    def note(message):
        # An answer such as 429, or none, is what a test asks for.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        context.set_default_timeout(60_000)  # also on a busy machine
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", note)
        page.goto(stub.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(visit):
    return visit()
