"""Settings and options as keywords: what a call takes is what `help()` and the signature show."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path
from typing import Any

import pytest

import scheduler as package
from fsm.domain.options import Options
from scheduler import InvalidSettings, PythonModel, Scheduler, Settings
from scheduler.config.settings import SETTINGS
from scheduler.testing import FakeMachine
from tests.support.leaks import no_leaks

ROOT = Path(__file__).resolve().parents[2]
OF_THE_ENGINE = {"chat", "complete", "embed", "stream", "achat", "acomplete", "aembed", "astream"}


def test_u57_settings_are_keywords_of_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keywords win over the environment, which wins over defaults."""
    monkeypatch.setenv("LOADMASTER_MAX_QUEUE", "7")
    monkeypatch.setenv("LOADMASTER_KEEP_ALIVE", "1m")
    with no_leaks(), Scheduler(memory_limit="1000MiB", gpus=False, max_queue=9) as scheduler:
        settings = scheduler.settings
        assert (settings.memory_limit, settings.max_queue, settings.keep_alive) == (1000 << 20, 9, 60.0)
        scheduler.acquire(PythonModel("a", load=object)).release()


def test_u57_keywords_win_over_settings_beside_them() -> None:
    """Keywords beside `Settings` replace those of the same name, and the environment is not read."""
    with no_leaks(), Scheduler(Settings(gpus=False, max_queue=9, keep_alive="1m"), max_queue=3) as scheduler:
        assert scheduler.settings == Settings(gpus=False, max_queue=3, keep_alive="1m")


def test_u57_a_former_name_is_taken_beside_settings() -> None:
    """A setting's former name replaces the setting, with its warning."""
    with pytest.warns(DeprecationWarning, match="measurement_file"):
        assert Settings().with_arguments(footprints=None) == Settings(measurement_file=None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "name"),
    [({"memory": "1GiB"}, "memory"), ({"max_queue": 0}, "max_queue"), ({"settings": {"max_queue": 9}}, "settings")],
)
def test_u57_a_wrong_keyword_is_refused_by_its_name(given: dict[str, Any], name: str) -> None:
    """A keyword that is no setting, a value that is not allowed, and a dictionary for `Settings` are refused."""
    with no_leaks(), pytest.raises(InvalidSettings) as refused:
        Scheduler(**given)
    assert refused.value.name == name


def _shown(call: Any) -> dict[str, inspect.Parameter]:
    return {
        name: each
        for name, each in inspect.signature(call).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }


@pytest.mark.parametrize("call", [Scheduler, Settings, Settings.from_environment, FakeMachine])
def test_u57_the_signature_has_every_setting_with_its_default(call: Any) -> None:
    """What is shown as the default of a setting is its default."""
    shown = {name: each.default for name, each in _shown(call).items() if name != "auto_advance"}
    assert list(shown) == [row.name for row in SETTINGS] or set(shown) == {row.name for row in SETTINGS}
    assert Settings(**shown) == Settings()


@pytest.mark.parametrize(
    "name", ["acquire", "submit", "acquire_async", "acquire_all", "acquire_all_async", "preload", "fit"]
)
def test_u57_the_signature_of_a_request_has_every_option(name: str) -> None:
    """Each keyword that is shown is taken, and each load-time option is shown."""
    shown = {name: each.default for name, each in _shown(getattr(Scheduler, name)).items()}
    assert set(shown) >= {*Options.__dataclass_fields__, "timeout", "priority", "keep_alive", "adapters", "embedding"}
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat")
        fake.scheduler._parser.parse_cached("chat", shown)  # type: ignore[arg-type]


def test_u57_help_tells_the_keywords() -> None:
    """`help()` shows the keywords of a scheduler, of a request, and of a change of limits."""
    text = pydoc.render_doc(Scheduler, renderer=pydoc.plaintext)
    for part in ("memory_limit: str | int | None = None", "num_ctx: int | None = None", "max_queue: int = Ellipsis"):
        assert part in text
    assert "**" not in text.partition("Data descriptors")[0].replace("**kwargs", "")


def test_u57_no_public_call_hides_its_keywords() -> None:
    """No public call takes keywords that its signature does not show, but for those that are the engine's own."""
    hidden = []
    for name in package.__all__:
        public = getattr(package, name)
        for call, function in [(name, public), *inspect.getmembers(public, inspect.isroutine)]:
            inherited = call in vars(str)  # an answer is a text; Python 3.14 shows what its `format` takes
            if call in OF_THE_ENGINE or call.startswith("_") or inherited or getattr(function, "_is_protocol", False):
                continue
            try:
                parameters = inspect.signature(function).parameters.values()
            except (TypeError, ValueError):  # a method of a base in C, or no callable
                continue
            hidden += [f"{name}.{call}" for each in parameters if each.kind is each.VAR_KEYWORD]
    assert hidden == []


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_u57_the_first_pages_tell_of_the_other_distribution(page: str) -> None:
    """The first pages say that PyPI's `scheduler` and this one overwrite each other, and how to see which is there."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert "named `scheduler` on PyPI" in text and "overwrites" in text and "scheduler.__version__" in text
