"""LangChain's clients: the standard suites that it has for them, with the engine alone as the measure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scheduler import Scheduler
from tests.http.conftest import Served

LIMIT_S = 300.0
SUITES = Path(__file__).with_name("standard_suites.py")
ALONE = "TestChatOpenAIOfTheEngine"
# All tests have one event loop, since the clients keep connections; sockets that these leave open are their own.
OPTIONS = ("asyncio_mode=auto", "asyncio_default_test_loop_scope=session", "filterwarnings=ignore")
# These ask for words which only a model that understands them finds.
BEYOND_THE_MODEL = {"test_bind_runnables_as_tools", "test_json_mode", "test_unicode_tool_call_integration"}

Outcomes = Mapping[str, Mapping[str, set[str]]]


@pytest.fixture(scope="module")
def outcomes(served: Served, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run the suites, and return the names of tests by suite and outcome: passed, failure, error or skipped."""
    report = tmp_path_factory.mktemp("report") / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", f"{SUITES}"]
    command += [part for option in OPTIONS for part in ("-o", option)]
    with Scheduler(gpus=False, models=model_folder) as beside, beside.acquire("calls") as lease:
        told = {"CLIENTS_SERVER": served.url, "CLIENTS_ENGINE": lease.url, "CLIENTS_KEY": str(lease.api_key)}
        environment = {**os.environ, **told}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    print(done.stdout)  # shown where a test fails
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found[case.attrib["classname"].rpartition(".")[2]][outcome].add(case.attrib["name"])
    return found


@pytest.mark.parametrize("suite", [ALONE, "TestChatOpenAI", "TestChatOllama"])
def test_what_fails_is_beyond_the_model(outcomes: Outcomes, suite: str) -> None:
    """No test fails but those that ask for a model with wits; these fail with the engine alone too."""
    assert outcomes[suite]["failure"] | outcomes[suite]["error"] <= BEYOND_THE_MODEL
    assert len(outcomes[suite]["passed"]) > 30


def test_what_passes_with_the_engine_alone_passes_with_the_server(outcomes: Outcomes) -> None:
    """The server takes nothing away: in OpenAI's API nothing at all, in Ollama's what the API has no word for."""
    alone = outcomes[ALONE]["passed"]
    assert alone - outcomes["TestChatOpenAI"]["passed"] == set()
    assert alone - outcomes["TestChatOllama"]["passed"] == {"test_tool_choice"}


@pytest.mark.parametrize("suite", ["TestEmbeddingsOpenAI", "TestEmbeddingsOllama"])
def test_vectors_pass_all_of_their_suite(outcomes: Outcomes, suite: str) -> None:
    assert {outcome for outcome, names in outcomes[suite].items() if names} == {"passed"}
    assert len(outcomes[suite]["passed"]) >= 4
