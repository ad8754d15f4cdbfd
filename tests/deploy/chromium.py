"""A headless browser, driven through its DevTools pipe: JSON messages that end in a zero byte.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from edgepeft.deploy import browser

PATIENCE_S = 120  # a software GPU compiles its shaders first
SETTLED = "const s = document.getElementById('status')?.textContent ?? ''; return /^Ready|could not/.test(s)"


class Browser:
    """A running browser with a profile of its own; pages of it share caches."""

    def __init__(self, profile: Path, *flags: str) -> None:
        told, tell = os.pipe()
        self._from, say = os.pipe()
        command = browser.command(profile, "--remote-debugging-pipe", *flags)
        shell = ["bash", "-c", f'exec "$@" 3<&{told} 4>&{say}', "bash", *command]
        self._log = open(profile / "log.txt", "w")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            shell, pass_fds=(told, say), env=browser.environment(), stdout=self._log, stderr=self._log
        )
        for end in (told, say):
            os.close(end)
        self._to, self._rest, self._count = tell, b"", 0

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._to, json.dumps({**message, **({"sessionId": session} if session else {})}).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], PATIENCE_S)[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_S} s")
            if not (more := os.read(self._from, 1 << 20)):
                raise EOFError(f"the browser ended: {Path(self._log.name).read_text()[-2000:]}")
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, first: str = "") -> Page:
        """Open a page of ours and wait until it says that it is ready, or why not; `first` runs before its scripts."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        self.call("Page.addScriptToEvaluateOnNewDocument", page._session, source=first)
        page.go(url)
        return page

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(PATIENCE_S)
        for end in (self._to, self._from):
            os.close(end)
        self._log.close()


class Page:
    """One page."""

    def __init__(self, owner: Browser, session: str) -> None:
        self._owner, self._session = owner, session
        self._owner.call("Page.enable", session)

    def go(self, url: str) -> None:
        """Load an address, the same one too, and wait as `Browser.open` does."""
        self._owner.call("Page.navigate", self._session, url=url)
        self.wait(SETTLED)

    def wait(self, body: str) -> None:
        """Wait until the body of a function returns true."""
        self.run(f"(async () => {{ while (!(() => {{ {body} }})()) await new Promise(r => setTimeout(r, 20)) }})()")

    def run(self, expression: str) -> Any:
        """Return an expression's value, awaited; raise what it throws."""
        found = self._owner.call(
            "Runtime.evaluate", self._session, expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", found["exceptionDetails"]))
        return found["result"].get("value")

    def text(self, name: str) -> str:
        """Return the text of an element by its id."""
        return self.run(f"document.getElementById({json.dumps(name)}).textContent")

    def close(self) -> None:
        """Close it."""
        self._owner.call("Page.close", self._session)
