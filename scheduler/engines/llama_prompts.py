"""The prompts of one runner: saved from its slots before it is stopped, and restored into those of the next one."""

from __future__ import annotations

import http.client
import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from scheduler.engines.prompt_store import KeptPrompt, Life, PromptStore
from scheduler.errors.formatting import format_bytes, printable

if TYPE_CHECKING:
    from scheduler.engines.interface import Buffer
    from scheduler.engines.llama_child import Prompts

log = logging.getLogger("loadmaster")

KEY_BYTES: Final = 32
SAVE_S: Final = 5.0  # for all slots of a runner: requests may wait for its memory
LOOK_S: Final = 1.0  # for the engine to say what its slots hold
LEAST_S: Final = 0.05  # a prompt that is computed sooner is not kept
READ_BYTES_PER_S: Final = 500e6  # at which a prompt is expected to be read again
USUAL_TOKENS_PER_S: Final = 1000.0  # at which prompts are computed, until a runner has shown it
LEAST_TOKENS: Final = 64  # computed by a runner, for its rate to be believed
ANSWER_LIMIT_BYTES: Final = 1 << 20
_COMPUTED = re.compile(r"^llamacpp:prompt_(tokens|seconds)_total ([\d.e+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot that holds a prompt."""

    id: int
    tokens: int
    used: int  # grows with the last use; -1: not used by this runner


class RunnerPrompts:
    """Saves and restores the prompts of one runner; what it asks of the engine blocks."""

    def __init__(self, store: PromptStore, folder: str, name: str, life: Life) -> None:
        self.key = secrets.token_urlsafe(KEY_BYTES)  # of the engine; clients have the key of the gate
        self.again_s = 0.0  # seconds that it takes to have its prompts again, as of the last look
        self.restored_tokens = 0  # by the engine's own count
        self.wanted = True  # False: the model was expired by its user, and nothing is kept of it
        self._store = store
        self._folder = folder
        self._name = name
        self._life = life
        self._url = ""  # of the engine itself, once it serves
        self._token_bytes = 0.0
        self._taken = store.take(life)
        self._tokens_per_s = max((one.tokens_per_s for one in self._taken), default=0.0)
        self._held: dict[int, int] = {}  # slot -> tokens restored
        self._failed: list[str] = []  # files that the engine may still write to

    def request(self) -> Prompts:
        """Return what the child is told."""
        restores = [(one.slot, one.name, one.tokens / self._rate) for one in self._taken]
        return {"folder": self._folder, "restores": restores}

    def loaded(self, url: str, restored: Mapping[int, int], buffers: Iterable[Buffer], cells: int) -> None:
        """Take in what a child that serves reports: `cells` are the tokens of all slots together."""
        self._url = url
        cache_bytes = sum(each.bytes for each in buffers if each.kind == "cache")
        self._token_bytes = cache_bytes / cells if cells else 0.0
        self._held = {slot: tokens for slot, tokens in restored.items() if tokens > 0}
        self.restored_tokens = sum(self._held.values())
        if wanted := sum(one.tokens for one in self._taken):
            level = logging.INFO if self.restored_tokens == wanted else logging.WARNING
            log.log(
                level,
                "%s: %d of %d tokens of kept prompts restored",
                printable(self._name),
                self.restored_tokens,
                wanted,
            )
        self._drop_taken()

    def ended(self) -> None:
        """Take in that the process is gone: it writes and reads no file any more."""
        self._drop_taken()
        self._store.drop(self._failed)

    def _drop_taken(self) -> None:
        self._store.drop(one.name for one in self._taken)
        self._taken = ()

    def look(self, timeout_s: float) -> None:
        """Note how long it takes to have the prompts again that the slots hold, by reading or by computing them."""
        self._note_rate(timeout_s)
        left_bytes, again_s = float(self._store.limit_bytes), 0.0
        for slot in self._slots(timeout_s):
            size_bytes, computed_s = slot.tokens * self._token_bytes, slot.tokens / self._rate
            kept = computed_s >= LEAST_S and size_bytes <= left_bytes
            left_bytes -= size_bytes if kept else 0.0
            again_s += min(computed_s, size_bytes / READ_BYTES_PER_S) if kept else computed_s
        self.again_s = again_s

    def save(self) -> None:
        """Save the prompt of each slot, the last used first, each in less time than computing it again would take."""
        end = time.monotonic() + SAVE_S
        self._note_rate(LOOK_S)
        saved: list[KeptPrompt] = []
        for slot in self._slots(LOOK_S):
            limit_s = min(slot.tokens / self._rate, end - time.monotonic())
            if not self.wanted or limit_s < LEAST_S:
                continue
            name = self._store.reserve(self._life, round(slot.tokens * self._token_bytes))
            if name is not None and (kept := self._save(slot, name, limit_s)) is not None:
                saved.append(kept)
        if saved:
            tokens, size = sum(one.tokens for one in saved), format_bytes(sum(one.bytes for one in saved))
            log.info("%s: prompts of %d tokens kept, %s", printable(self._name), tokens, size)

    def forget(self) -> None:
        """Keep nothing of this runner."""
        self.wanted = False
        self._store.forget(self._life[0])

    def _save(self, slot: Slot, name: str, limit_s: float) -> KeptPrompt | None:
        told = self._ask("POST", f"/slots/{slot.id}?action=save", limit_s, {"filename": name})
        match told:
            case {"n_saved": int(tokens), "n_written": int(size_bytes)} if tokens > 0 and size_bytes > 0:
                prompt = KeptPrompt(slot.id, name, tokens, size_bytes, self._rate)
                if self.wanted and self._store.keep(self._life, prompt):
                    if not self.wanted:  # expired meanwhile
                        self.forget()
                    return prompt
        self._store.drop([name])
        self._failed.append(name)  # the engine may be about to write it all the same
        return None

    @property
    def _rate(self) -> float:
        return self._tokens_per_s or USUAL_TOKENS_PER_S

    def _note_rate(self, timeout_s: float) -> None:
        told = self._ask("GET", "/metrics", timeout_s)
        found = {what: float(amount) for what, amount in _COMPUTED.findall(told if isinstance(told, str) else "")}
        if found.get("tokens", 0.0) >= LEAST_TOKENS and found.get("seconds", 0.0) > 0.0:
            self._tokens_per_s = found["tokens"] / found["seconds"]

    def _slots(self, timeout_s: float) -> list[Slot]:
        """Return the slots that hold prompts, the last used first; none where the engine does not answer in time."""
        told = self._ask("GET", "/slots", timeout_s)
        found = []
        for one in told if isinstance(told, list) else ():
            match one:
                case {"id": int(id), "n_prompt_tokens": int(tokens), "id_task": int(task)} if tokens > 0:
                    found.append(Slot(id, tokens, task))
                case {"id": int(id)} if id in self._held:
                    found.append(Slot(id, self._held[id], -1))
        return sorted(found, key=lambda slot: -slot.used)

    def _ask(self, method: str, path: str, timeout_s: float, body: object = None) -> Any:
        """Return the engine's answer, as JSON or as a text; None where it gives none within `timeout_s` seconds."""
        address = urlsplit(self._url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read(ANSWER_LIMIT_BYTES).decode(errors="replace")
            if answer.status != http.client.OK:
                return None
            return content if path == "/metrics" else json.loads(content)
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()
