"""A headless Chromium for tests."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

# Debian's and Ubuntu's names, the smallest package first, then those of others.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MISSING = "needs Chromium (apt-get install chromium-headless-shell)"


@contextlib.contextmanager
def chromium() -> Iterator:
    """The browser, one at a time; skips the test where it or Playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(MISSING)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()
