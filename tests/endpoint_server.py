"""A real HTTP server on loopback that speaks the OpenAI form and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What one chat request gets in place of an answer.

    body: sent as it is. cut: the connection ends after half of it. drip_seconds: between single bytes of it.
    """

    status: int = 200
    body: str = '{"error": {"message": "out of order"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    drip_seconds: float = 0.0


NO_JSON = Fault(body="<html>Welcome</html>")
NO_CHOICES = Fault(body='{"object": "chat.completion"}')
EMPTY_CHOICES = Fault(body='{"choices": []}')
NULL_CONTENT = Fault(body='{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}')
CUT = Fault(body='{"choices": [{"message": {"content": "never to be seen whole"}}]}', cut=True)


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float


class EndpointServer:
    """`with EndpointServer() as server:` answers at `server.url` until the block ends. All attributes may be changed.

    faults: used up one by one by chat requests, before any answer. models: of /models, and the only ones known; None: no
    such route, and every name is known. open_models: names beside the listed ones are known too. key: asked for in the
    Authorization header, which a refusal echoes. top_logprobs: (token, log-probability) of the first token, as a list or
    made from the request; None: given none. total_tokens: of each answer; None: no usage is told.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], str] = lambda _: "fine"
        self.delay_seconds = 0.0
        self.faults: deque[Fault] = deque()
        self.models: list[str] | None = ["tiny"]
        self.open_models = False
        self.models_fault: Fault | None = None
        self.key: str | None = None
        self.top_logprobs: Sequence[tuple[str, float]] | Callable[[dict[str, Any]], Sequence[tuple[str, float]]] | None
        self.top_logprobs = [("A", -0.2), ("B", -1.8)]
        self.total_tokens: int | None = 10
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> EndpointServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Up to /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def chats(self) -> list[Seen]:
        """Chat requests, in the order in which they came."""
        return [seen for seen in self.seen if seen.path.endswith("/chat/completions")]

    def record(self, seen: Seen) -> None:
        """Note a request that is now under way."""
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def finish(self) -> None:
        """Note that a request is about to be answered."""
        with self._lock:
            self._at_once -= 1

    def outcome(self, seen: Seen) -> Fault:
        """What the request gets."""
        if self.key is not None and seen.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, f"wrong credentials: {seen.headers.get('authorization')}")
        if seen.path == "/v1/models":
            return self.models_fault or self._listing()
        if seen.path != "/v1/chat/completions":
            return _error(404, f"no route {seen.path}")
        with self._lock:
            if self.faults:
                return self.faults.popleft()
        if self.models and seen.body["model"] not in self.models and not self.open_models:
            return _error(404, f"The model `{seen.body['model']}` does not exist.")
        return Fault(body=json.dumps(self._answer(seen.body)))

    def _listing(self) -> Fault:
        if self.models is None:
            return _error(404, "no route /v1/models")
        return Fault(body=json.dumps({"object": "list", "data": [{"id": name} for name in self.models]}))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.reply(body)}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        if body.get("logprobs") and self.top_logprobs is not None:
            pairs = self.top_logprobs(body) if callable(self.top_logprobs) else self.top_logprobs
            listed = [{"token": token, "logprob": logp} for token, logp in pairs]
            choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}] if listed else []}
        answer: dict[str, Any] = {"object": "chat.completion", "model": body["model"], "choices": [choice]}
        if self.total_tokens is not None:
            answer["usage"] = {"total_tokens": self.total_tokens}
        return answer


def _error(status: int, message: str) -> Fault:
    return Fault(status, json.dumps({"error": {"message": message}}))


class _Server(ThreadingHTTPServer):
    owner: EndpointServer
    daemon_threads = True
    block_on_close = False  # a thread that still sleeps must not hold up the test

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hung up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, json.loads(text or b"{}"), time.monotonic())
        owner = self.server.owner
        owner.record(seen)
        try:
            time.sleep(owner.delay_seconds)
            outcome = owner.outcome(seen)
        finally:
            owner.finish()
        self._send(outcome)

    def _send(self, outcome: Fault) -> None:
        body = outcome.body.encode()
        self.send_response(outcome.status)
        for name, value in outcome.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if outcome.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if not outcome.drip_seconds:
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(outcome.drip_seconds)
