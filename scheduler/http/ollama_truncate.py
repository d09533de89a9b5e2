"""How a prompt that a context does not hold is shortened, as clients of Ollama expect it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Any]]  # a path of the runner's server, and a body

_CHAT = "/v1/chat/completions"
_TRIES = 4  # the rest of a text may have other tokens than before
_COUNTED = ("messages", "tools", "chat_template_kwargs", "response_format", "tool_choice")  # what a prompt is made of


async def shortened(path: str, body: Mapping[str, Any], context: int | None, ask: Ask) -> dict[str, Any] | None:
    """Return a request with as much of its prompt as a context holds; None: it holds the prompt, or no part of it.

    A chat loses its oldest messages, but for system messages and the last one, and then the beginning of the last one.
    A text loses its beginning, behind its first `n_keep` tokens.
    """
    if context is None:
        return None
    if path == _CHAT:
        messages = await _last_messages(body, context, ask)
        return None if messages is None else {**body, "messages": messages}
    if path == "/completion" and isinstance(body.get("prompt"), str):
        tokens, _ = await tokens_of(ask, body["prompt"])
        keep, held = max(0, int(body.get("n_keep") or 0)), context - 1  # one more is answered
        if len(tokens) > held > keep:
            return {**body, "prompt": [*tokens[:keep], *tokens[keep - held :]]}
    return None


async def tokens_of(ask: Ask, text: str) -> tuple[list[int], int]:
    """Return the tokens of a text, with those that the model puts around each text, and how many of these are last."""
    whole, plain = [
        (await ask("/tokenize", {"content": text, "add_special": special}))["tokens"] for special in (True, False)
    ]
    before = 1 if plain and whole[0] != plain[0] else 0
    return whole, max(0, len(whole) - len(plain) - before)


async def _last_messages(body: Mapping[str, Any], context: int, ask: Ask) -> list[Any] | None:
    """Return a chat without as much of its beginning as it takes; None where that is nothing, or not enough."""
    messages: Sequence[Mapping[str, Any]] = body["messages"]
    told = {name: body[name] for name in _COUNTED if name in body}
    old = [place for place, message in enumerate(messages[:-1]) if message.get("role") != "system"]

    def without(dropped: int) -> list[Any]:
        return [message for place, message in enumerate(messages) if place not in old[:dropped]]

    async def excess(left: Sequence[Any]) -> int:
        counted = await ask(f"{_CHAT}/input_tokens", {**told, "messages": left})
        return int(counted["input_tokens"]) - context + 1  # one more is answered

    if await excess(messages) <= 0:
        return None
    if (over := await excess(without(len(old)))) > 0:
        return await _without_its_beginning(without(len(old)), over, excess, ask)
    too_few, enough = 0, len(old)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if await excess(without(middle)) <= 0 else (middle, enough)
    return without(enough)


async def _without_its_beginning(
    messages: Sequence[Mapping[str, Any]], over: int, excess: Callable[[Sequence[Any]], Awaitable[int]], ask: Ask
) -> list[Any] | None:
    """Return a chat whose last message has lost its first tokens, `over` or a few more; None where they do not do."""
    *before, last = messages
    text = last.get("content")
    tokens = (await ask("/tokenize", {"content": text}))["tokens"] if isinstance(text, str) else []
    for _ in range(_TRIES):
        if over >= len(tokens):
            return None
        cut = (await ask("/detokenize", {"tokens": tokens[over:]}))["content"]
        found = [*before, {**last, "content": cut}]
        if (more := await excess(found)) <= 0:
            return found
        over += more
    return None
