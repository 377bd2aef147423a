"""A model folder behind the OpenAI form of HTTP: python benchmarks/served_model.py FOLDER --port 8000

For trying out `critic: {kind: endpoint}` without any other server; a vLLM or llama.cpp server takes its place. One request
is answered after the other. Routes: GET /v1/models, POST /v1/chat/completions (max_tokens, temperature, top_p, seed,
logprobs, top_logprobs).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from align.data.examples import Messages, messages_from
from align.errors import AlignError
from align.models.source import source_of
from align.rollout.generation import Reply, Sampling, context_length
from align.use.opened import Policy

MOST_LISTED = 20  # of top_logprobs, as at OpenAI


class Refusal(Exception):
    """A request that is answered with an error. code: as OpenAI names it."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Served:
    """The model. Threads may ask; a lock lets one request work at a time."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.policy = Policy.open(source_of(folder))
        self._lock = threading.Lock()

    def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a chat request. Raises Refusal or AlignError."""
        if body.get("model") != self.name:
            raise Refusal(404, f"The model `{body.get('model')}` does not exist.", "model_not_found")
        try:
            messages = messages_from(body["messages"])
            limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or 64)
            sampling = _sampling(body, limit)
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal(400, f"not a chat request: {error!r}", "invalid_request_error") from None
        listed = min(int(body.get("top_logprobs") or 0), MOST_LISTED) if body.get("logprobs") else None
        with self._lock:
            return self._completion(messages, sampling, listed)

    def _completion(self, messages: Messages, sampling: Sampling, listed: int | None) -> dict[str, Any]:
        prompt = self.policy.encoder.prompt(messages)
        context = context_length(self.policy.model)
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise Refusal(
                400, f"This model's maximum context length is {context} tokens, and {len(prompt)} of the messages and "
                f"{sampling.max_new_tokens} of the answer were asked for.", "context_length_exceeded",
            )  # fmt: skip
        reply = self.policy.answer([messages], sampling)[0]
        choice: dict[str, Any] = {
            "index": 0, "message": {"role": "assistant", "content": reply.text},
            "finish_reason": "stop" if reply.finished else "length",
        }  # fmt: skip
        if listed is not None:
            choice["logprobs"] = {"content": self._listed(prompt, reply, listed)}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.ids)}
        return {
            "object": "chat.completion", "model": self.name, "choices": [choice],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }  # fmt: skip

    @torch.no_grad()
    def _listed(self, prompt: Sequence[int], reply: Reply, count: int) -> list[dict[str, Any]]:
        """Log-probability of each new token, without temperature, and the `count` likeliest ones in its place."""
        ids = torch.tensor([[*prompt, *reply.ids]])
        logps = self.policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        places = []
        for row, token in zip(logps, reply.ids, strict=True):
            values, tokens = row.topk(min(count, len(row)))
            top = [self._token(int(one), float(value)) for one, value in zip(tokens, values, strict=True)]
            places.append(self._token(token, float(row[token])) | {"top_logprobs": top})
        return places

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        return {"token": self.policy.tokenizer.decode([token]), "logprob": logp}


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the acknowledgement of its headers
    served: Served

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.served.name, "object": "model"}]})
        else:
            self._send(404, _error(f"no route {self.path}", "not_found"))

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            self._send(404, _error(f"no route {self.path}", "not_found"))
            return
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise ValueError("not an object")
            self._send(200, self.served.completion(body))
        except Refusal as refusal:
            self._send(refusal.status, _error(str(refusal), refusal.code))
        except (AlignError, ValueError) as error:
            self._send(400, _error(str(error), "invalid_request_error"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """The command line: serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="served", help="name of the model (default: served)")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    options = parser.parse_args()
    Handler.served = Served(options.folder, options.name)
    with ThreadingHTTPServer(("127.0.0.1", options.port), Handler) as server:
        sys.stdout.write(f"{options.name} at http://127.0.0.1:{server.server_address[1]}/v1\n")
        sys.stdout.flush()
        server.serve_forever()


def _sampling(body: Mapping[str, Any], limit: int) -> Sampling:
    temperature = float(1.0 if body.get("temperature") is None else body["temperature"])
    top_p = float(body.get("top_p") or 1.0) if temperature else 1.0
    return Sampling(max_new_tokens=limit, temperature=temperature, top_p=top_p, seed=int(body.get("seed") or 0))


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


if __name__ == "__main__":
    main()
