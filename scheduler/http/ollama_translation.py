"""What a request in Ollama's terms is in the engine's, and what the engine's answer is in Ollama's: values alone."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from scheduler.engines.answer import PartialAnswer
from scheduler.engines.runner_client import engine_error
from scheduler.errors.exceptions import UnsupportedOption
from scheduler.http.exchange import body_of
from scheduler.http.rules import LOAD_OPTIONS
from scheduler.models.ollama_model import SAMPLING_NAMES, load_options, sampling_parameters

Shape = Literal["chat", "generate"]

_PARTS = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([-+]?)((?:{_PARTS.pattern})+|0)")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_FOREVER_S = -1.0
_EFFORTS = ("low", "medium", "high")
_NS = 1_000_000_000
_PING_S = 10  # the runner's own signs of life, while it computes a long prompt

# The first bytes of the files that llama.cpp reads, with what they hold.
_IMAGES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}
_SOUNDS = {b"RIFF": "wav", b"ID3": "mp3", b"\xff\xfb": "mp3", b"\xff\xf3": "mp3"}


@dataclass(frozen=True, slots=True)
class Question:
    """What the engine is asked."""

    path: str  # of the runner's server
    body: Mapping[str, Any]  # of the request to it
    needs: frozenset[str] = frozenset()  # what the model must be capable of
    empty: bool = False  # nothing is asked: the model is loaded, or unloaded


# -- scheduling --------------------------------------------------------------------------------------------------------


def keep_alive_of(asked: Mapping[str, Any]) -> float | None:
    """Return a keep-alive in seconds, negative: for ever; None where none is named. Raises `UnsupportedOption`.

    A number is seconds. A text needs units, as in "5m" or "1h30m"; "0" alone needs none.
    """
    value = asked.get("keep_alive")
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _FOREVER_S if value < 0 else float(min(value, 1 << 62))
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise UnsupportedOption("keep_alive", value, 'it must be seconds, or a text with units, as in "5m"')
    seconds = sum(float(count) * _UNITS_S[unit] for count, unit in _PARTS.findall(found[2]))
    return _FOREVER_S if found[1] == "-" and seconds else seconds


def options_of(asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the load-time options of a request, and its parameters of sampling by the engine's names.

    Options that have no counterpart have no effect. Raises `UnsupportedOption` for a value that cannot be.
    """
    options = asked.get("options") or {}
    if not isinstance(options, Mapping):
        raise UnsupportedOption("options", options, "it must be an object")
    loading = {name: options[name] for name in LOAD_OPTIONS if name in options} | load_options(options)
    sampling, unknown = sampling_parameters(options)
    for name in unknown:
        if name in SAMPLING_NAMES:
            raise UnsupportedOption(f"options.{name}", options[name], "it has a wrong type")
    return {name: value for name, value in loading.items() if value is not None}, sampling


# -- questions ---------------------------------------------------------------------------------------------------------


def chat_question(asked: Mapping[str, Any], sampling: Mapping[str, Any]) -> Question:
    """Return what a request to /api/chat asks the engine; raises `UnsupportedOption`."""
    said = asked.get("messages") or []
    if not isinstance(said, list) or not all(isinstance(each, Mapping) for each in said):
        raise UnsupportedOption("messages", said, "it must be a list of messages")
    tools = asked.get("tools") or []
    if not isinstance(tools, list):
        raise UnsupportedOption("tools", tools, "it must be a list of tools")
    messages, needs = _messages(said)
    body = {**sampling, "messages": messages, **_of_chats(asked, needs)}
    if tools:
        body["tools"] = tools
        needs.add("tools")
    return Question("/v1/chat/completions", body, frozenset(needs), not said)


def generate_question(asked: Mapping[str, Any], sampling: Mapping[str, Any]) -> Question:
    """Return what a request to /api/generate asks the engine; raises `UnsupportedOption`."""
    prompt, suffix, system = (_text(asked, name) for name in ("prompt", "suffix", "system"))
    for name, why in (
        ("template", "the engine writes prompts by the template in the model's file: write the prompt, with raw"),
        ("context", "send what was said before as messages, to /api/chat"),
    ):
        if asked.get(name):
            raise UnsupportedOption(name, asked[name], why)
    raw = asked.get("raw") is True
    if raw or suffix:
        for name in ("system", "images"):
            if asked.get(name):
                raise UnsupportedOption(name, "…", f"it is not for {'raw prompts' if raw else 'a gap in a text'}")
        body = {**sampling, "stream": True, "sse_ping_interval": _PING_S}
        body |= {"prompt": prompt} if raw else {"input_prefix": prompt, "input_suffix": suffix, "prompt": ""}
        if (schema := _schema(asked)) is not None:
            body["json_schema"] = schema or {"type": "object"}
        if asked.get("logprobs"):
            body["n_probs"] = _top_logprobs(asked)
        return Question("/completion" if raw else "/infill", body, empty=not prompt)
    said: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said.append({"role": "user", "content": prompt, "images": asked.get("images")})
    messages, needs = _messages(said)
    body = {**sampling, "messages": messages, **_of_chats(asked, needs)}
    return Question("/v1/chat/completions", body, frozenset(needs), not prompt)


def _of_chats(asked: Mapping[str, Any], needs: set[str]) -> dict[str, Any]:
    """Return the rest of a request for the answer to a chat, and add what the model must be capable of."""
    body: dict[str, Any] = {"stream": True, "sse_ping_interval": _PING_S}
    if (schema := _schema(asked)) is not None:
        named = {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
        body["response_format"] = named if schema else {"type": "json_object"}
    if asked.get("logprobs"):
        body |= {"logprobs": True, "top_logprobs": _top_logprobs(asked)}
    think = asked.get("think")
    if think is not None:
        if think not in _EFFORTS and not isinstance(think, bool):
            raise UnsupportedOption("think", think, f"it must be true, false, or one of {', '.join(_EFFORTS)}")
        effort = {"reasoning_effort": think} if isinstance(think, str) else {}
        body["chat_template_kwargs"] = {"enable_thinking": bool(think), **effort}
        if think:
            needs.add("thinking")
    return body


def _schema(asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the JSON schema that an answer must meet, empty: any object; None: it is free."""
    wanted = asked.get("format")
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return {}
    if not isinstance(wanted, Mapping) or not wanted:
        raise UnsupportedOption("format", wanted, 'it must be "json" or a JSON schema')
    return wanted


def _top_logprobs(asked: Mapping[str, Any]) -> int:
    count = asked.get("top_logprobs") or 1
    if not isinstance(count, int) or not 0 < count <= 20:
        raise UnsupportedOption("top_logprobs", count, "it must be a whole number from 0 to 20")
    return count


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str | None):
        raise UnsupportedOption(name, value, "it must be a text")
    return value or ""


def _messages(said: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """Return messages as OpenAI has them, and what the model must be capable of.

    The result of a tool names the call that it belongs to: the first open one of the same tool, else the first.
    """
    messages: list[dict[str, Any]] = []
    needs: set[str] = set()
    open_calls: list[tuple[str, object]] = []  # ids and names of the calls whose results have not come
    for message in said:
        if not isinstance(message.get("role"), str):
            raise UnsupportedOption("messages", message.get("role"), "each message has a role, which is a text")
        content: Any = _text(message, "content")
        if images := message.get("images"):
            content = [{"type": "text", "text": content}, *_files(images, needs)]
        found: dict[str, Any] = {"role": message["role"], "content": content}
        if thinking := _text(message, "thinking"):
            found["reasoning_content"] = thinking
        if calls := message.get("tool_calls"):
            found["tool_calls"] = made = _calls(calls, len(messages))
            open_calls = [(call["id"], call["function"]["name"]) for call in made]
        if message["role"] == "tool":
            name = message.get("tool_name") or message.get("name")
            answered = next((call for call in open_calls if call[1] == name), open_calls[0] if open_calls else None)
            found |= {"name": name} if name else {}
            if answered is not None:
                open_calls.remove(answered)
                found["tool_call_id"] = answered[0]
            if message.get("tool_call_id"):
                found["tool_call_id"] = message["tool_call_id"]
        messages.append(found)
    return messages, needs


def _calls(calls: object, place: int) -> list[dict[str, Any]]:
    """Return the calls of tools in a message, with ids that no other message's calls have."""
    found = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") or {} if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(arguments, Mapping):
            raise UnsupportedOption("tool_calls", call, "each has a function with a name, and arguments in an object")
        text = body_of(arguments).decode()
        found.append(
            {
                "id": call.get("id") or f"call_{place}_{number}", "type": "function",
                "function": {"name": function.get("name"), "arguments": text},
            }
        )  # fmt: skip
    return found


def _files(images: Any, needs: set[str]) -> list[dict[str, Any]]:
    """Return images, and sounds, which Ollama sends in the same field, as parts of a message."""
    parts: list[dict[str, Any]] = []
    for image in images if isinstance(images, list) else [images]:
        try:
            start = base64.b64decode(image[:24], validate=True)
        except (ValueError, TypeError, binascii.Error):
            raise UnsupportedOption("images", "…", "each must be the content of a file in Base64") from None
        kind = next((name for begin, name in _IMAGES.items() if start.startswith(begin)), None)
        sound = next((name for begin, name in _SOUNDS.items() if start.startswith(begin)), None)
        if kind is not None:
            needs.add("vision")
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}})
        elif sound is not None and start[8:12] != b"WEBP":
            needs.add("audio")
            parts.append({"type": "input_audio", "input_audio": {"data": image, "format": sound}})
        else:
            raise UnsupportedOption("images", "…", "the engine reads PNG, JPEG, GIF, BMP, WAV and MP3: convert it")
    return parts


# -- answers -----------------------------------------------------------------------------------------------------------


def now() -> str:
    """Return the time of day as Ollama writes it."""
    return time_of(time.time())


def time_of(seconds: float) -> str:
    """Return a time in seconds since 1970 as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def line_of(shape: Shape, model: str, text: str, **more: Any) -> dict[str, Any]:
    """Return a part of an answer; `thinking`, `tool_calls` and `logprobs` where there are any."""
    line: dict[str, Any] = {"model": model, "created_at": now()}
    inner = {name: more.pop(name) for name in ("thinking", "tool_calls") if more.get(name)}
    if shape == "chat":
        line["message"] = {"role": "assistant", "content": text, **inner}
    else:
        line |= {"response": text, **inner}
    return {**line, **{name: value for name, value in more.items() if value not in (None, "", [])}}


@dataclass(slots=True)
class Reply:
    """An answer in Ollama's terms, from the events in which the runner's comes."""

    shape: Shape
    model: str  # as the client calls it
    began: float  # by the monotonic clock
    load_s: float
    calls: PartialAnswer = field(default_factory=lambda: PartialAnswer(chat=True))
    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    timings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = "stop"

    def feed(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take in an event, and return the line that says what came with it; None: nothing that is shown."""
        self.timings = event.get("timings") or self.timings
        text, thinking, logprobs = self._of_chat(event) if "choices" in event else self._of_text(event)
        self.text.append(text)
        self.thinking.append(thinking)
        self.logprobs += logprobs
        if not (text or thinking or logprobs):
            return None
        return line_of(self.shape, self.model, text, thinking=thinking, logprobs=logprobs, done=False)

    def _of_chat(self, event: Mapping[str, Any]) -> tuple[str, str, list[Any]]:
        choice = event["choices"][0] if event["choices"] else {}
        delta = choice.get("delta") or {}
        if delta.get("tool_calls"):
            self.calls.feed(event)
        if choice.get("finish_reason") == "length":
            self.reason = "length"
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        return delta.get("content") or "", delta.get("reasoning_content") or "", logprobs

    def _of_text(self, event: Mapping[str, Any]) -> tuple[str, str, list[Any]]:
        if event.get("stop_type") == "limit":
            self.reason = "length"
        return event.get("content") or "", "", event.get("completion_probabilities") or []

    def last(self, *, whole: bool = False) -> dict[str, Any]:
        """Return the last line of the answer, or the answer in one."""
        parts: dict[str, Any] = {"thinking": "".join(self.thinking), "logprobs": self.logprobs} if whole else {}
        end = line_of(
            self.shape, self.model, "".join(self.text) if whole else "", tool_calls=self._tool_calls(), **parts,
            done=True, done_reason=self.reason,
        )  # fmt: skip
        return end | {
            "total_duration": int((time.monotonic() - self.began) * _NS),
            "load_duration": int(self.load_s * _NS),
            "prompt_eval_count": self.tokens_in,
            "prompt_eval_duration": self._duration("prompt_ms"),
            "eval_count": self.tokens_out,
            "eval_duration": self._duration("predicted_ms"),
        }

    @property
    def tokens_in(self) -> int:
        """Tokens of the prompt, with those that the engine still had."""
        return int(self.timings.get("prompt_n", 0)) + int(self.timings.get("cache_n", 0))

    @property
    def tokens_out(self) -> int:
        """Tokens of the answer."""
        return int(self.timings.get("predicted_n", 0))

    def _duration(self, name: str) -> int:
        return int(float(self.timings.get(name, 0)) * 1e6)

    def _tool_calls(self) -> list[dict[str, Any]]:
        """Return the calls of tools; one that was cut off by the limit of tokens is left out."""
        found = []
        for index, call in enumerate(self.calls.answer().tool_calls):
            function = call.get("function") or {}
            try:
                arguments = json.loads(function.get("arguments") or "{}")
            except ValueError:
                continue
            told = {"index": index, "name": function.get("name"), "arguments": arguments}
            found.append({"id": call.get("id"), "function": told})
        return found


async def events_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the events of a runner's answer from its bytes; raises `EngineError` for an error among them."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data" and value.strip() != b"[DONE]":
                event = json.loads(value)
                if "error" in event:
                    raise engine_error(500, value)
                yield event
            elif name == b"error":
                raise engine_error(500, b'{"error":' + value + b"}")
