"""The server of a bundle's page: its headers and types, and what it does not give."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepeft.deploy import serve
from edgepeft.errors import ArtifactError, ConfigError
from tests.runtime import standin


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = standin.write_bundle(tmp_path_factory.mktemp("served") / "bundle")
    for name in ("index.html", "edgepeft.js", "a.mjs", "a.wasm"):
        (folder / name).write_text(name)
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "secret")
    standin.reseal(folder)
    return folder


@pytest.fixture(scope="module")
def running(bundle: Path) -> Iterator[http.client.HTTPConnection]:
    with serve.server(bundle, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield http.client.HTTPConnection(serve.HOST, server.server_port, timeout=10)
        server.shutdown()


def _get(running: http.client.HTTPConnection, path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    running.request("GET", path, headers=headers)
    answer = running.getresponse()
    return answer.status, answer.read(), answer.headers


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("/", "index.html", "text/html"),
        ("/?a=b", "index.html", "text/html"),
        ("/edgepeft.js", "edgepeft.js", "text/javascript"),
        ("/a.mjs", "a.mjs", "text/javascript"),
        ("/a.wasm", "a.wasm", "application/wasm"),
        ("/manifest.json", "manifest.json", "application/json"),
        ("/model.onnx.data", "model.onnx.data", "application/octet-stream"),
    ],
)
def test_a_file_comes_with_its_type_and_isolated(running, bundle: Path, path: str, name: str, kind: str) -> None:
    status, body, headers = _get(running, path)
    assert (status, body) == (200, (bundle / name).read_bytes())
    assert headers["Content-Type"].split(";")[0] == kind
    assert {key: headers[key] for key in serve.HEADERS} == serve.HEADERS


def test_what_did_not_change_is_not_sent_again(running) -> None:
    since = _get(running, "/edgepeft.js")[2]["Last-Modified"]
    assert _get(running, "/edgepeft.js", **{"If-Modified-Since": since})[:2] == (304, b"")


@pytest.mark.parametrize(
    "path", ["/../secret", "/%2e%2e/secret", "/adapters/..%2f..%2fsecret", "//../secret", "/link", "/adapters", "/none"]
)
def test_nothing_else_is_given(running, path: str, capsys) -> None:
    status, body, _ = _get(running, path)
    assert status == 404
    assert b"secret" not in body.replace(b"/secret", b"")
    assert "File not found" in capsys.readouterr().err


def test_nothing_is_taken(running) -> None:
    running.request("POST", "/", body=b"x")
    answer = running.getresponse()
    answer.read()
    assert answer.status == 501


def test_what_cannot_be_served_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no page for browsers.*--target web"):
        serve.server(standin.write_bundle(tmp_path / "bundle"), 0)
    with pytest.raises(ArtifactError, match="no such folder"):
        serve.server(tmp_path / "none", 0)
    with pytest.raises(ConfigError, match="expected 0"):
        serve.server(bundle, 70000)
    with serve.server(bundle, 0) as other, pytest.raises(ConfigError, match=r"cannot be had.*in use"):
        serve.server(bundle, other.server_port)
