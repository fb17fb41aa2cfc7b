"""A real Chromium for tests: `NEFT_CHROMIUM`, or `chromium` on the path."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def need_chromium() -> str:
    """Its path. Skip, loudly, where there is none; where `NEFT_REQUIRE_CHROMIUM` is set, as in CI, fail."""
    path = os.environ.get("NEFT_CHROMIUM") or shutil.which("chromium")
    if path is not None and shutil.which(path):
        return path
    said = f"NO CHROMIUM at {path or 'any place on the path'}: install Debian's chromium or set NEFT_CHROMIUM"
    if os.environ.get("NEFT_REQUIRE_CHROMIUM"):
        pytest.fail(said)
    pytest.skip(said)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser without a window."""
    path = need_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its own sandbox needs rights that a container does not give; it sees nothing but this machine's test server.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
