"""/openapi.json: valid, complete, and true: it names the parameters that are taken, and real requests and answers fit it."""

import copy
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import data_url, make_model, png, serving, wav
from tests.serve.test_page import page_request

PAGES = {"/", "/docs"}
ONE = {"n"}  # taken, and refused but for 1, where there is one answer
TEXT = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def api(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def body_of(api: dict[str, Any], path: str, kind: str = "application/json") -> dict[str, Any]:
    return api["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]


def task_path(task: str) -> str:
    return f"/v1/tasks/{urllib.parse.quote(task, safe='')}"


def test_it_is_valid(api):
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    validator.validate(api)
    broken = copy.deepcopy(api)
    broken["paths"]["/v1/tasks"]["get"]["responses"]["200"].pop("description")
    with pytest.raises(Exception, match="description"):
        validator.validate(broken)


def test_every_route_is_there_and_nothing_else(client, api):
    routes = {
        (path.path, method) for path in client.app.routes for method in getattr(path, "methods", {"HEAD"}) - {"HEAD"}
    }
    # a WebSocket has no methods, and OpenAPI no words for it
    tasks = [row["task"] for row in client.get("/v1/tasks").json()["data"]]
    wanted = {(path, verb.lower()) for path, verb in routes if path not in PAGES and "{task:path}" not in path}
    wanted |= {(task_path(task) + more, "post") for task in tasks for more in ("", "/look")}
    assert {(path, verb) for path, methods in api["paths"].items() for verb in methods} == wanted
    for path in (path for path in api["paths"] if "{" not in path):
        method = client.get if "get" in api["paths"][path] else client.post
        assert method(path).status_code not in (404, 405), path


@pytest.fixture
def taken(monkeypatch) -> Iterator[set[str]]:
    """The parameters that endpoints take, without those that they only refuse."""
    from multimodal.serve.bodies import Params

    names: set[str] = set()
    take, without = Params.take, Params.without
    refusing = []

    def recorded(self: Any, name: str) -> Any:
        if not refusing:
            names.add(name)
        return take(self, name)

    def refused(self: Any, why: str, **allowed: Any) -> None:
        refusing.append(True)
        try:
            without(self, why, **allowed)
        finally:
            refusing.pop()

    monkeypatch.setattr(Params, "take", recorded)
    monkeypatch.setattr(Params, "without", refused)
    return names


def test_each_task_names_the_parameters_that_it_takes(client, api, taken, monkeypatch):
    from multimodal.serve import looks

    monkeypatch.setattr(looks, "_png", lambda ray: b"")  # drawing it takes seconds
    rows = client.get("/v1/tasks").json()["data"]
    for row in rows:
        for path in (task_path(row["task"]), task_path(row["task"]) + "/look"):
            taken.clear()
            body = page_request(row, {})
            body.pop("stream", None)
            if row["pair"] and path.endswith("/look"):
                body["fields"].pop("text")
            assert client.post(path, json=body).status_code == 200
            schema = body_of(api, path)
            # one answer alone is looked at; a pair takes `stream` and has nothing to stream
            named = taken - (ONE if path.endswith("/look") else {"stream"} if row["pair"] else set())
            assert set(schema["properties"]) == named
            parts = {name.removesuffix("[]") for name in body_of(api, path, "multipart/form-data")["properties"]}
            assert parts == (named - {"fields"}) | {read["field"] for read in row["reads"]}
            assert not schema["additionalProperties"]
    assert {row["token_by_token"] for row in rows} == {True, False}


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "json": {
            "messages": [TEXT],
            "task": "question -> text",
            "max_tokens": 2,
            "stream": True,
            "stream_options": {},
        }
    },
    "/v1/audio/transcriptions": {
        "files": {"file": ("a.wav", wav())},
        "data": {"task": "audio -> words:text", "max_tokens": "2"},
    },
    "/v1/embeddings": {"json": {"input": "a"}},
    "/v1/audio/speech": {"json": {"input": "a", "max_tokens": 4}},
    "/v1/images/generations": {"json": {"prompt": "cat"}},
}


def test_openais_endpoints_name_the_parameters_that_they_take(client, api, taken):
    for path, request in REQUESTS.items():
        taken.clear()
        found = client.post(path, **request)
        assert found.status_code == 200, found.text
        (kind,) = api["paths"][path]["post"]["requestBody"]["content"]
        named = {name.removesuffix("[]") for name in body_of(api, path, kind)["properties"]}
        others = {"voice"} if path == "/v1/audio/speech" else set()  # which only another task reads
        inside = {"include_usage", "role", "content"} if path.endswith("completions") else set()
        one = ONE if path.startswith("/v1/audio") else set()
        assert named - others == taken - inside - one, path
    assert set(REQUESTS) == {path for path in api["paths"] if re.match("/v1/(chat|audio|embeddings|images)", path)}


def test_requests_and_answers_fit_it(client, api):
    jsonschema = pytest.importorskip("jsonschema")

    def fits(schema: dict[str, Any], value: Any) -> bool:
        whole = {**schema, "components": api["components"]}
        errors = list(jsonschema.Draft202012Validator(whole).iter_errors(value))
        print(*(error.message for error in errors))  # for whoever reads why it failed
        return not errors

    for row in client.get("/v1/tasks").json()["data"]:
        path = task_path(row["task"])
        options = {"max_tokens": 3, "temperature": 0.5, "n": 2} if row["token_by_token"] else {}
        options |= {"stop": ["a"], "only": "b"} if options and row["writes"] == "text" else {}
        body = page_request(row, options) | ({"stream": False} if "stream" in page_request(row, {}) else {})
        assert fits(body_of(api, path), body)
        assert not fits(body_of(api, path), {**body, "temprature": 1})
        assert not fits(body_of(api, path), {**body, "fields": {**body["fields"], "more": 1}})
        found = client.post(path, json=body)
        assert found.status_code == 200, found.text
        content = api["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert fits(content, found.json())
        assert not fits(content, {"id": 1})
    error = client.post(task_path("image -> label"), json={}).json()
    assert fits(api["components"]["schemas"]["Error"], error)
    label = body_of(api, task_path("label -> drawing"))
    assert not fits(label, {"fields": {"label": "horse"}})
    sound = body_of(api, task_path("audio -> text"))
    for value, good in (
        (data_url(wav(), "audio/wav"), True),
        ({"array": [0.0], "sampling_rate": 8000}, True),
        (7, False),
    ):
        assert fits(sound, {"fields": {"audio": value}}) == good
    both = body_of(api, task_path("image question -> text"))
    assert fits(both, {"fields": {"image": None, "question": "a"}})  # null: the sample lacks it
    assert not fits(both, {"fields": {"image": data_url(png())}})


def test_several_models_and_keys():
    from multimodal.serve.openapi import api_description
    from multimodal.serve.settings import Settings

    with serving(keys=("secret",)) as client:
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/docs").status_code == 200
        api = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert (api["security"], api["paths"]["/health"]["get"]["security"]) == ([{"key": []}], [])
    model = make_model()
    two = api_description({"one": model, "two": model}, Settings())
    schema = body_of(two, task_path("image -> label"))
    assert schema["properties"]["model"]["enum"] == ["one", "two"]
    assert "model" in schema["required"]
    assert "security" not in two
