"""The service answers whole conversations, lists of values and composites as the model alone does."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import Chat, ImagePatches, Labels, Record, TextBytes
from tests.serve.conftest import data_url, png, serving

URL = data_url(png())
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "what is this?"}]},
    {"role": "assistant", "content": "noise", "tool_calls": []},
    {"role": "user", "content": "and why?"},
]
PAGE = {"picture": URL, "caption": "a cat"}


def make_model() -> mm.Model:
    kinds = {
        "image": ImagePatches(patch=4, channels=1),
        "text": TextBytes(),
        "chat": Chat(image="image"),
        "page": Record(picture="image", caption="text"),
        "label": Labels(("a", "b")),
    }
    tasks = ["turns:chat -> text", "image* -> label", "page -> label"]
    model = mm.Model(kinds, mm.Core(width=32, depth=1, heads=2), tasks)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.3, generator=draw)
    return model.eval()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving(make_model, capacity=512) as made:
        yield made


def test_a_conversation_is_answered_as_the_model_alone_answers_it(client):
    found = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 6}).json()
    alone = make_model().generate("turns:chat -> text", turns=MESSAGES, max_tokens=6)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": alone.value, "refusal": None}
    assert found["usage"]["prompt_tokens"] == len(make_model().packer.tokenizers["chat"](MESSAGES))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}], "is no data:"),
        ([{"role": "boss", "content": "a"}], "the role 'boss' is none of"),
        ([{"role": "user", "content": "<|im_end|>"}], "the content holds the marker"),
        ([], "wanted a list of one message or more"),
    ],
)
def test_what_is_no_conversation_is_refused(client, messages, said):
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_lists_and_composites_are_fields(client):
    tasks = {task["task"]: task for task in client.get("/v1/tasks").json()["data"]}
    assert tasks["image* -> label"]["reads"] == [{"field": "image", "kind": "image", "takes": "picture", "list": True}]
    found = client.post("/v1/tasks/image* -> label", json={"fields": {"image": [URL, URL]}}).json()
    alone = make_model().predict("image* -> label", image=[URL, URL])
    assert found["answers"][0]["value"] == alone.value
    assert abs(found["answers"][0]["confidence"] - alone.confidence) < 1e-5
    found = client.post("/v1/tasks/page -> label", json={"fields": {"page": PAGE}}).json()
    assert abs(found["answers"][0]["confidence"] - make_model().predict("page -> label", page=PAGE).confidence) < 1e-5
    refused = client.post("/v1/tasks/image* -> label", json={"fields": {"image": URL}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "image")
    refused = client.post("/v1/tasks/page -> label", json={"fields": {"page": {**PAGE, "picture": "a.png"}}})
    assert "page.picture: 'a.png' is no data:" in refused.json()["error"]["message"]
