"""Anthropic's Messages: answered by the runner itself, and passed on as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from scheduler.engines.answer_requests import COMPLETION_PARAMETERS
from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import as_json
from scheduler.http.protocol import EVENTS, Waiting
from scheduler.http.protocol_module import Body
from scheduler.http.runner_routes import RunnerRoute
from scheduler.models.chat_defaults import ChatDefaults

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class Anthropic:
    """Errors and signs of life in Anthropic's terms."""

    content_type = EVENTS

    def error(self, answer: ErrorAnswer) -> Mapping[str, Any]:
        """Return the body of an answer that is an error."""
        kind = _TYPES.get(answer.status, "invalid_request_error" if answer.status < 500 else "api_error")
        return {"type": "error", "error": {**answer.figures, "type": kind, "message": answer.message}}

    def error_event(self, answer: ErrorAnswer) -> bytes:
        """Return the end of a stream that breaks."""
        return b"\n\nevent: error\ndata: " + as_json(self.error(answer)) + b"\n\n"

    def missing(self, lines: bytes, model: str) -> bytes | None:
        """Return the beginning that llama.cpp leaves out where the first character has several tokens."""
        _, found, first = lines.partition(b"event: ")
        if not found:
            return None
        if not first.startswith((b"content_block", b"message_delta")):
            return b""
        message: dict[str, Any] = {
            "id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "content": [], "model": model,
            "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip
        return b"event: message_start\ndata: " + as_json({"type": "message_start", "message": message}) + b"\n\n"

    def sign_of_life(self, waiting: Waiting) -> bytes:
        """Return a ping, behind a comment that says what the request waits for."""
        return f': {waiting.line()}\nevent: ping\ndata: {{"type": "ping"}}\n\n'.encode()


def _chat(body: Mapping[str, Any], defaults: ChatDefaults) -> Mapping[str, Any]:
    """Return the body with what the model's chats begin with, and its parameters by their names here."""
    named = {"stop": None, **body} if "stop_sequences" in body else body
    body = {**defaults.with_parameters(named)}
    if stop := body.pop("stop", None):
        body["stop_sequences"] = stop
    if not isinstance(body.get("messages"), list):
        return body
    system = {"system": defaults.system} if defaults.system and not body.get("system") else {}
    return {**body, **system, "messages": [*defaults.messages, *body["messages"]]}


PROTOCOL = Anthropic()
_MESSAGES = {"model", "messages", "system", "tools", "tool_choice", "thinking", "metadata"}
_SAMPLING = {"max_tokens", "stop_sequences", "stream", *COMPLETION_PARAMETERS} - {"id_slot"}
ROUTES = (
    RunnerRoute(("/v1/messages",), {*_MESSAGES, *_SAMPLING}, "answer a chat", defaulted=_chat),
    RunnerRoute(("/v1/messages/count_tokens",), _MESSAGES, "count the tokens of a chat", defaulted=_chat),
)
ENDPOINTS = ()
BODIES: dict[str, Body] = {}
