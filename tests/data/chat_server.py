"""A chat server of the tests' own: OpenAI's protocol over HTTP, that answers, fails, stalls and lies as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Sent = dict[str, Any]       # the JSON object in the user's message


@dataclass(frozen=True)
class Reply:
    """One HTTP answer: a text inside a chat completion, or a raw body."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay_s: float = 0.0


def honest(sent: Sent) -> Reply:
    """What a good model says: the words after for, in and because."""
    if "description" in sent:
        return Reply(json.dumps({"id": sent["id"], "summary": sent["description"][: sent["max_characters"]]}))
    words = sent["review"].lower().replace(".", "").split()
    after = {word: words[words.index(word) + 1] for word in ("for", "in", "because") if word in words[:-1]}
    found = {"who": "for", "when": "in", "why": "because"}
    return Reply(json.dumps({"id": sent["id"], **{aspect: [after[word]] if word in after else []
                                                  for aspect, word in found.items()}}))


@dataclass
class ChatServer:
    """The running server: what it was asked, and how it answers the nth question."""

    url: str
    behave: Callable[[Sent, int], Reply]
    requests: list[Sent] = field(default_factory=list)      # bodies of /v1/chat/completions
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0

    def sent(self) -> list[Sent]:
        """The user's messages of all requests."""
        return [json.loads(one["messages"][-1]["content"]) for one in self.requests]


@contextmanager
def chat_server(behave: Callable[[Sent, int], Reply] | None = None) -> Iterator[ChatServer]:
    """A server on a free port of this machine, ended with the block."""
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                under_way[0] += 1
                number = len(server.requests)
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization", ""))
                server.times.append(time.monotonic())
                server.most_at_once = max(server.most_at_once, under_way[0])
            reply = server.behave(json.loads(body["messages"][-1]["content"]), number)
            time.sleep(reply.delay_s)
            with lock:
                under_way[0] -= 1
            completion = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply.text}}]}
            content = json.dumps(completion).encode() if reply.raw is None else reply.raw
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers,
                                    "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass        # the client gave up waiting

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_port}/v1", behave or (lambda sent, _: honest(sent)))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
