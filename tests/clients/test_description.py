"""Schemathesis on the OpenAPI description: whatever is sent, answers are as described, and the server does not fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import integers
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from scheduler import Scheduler
from scheduler.http import create_app
from scheduler.http.app import _MODULES
from scheduler.http.openapi import description
from tests.support.running import running
from tests.support.tiny_models import END, write_tiny_model

MEANT = (501, 503, 504, 507)  # the engine cannot, or there is no room, or no time
WITHOUT_END = ("/events",)
CHECKS = [status_code_conformance, response_schema_conformance]

described: Any = schemathesis.openapi.from_dict(json.loads(json.dumps(description(_MODULES, "0"))))
_aliases = {path for module in _MODULES for route in module.ROUTES for path in route.paths[1:]}
operations = [
    found.ok() for found in described.get_all_operations() if found.ok().path not in {*WITHOUT_END, *_aliases}
]
MODES = [
    pytest.param(operation, mode, id=f"{operation.label}-{mode.value}")
    for operation in operations
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if mode is GenerationMode.POSITIVE or operation.body  # what has no body cannot be wrong
]
PROFILE = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model ends its answers at once."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "m.gguf", context=256, biases={END: 40})
    with (
        Scheduler(gpus=False, models=folder) as scheduler,
        running(create_app(scheduler, dashboard_actions=True)) as url,
    ):
        yield url


def described_part(body: dict[str, Any], operation: Any) -> dict[str, Any]:
    """Return the fields and the options of a body that have a description, with the name of the model that is there."""
    (content,) = operation.definition.raw["requestBody"]["content"].values()
    known = content["schema"]["properties"]
    body = {name: value for name, value in body.items() if name in known}
    if isinstance(body.get("options"), dict):
        options = known["options"]["properties"]
        body["options"] = {name: value for name, value in body["options"].items() if name in options}
    return {**body, "model": "m"} if isinstance(body.get("model"), str) else body


@pytest.mark.parametrize(("operation", "mode"), MODES)
def test_answers_are_as_described(operation: Any, mode: GenerationMode, url: str) -> None:
    """Most bodies, right and wrong ones, are cut to what is described, and name the model that is there."""

    @PROFILE
    @given(case=operation.as_strategy(generation_mode=mode), kept=integers(0, 4))
    def ask(case: Any, kept: int) -> None:
        if kept and isinstance(case.body, dict):
            case.body = described_part(case.body, operation)
        response = case.call(base_url=url, timeout=60)
        assert response.status_code < 500 or response.status_code in MEANT, response.text
        case.validate_response(response, checks=CHECKS)

    ask()
