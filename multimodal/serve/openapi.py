"""GET /openapi.json: an OpenAPI 3.1 description of every endpoint, with one path for each task."""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from multimodal.model import Model
from multimodal.serve.media_answers import SOUND_TYPES
from multimodal.serve.native import PREFIX, RESERVED
from multimodal.serve.settings import Settings
from multimodal.serve.tasks import described
from multimodal.serve.transcriptions import FORMATS
from multimodal.serve.transcriptions import TYPES as TEXT_TYPES
from multimodal.serve.values import CLASS, PICTURE, SOUND, TEXT
from multimodal.versions import package_version

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"
Schema = dict[str, Any]


def _text(about: str, **more: Any) -> Schema:
    return {"type": "string", "description": about, **more}


def _number(about: str, **more: Any) -> Schema:
    return {"type": "number", "description": about, **more}


def _whole(about: str, **more: Any) -> Schema:
    return {"type": "integer", "description": about, **more}


def _flag(about: str) -> Schema:
    return {"type": "boolean", "description": about}


def _texts(about: str) -> Schema:
    several = {"type": "array", "items": {"type": "string", "minLength": 1}}
    return {"description": about, "anyOf": [{"type": "string"}, several]}


def _object(properties: Mapping[str, Schema], required: Iterable[str] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": dict(properties), "required": list(required), **more}


OPTIONS: dict[str, Schema] = {
    "max_tokens": _whole("the most tokens that are generated", minimum=1),
    "temperature": _number("divides the logits before sampling; 0: greedy decoding", minimum=0),
    "top_k": _whole("sample only from the k likeliest tokens", minimum=1),
    "top_p": _number("sample only from the fewest likeliest tokens whose probabilities add up to this"),
    "min_p": _number("sample only from tokens with at least this fraction of the largest probability"),
    "beams": _whole("number of beams of beam search; 1: no beam search", minimum=1),
    "length_penalty": _number(
        "beams are ranked by log-probability / length ** length_penalty", minimum=-10, maximum=10
    ),
    "guidance": _number("classifier-free guidance scale; 1: no guidance"),
    "stop": _texts("stop strings of a text answer"),
    "begin": _text("the beginning of a text answer, which the model continues"),
    "seed": _whole("the seed of the first answer; the following answers use the following seeds", minimum=0),
    "no_repeat": _whole("the n for which no n-gram of tokens is repeated", minimum=1),
    "repetition": _number("the repetition penalty of tokens that the answer has already"),
    "presence_penalty": _number("subtracted once from the logit of each token that the answer has already"),
    "frequency_penalty": _number("subtracted from a token's logit for each time that the answer has it already"),
    "only": _texts("the allowed words of a text answer"),
    "one_of": _texts("the allowed answers: texts or classes"),
    "n": _whole("number of answers", minimum=1),
}
"""The options of generation, for tasks that generate token by token."""
STREAM = {"stream": _flag("whether to stream pieces of the answer as server-sent events")}
URL = "a data: URL, such as data:image/png;base64,.."
VALUES: dict[str, Schema] = {
    TEXT: {"type": "string"},
    PICTURE: {
        "description": f"a picture: {URL}, or rows of numbers in 0..1",
        "anyOf": [{"type": "string"}, {"type": "array"}],
    },
    SOUND: {
        "description": f"a sound: {URL.replace('image/png', 'audio/wav')}, its file in base64, or its samples",
        "anyOf": [
            {"type": "string"},
            _object({"data": {"type": "string"}, "format": {"type": "string"}}, ["data"]),
            _object(
                {"array": {"type": "array"}, "sampling_rate": {"type": "integer", "minimum": 1}},
                ["array", "sampling_rate"],
            ),
        ],
    },
}
"""{form of a value: its JSON schema}; all other values are numbers and lists."""
FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
COUNTS = {"type": "object", "additionalProperties": {"type": "integer"}}
ANSWER = _object(
    {
        "value": {"description": "the answer; a picture or a sound is a data: URL"},
        "confidence": _number("the probability of the value, if known") | {"type": ["number", "null"]},
        "probability": {"type": "object", "additionalProperties": {"type": "number"}, "description": "of every class"},
        "complete": _flag("whether the answer is complete"),
        "ended": _text("what ended it: stop, stop string, length or max_tokens"),
        "tokens": _whole("number of generated tokens"),
        "ids": {"type": "array", "items": {"type": "integer"}, "description": "the token ids"},
        "others": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Answer"},
            "description": "the answers of other beams",
        },
    },
    ["value", "confidence", "probability", "complete"],
)
HEAD = {name: {"type": "string"} for name in ("id", "task")} | {"created": {"type": "integer"}}
SCHEMAS: dict[str, Schema] = {
    "Answer": ANSWER,
    "TaskAnswer": _object(
        {
            **HEAD,
            "object": {"const": "task.answer"},
            "answers": {"type": "array", "items": {"$ref": "#/components/schemas/Answer"}},
            "seed": _whole("the seed that was used, if tokens were sampled"),
            "usage": COUNTS,
        },
        [*HEAD, "object", "answers", "usage"],
    ),
    "TaskVectors": _object(
        {
            **HEAD,
            "object": {"const": "task.vectors"},
            **{side: {"type": "array", "items": {"type": "number"}} for side in ("left", "right")},
            "similarity": _number("the cosine similarity of both sides, from -1 to 1"),
            "match": _number("the probability that both sides belong together"),
            "usage": COUNTS,
        },
        [*HEAD, "object", "usage"],
    ),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                ["message", "type", "param", "code"],
            )
        },
        ["error"],
    ),
}
KEY = "key"


def api_description(models: Mapping[str, Model], settings: Settings) -> dict[str, Any]:
    """The OpenAPI description of a service with these models."""
    rows = [row for name, model in models.items() for row in described(model, name)]
    paths = {**_gets(), **_reload(models)}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        where = f"/v1/tasks/{quote(task, safe='')}"
        paths[where] = {"post": _task(own)}
        paths[f"{where}/look"] = {"post": _look(own)}
    paths |= {path: {"post": made} for path, made in _openai(list(models), rows).items()}
    found = {
        "openapi": "3.1.0",
        "info": {
            "title": "multimodal",
            "version": package_version(),
            "description": "Tasks of trained models. A value is a JSON value, or a part of a form. Unknown parameters are refused.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": {
                "Error": {
                    "description": "an error: 400 a wrong parameter, 401 no key, 404 no such model or task, 413 too large, 429 and "
                    "503 try again after Retry-After, 504 timeout",
                    "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
            "securitySchemes": {KEY: {"type": "http", "scheme": "bearer"}},
        },
    }
    return found | ({"security": [{KEY: []}]} if settings.keys else {})


def _operation(summary: str, content: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """content: {media type: schema of the answer}."""
    answers = {kind: {"schema": schema} for kind, schema in content.items()}
    return {
        "summary": summary,
        **more,
        "responses": {
            "200": {"description": "the answer", "content": answers},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }


def _body(bodies: Mapping[str, Schema]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema} for kind, schema in bodies.items()}}


def _gets() -> dict[str, Any]:
    anything: Schema = {"type": "object"}
    text = {"text/plain": {"type": "string"}}
    name = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "/health": {"get": _operation("Whether it answers", {JSON: anything}, security=[])},
        "/metrics": {"get": _operation("Counts and times, for Prometheus", text)},
        "/openapi.json": {"get": _operation("This description", {JSON: anything})},
        "/v1/models": {"get": _operation("The models", {JSON: anything})},
        "/v1/models/{name}": {"get": _operation("One model", {JSON: anything}, parameters=name)},
        "/v1/tasks": {"get": _operation("The tasks, and what each field takes", {JSON: anything})},
    }


def _reload(models: Mapping[str, Model]) -> dict[str, Any]:
    name = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}]
    done = _object({"id": {"type": "string"}, "object": {"const": "model"}, "reloaded": {"type": "boolean"}})
    return {
        "/v1/models/{name}/reload": {"post": _operation("Reload a model; needs a key", {JSON: done}, parameters=name)}
    }


def _task(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The operation of a task. rows: entries of /v1/tasks, one for each model that has the task."""
    task, pair = rows[0]["task"], rows[0]["pair"]
    answer = {"$ref": f"#/components/schemas/{'TaskVectors' if pair else 'TaskAnswer'}"}
    content: dict[str, Any] = {JSON: answer} if pair else {JSON: answer, EVENTS: {"type": "string"}}
    says = "Vectors of one side, or the similarity of both" if pair else f"Answers in {rows[0]['writes']}"
    body = _body(_task_bodies(rows, {} if pair else STREAM))
    return _operation(f"{task}: {says[0].lower()}{says[1:]}", content, requestBody=body)


def _look(rows: list[dict[str, Any]]) -> dict[str, Any]:
    body, png = _body(_task_bodies(rows, {}, several=False)), {"image/png": FILE}
    task = rows[0]["task"]
    return _operation(f"{task}: the attention of every head", png, requestBody=body)


def _task_bodies(rows: list[dict[str, Any]], more: dict[str, Schema], *, several: bool = True) -> dict[str, Schema]:
    """The schemas of a request body. several: whether it may ask for several answers."""
    models = [row["model"] for row in rows]
    options = {name: OPTIONS[name] for name in OPTIONS if several or name != "n"} if rows[0]["token_by_token"] else {}
    model = {"model": _text("the model", enum=models)}
    names = [read["field"] for read in rows[0]["reads"]]
    fields = {name: _any_of([_value(row, name) for row in rows]) for name in names}
    files = {name: _any_of([_part(row, name) for row in rows]) for name in names}
    needed = [] if rows[0]["pair"] else names
    asked = ["model"] if len(models) > 1 else []
    closed: Any = {"additionalProperties": False}
    parts = {f"{PREFIX}{name}" if name in RESERVED else name: schema for name, schema in files.items()}
    # a form cannot contain null, for a field that a sample lacks
    return {
        JSON: _object(
            {"fields": _object(fields, needed, **closed), **model, **options, **more}, ["fields", *asked], **closed
        ),
        FORM: _object(
            {**parts, **model, **_in_form({**options, **more})},
            [*(name for name, read in zip(parts, names, strict=True) if read in needed), *asked],
            **closed,
        ),
    }


def _value(row: dict[str, Any], name: str) -> Schema:
    """The schema of a field in JSON."""
    read = next(read for read in row["reads"] if read["field"] == name)
    if read["takes"] == CLASS:
        one: Schema = {"type": "string", "enum": read["classes"]} if read["classes"] else {"type": "string"}
        schema = {"type": "array", "items": one} if read["several"] else one
    else:
        schema = VALUES.get(read["takes"], {"description": f"numbers and lists, as {read['kind']} reads them"})
    if row["pair"] or len(row["reads"]) == 1:
        return schema
    about = "; ".join(filter(None, [schema.get("description"), "null: this sample lacks it"]))
    return {"description": about, "anyOf": [schema, {"type": "null"}]}


def _part(row: dict[str, Any], name: str) -> Schema:
    """The schema of a field in a form."""
    read = next(read for read in row["reads"] if read["field"] == name)
    return {"type": "string"} if read["takes"] in (TEXT, CLASS) else FILE


def _any_of(schemas: list[Schema]) -> Schema:
    """One schema for a field whose schema differs between models."""
    distinct = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def _in_form(properties: Mapping[str, Schema]) -> dict[str, Schema]:
    """The schemas in a form, where a list is several parts with a name that ends in []."""
    found: dict[str, Schema] = {}
    for name, schema in properties.items():
        if "anyOf" in schema:
            one, several = schema["anyOf"]
            found |= {name: {**one, "description": schema["description"]}, f"{name}[]": several}
        else:
            found[name] = schema
    return found


def _openai(models: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The operations of OpenAI's endpoints."""
    asked = ["model"] if len(models) > 1 else []
    head = {
        "model": _text("the model", enum=models),
        "task": _text("the task, if several fit", enum=list(dict.fromkeys(row["task"] for row in rows))),
    }
    user = {"user": _text("ignored")}
    closed: Any = {"additionalProperties": False}
    anything: Schema = {"type": "object"}
    sound = dict.fromkeys(SOUND_TYPES.values(), FILE)
    chat = {
        "messages": {
            "type": "array",
            "items": _object({"role": {"type": "string"}, "content": {}}, ["content"]),
            "minItems": 1,
            "description": "their parts of type text, image_url and input_audio become the fields of the task, in order",
        },
        **head,
        **OPTIONS,
        "max_completion_tokens": OPTIONS["max_tokens"],
        **STREAM,
        "stream_options": _object({"include_usage": _flag("whether the last chunk contains the token counts")}),
        "response_format": _object({"type": {"const": "text"}}),
        **user,
    }
    one = {name: schema for name, schema in OPTIONS.items() if name != "n"}
    heard = {
        "file": FILE,
        **head,
        "response_format": _text("the format", enum=list(FORMATS)),
        "timestamp_granularities[]": {"type": "array", "items": {"type": "string", "enum": ["word", "segment"]}},
        **_in_form(one),
        **STREAM,
    }
    embedded = {
        "input": {"description": "a text, or a list of texts and of parts of type image_url and input_audio"},
        **head,
        "side": _text("the side of the pair, if both fit", enum=["left", "right"]),
        "encoding_format": _text("the encoding of the vectors", enum=["float", "base64"]),
        **user,
    }
    spoken = {
        "input": _text("the text to speak"),
        **head,
        "voice": _text("the class that the task reads besides the text, if any"),
        "response_format": _text("the format", enum=list(SOUND_TYPES)),
        **one,
    }
    drawn = {
        "prompt": _text("a description of the picture"),
        **head,
        "size": _text("its columns x rows, or auto"),
        **user,
        **OPTIONS,
    }
    texts = {kind: {"type": "string"} for kind in (*TEXT_TYPES.values(), EVENTS)}
    made = {
        "chat/completions": (
            "Chat",
            {JSON: _object(chat, ["messages", *asked], **closed)},
            {JSON: anything, EVENTS: {"type": "string"}},
        ),
        "audio/transcriptions": (
            "Transcript of a recording",
            {FORM: _object(heard, ["file", *asked], **closed)},
            {JSON: anything, **texts},
        ),
        "embeddings": (
            "Embedding vectors",
            {JSON: _object(embedded, ["input", *asked], **closed)},
            {JSON: anything},
        ),
        "audio/speech": ("Speech from text", {JSON: _object(spoken, ["input", *asked], **closed)}, sound),
        "images/generations": (
            "Pictures from text",
            {JSON: _object(drawn, ["prompt", *asked], **closed)},
            {JSON: anything},
        ),
    }
    return {
        f"/v1/{path}": _operation(f"{summary}, compatible with OpenAI's clients", content, requestBody=_body(bodies))
        for path, (summary, bodies, content) in made.items()
    }
