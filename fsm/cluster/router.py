"""What a front knows between two requests: the digests that it has heard, and what it has sent since."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from fsm.cluster.choice import USUAL_ANSWER_S, Choice, Sent, Wanted, choose
from fsm.cluster.digest import ContentId, NodeDigest, NodeId
from fsm.domain.options import AUTOMATIC, Options

_WEIGHT = 0.2  # of the last answer in the usual length of a model's answers


@dataclass(slots=True, eq=False)
class Forwarded:
    """A request that a front has sent to a node."""

    node: NodeId
    content: ContentId
    at: float
    ended: bool = False


@dataclass(slots=True)
class Router:
    """The state of one front: not thread-safe, and free of clocks; times are seconds of the front's clock."""

    digests: dict[NodeId, NodeDigest] = field(default_factory=dict)
    sent: dict[NodeId, dict[ContentId, Sent]] = field(default_factory=dict)  # since each digest was taken
    answers_s: dict[ContentId, float] = field(default_factory=dict)  # the usual length of a model's answers
    _forwarded: dict[NodeId, list[Forwarded]] = field(default_factory=dict)  # since each digest was taken

    def heard(self, digest: NodeDigest, asked_at: float) -> None:
        """Take over a node's digest that was asked for at `asked_at`; one that is older than the last is ignored."""
        known = self.digests.get(digest.node)
        if known is not None and asked_at < known.at:
            return
        self.digests[digest.node] = replace(digest, at=asked_at)
        since = [one for one in self._forwarded.get(digest.node, ()) if one.at >= asked_at and not one.ended]
        self._forwarded[digest.node], self.sent[digest.node] = since, {}
        for one in since:
            self._count(one, 1)

    def lost(self, node: NodeId) -> None:
        """Forget a node that is gone."""
        for known in (self.digests, self.sent, self._forwarded):
            known.pop(node, None)

    def choose(
        self, now: float, content: ContentId, options: Options = AUTOMATIC, refused: Collection[NodeId] = ()
    ) -> list[Choice]:
        """Return the nodes for a request, the best first, without those that have refused it already."""
        wanted = Wanted(content, options, self.answers_s.get(content, USUAL_ANSWER_S))
        asked = [digest for node, digest in self.digests.items() if node not in refused]
        return choose(asked, self.sent, wanted, now)

    def forward(self, now: float, node: NodeId, content: ContentId) -> Forwarded:
        """Count a request that is sent to a node now; `ended` or `answered` takes it back."""
        one = Forwarded(node, content, now)
        self._forwarded.setdefault(node, []).append(one)
        self._count(one, 1)
        return one

    def ended(self, one: Forwarded) -> None:
        """Count that a request has ended on its node, however it ended, or was never queued there."""
        if not one.ended and one.node in self.digests:
            one.ended = True
            self._count(one, -1)

    def answered(self, one: Forwarded, answer_s: float) -> None:
        """Count that a request has been answered in `answer_s` seconds, from its first token or its grant on."""
        usual_s = self.answers_s.get(one.content, answer_s)
        self.answers_s[one.content] = usual_s + _WEIGHT * (answer_s - usual_s)
        self.ended(one)

    def _count(self, one: Forwarded, by: int) -> None:
        sent = self.sent.setdefault(one.node, {})
        known = sent.get(one.content, Sent(0, one.at))
        sent[one.content] = Sent(known.count + by, known.first_at)
