"""What Ollama's API tells of models: those that have a name, those that are loaded, and one in full."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fsm.domain.devices import HOST
from scheduler.api.status import RunnerStatus
from scheduler.errors.exceptions import InvalidModel, SchedulerError
from scheduler.http.model_files import ModelFacts
from scheduler.http.ollama_translation import time_of
from scheduler.http.service import Service
from scheduler.models.gguf_header import Value
from scheduler.models.model_card import TEMPLATE, shown_count
from scheduler.models.model_spec import ModelSpec

_FOREVER_S = 290 * 365 * 86400.0  # shown for a model that stays for ever: a time that far away, as Ollama shows one
_GAP = ".Suffix"  # in Ollama's templates: the text behind a gap
_NAMES = {"max_tokens": "num_predict", "n_keep": "num_keep"}  # Ollama's names of the engine's parameters


async def list_models(service: Service) -> list[dict[str, Any]]:
    """Return the models that have a name, without those whose files cannot be read."""
    found = await service.models()
    facts = await service.files.facts(found.values())
    return [
        {**_names(name), **_facts(known), "details": details_of(known)}
        for name, known in zip(found, facts, strict=True)
        if known is not None
    ]


async def list_runners(service: Service) -> list[dict[str, Any]]:
    """Return the loaded and loading models, those that stay longest first."""
    shown = []
    for runner in service.scheduler.status().runners:
        if runner.state == "expiring" and not runner.leases:
            continue
        try:
            (facts,) = await service.files.facts([await service.find(runner.model)])
        except SchedulerError:  # an object, or a model that the program has acquired by its path
            facts = None
        shown.append((_stays_s(runner), runner, facts))
    now = time.time()
    shown.sort(key=lambda one: -one[0])
    return [
        {
            **_names(runner.model),
            "size": sum(runner.held_bytes.values()),
            "digest": facts.digest if facts else hashlib.sha256(runner.model.encode()).hexdigest(),
            "details": details_of(facts) if facts else {},
            "expires_at": time_of(now + stays_s),
            "size_vram": sum(size for device, size in runner.held_bytes.items() if device != HOST),
            "context_length": runner.options.num_ctx or 0,
        }
        for stays_s, runner, facts in shown
    ]  # fmt: skip


async def show_model(service: Service, name: str) -> dict[str, Any]:
    """Return what there is to say of a model; raises what `Catalog.find` raises."""
    spec = await service.find(name)
    (facts,) = await service.files.facts([spec])
    if facts is None:
        await service.files.card(spec)  # raises what is wrong
        raise InvalidModel(spec.path, "its files cannot be read")
    card, parameters = facts.card, _parameters(spec)
    template = spec.chat.template or card.template
    if "insert" in card.capabilities and _GAP not in template:
        template += f"{{# {_GAP} #}}"  # a comment, for clients that look here whether a model fills in gaps
    told: dict[str, Any] = {
        "modelfile": _modelfile(name, spec, template, parameters),
        "parameters": "\n".join(f"{option:<30} {value}" for option, value in parameters),
        "template": template,
        "details": details_of(facts),
        "model_info": _model_info(facts),
        "capabilities": list(card.capabilities),
        "modified_at": time_of(facts.modified_at),
    }
    if spec.chat.system:
        told["system"] = spec.chat.system
    if spec.chat.messages:
        told["messages"] = list(spec.chat.messages)
    if isinstance(licence := card.values.get("general.license"), str):
        told["license"] = licence
    return told


def details_of(facts: ModelFacts) -> dict[str, Any]:
    """Return a model's kind and size, as lists have them."""
    card = facts.card
    return {
        "parent_model": "",
        "format": "gguf",
        "family": card.architecture,
        "families": [card.architecture, *(["clip"] if "vision" in card.capabilities else [])],
        "parameter_size": shown_count(card.parameters),
        "quantization_level": card.quantisation,
    }


def _names(name: str) -> dict[str, str]:
    """Return a name in both fields; each has a tag there."""
    whole = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return {"name": whole, "model": whole}


def _facts(facts: ModelFacts) -> dict[str, Any]:
    return {
        "modified_at": time_of(facts.modified_at), "size": facts.card.file_bytes, "digest": facts.digest,
    }  # fmt: skip


def _stays_s(runner: RunnerStatus) -> float:
    """Return for how long a runner stays if nothing more is asked of it: its keep-alive begins anew after a lease."""
    stays_s = runner.expires_in_s if runner.expires_in_s < math.inf else runner.keep_alive_s
    return _FOREVER_S if runner.pinned else min(max(0.0, stays_s), _FOREVER_S)


def _parameters(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return a model's own options and parameters by Ollama's names, with their values as text."""
    named: dict[str, Any] = {each.name: getattr(spec.options, each.name) for each in fields(spec.options)}
    named |= {_NAMES.get(name, name): value for name, value in spec.chat.parameters.items()}
    rows = [(name, value) for name, values in named.items() for value in (values if name == "stop" else [values])]
    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in rows if value is not None]


def _modelfile(name: str, spec: ModelSpec, template: str, parameters: list[tuple[str, str]]) -> str:
    lines = [f"FROM {name}", f'TEMPLATE """{template}"""' if template else ""]
    lines += [f'SYSTEM """{spec.chat.system}"""' if spec.chat.system else ""]
    lines += [f"PARAMETER {option} {value}" for option, value in parameters]
    return "\n".join(filter(None, lines)) + "\n"


def _model_info(facts: ModelFacts) -> dict[str, Any]:
    """Return the metadata of the model's file in the order of their keys, without the chat template."""
    values: Mapping[str, Value] = {**facts.card.values, "general.parameter_count": facts.card.parameters}
    return {key: _json_value(values[key]) for key in sorted(values) if key != TEMPLATE}


def _json_value(value: Value) -> Any:
    """Return a value as JSON has it; None for a number that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value
