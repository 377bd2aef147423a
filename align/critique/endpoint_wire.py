"""One request to a server and the whole of its answer; nothing here knows what is asked."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from align.errors import AlignError

CONNECT_SECONDS = 10.0
MOST_ANSWER_BYTES = 2**24


class TryAgain(Exception):
    """A try that failed in a way that the next may not.

    status: of the answer; None: none came, or not the whole of it. pause: seconds that the server asks to wait.
    sent: whether the server may have worked on it.
    """

    def __init__(self, what: str, *, status: int | None = None, pause: float = 0.0, sent: bool = True) -> None:
        super().__init__(what)
        self.status = status
        self.pause = pause
        self.sent = sent


@dataclass(frozen=True)
class Reply:
    """A whole answer. header names are read in any case."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def pause(self) -> float:
        """Seconds that Retry-After asks for, as a number or a date; 0 where it asks for nothing."""
        value = self.headers.get("retry-after", "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d*)?", value, re.ASCII):
            return float(value)
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return 0.0
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max((aware - datetime.now(UTC)).total_seconds(), 0.0)


class Wire:
    """Connections to one address, shared by threads. Redirects are not followed: the key is for this address only.

    As many connections as there are threads are kept open. Raises AlignError for an address or a proxy that cannot be used.
    """

    def __init__(self, url: str, key: str | None, *, timeout_seconds: float) -> None:
        self.url = url
        self._seconds = timeout_seconds
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        if key:  # at level DEBUG it writes the headers of answers, in which a server may quote the key
            logging.getLogger("httpcore2").setLevel(logging.INFO)
        try:
            self._client = httpx2.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx2.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds), pool=None),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=not _is_this_machine(httpx2.URL(url).host),  # proxies are for other machines
                follow_redirects=False,
            )
        except httpx2.InvalidURL as error:
            raise AlignError(f"url: '{url}' is no address ({error})", "Write http://host:port/v1.") from None
        except (ImportError, ValueError):
            raise AlignError(
                f"{url}: the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used",
                "Set it to an http:// or https:// address, or name this host in NO_PROXY.",
            ) from None

    def send(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> Reply:
        """Send one request and read all of the answer. Raises TryAgain where that fails."""
        until = time.monotonic() + self._seconds
        content = None if body is None else json.dumps(body).encode()  # ASCII, which holds half characters too
        headers = {} if body is None else {"Content-Type": "application/json"}
        seen = {"trace": self._watch}
        try:
            with self._client.stream(
                method, self.url + route, content=content, headers=headers, extensions=seen
            ) as response:
                return Reply(response.status_code, response.headers, _whole_text(response, until))
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise TryAgain(f"no connection ({error})", sent=False) from None
        except httpx2.TimeoutException:
            raise TryAgain(f"no whole answer within {self._seconds:g} seconds") from None
        except httpx2.RequestError as error:
            raise TryAgain(f"no whole answer ({error})") from None

    def close(self) -> None:
        """Give the connections back; requests under way end at once."""
        with self._lock:
            self._closed = True
            for open_socket in list(self._sockets):
                _hang_up(open_socket)
        self._client.close()

    def _watch(self, event: str, details: Mapping[str, Any]) -> None:
        """Keep the sockets of connections that come up."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                opened = details["return_value"].get_extra_info("socket")
                self._sockets.add(opened)
                if self._closed:
                    _hang_up(opened)


def _hang_up(opened: socket.socket) -> None:
    """Wake the thread that reads, which closing alone does not."""
    with suppress(OSError):  # the other side was faster
        opened.shutdown(socket.SHUT_RDWR)


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _whole_text(response: httpx2.Response, until: float) -> str:
    """The body. Raises TryAgain where it is too long, or still comes in at the time `until`."""
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > MOST_ANSWER_BYTES:
            raise TryAgain(f"an answer of more than {MOST_ANSWER_BYTES} bytes", status=response.status_code)
        if time.monotonic() > until:
            raise httpx2.ReadTimeout("the answer drips")
    return body.decode(errors="replace")
