"""The page at /: what a browser may do for it, the requests that it builds, and the attention that it shows."""

import base64
import hashlib
import io
import json
import re
import threading
import tomllib
from pathlib import Path
from typing import Any

from tests.serve.conftest import data_url, png, serving, wav

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "multimodal" / "serve" / "page.html"
VALUES = {"picture": data_url(png()), "sound": data_url(wav(), "audio/wav"), "text": "a $cat `sat` \\ 'here'"}


def test_it_is_served_and_may_reach_no_other_host(client):
    found = client.get("/")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert found.text == PAGE.read_text(encoding="utf-8")
    policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", found.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert found.headers["x-content-type-options"] == "nosniff"


def test_it_names_no_host_and_runs_no_other_script():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"https?:|[\"'(]//\w|<script [^>]*src|@import|\bstyle=|\son\w+=\"", text) == []
    assert len(text.splitlines()) < 900


def test_it_is_in_the_wheel():
    """Hatch takes every file of a package that git does not ignore."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert "multimodal" in build["targets"]["wheel"]["packages"]
    assert not any("exclude" in part for part in (build, build["targets"]["wheel"]))
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not any(line in ("*.html", "page.html") for line in ignored)


def page_request(row: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `makeRequest` of the page builds for a row of /v1/tasks."""
    values = VALUES | {"class": "cat"}
    stream = {"stream": True} if row["token_by_token"] and row["writes"] == "text" else {}
    fields = {read["field"]: values[read["takes"]] for read in row["reads"]}
    return {"model": row["model"], "fields": fields, **options, **stream}


def test_every_task_answers_what_the_page_asks(client):
    rows = client.get("/v1/tasks").json()["data"]
    assert {read["takes"] for row in rows for read in row["reads"]} == {"picture", "sound", "text", "class"}
    for row in rows:
        options = {"max_tokens": 3, "temperature": 0.5, "seed": 1} if row["token_by_token"] else {}
        body = page_request(row, options)
        found = client.post(f"/v1/tasks/{row['task']}", json=body)
        assert found.status_code == 200, (row, found.text)
        if body.get("stream"):
            *pieces, last, done = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
            assert done == "[DONE]"
            text = "".join(json.loads(piece)["text"] for piece in pieces)
            assert json.loads(last)["answers"][0]["value"] == text
        else:
            answer = found.json()
            assert answer["object"] == ("task.vectors" if row["pair"] else "task.answer")


def test_examples_are_listed_with_their_files():
    sample = {"image": ("seven.png", data_url(png())), "question": ("what.txt", data_url(b"what?", "text/plain"))}
    with serving(examples=(sample,)) as client:
        (found,) = client.get("/v1/tasks").json()["examples"]
        assert found["image"] == {"name": "seven.png", "url": data_url(png())}
        assert set(found) == {"image", "question"}


def test_classes_and_word_times_are_listed(client):
    rows = {row["task"]: row for row in client.get("/v1/tasks").json()["data"]}
    (read,) = rows["label -> drawing"]["reads"]
    assert (read["classes"], read["several"]) == (["cat", "dog", "bird"], False)
    assert [task for task, row in rows.items() if row["word_times"]] == ["audio -> words:text", "audio -> text"]


def test_words_have_times_as_the_page_asks_for_them(client):
    form = {"model": "tiny", "task": "audio -> text", "response_format": "verbose_json"}
    form |= {"timestamp_granularities[]": "word"}
    found = client.post("/v1/audio/transcriptions", data=form, files={"file": ("sound.wav", wav())})
    assert found.status_code == 200, found.text
    assert all({"word", "start", "end"} <= set(word) for word in found.json()["words"])


def test_the_attention_of_every_task_is_a_picture(client, monkeypatch):
    from PIL import Image

    from multimodal.serve import looks

    rays: dict[str, Any] = {}
    threads, xray = set(), looks.xray

    def recorded(model: Any, task: str, sample: Any, **more: Any) -> Any:
        threads.add(threading.current_thread().name)
        rays[task] = xray(model, task, sample, **more)
        return rays[task]

    monkeypatch.setattr(looks, "xray", recorded)
    rows = client.get("/v1/tasks").json()["data"]
    for row in rows:
        options = {"max_tokens": 3} if row["token_by_token"] else {}
        body = page_request(row, options)
        body.pop("stream", None)
        if row["pair"]:
            body["fields"].pop("text")
        found = client.post(f"/v1/tasks/{row['task']}/look", json=body)
        assert (found.status_code, found.headers["content-type"]) == (200, "image/png"), found.text
        assert Image.open(io.BytesIO(found.content)).size[0] > 500
    assert threads == {"serve tiny"}
    assert set(rays) == {row["task"] for row in rows}
    # the answer that it looks at is the one that the task gives
    row = next(row for row in rows if row["task"] == "question -> text")
    body = page_request(row, {"max_tokens": 3}) | {"stream": False}
    answer = client.post(f"/v1/tasks/{row['task']}", json=body).json()["answers"][0]
    assert rays[row["task"]].sample["text"].content.tolist() == answer["ids"]


def test_attention_is_refused_where_it_is_too_much_or_unclear(client, monkeypatch):
    from multimodal.serve import looks

    def refused(task: str, **body: Any) -> str:
        found = client.post(f"/v1/tasks/{task}/look", json=body)
        assert found.status_code == 400, found.text
        return found.json()["error"]["message"]

    image = {"image": data_url(png())}
    assert "stream" in refused("image -> label", fields=image, stream=True)
    assert "also reads question" in refused("image question -> text", fields=image)
    assert "at once" in refused("image -> label", fields=image, temperature=1)
    assert "has two sides, and both came" in refused("image <-> text", fields={**image, "text": "a cat"})
    assert client.post("/v1/tasks/no -> task/look", json={"fields": {}}).status_code == 404
    monkeypatch.setattr(looks, "MOST_WEIGHTS", 30)
    assert "the attention of 2 heads can be drawn over 3 at most" in refused("image -> label", fields=image)


def test_a_key_is_asked_for():
    with serving(keys=("secret",)) as client:
        assert client.get("/").status_code == 200
        assert client.get("/v1/tasks").status_code == 401
        assert client.post("/v1/tasks/image -> label/look", json={"fields": {}}).status_code == 401
