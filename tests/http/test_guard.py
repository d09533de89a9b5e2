"""Who may call: hosts, web pages, keys, sizes and numbers of requests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import httpx2
import pytest

from scheduler.errors.exceptions import InvalidSettings
from scheduler.http.settings import ServerSettings
from tests.http.conftest import Serve, Served, eventually

UNLOAD = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "keep_alive": 0}'


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example",
                                  "", "localhost@evil.example", "localhost/../evil", "[::1", "a" * 5000])  # fmt: skip
def test_another_host_is_refused(served: Served, host: str) -> None:
    """A name that was made to lead here, as by DNS rebinding, is refused, whatever is asked."""
    answer = served.get("/v1/models", Host=host)
    assert answer.status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:9", "[::1]:80", "192.168.0.7"])
def test_addresses_and_localhost_are_known(served: Served, host: str) -> None:
    assert served.get("/v1/models", Host=host).status_code == 200


def test_hosts_can_be_named(serve: Serve) -> None:
    served = serve(allow_hosts=["host.docker.internal"])
    assert served.get("/health", Host="Host.Docker.internal:11434").status_code == 200
    assert served.get("/health", Host="evil.example").status_code == 403
    assert serve(allow_hosts="*").get("/health", Host="evil.example").status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize(
    "browser",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)  # fmt: skip
def test_a_page_of_another_origin_changes_nothing(served: Served, kind: str | None, browser: dict[str, str]) -> None:
    """A cross-site POST, with any content type, unloads nothing and loads nothing."""
    with served.scheduler.acquire("m", keep_alive="1h"):
        pass
    headers = browser if kind is None else {"Content-Type": kind, **browser}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", content=UNLOAD, headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert [runner.state for runner in served.scheduler.status().runners if runner.model == "m"] == ["idle"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_client_that_is_no_browser_may_send_any_content_type(served: Served, kind: str | None) -> None:
    """curl sends JSON as a form unless it is told not to."""
    headers = {} if kind is None else {"Content-Type": kind}
    content = UNLOAD.replace(b'"keep_alive": 0', b'"keep_alive": "1h"')
    assert httpx2.post(f"{served.url}/v1/chat/completions", content=content, headers=headers).status_code == 200


def test_the_same_origin_and_an_allowed_one_may_call(serve: Serve) -> None:
    """Only an allowed origin gets the headers that let its pages read the answers; a preflight is answered."""
    served = serve(allow_origins=["https://app.example"])
    answer = served.get("/v1/models", Origin=served.url)
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    answer = served.get("/v1/models", Origin="https://app.example")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-expose-headers"] == "*"  # whether a retry may help is in headers
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    answer = httpx2.options(f"{served.url}/v1/chat/completions", headers=asking)
    assert answer.status_code == 204 and "POST" in answer.headers["access-control-allow-methods"]
    asking["Origin"] = "https://evil.example"
    assert httpx2.options(f"{served.url}/v1/chat/completions", headers=asking).status_code == 403


@pytest.mark.parametrize("key", [None, "wrong", "SECRET-1", "secret-", "secret-12", "sécret-1", "secret-1"])
def test_a_key_is_needed_once_one_is_set(serve: Serve, key: str | None) -> None:
    """Every path but the health check asks for it, and a wrong one is told in the terms of the protocol."""
    served = serve(api_key="secret-1")
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
    for path, status in (("/v1/models", 200), ("/ready", 200), ("/nothing", 404), ("/health", 200)):
        expected = status if key == "secret-1" or path == "/health" else 401
        assert httpx2.get(f"{served.url}{path}", headers=headers).status_code == expected, path
        assert httpx2.head(f"{served.url}{path}", headers=headers).status_code == expected, path
    if key != "secret-1":
        answer = httpx2.post(f"{served.url}/v1/messages", headers=headers, json={})
        assert answer.json()["error"]["type"] == "authentication_error"


def test_a_key_comes_as_a_bearer_token_or_as_anthropics_header(serve: Serve) -> None:
    served = serve(api_key="secret-1")
    assert served.get("/v1/models", Authorization="bearer secret-1").status_code == 200
    assert served.get("/v1/models", **{"x-api-key": "secret-1"}).status_code == 200
    assert served.get("/v1/models", Authorization="Bearer none", **{"x-api-key": "secret-1"}).status_code == 200


@pytest.mark.parametrize("key", ["", "with space", "schlüssel", "line\nbreak", 3])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: object) -> None:
    with pytest.raises(InvalidSettings, match="api_key") as caught:
        ServerSettings(api_key=key)  # type: ignore[arg-type]
    assert "cannot be '…'" in str(caught.value)


@pytest.mark.parametrize("wrong", [{"body_limit": "many"}, {"patience": 0}, {"allow_hosts": [3]}, {"prot": 1}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(wrong))):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_a_body_over_the_limit_is_refused(serve: Serve) -> None:
    """Whether or not the client says beforehand how long it is."""
    served = serve(body_limit=1000)
    answer = httpx2.post(f"{served.url}/v1/chat/completions", content=b"x" * 1001)
    assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    assert httpx2.post(f"{served.url}/v1/chat/completions", content=parts()).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    """A client that pauses for too long is answered, and its connection is not kept."""
    address = urlsplit(serve(body_timeout="0.2s").url)
    with closing(socket.create_connection((address.hostname, address.port), 10)) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_one_request_too_many_is_refused(serve: Serve) -> None:
    """Beyond the limit of requests at once a client is told to come back; after one has ended, another may come."""
    served = serve(max_connections=1)
    address = urlsplit(served.url)
    with closing(socket.create_connection((address.hostname, address.port), 10)) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        eventually(lambda: served.get("/v1/models").status_code == 503)
        assert served.get("/v1/models").headers["retry-after"] == "1"
    eventually(lambda: served.get("/v1/models").status_code == 200)
