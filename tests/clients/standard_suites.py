"""LangChain's standard suites, against the addresses that the environment names; run by `test_langchain.py`."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

SERVER, ENGINE, KEY = (os.environ[f"CLIENTS_{name}"] for name in ("SERVER", "ENGINE", "KEY"))
GREEDY = {"temperature": 0, "seed": 1}


class TestChatOpenAI(ChatModelIntegrationTests):
    """Chats of the client of OpenAI's API, answered by the server."""

    chat_model_class = ChatOpenAI
    supports_json_mode = True
    chat_model_params: ClassVar[dict[str, Any]] = {
        "model": "calls", "base_url": f"{SERVER}/v1", "api_key": "none", "max_retries": 0, "stream_usage": True,
        "max_tokens": 200, **GREEDY,
    }  # fmt: skip


class TestChatOpenAIOfTheEngine(TestChatOpenAI):
    """The same, answered by the engine alone."""

    chat_model_params: ClassVar[dict[str, Any]] = {
        **TestChatOpenAI.chat_model_params,
        "base_url": f"{ENGINE}/v1",
        "api_key": KEY,
    }


class TestChatOllama(ChatModelIntegrationTests):
    """Chats of the client of Ollama's API."""

    chat_model_class = ChatOllama
    supports_json_mode = True
    has_tool_choice = False  # the API has none
    chat_model_params: ClassVar[dict[str, Any]] = {"model": "calls", "base_url": SERVER, "num_predict": 200, **GREEDY}


class TestEmbeddingsOpenAI(EmbeddingsIntegrationTests):
    """Vectors by OpenAI's API, of texts as they are."""

    embeddings_class = OpenAIEmbeddings
    embedding_model_params: ClassVar[dict[str, Any]] = {
        "model": "m", "base_url": f"{SERVER}/v1", "api_key": "none", "check_embedding_ctx_length": False,
    }  # fmt: skip


class TestEmbeddingsOllama(EmbeddingsIntegrationTests):
    """Vectors by Ollama's API."""

    embeddings_class = OllamaEmbeddings
    embedding_model_params: ClassVar[dict[str, Any]] = {"model": "m", "base_url": SERVER}
