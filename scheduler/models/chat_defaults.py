"""What a model's chats begin with, and the parameters of its answers, where a caller names none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Parameters that say the same: where a caller names one, a default by another name does not count.
_SAME = ({"max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"},)


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What the chats of a model begin with, and the parameters of its answers that a caller does not name.

    The methods of a lease apply them; a client of the runner's own server does not.
    """

    system: str = ""  # the text of a system message, for chats that begin with none of their own
    messages: Sequence[Mapping[str, Any]] = ()  # that come before those of a chat, behind the system message
    parameters: Mapping[str, Any] = field(default_factory=dict)  # by the engine's names, as `Lease.chat` takes them
    unapplied: Sequence[str] = ()  # what else the model comes with, in words: it has no effect here
    template: str = field(default="", compare=False)  # in Ollama's language: shown, and not applied

    def with_parameters(
        self, parameters: Mapping[str, Any], *, but: Collection[str] = frozenset()
    ) -> Mapping[str, Any]:
        """Return the parameters that a caller names, and the defaults for the others, but for those in `but`."""
        named = {each for name in parameters for each in next((same for same in _SAME if name in same), {name})}
        return {**{name: self.parameters[name] for name in self.parameters if name not in {*named, *but}}, **parameters}

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return a chat with what it begins with."""
        first = messages[0] if messages else None
        own = isinstance(first, Mapping) and first.get("role") == "system"
        system = [{"role": "system", "content": self.system}] if self.system and not own else []
        return [*system, *self.messages, *messages]


NO_DEFAULTS = ChatDefaults()
