"""A conversation goes on after its model was evicted: with its prompt kept and without, in turns within one run.

The seconds are from `acquire`, with the memory held by an idle model that goes at once, to the first token of the next
answer. A turn adds a question to the conversation and one token of an answer. The request that evicts the conversation
waits while its prompt is saved: the seconds until that request has the memory are noted too.
"""

from __future__ import annotations

import statistics
import time
from tempfile import TemporaryDirectory
from typing import Any

from scheduler import PythonModel, Scheduler, Settings
from tests.tools.bench.cold import model_path

ROUNDS = 5
LIMIT = "4GiB"
OTHER = PythonModel("other", load=object, memory={"cpu": "4090MiB"})
OPTIONS: dict[str, Any] = {"num_ctx": 4096, "num_parallel": 1}
SENTENCES = 160  # about 2,000 tokens


class Conversation:
    """A conversation with one scheduler's model, which is evicted after each answer."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        facts = " ".join(f"In room {number} there are {number * 7 % 100} chairs." for number in range(SENTENCES))
        self.messages = [{"role": "user", "content": facts}]
        self.taken_s: list[float] = []
        self.gone_s: list[float] = []
        self.tokens: list[tuple[int, int]] = []  # of each prompt: all, and those that were not computed again

    def go_on(self) -> None:
        """Ask the next question, note the seconds to the first token, and have the model evicted."""
        begin = time.monotonic()
        with self.scheduler.acquire(str(model_path()), **OPTIONS) as lease:
            with lease.stream(self.messages, max_tokens=1, temperature=0) as pieces:
                text = next(pieces, "")
                self.taken_s.append(time.monotonic() - begin)
                next(pieces, None)
            usage = pieces.answer.usage
        self.tokens.append(
            (usage.get("prompt_tokens", 0), usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))
        )
        question = f"And in room {len(self.messages)}?"
        self.messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
        begin = time.monotonic()
        self.scheduler.acquire(OTHER).release()
        self.gone_s.append(time.monotonic() - begin)


def run() -> dict[str, Any]:
    """Return the seconds of both and their ratio, and print them."""
    settings: dict[str, Any] = {"memory_limit": LIMIT, "gpus": False, "measurement_file": None, "lock_folder": None}
    with (
        TemporaryDirectory() as folder,
        Scheduler(Settings(keep_prompts=f"{folder}/prompts", **settings)) as keeping,
        Scheduler(Settings(**settings)) as forgetting,
    ):
        kept, forgotten = Conversation(keeping), Conversation(forgetting)
        kept.go_on()  # the first time the prompt is computed
        for _ in range(ROUNDS):
            forgotten.go_on()
            kept.go_on()
    with_it, without = kept.taken_s[1:], forgotten.taken_s
    ratio = statistics.median(with_it) / statistics.median(without)
    prompt, cached = kept.tokens[-1]
    gone = [statistics.median(each.gone_s) for each in (forgotten, kept)]
    print(
        f"to the next token of an evicted conversation of {prompt} tokens, median of {ROUNDS} in turns: "
        f"forgotten {statistics.median(without):.2f} s ({min(without):.2f}–{max(without):.2f}), "
        f"kept {statistics.median(with_it):.2f} s ({min(with_it):.2f}–{max(with_it):.2f}): ratio {ratio:.2f}; "
        f"{cached} of the tokens were not computed again; to have the memory for another model "
        f"{gone[0]:.3f} s and {gone[1]:.3f} s"
    )
    figures = {"forgotten_s": without, "kept_s": with_it, "ratio": round(ratio, 3), "tokens": kept.tokens}
    return figures | {"forgotten_gone_s": forgotten.gone_s, "kept_gone_s": kept.gone_s}
