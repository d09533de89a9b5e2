"""The requests that a runner's server is sent: what may be asked of it, and in which form."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.errors.exceptions import UnsupportedOption
from scheduler.models.chat_defaults import NO_DEFAULTS, ChatDefaults

Messages = str | Sequence[Mapping[str, Any]]

# The parameters that llama.cpp's server acts upon; it passes over all others without a word.
_OF_ALL = """
    adaptive_decay adaptive_target backend_sampling cache_prompt dry_allowed_length dry_base dry_multiplier
    dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range frequency_penalty grammar grammar_lazy
    grammar_triggers id_slot ignore_eos json_schema logit_bias logprobs max_completion_tokens max_tokens min_keep
    min_p mirostat mirostat_eta mirostat_tau n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs n
    post_sampling_probs presence_penalty preserved_tokens reasoning_budget_message reasoning_budget_tokens
    reasoning_control reasoning_format repeat_last_n repeat_penalty return_tokens samplers seed stop t_max_predict_ms
    temperature timings_per_token top_k top_n_sigma top_p typical_p verbose xtc_probability xtc_threshold
"""
_OF_CHATS = """
    add_generation_prompt chat_template_kwargs continue_final_message echo parallel_tool_calls parse_tool_calls
    reasoning_effort response_format thinking_budget_tokens tool_choice tools top_logprobs
"""
COMPLETION_PARAMETERS = frozenset(_OF_ALL.split())
_CHATS_ALONE = frozenset(_OF_CHATS.split())
CHAT_PARAMETERS = COMPLETION_PARAMETERS | _CHATS_ALONE
EMBEDDING_PARAMETERS = frozenset({"embd_normalize"})

# What is not a caller's to say, with what helps.
_OWN: Mapping[str, str] = {
    "model": "the lease is on one model: acquire another",
    "messages": "they are the first argument",
    "prompt": "it is the first argument",
    "input": "it is the first argument",
    "stream": "call stream, or astream, for an answer piece by piece",
    "stream_options": "an answer that comes piece by piece always ends with its usage",
    "functions": "name them as tools",
    "function_call": "name it as tool_choice",
    "lora": "name the model's adapter as it is acquired",
}
_ADDRESS = re.compile(r"http|\s*[A-Za-z][A-Za-z0-9+.-]*:/")  # llama.cpp takes all that begins with "http" for one

# Parts of a message whose addresses are words: nothing fetches them.
_WORDS = "text input_text output_text thinking redacted_thinking tool_use refusal reasoning summary_text"
_TEXT_PARTS = frozenset(_WORDS.split())

# The texts of one request to an embedder: it is silent until all of them are computed.
BATCH_TEXTS = 16
BATCH_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a caller with or without an event loop."""

    path: str
    body: Mapping[str, Any]
    scales: tuple[float, ...] = ()  # of the model's adapters, where there is one to choose from

    def content(self) -> bytes:
        """Return the body as JSON; raises `UnsupportedOption` for a value that JSON does not have."""
        try:
            return _as_json(self.body)
        except (TypeError, ValueError, RecursionError):
            for name, value in self.body.items():
                try:
                    _as_json(value)
                except (TypeError, ValueError, RecursionError) as error:
                    raise UnsupportedOption(name, value, f"it cannot be written as JSON ({error})") from None
            raise


def _as_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def chat_request(messages: Messages, parameters: Mapping[str, Any], defaults: ChatDefaults = NO_DEFAULTS) -> Request:
    """Return a request for the answer to a chat; raises `UnsupportedOption` for what a runner would not do.

    That holds for the defaults of a model as for what a caller says.
    """
    parameters = defaults.with_parameters(parameters)
    _check(parameters, CHAT_PARAMETERS)
    if isinstance(messages, Mapping | bytes) or not isinstance(messages, Sequence):
        raise UnsupportedOption("messages", messages, "it must be one text, or a list of messages")
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    said = defaults.with_messages(said)
    refuse_fetches(said)
    return Request("/v1/chat/completions", _streamed({**parameters, "messages": said}))


def completion_request(prompt: str, parameters: Mapping[str, Any], defaults: ChatDefaults = NO_DEFAULTS) -> Request:
    """Return a request for the continuation of a prompt; raises `UnsupportedOption` as `chat_request` does."""
    parameters = defaults.with_parameters(parameters, but=_CHATS_ALONE)
    _check(parameters, COMPLETION_PARAMETERS)
    if not isinstance(prompt, str):
        raise UnsupportedOption("prompt", prompt, "it must be one text: ask once for each")
    return Request("/v1/completions", _streamed({**parameters, "prompt": prompt}))


def embedding_requests(texts: Sequence[str], parameters: Mapping[str, Any]) -> Iterator[Request]:
    """Yield requests for the vectors of texts, as many as keep each of them short."""
    _check(parameters, EMBEDDING_PARAMETERS)
    for batch in _batches("text", texts):
        yield Request("/v1/embeddings", {**parameters, "input": batch})


def rerank_requests(query: str, documents: Sequence[str]) -> Iterator[Request]:
    """Yield requests for the scores of documents, as many as keep each of them short."""
    if not isinstance(query, str):
        raise UnsupportedOption("query", query, "it must be one text")
    if isinstance(documents, str):
        raise UnsupportedOption("documents", documents, "it must be a list of texts")
    for batch in _batches("documents", documents):
        yield Request("/v1/rerank", {"query": query, "documents": batch})


def token_request(text: str, special: bool) -> Request:
    """Return a request for the tokens of a text; raises `UnsupportedOption` where it is none."""
    if not isinstance(text, str):
        raise UnsupportedOption("text", text, "it must be one text")
    return Request("/tokenize", {"content": text, "add_special": bool(special)})


def _batches(name: str, texts: Sequence[str]) -> Iterator[list[str]]:
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UnsupportedOption(name, text, "it must be one text, or a list of texts")
    begin = 0
    while begin < len(texts):
        end, characters = begin + 1, len(texts[begin])
        while end < min(len(texts), begin + BATCH_TEXTS) and characters + len(texts[end]) <= BATCH_CHARACTERS:
            characters += len(texts[end])
            end += 1
        yield texts[begin:end]
        begin = end


def _streamed(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Have an answer come as it is computed, so that a silence is one of the computation; its usage comes last."""
    told = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True, "sse_ping_interval": -1}
    return {**body, **told}


def _check(parameters: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in parameters.items():
        if name in known:
            continue
        if name in _OWN:
            raise UnsupportedOption(name, value, _OWN[name])
        closest = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        advice = f"; did you mean {closest[0]}?" if closest else ""
        raise UnsupportedOption(name, value, f"no parameter has this name{advice}")
    for name in ("n", "n_cmpl"):
        if parameters.get(name) not in (None, 1):
            raise UnsupportedOption(name, parameters[name], "one answer is returned: ask once for each")


def refuse_fetches(messages: object) -> None:
    """Raise `UnsupportedOption` for messages with an address that a runner would fetch or open.

    A runner is inside the program's network and reads as its user: who writes a message is not who may choose that.
    """
    for part in _parts(messages):
        for address in _texts({name: value for name, value in part.items() if name != "text"}):
            if _ADDRESS.match(address):
                advice = "the runner would fetch it: pass what it holds, as data:image/png;base64,…"
                raise UnsupportedOption(str(part.get("type", "content")), address, advice)


def _parts(messages: object) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of messages that are neither text nor calls, those in the results of tools among them."""
    for message in messages if isinstance(messages, list) else ():
        for field in ("content", "output"):
            content = message.get(field) if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list | tuple) else ():
                if isinstance(part, Mapping) and part.get("type") == "tool_result":
                    yield from _parts([part])
                elif isinstance(part, Mapping) and part.get("type") not in _TEXT_PARTS:
                    yield part


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for each in value.values():
                yield from _texts(each)
        case list() | tuple():
            for each in value:
                yield from _texts(each)
