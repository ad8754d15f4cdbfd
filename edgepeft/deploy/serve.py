"""A bundle's page in a browser, from this machine: a small HTTP server for one folder.

    http://127.0.0.1:PORT/  ──►  index.html, the module and the model's files, by GET and HEAD

Its headers are those that browsers ask for: a page that is isolated from others (COOP, COEP) may use several threads,
and a WebAssembly file must be called one. 127.0.0.1 counts as a secure place, without which there is no WebGPU, no
cache and no digest; another machine needs HTTPS, which any web server that hosts the folder can give. Left out: lists
of folders, uploads, and everything that lies outside the bundle, behind a link as well.
"""

from __future__ import annotations

import http.server
import webbrowser
from pathlib import Path
from typing import Any

from edgepeft.console import say
from edgepeft.errors import ArtifactError, ConfigError
from edgepeft.runtime.manifest import unseal

PAGE = "index.html"
HOST = "127.0.0.1"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and not sent again unless it changed
    "X-Content-Type-Options": "nosniff",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder."""

    extensions_map = {"": "application/octet-stream", **TYPES}
    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        """Return the file of a request's path; one that does not exist for what lies outside of the folder."""
        found, root = Path(super().translate_path(path)), Path(self.directory).resolve()
        inside = found.resolve().is_relative_to(root)
        if found.resolve() == root:
            return str(root / PAGE)
        return str(found) if inside and found.is_file() else str(root / "no such file")

    def end_headers(self) -> None:
        """Add the headers that browsers ask for."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests that went well."""

    def log_error(self, format: str, *values: Any) -> None:
        """Name a file that was asked for and is not there."""
        if self.path.rsplit("/", 1)[-1] != "favicon.ico":
            say(f"{self.path}: {format % values}")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a browser that went away in the middle of a file."""


def server(bundle: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Return the server of a bundle's page, listening; port 0 takes a free one.

    Raises ArtifactError for a folder that is no bundle or has no page, ConfigError for a port that cannot be had.
    """
    bundle = Path(bundle)
    unseal(bundle / "manifest.json")
    if not (bundle / PAGE).is_file():
        raise ArtifactError(f"{bundle}: holds no page for browsers. Build it with --target web.")
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port: expected 0 (a free one) to 65535, found {port}.")

    def handle(*request: Any) -> _Handler:
        return _Handler(*request, directory=str(bundle))

    try:
        return _Server((HOST, port), handle)
    except OSError as error:
        raise ConfigError(
            f"--port: {port} cannot be had ({error.strerror}). Take another, or 0 for a free one."
        ) from None


def serve_cli(bundle: Path, port: int, open_it: bool) -> None:
    """Serve a bundle's page until Ctrl-C; print its address, and open it in the usual browser if asked."""
    with server(bundle, port) as running:
        address = f"http://{HOST}:{running.server_port}/"
        print(address, flush=True)
        say("Ctrl-C ends it.")
        if open_it and not webbrowser.open(address):
            say(f"no browser could be started; open {address} in one.")
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            say("ended")
