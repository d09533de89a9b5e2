"""Schemathesis on the OpenAPI description: whatever is sent, answers are as described, and the server does not fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig

from scheduler import Scheduler
from scheduler.http import create_app
from scheduler.http.app import _MODULES
from scheduler.http.openapi import description
from tests.support.running import running
from tests.support.tiny_models import END, write_tiny_model

# Statuses that say that the engine cannot, that there is no room or time, or that the server is busy.
MEANT = (501, 503, 504, 507)
SETTINGS = {
    "generation": {"max-examples": 10, "deterministic": True},
    "phases": {"coverage": {"enabled": True}},
    "request-timeout": 60,
}


described = schemathesis.openapi.from_dict(
    json.loads(json.dumps(description(_MODULES, "0"))), config=SchemathesisConfig.from_dict(SETTINGS)
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model ends its answers at once."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "m.gguf", context=256, biases={END: 40})
    with Scheduler(gpus=False, models=folder) as scheduler, running(create_app(scheduler)) as url:
        yield url


@described.parametrize()
def test_answers_are_as_described(case: Any, url: str) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
        case.body["model"] = "m"
    response = case.call(base_url=url)
    print(response.status_code, case.method, case.path, str(case.body)[:300], response.text[:200])
    assert response.status_code < 500 or response.status_code in MEANT, response.text
