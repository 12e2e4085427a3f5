"""What the light engine says: OpenAI's objects and events, with words and vectors that follow from the request."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from typing import Any, cast

from berth.engines.answers import Answer, usage
from berth.engines.errors import ApiError
from berth.engines.prefill import PARAMS

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")


def chat(about: dict[str, Any], asked: dict[str, Any]) -> Answer:
    text = " ".join(str(message.get("content")) for message in asked.get("messages", ()))
    return Answer(about, "chat.completion", "ChatCompletionResponse", count(text), fetched(asked))


def completion(about: dict[str, Any], asked: dict[str, Any]) -> Answer:
    return Answer(about, "text_completion", "CompletionResponse", count(asked.get("prompt", "")), fetched(asked))


def fetched(asked: dict[str, Any]) -> bool:
    """Whether the KV cache of the prompt came from another engine."""
    return bool((asked.get(PARAMS) or {}).get("do_remote_prefill"))


def words(model: str, asked: dict[str, Any], length: int) -> list[str]:
    """``length`` words, or JSON that a requested schema admits, in as many pieces as it takes."""
    if (schema := _schema(asked.get("response_format"))) is not None:
        text = json.dumps(instance(schema, schema))
        return [text[start : start + 8] for start in range(0, len(text), 8)]
    return [*["light", " replica", " of", f" {model}"][:length], *(f" {index}" for index in range(4, length))]


def embeddings(about: dict[str, Any], asked: dict[str, Any], dimensions: int) -> dict[str, Any]:
    """Unit vectors that depend on the text alone."""
    given = asked.get("input", "")
    inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    rows = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector(str(text), dimensions), asked)}
        for index, text in enumerate(inputs)
    ]
    return {**about, "object": "list", "data": rows, "usage": usage(sum(map(count, inputs)))}


def scores(about: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The share of the query's words that each document has."""
    query = set(str(asked["text_1"]).lower().split())
    found = [query & set(str(text).lower().split()) for text in asked["text_2"]]
    rows = [
        {"object": "score", "index": index, "score": len(common) / max(1, len(query))}
        for index, common in enumerate(found)
    ]
    return {**about, "object": "list", "data": rows, "usage": usage(sum(map(count, asked["text_2"])))}


def vector(text: str, dimensions: int) -> list[float]:
    numbers = [
        int.from_bytes(hashlib.blake2b(f"{index} {text}".encode(), digest_size=4).digest(), "big") / 2**31 - 1
        for index in range(dimensions)
    ]
    length = math.hypot(*numbers) or 1.0
    return [number / length for number in numbers]


def instance(schema: Any, root: dict[str, Any]) -> Any:
    """The least value that a JSON schema admits, by its common words."""
    if "$ref" in schema:
        found: Any = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        return instance(found, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return instance(choices[0], root)
    kind = _kind(schema)
    if kind == "object":
        return {key: instance(value, root) for key, value in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {"type": "null"}), root)] * schema.get("minItems", 0)
    lowest = schema.get("minimum", 0)
    return {"string": "light", "integer": lowest, "number": float(lowest), "boolean": False}.get(kind)


def count(given: Any) -> int:
    """Tokens of a text or of token ids; words are tokens here."""
    if isinstance(given, list):
        return len(given) if given and isinstance(given[0], int) else sum(map(count, given))
    return len(str(given).split())


def _encoded(numbers: list[float], asked: dict[str, Any]) -> Any:
    """OpenAI's own client asks for base64 of little-endian float32."""
    if asked.get("encoding_format") == "base64":
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return numbers


def _schema(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a ``response_format``, None where any text will do.

    Raises:
        ApiError: 400 for a schema that is none.
    """
    if not response_format or response_format.get("type") in (None, "text"):
        return None
    if response_format["type"] == "json_object":
        return {"type": "object"}
    schema = (response_format.get("json_schema") or {}).get("schema")
    if problem := _problem(schema):
        message = f"The JSON schema of response_format is malformed: {problem}."
        raise ApiError(400, message, param="response_format")
    return cast(dict[str, Any], schema)


def _kind(schema: dict[str, Any]) -> Any:
    kind = schema.get("type", "object")
    return kind[0] if isinstance(kind, list) and kind else kind


def _problem(schema: Any) -> str:
    """What is wrong with a schema, looked at as far as this engine reads it."""
    if not isinstance(schema, dict):
        return f"a schema is an object, found {type(schema).__name__}"
    kind = _kind(schema)
    if kind not in TYPES:
        return f"type {kind!r} is none of {', '.join(TYPES)}"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return "properties is not an object"
    parts = [*properties.values(), *([schema["items"]] if "items" in schema else [])]
    return next(filter(None, map(_problem, parts)), "")
