"""Pages of small bundles in a browser, made and loaded once."""

from __future__ import annotations

from typing import Any

import pytest

from edgepeft.deploy import browser, web
from tests.deploy.chromium import Browser, Page
from tests.deploy.served import MAKE, Served

FLAGS = {"webgpu": browser.SOFTWARE_GPU, "wasm": browser.NO_GPU}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the served bundle of a kind, made once."""
    if reason := web.missing():
        pytest.skip(reason)
    made: dict[str, Served] = {}

    def make(kind: str) -> Served:
        if kind not in made:
            made[kind] = Served(MAKE[kind](tmp_path_factory.mktemp(kind)))
        return made[kind]

    yield make
    for served in made.values():
        served.stop()


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the running browser of a device, started once."""
    if reason := browser.missing():
        pytest.skip(reason)
    running: dict[str, Browser] = {}

    def start(device: str) -> Browser:
        if device not in running:
            running[device] = Browser(tmp_path_factory.mktemp(device), *FLAGS[device])
        return running[device]

    yield start
    for one in running.values():
        one.close()


@pytest.fixture(scope="session")
def pages(bundles: Any, browsers: Any) -> Any:
    """Return the page of a kind on a device, loaded once."""
    opened: dict[tuple[str, str], Page] = {}

    def open_page(kind: str, device: str) -> Page:
        if (kind, device) not in opened:
            opened[kind, device] = browsers(device).open(bundles(kind).url)
        return opened[kind, device]

    return open_page
