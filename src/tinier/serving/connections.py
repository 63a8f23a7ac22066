"""HTTP connections with limits on what may come before a key or a body is looked at; uvicorn has none.

`Connection` is uvicorn's protocol with a bound on the bytes, number and time of a request's head, and on
connections. What breaks one gets OpenAI's error body and is closed.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MOST_HEAD_BYTES = 64 << 10
MOST_HEADERS = 128
HEAD_SECONDS = 20.0
MOST_CONNECTIONS = 8192


class Connection(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True
        self._head_bytes = 0
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(503, "The server has too many connections. Try again later.")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._expect_head()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MOST_HEAD_BYTES:
            self._refuse(431, f"A request's headers may have {MOST_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_came()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MOST_HEAD_BYTES or len(self.headers) > MOST_HEADERS:
            self._refuse(
                431,
                f"A request may have {MOST_HEADERS} headers, and {MOST_HEAD_BYTES} bytes of them.",
            )
        elif not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "This is no HTTP request.")

    def _expect_head(self) -> None:
        """From now on a request's head must be whole within HEAD_SECONDS."""
        if self._timer is None:
            late = f"A request's headers must come within {HEAD_SECONDS:g} s."
            self._timer = self.loop.call_later(HEAD_SECONDS, self._refuse, 408, late)

    def _head_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_came()
        error: dict[str, Any] = {
            "message": message, "type": "invalid_request_error", "param": None, "code": None,
        }  # fmt: skip
        body = json.dumps({"error": error}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
