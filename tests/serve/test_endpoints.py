"""Every endpoint gives what the model gives alone, and refuses by name what it cannot honour."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from multimodal.transcription import transcribe
from tests.serve.conftest import RATE, data_url, png, serving, wav, wave

IMAGE = {"type": "image_url", "image_url": {"url": data_url(png())}}
SOUND = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}}


def chat(*parts: Any, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **options}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def events(response: Any) -> list[Any]:
    """The events of a stream, whose last one is [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def test_health_models_tasks_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "models": ["tiny"]}
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m["object"]) for m in listed["data"]] == [("tiny", "model")]
    assert client.get("/v1/models/tiny").json()["tasks"] == listed["data"][0]["tasks"]
    tasks = {task["task"]: task for task in client.get("/v1/tasks").json()["data"]}
    assert tasks["image question -> text"]["reads"] == [
        {"field": "image", "kind": "image", "takes": "picture"},
        {"field": "question", "kind": "question", "takes": "text"},
    ]
    assert (tasks["label -> drawing"]["writes"], tasks["question -> speech"]["writes"]) == ("picture", "sound")
    assert (tasks["image <-> text"]["pair"], tasks["audio -> text"]["transcribes"]) == (True, True)
    client.post("/v1/chat/completions", json=chat(IMAGE, max_tokens=3))
    lines = client.get("/metrics").text.splitlines()
    assert 'multimodal_rows_most{model="tiny"} 4' in lines
    assert any(line.startswith('multimodal_whole_seconds_count{endpoint="/v1/chat/completions"}') for line in lines)


def test_a_class_has_its_probabilities(client, model):
    wanted = model.predict("image -> label", image=png())
    answer = client.post("/v1/tasks/image -> label", json={"fields": {"image": data_url(png())}}).json()["answers"][0]
    assert answer["value"] == wanted.value
    assert answer["probability"] == pytest.approx(wanted.probability, rel=1e-4)


@pytest.mark.parametrize("sent", ["a form", "an array"])
def test_the_native_endpoint_takes_forms_and_arrays(client, model, sent):
    pixels = np.random.default_rng(3).random((8, 8)).astype(np.float32)
    if sent == "a form":
        wanted = model.generate("image question -> text", image=png(), question="why?", max_tokens=9)
        files = {"image": ("a.png", png()), "question": (None, "why?"), "max_tokens": (None, "9")}
        found = client.post("/v1/tasks/image question -> text", files=files)
    else:
        wanted = model.generate("image question -> text", image=pixels, question="why?", max_tokens=9)
        fields = {"image": pixels.tolist(), "question": "why?"}
        found = client.post("/v1/tasks/image  question -> text", json={"fields": fields, "max_tokens": 9})
    answer = found.json()["answers"][0]
    assert (answer["ids"], answer["value"]) == (wanted.tokens.content.tolist(), wanted.value)
    assert found.json()["usage"]["completion_tokens"] == len(wanted.tokens)


def test_the_native_endpoint_streams(client, model):
    wanted = model.generate("question -> text", question="hello", max_tokens=9)
    body = {"fields": {"question": "hello"}, "max_tokens": 9, "stream": True}
    *pieces, last = events(client.post("/v1/tasks/question -> text", json=body))
    assert "".join(piece["text"] for piece in pieces) == wanted.value == last["answers"][0]["value"]


def test_the_options_are_those_of_generate(client, model):
    import multimodal as mm

    body = {"fields": {"question": "hello"}, "temperature": 0.9, "top_p": 0.8, "seed": 5, "n": 2, "max_tokens": 9}
    found = client.post("/v1/tasks/question -> text", json=body).json()
    sampler = mm.Temperature(0.9) | mm.TopP(0.8)
    for i, answer in enumerate(found["answers"]):
        wanted = model.generate("question -> text", question="hello", sampler=sampler, seed=5 + i, max_tokens=9)
        assert answer["ids"] == wanted.tokens.content.tolist()
    body = {"fields": {"question": "hello"}, "beams": 3, "max_tokens": 6}
    (answer,) = client.post("/v1/tasks/question -> text", json=body).json()["answers"]
    wanted = model.generate("question -> text", question="hello", beams=3, max_tokens=6)
    assert (answer["ids"], len(answer["others"])) == (wanted.tokens.content.tolist(), 2)
    body = {"fields": {"question": "hello"}, "one_of": ["yes", "no"]}
    assert client.post("/v1/tasks/question -> text", json=body).json()["answers"][0]["value"] in ("yes", "no")


def test_a_pair_gives_vectors_and_how_similar_they_are(client, model):
    task = "image <-> text"
    both = client.post(f"/v1/tasks/{task}", json={"fields": {"image": data_url(png()), "text": "a cat"}}).json()
    (left_F,), (right_F,) = model.vectors(task, [{"image": png()}]), model.vectors(task, [{"text": "a cat"}])
    torch.testing.assert_close(torch.tensor(both["left"]), left_F, atol=1e-5, rtol=0)
    assert both["similarity"] == pytest.approx(float(left_F @ right_F), abs=1e-5)
    match = model.matches(task, [{"image": png()}], [{"text": "a cat"}])
    assert both["match"] == pytest.approx(float(match), abs=1e-5)
    alone = client.post(f"/v1/tasks/{task}", json={"fields": {"text": "a cat"}}).json()
    assert "left" not in alone
    assert alone["right"] == pytest.approx(both["right"], abs=1e-5)


@pytest.mark.parametrize(
    ("parts", "task", "fields"),
    [
        ([IMAGE], "image -> text", {"image": png()}),
        ([text("why?"), IMAGE], "image question -> text", {"image": png(), "question": "why?"}),
        ([text("hello")], "question -> text", {"question": "hello"}),
        ([SOUND], "audio -> words:text", {"audio": wav()}),
    ],
)
def test_chat_reads_the_parts_of_a_message(client, model, parts, task, fields):
    wanted = model.generate(task, max_tokens=8, **fields)
    body = chat(*parts, max_completion_tokens=8, task=task, model="tiny", temperature=0, top_p=1)
    found = client.post("/v1/chat/completions", json=body).json()
    assert found["object"] == "chat.completion"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": wanted.value, "refusal": None}
    assert choice["finish_reason"] == ("stop" if wanted.complete else "length")
    assert found["usage"]["completion_tokens"] == len(wanted.tokens)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, *rest, reason, usage = events(client.post("/v1/chat/completions", json={**body, **options}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest) == wanted.value
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in (first, *rest))
    assert (reason["choices"][0]["delta"], reason["choices"][0]["finish_reason"]) == ({}, choice["finish_reason"])
    assert (usage["choices"], usage["usage"]) == ([], found["usage"])


def test_an_answer_that_may_be_long_ends_where_there_is_no_room_left(client):
    found = client.post("/v1/chat/completions", json=chat(text("x" * 120))).json()
    assert found["usage"]["total_tokens"] <= 128
    error = refused(client.post("/v1/chat/completions", json=chat(text("x" * 200))))
    assert "capacity=128" in error["message"]
    assert (
        "max_tokens"
        in refused(client.post("/v1/chat/completions", json=chat(text("x" * 120), max_tokens=100)))["message"]
    )


FORMS = ("json", "text", "srt", "verbose_json", "vtt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["audio -> text", "audio -> words:text"])
def test_transcripts_are_those_of_transcribe(model, form, task):
    with serving(window_s=0.6) as client:
        sound = wav(5, 1.5)
        data = {"task": task, "response_format": form} | ({"max_tokens": "12"} if "words" in task else {})
        found = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound)}, data=data)
        assert found.status_code == 200, found.text
        overlap = {"overlap_s": 0.15} if task == "audio -> text" else {}
        options = {"window_s": 0.6, "max_tokens": 12, **overlap}
        (wanted,) = transcribe(model, task, [(wave(5, 1.5), RATE)], **options)
        assert wanted.text
        if form in ("srt", "vtt"):
            assert found.text == getattr(wanted, form)().rstrip("\n") + "\n"
        elif form == "text":
            assert found.text == wanted.text + "\n"
        else:
            assert found.json()["text"] == wanted.text
        if form == "verbose_json":
            assert found.json()["duration"] == pytest.approx(1.5)
            assert found.json()["segments"][0]["text"] in wanted.srt()
            data |= {"timestamp_granularities[]": ["word"]}
            words = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound)}, data=data).json()["words"]
            assert [w["word"] for w in words] == [w.text for w in wanted.words]
            assert [w["start"] for w in words] == pytest.approx([w.start_s for w in wanted.words])
        if form == "json":
            data |= {"stream": "true"}
            *deltas, done = events(client.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound)}, data=data))
            assert {delta["type"] for delta in deltas} == {"transcript.text.delta"}
            assert "".join(delta["delta"] for delta in deltas) == done["text"] == wanted.text


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"language": "de"}, "language"),
        ({"prompt": "names"}, "prompt"),
        ({"temperature": "0.5"}, "temperature"),
        ({"response_format": "docx"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"response_format": "srt", "stream": "true"}, "stream"),
        ({"include[]": "logprobs"}, "include"),
        ({"chunk": "1"}, "chunk"),
    ],
)
def test_what_a_transcript_cannot_honour_is_refused_by_name(client, data, param):
    data = {"task": "audio -> text", **data}
    error = refused(client.post("/v1/audio/transcriptions", files={"file": ("a.wav", wav())}, data=data))
    assert error["param"] == param
    assert param in error["message"]


def test_embeddings(client, model):
    wanted = model.vectors("image <-> text", [{"text": "one"}, {"text": "two words"}])
    found = client.post("/v1/embeddings", json={"input": ["one", "two words"], "model": "tiny"}).json()
    torch.testing.assert_close(torch.tensor([d["embedding"] for d in found["data"]]), wanted, atol=1e-5, rtol=0)
    packed = client.post("/v1/embeddings", json={"input": "one", "encoding_format": "base64"}).json()["data"][0]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), wanted[0], atol=1e-5)
    seen = client.post("/v1/embeddings", json={"input": [IMAGE]}).json()["data"][0]["embedding"]
    assert seen == pytest.approx(model.vectors("image <-> text", [{"image": png()}])[0].tolist(), abs=1e-5)
    assert refused(client.post("/v1/embeddings", json={"input": [[1, 2]]}))["param"] == "input"
    assert refused(client.post("/v1/embeddings", json={"input": "a", "dimensions": 4}))["param"] == "dimensions"


def test_speech_and_pictures(client, model):
    import soundfile
    from PIL import Image

    wanted, rate = model.generate("question -> speech", question="hi", max_tokens=8).value
    found = client.post("/v1/audio/speech", json={"input": "hi", "voice": "default", "max_tokens": 8})
    heard, heard_rate = soundfile.read(io.BytesIO(found.content), dtype="float32")
    assert (found.headers["content-type"], heard_rate) == ("audio/wav", rate)
    np.testing.assert_allclose(heard, wanted, atol=1e-4)
    raw = client.post("/v1/audio/speech", json={"input": "hi", "response_format": "pcm", "max_tokens": 8})
    assert len(raw.content) == 2 * len(wanted)
    assert raw.headers["x-sample-rate"] == str(rate)
    drawn = client.post("/v1/images/generations", json={"prompt": "cat"}).json()["data"][0]["b64_json"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))))
    picture = model.generate("label -> drawing", label="cat").value[0]
    np.testing.assert_array_equal(pixels, np.rint(picture.numpy() * 255))
    for body, param in (
        ({"speed": 2}, "speed"),
        ({"voice": "nova"}, "voice"),
        ({"response_format": "mp3"}, "response_format"),
    ):
        assert refused(client.post("/v1/audio/speech", json={"input": "hi", **body}))["param"] == param
    for body, param in (
        ({"size": "64x64"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"n": 2}, "n"),
    ):
        assert refused(client.post("/v1/images/generations", json={"prompt": "cat", **body}))["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (chat(text("a"), tools=[{"type": "function"}]), "tools", "leave it out"),
        (chat(text("a"), colour="red"), "colour", "no parameter"),
        (chat(text("a"), temprature=1), "temprature", "did you mean 'temperature'"),
        (chat(text("a"), temperature="hot"), "temperature", "wanted a number"),
        (chat(text("a"), temperature=-1), "temperature", "0 or more"),
        (chat(text("a"), temperature=10**400), "temperature", "temperature"),
        (chat(text("a"), max_tokens=0), "max_tokens", "from 1"),
        (chat(text("a"), max_tokens=True), "max_tokens", "whole number"),
        (chat(text("a"), n=3), "n", "nothing is sampled"),
        (chat(text("a"), stop=[""]), "stop", "not empty"),
        (chat(text("a"), seed=2**70), "seed", "whole number"),
        (chat(text("a"), seed=-1, temperature=1), "seed", "whole number from 0"),
        (chat(text("a"), beams=2, length_penalty=1e300), "length_penalty", "wanted -10 to 10"),
        (chat(text("a"), beams=2, length_penalty=-10.5), "length_penalty", "wanted -10 to 10"),
        (chat(text("a"), response_format={"type": "json_object"}), "response_format", "one_of"),
        (chat(text("a"), stream_options={"include_usage": True}), "stream_options", "only with stream"),
        (chat(text("a"), text("b")), "model", "2 text"),
        (chat(), "model", "nothing"),
        (chat(text("a"), task="image -> text"), "task", "a task that writes text"),
        ({"messages": []}, "messages", "one message or more"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]", "begin"),
        ({"messages": [{"role": "king", "content": "a"}]}, "role", "king"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "wanted a text"),
        (chat({**text("a"), "cache": 1}), "messages[0].content[0]", "'cache' is no key"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "name", "names of participants"),
        (chat({"type": "file", "file": {}}), "messages[0].content[0]", "none of text"),
        (chat(text("a"), beams=5), "beams", "rows"),
        (chat(text("a"), beams=2, temperature=1.0), "beams", "likeliest"),
        (chat(text("a"), top_p=2, temperature=1.0), "top_p", "at most 1"),
        (chat(text("a"), temperature=1.0, min_p=2), "min_p", "from 0 to 1"),
        (chat(text("a"), length_penalty=2), "length_penalty", "give beams too"),
        (
            chat(text("a"), max_tokens=500),
            "max_tokens",
            "ask for at most 126, or send less (whoever runs it allows more by --capac",
        ),
        ({"mesages": []}, "mesages", "did you mean 'messages'"),
        (chat({"type": "image_url", "image_url": {"url": "cat.png"}}), "image", "-F image=@cat.png"),
        (
            chat({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}),
            "image",
            "of its option --allow-host (none)",
        ),
    ],
)
def test_a_wrong_chat_is_refused_by_name(client, body, param, words):
    error = refused(client.post("/v1/chat/completions", json=body))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


def test_what_is_not_there_is_404(client):
    assert (
        refused(client.post("/v1/chat/completions", json=chat(text("a"), model="gpt")), 404)["code"]
        == "model_not_found"
    )
    assert refused(client.post("/v1/tasks/image -> lable", json={"fields": {}}), 404)["code"] == "task_not_found"
    assert "/v1/completions" in refused(client.post("/v1/completions", json={}), 404)["message"]
    assert "is a WebSocket" in refused(client.get("/v1/realtime"), 404)["message"]


def test_a_wrong_method_names_the_right_one(client):
    for found, allowed in (
        (client.get("/v1/embeddings"), "POST"),
        (client.put("/v1/tasks/image -> label"), "POST"),
        (client.post("/v1/models"), "GET, HEAD"),
    ):
        error = refused(found, 405)
        assert ", ".join(sorted(found.headers["allow"].split(", "))) == allowed
        assert error["message"].startswith(f"{found.request.url.path!r} takes no {found.request.method}; use ")
        assert all(method in error["message"] for method in allowed.split(", "))
        assert error["code"] == "method_not_allowed"


def test_a_field_in_the_wrong_place_is_said_before_what_is_missing(client):
    task, image = "/v1/tasks/image question -> text", data_url(png())
    error = refused(client.post(task, json={"image": image, "question": "why?"}))
    assert (error["param"], error["code"]) == ("image", "unknown_parameter")
    assert 'fields go into "fields": {"image": ..}' in error["message"]
    error = refused(client.post(task, json={"fields": {"question": "why?"}, "imgae": image}))
    assert error["param"] == "imgae"
    assert "did you mean 'image'?" in error["message"]
    error = refused(client.post(task, files={"imgae": ("cat.png", png())}, data={"question": "why?"}))
    assert (error["param"], error["code"]) == ("imgae", "unknown_parameter")
    assert "did you mean 'image'?" in error["message"]
    error = refused(client.post(task, files={"question": (None, "why?"), "colour": (None, "red")}))
    assert error["param"] == "colour"
    assert "did you mean" not in error["message"]
    error = refused(client.post("/v1/audio/transcriptions", files={"fiel": ("a.wav", wav())}))
    assert (error["param"], error["message"]) == ("fiel", "there is no parameter 'fiel' here; did you mean 'file'?")
    # what is only missing is still said
    error = refused(client.post(task, json={"fields": {"question": "why?"}}))
    assert (error["param"], error["code"]) == ("fields.image", "missing_field")
    assert refused(client.post("/v1/audio/transcriptions", files={"task": (None, "audio -> text")}))["param"] == "file"


def test_what_a_field_cannot_be_names_the_field_and_no_object_of_ours(client):
    for task, value, words in (
        ("image -> label", ("image", data_url(b"no picture")), "cannot read 10 bytes as a picture"),
        ("image -> label", ("image", "a cat"), "-F image=@FILE"),
        ("image -> label", ("image", 5), "wanted a picture"),
        ("audio -> words:text", ("audio", data_url(b"RIFF1234WAVEfmt ", "audio/wav")), "as sound: Error in WAV file"),
        ("audio -> words:text", ("audio", data_url(b"hello", "audio/wav")), "Format not recognised"),
        ("label -> drawing", ("label", "dgo"), "did you mean 'dog'"),
        ("question -> text", ("question", 5), "wanted a text"),
    ):
        error = refused(client.post(f"/v1/tasks/{task}", json={"fields": {value[0]: value[1]}}))
        assert error["param"] == value[0], error
        assert words in error["message"]
        assert " object at 0x" not in error["message"]
    for path, sent, param in (
        ("/v1/embeddings", {"input": [{"type": "image_url", "image_url": {"url": data_url(b"none")}}]}, "input"),
        ("/v1/images/generations", {"prompt": "dgo"}, "prompt"),
        ("/v1/audio/speech", {"input": "x" * 200, "max_tokens": 3}, "input"),
    ):
        assert refused(client.post(path, json=sent))["param"] == param
    sound = {"files": {"file": ("a.wav", b"RIFF1234WAVEfmt ")}, "data": {"task": "audio -> text"}}
    error = refused(client.post("/v1/audio/transcriptions", **sound))
    assert (error["param"], "object at" in error["message"]) == ("file", False)
    for path, sent, name in (
        ("/v1/embeddings", {"inptu": "a"}, "input"),
        ("/v1/images/generations", {"promt": "cat"}, "prompt"),
        ("/v1/audio/speech", {"inputs": "a"}, "input"),
    ):
        error = refused(client.post(path, json=sent))
        assert f"did you mean {name!r}?" in error["message"]
    error = refused(client.post("/v1/tasks/image -> label", files={"image": (None, "cat.png")}))
    assert error["message"].endswith("in a form the file itself: -F image=@cat.png")
    error = refused(
        client.post("/v1/tasks/question -> text", json={"fields": {"question": "x" * 200}, "max_tokens": 3})
    )
    assert (error["param"], "more than the capacity=128" in error["message"]) == ("question", True)


def test_what_is_refused_of_a_task_names_it(client):
    for body in ({"beams": 2}, {"only": ["a"]}):
        image = {"fields": {"image": data_url(png())}, **body}
        assert "task 'image -> label'" in refused(client.post("/v1/tasks/image -> label", json=image))["message"]
    spoken = {"fields": {"question": "hi"}, "only": ["a"]}
    assert (
        "task 'question -> speech' writes none"
        in refused(client.post("/v1/tasks/question -> speech", json=spoken))["message"]
    )


def test_several_tasks_that_fit_are_named(client):
    error = refused(client.post("/v1/chat/completions", json=chat(SOUND)))
    assert error["param"] == "task"
    assert "'audio -> words:text'" in error["message"]
    assert "'audio -> text'" in error["message"]


def test_what_a_model_has_no_task_for_is_refused_clearly():
    import multimodal as mm
    from multimodal_tokenizers import ImagePatches, Labels

    def load() -> mm.Model:
        kinds = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("cat", "dog"))}
        return mm.Model(kinds, mm.Core(width=32, depth=1, heads=2), ["image -> label"])

    with serving(load) as client:
        for path, sent, words in (
            ("/v1/chat/completions", chat(text("a")), "writes text"),
            ("/v1/embeddings", {"input": "a"}, "gives vectors"),
            ("/v1/audio/speech", {"input": "a"}, "writes sound"),
            ("/v1/images/generations", {"prompt": "a"}, "writes a picture"),
        ):
            error = refused(client.post(path, json=sent))
            assert error["code"] == "no_such_task"
            assert words in error["message"]
            assert "it has 'image -> label'" in error["message"]
        assert refused(client.post("/v1/audio/transcriptions", files={"file": ("a", b"")}))["code"] == "no_such_task"
        idle = {"fields": {"image": data_url(png())}, "temperature": 0.5}
        assert "answers at once" in refused(client.post("/v1/tasks/image -> label", json=idle))["message"]
        assert client.post("/v1/tasks/image -> label", json={**idle, "temperature": 0}).status_code == 200
