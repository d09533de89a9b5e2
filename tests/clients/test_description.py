"""Schemathesis on the OpenAPI description: whatever is sent, answers are as described, and the server does not fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
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
operations = [found.ok() for found in described.get_all_operations() if found.ok().path not in WITHOUT_END]
PROFILE = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model ends its answers at once."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "m.gguf", context=256, biases={END: 40})
    with Scheduler(gpus=False, models=folder) as scheduler, running(create_app(scheduler)) as url:
        yield url


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", operations, ids=lambda operation: operation.label)
def test_answers_are_as_described(operation: Any, mode: GenerationMode, url: str) -> None:
    """Of bodies as they are described, and of others, most name the model that is there."""

    @PROFILE
    @given(case=operation.as_strategy(generation_mode=mode), named=integers(0, 4))
    def ask(case: Any, named: int) -> None:
        if named and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "m"
        response = case.call(base_url=url, timeout=60)
        print(response.status_code, case.method, case.path, str(case.body)[:300], response.text[:200])
        assert response.status_code < 500 or response.status_code in MEANT, response.text
        case.validate_response(response, checks=CHECKS)

    try:
        ask()
    except Unsatisfiable:
        pytest.skip("nothing about it can be wrong")
