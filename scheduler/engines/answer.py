"""The answer of a runner to a chat or a prompt, put together from the events that it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the parts of a message that come bit by bit; all others come whole
_GROWING = frozenset({"arguments", "content", "reasoning_content"})
_OF_EVENTS = frozenset({"choices", "prompt_progress"})  # what an event tells of itself, and not of the answer


class Answer(str):
    """The text of an answer, with all else that the runner told of it.

    `raw` is the whole answer in the form of OpenAI's API, as plain dictionaries and lists.
    """

    raw: dict[str, Any]

    def __new__(cls, raw: dict[str, Any]) -> Answer:
        """Make an answer of what a runner returned; raises KeyError, IndexError or TypeError for another shape."""
        choice = raw["choices"][0]
        text = (choice["message"]["content"] if "message" in choice else choice["text"]) or ""  # it may be null
        if not isinstance(text, str):
            raise TypeError("an answer's content is no text")
        answer = super().__new__(cls, text)
        answer.raw = raw
        return answer

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Copy and pickle an answer by all that was told, and not by its text."""
        return (self.raw,)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended: "stop", "length" (it was cut off) or "tool_calls"; None: it did not end."""
        reason = self._choice.get("finish_reason")
        return reason if isinstance(reason, str) else None

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens were read and written, such as `prompt_tokens` and `completion_tokens`; empty: not told."""
        return self.raw.get("usage") or {}

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered; empty where it did not, or does not tell."""
        return self._message.get("reasoning_content") or ""

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of tools that the model asks for, as in OpenAI's API: `function` has `name` and `arguments`."""
        return self._message.get("tool_calls") or []

    @property
    def _choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self.raw["choices"][0]
        return choice

    @property
    def _message(self) -> dict[str, Any]:
        return self._choice.get("message") or {}


class PartialAnswer:
    """As much of an answer as has come; any thread may read it while one feeds it."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat  # whether it answers a chat, and not a prompt
        self._head: dict[str, Any] = {}
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}
        self._calls: dict[int, dict[str, Any]] = {}  # of tools, by their index
        self._logprobs: dict[str, list[Any]] = {}
        self._end: dict[str, Any] = {"finish_reason": None}

    def feed(self, event: Mapping[str, Any]) -> str:
        """Take in one event and return the text in it, which may be empty; raises TypeError for another shape."""
        self._head |= {name: value for name, value in event.items() if name not in _OF_EVENTS and value is not None}
        return "".join([self._feed_choice(choice) for choice in event["choices"] if choice.get("index", 0) == 0])

    def answer(self) -> Answer:
        """Return what has come; its `finish_reason` is None until all has."""
        choice: dict[str, Any] = {"index": 0, **self._end}
        if self._logprobs:
            choice["logprobs"] = {name: list(values) for name, values in self._logprobs.items()}
        if self._chat:
            choice["message"] = dict(self._message)
            if self._calls:
                choice["message"]["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        else:
            choice["text"] = self._message["content"]
        kind = "chat.completion" if self._chat else "text_completion"
        return Answer({**self._head, "object": kind, "choices": [choice]})

    def _feed_choice(self, choice: Mapping[str, Any]) -> str:
        if choice.get("finish_reason") is not None:
            self._end["finish_reason"] = choice["finish_reason"]
        for name, values in (choice.get("logprobs") or {}).items():
            if isinstance(values, list):
                self._logprobs.setdefault(name, []).extend(values)
        delta = choice["delta"] if self._chat else {"content": choice["text"]}
        for call in delta.get("tool_calls") or ():
            _merge(self._calls.setdefault(call.get("index", 0), {}), call)
        _merge(self._message, {name: value for name, value in delta.items() if name != "tool_calls"})
        piece = delta.get("content") or ""
        if not isinstance(piece, str):
            raise TypeError("a piece of an answer is no text")
        return piece


def _merge(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, Mapping):
            _merge(whole.setdefault(name, {}), value)
        elif name in _GROWING and isinstance(value, str):
            whole[name] = (whole.get(name) or "") + value
        elif value is not None and name != "index":
            whole[name] = value
