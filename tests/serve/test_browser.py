"""The page in a real Chromium: what people do with it, at the sizes and colours they have, and whom it asks."""

import ast
import base64
import io
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.browser import WHY_NOT, Browser
from tests.serve.conftest import EXTRA, data_url, make_model, png, wav

uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)
pytest.importorskip("python_multipart", reason=EXTRA)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

QUESTION = "a $cat `sat` \\ 'here'"
KEY = "secret"
SHOTS = os.environ.get("MULTIMODAL_SHOTS")  # a folder for pictures of the page, to look at


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a service on a port of this machine."""
    from multimodal.serve import looks
    from multimodal.serve.app import make_app
    from multimodal.serve.checkpoints import Checkpoint
    from multimodal.serve.settings import Settings

    seven = {"image": ("seven.png", data_url(png(7))), "audio": ("three.wav", data_url(wav(3), "audio/wav"))}
    settings = Settings(rows=4, capacity=128, max_tokens=12, keys=(KEY,), about="A model of tests.", examples=(seven,))
    app = make_app([Checkpoint("tiny", make_model, settings)], settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        # matplotlib takes seconds, and test_page.py has what it draws
        patch.setattr(looks, "_png", lambda ray: png(size=600))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory) -> Iterator[Browser]:
    """The page, after its key was typed in, at the second try."""
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        browser.size(1200, 800)
        browser.open(address, "document.activeElement.id === 'key'")
        browser.type("wrong")
        browser.press("Enter")
        browser.until("$('key-error').textContent.includes('not one of this service')")
        browser.type(KEY)
        browser.press("Enter")
        browser.until("!$('ask').hidden")
        assert len(browser.said) == 2  # the two refusals
        browser.said.clear()
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Browser]:
    """The page as it is when it has been loaded; whatever a test does, it may say nothing and ask no other host."""
    browser.size(1200, 800)
    browser.run("localStorage.clear()")
    browser.asked.clear()
    browser.open(address, "!$('ask').hidden && document.readyState === 'complete'")
    yield browser
    assert browser.said == []
    assert f"{address}/v1/tasks" in browser.asked
    foreign = [url for url in browser.asked if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))]
    assert foreign == []


def choose(page: Browser, task: str) -> None:
    page.run(f"[...document.querySelectorAll('#tasks input')].find((each) => each.value === {task!r}).click()")


def upload(page: Browser, file: Path, data: bytes, field: int = 0) -> None:
    file.write_bytes(data)
    page.upload(f"#field-{field}", file)
    page.until(f"fields[{field}].get()")


def ask(page: Browser) -> None:
    page.run("$('send').click()")
    page.until("!running")
    assert page.run("$('ask-error').textContent") == ""


def shown(page: Browser) -> str:
    """The text that was written."""
    return page.run("document.querySelector('#answer .written').textContent")


def value_of(page: Browser, field: int = 0) -> bytes:
    """The bytes of a picture or a sound in the form."""
    return base64.b64decode(page.run(f"fields[{field}].get().url").partition(",")[2])


def brightness(page: Browser, name: str) -> float:
    """Of a picture of the page, from 0 to 255; it is saved as NAME.png if MULTIMODAL_SHOTS names a folder."""
    from PIL import Image

    data = page.picture()
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        (Path(SHOTS) / f"{name}.png").write_bytes(data)
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean())


def as_typed(page: Browser, folder: Path) -> Iterator[Any]:
    """What the calls that the page shows print, as they are copied, in a folder with the files."""
    origin = page.run("location.origin")
    page.call("Browser.grantPermissions", origin=origin, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.run("document.querySelector('#calls details').open = true")
    env = {"KEY": KEY, "PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    for name, start in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        page.run(f"document.querySelector('[data-copies={name}]').click()")
        page.until("$('copied').textContent === 'Copied.'")
        page.run("$('copied').textContent = ''")
        code = page.run("navigator.clipboard.readText()")
        done = subprocess.run([*start, code], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        yield done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_picture_is_uploaded_a_question_typed_and_the_same_asked_as_curl_and_python(page, model, tmp_path):
    choose(page, "image question -> text")
    upload(page, tmp_path / "it's a cat.png", png())
    page.run("$('field-1').focus()")
    page.type(QUESTION)
    page.run("$('option-max_tokens').value = 8; $('options').oninput()")
    ask(page)
    wanted = model.generate("image question -> text", image=png(), question=QUESTION, max_tokens=8).value
    assert shown(page) == (wanted or "(nothing)")
    curl, python = as_typed(page, tmp_path)
    assert json.loads(curl)["answers"][0]["value"] == wanted
    assert repr(wanted) in python
    brightness(page, "text")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_words_of_a_sound_have_times_and_the_same_is_asked_as_curl_and_python(page, tmp_path):
    pytest.importorskip("openai")
    choose(page, "audio -> text")
    upload(page, tmp_path / "beep.wav", wav(5, 1.0))
    ask(page)
    assert page.run("document.querySelector('#answer audio').src").startswith("data:audio/")
    words = page.run("[...document.querySelectorAll('.words button')].map((each) => each.textContent)")
    assert words == shown(page).split()
    curl, python = as_typed(page, tmp_path)
    assert [word["word"] for word in json.loads(curl)["words"]] == words
    assert all(f"word={word!r}" in python for word in words)
    brightness(page, "words")


@pytest.mark.parametrize("finger", [False, True], ids=["mouse", "finger"])
def test_a_digit_is_drawn(page, model, finger):
    from PIL import Image

    page.size(390, 800, touch=finger)
    choose(page, "image -> label")
    page.run("[...document.querySelectorAll('button')].find((each) => each.textContent === 'Draw').click()")
    left, top, width, height = page.box("canvas")
    assert page.run("fields[0].get()") is None
    turns = [i * math.pi / 12 for i in range(25)]
    ring = [(left + width * (0.5 + 0.25 * math.sin(a)), top + height * (0.5 + 0.3 * math.cos(a))) for a in turns]
    page.stroke(ring, finger=finger)
    page.until("fields[0].get()")
    drawing = np.asarray(Image.open(io.BytesIO(value_of(page))).convert("L"))
    assert drawing.shape == (224, 224)
    # a ring: white on its line, black inside and in the corners
    assert [drawing[y, x] for y, x in ((112, 112), (179, 112), (112, 168), (5, 5), (5, 218))] == [0, 255, 255, 0, 0]
    ask(page)
    wanted = model.predict("image -> label", image=value_of(page)).probability
    bars = page.run("[...document.querySelectorAll('.bars tr')].map((row) => [...row.cells].map((e) => e.textContent))")
    assert {name: share for name, _, share in bars} == {name: f"{100 * p:.1f} %" for name, p in wanted.items()}
    brightness(page, f"drawn_{finger}")
    page.run("[...document.querySelectorAll('button')].find((each) => each.textContent.startsWith('Wipe')).click()")
    assert page.run("fields[0].get()") is None


def test_a_sound_is_recorded(page):
    import soundfile

    choose(page, "audio -> words:text")
    page.run("[...document.querySelectorAll('button')].find((each) => each.textContent === 'Record').click()")
    page.until("document.activeElement.textContent === 'End the recording'")
    page.run("new Promise((done) => setTimeout(done, 1200))")  # Chromium's own microphone beeps each half second
    page.press("Enter")
    page.until("fields[0].get()")
    wave, rate = soundfile.read(io.BytesIO(value_of(page)))
    assert 0.8 < len(wave) / rate < 5
    assert np.abs(wave).max() > 0.05
    assert page.run("document.querySelector('.drop a[download]').download") == "recording.wav"
    ask(page)
    brightness(page, "recorded")


def one_by_one(patch: pytest.MonkeyPatch) -> threading.Semaphore:
    """From here on the engine goes on after a piece of text only when it is told to, so that the browser can show each of them."""
    from multimodal.generate import Engine

    go, step = threading.Semaphore(0), Engine.step
    waits = False

    def step_when_told(engine: Engine) -> Any:
        nonlocal waits
        if waits:
            go.acquire(timeout=60)
        pieces = step(engine)
        waits = any(piece.text for piece in pieces)
        return pieces

    patch.setattr(Engine, "step", step_when_told)
    return go


def test_text_appears_while_it_is_written(page, model, monkeypatch):
    choose(page, "question -> text")
    page.run("$('field-0').value = 'hello'")
    page.run(
        "seen = []; new MutationObserver(() => seen.push($('answer').querySelector('.written')?.textContent ?? ''))"
        ".observe($('answer'), { childList: true, subtree: true, characterData: true })"
    )
    wanted = model.generate("question -> text", question="hello", max_tokens=12).value
    pieces = [piece.text for piece in model.stream("question -> text", question="hello", max_tokens=12) if piece.text]
    go = one_by_one(monkeypatch)
    page.run("$('send').click()")
    for text in itertools.accumulate(pieces):
        page.until(f"document.querySelector('#answer .written').textContent === {json.dumps(text)}")
        go.release()
    page.until("!running")
    seen = list(dict.fromkeys(page.run("seen")))
    assert shown(page) == wanted
    assert len(seen) > 3
    assert all(wanted.startswith(text) for text in seen)


def test_pictures_and_sounds_that_are_written_are_shown(page):
    choose(page, "label -> drawing")
    ask(page)
    page.until("document.querySelector('#answer img.shown')?.naturalWidth === 8")
    brightness(page, "picture")
    choose(page, "question -> speech")
    page.run("$('field-0').value = 'hello'")
    ask(page)
    page.until("document.querySelector('#answer audio')?.duration > 0")
    brightness(page, "sound")


def test_what_was_asked_is_remembered_without_the_key(page, address, tmp_path):
    choose(page, "image question -> text")
    upload(page, tmp_path / "cat.png", png())
    page.run("$('field-1').value = 'why?'")
    ask(page)
    page.open(address, "!$('ask').hidden && document.querySelector('#history li')")
    choose(page, "image -> label")
    brightness(page, "history")
    page.run("document.querySelector('#history li button').click()")
    assert page.run("task.task") == "image question -> text"
    assert (value_of(page), page.run("fields[1].get()")) == (png(), "why?")
    assert not page.run(f"JSON.stringify(localStorage).includes({KEY!r})")
    page.run("$('forget').click()")
    assert page.run("readHistory().length") == 0
    assert page.run("$('history').hidden")


def test_it_fits_a_phone_and_follows_dark_and_light(page, tmp_path):
    choose(page, "image -> label")
    upload(page, tmp_path / "cat.png", png())
    ask(page)
    page.run("$('look').click()")
    page.until("document.querySelector('.looked')?.naturalWidth > 500")
    page.run("document.querySelector('#calls details').open = true")
    for width in (360, 1200):
        light, dark = [], []
        for shade in (light, dark):
            page.size(width, 740, dark=shade is dark)
            assert page.run("document.documentElement.scrollWidth") <= width
            shade.append(brightness(page, f"label_{width}_{'dark' if shade is dark else 'light'}"))
        assert light[0] > 180
        assert dark[0] < light[0] - 60


def test_a_keyboard_is_enough(page, model):
    assert page.run("[...document.querySelectorAll('input, select, textarea')].every((each) => each.labels.length)")
    choose(page, "image question -> text")
    page.run("document.activeElement.blur()")
    # all that can be used and seen; of the tasks, one is reached by Tab and the others from it by arrows
    everything = (
        "[...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]"
        ".filter((e) => e.checkVisibility() && !e.disabled && (e.type !== 'radio' || e.checked))"
    )
    page.run(f"all = {everything}; reached = new Set()")
    for _ in range(page.run("all.length") + 2):
        page.press("Tab")
        page.run("reached.add(document.activeElement)")
    assert page.run("all.filter((each) => !reached.has(each)).map((each) => each.outerHTML)") == []
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.run("document.querySelector('#tasks input:checked').focus()")
    page.press("ArrowRight")
    assert page.run("task.task") == "question -> text"
    page.press("Tab")
    page.type("hello")
    page.press("Tab")  # the options
    page.press("Enter")
    page.until("$('options-box').open")
    page.press("Tab")
    page.type("4")
    page.press("Enter")
    page.until("!running && document.querySelector('#answer .soft')")
    assert shown(page) == model.generate("question -> text", question="hello", max_tokens=4).value


def test_what_is_missing_is_said_where_it_is(page):
    choose(page, "image -> label")
    page.run("$('send').click()")
    page.until("document.activeElement.id === 'field-0'")
    assert page.run("$('field-0-error').textContent") == "Give a picture first."
    assert page.run("$('field-0').getAttribute('aria-invalid')") == "true"


def test_another_task_hides_the_old_answer(page, tmp_path):
    choose(page, "image -> label")
    upload(page, tmp_path / "cat.png", png())
    ask(page)
    page.run("$('look').click()")
    page.until("document.querySelector('.looked')")
    choose(page, "question -> text")
    assert page.run("$('answer').textContent") == "Nothing has been asked of this task yet."
    assert page.run("$('looked').children.length") == 0


def test_a_question_does_not_wait_for_the_attention(page, monkeypatch):
    from multimodal.serve import looks

    drawn, draw = threading.Event(), looks._png
    monkeypatch.setattr(looks, "_png", lambda ray: drawn.wait(60) and draw(ray))
    choose(page, "question -> text")
    page.run("$('field-0').value = 'hello'; $('look').click()")
    page.until("running && $('looked').textContent.startsWith('Looking')")
    try:
        assert not page.run("$('send').disabled")
        ask(page)
        assert page.run("document.querySelector('#answer .written') !== null")
        assert page.run("$('looked').textContent") == ""
        assert page.run("$('stop').hidden && !$('look').disabled")
    finally:
        drawn.set()


def test_the_probability_of_a_written_text_is_that_of_a_token(page, model):
    choose(page, "question -> text")
    page.run("$('field-0').value = 'hello'")
    ask(page)
    answer = model.generate("question -> text", question="hello", max_tokens=12)
    factors = len(answer.tokens) + (answer.ended == "stop")
    said = page.run("document.querySelector('#answer .soft').textContent")
    assert said.startswith(f"mean probability of a token {100 * answer.confidence ** (1 / factors):.1f} %")


def test_examples_are_offered_where_they_fit(page):
    choose(page, "question -> text")
    assert page.run("$('tries').hidden")
    choose(page, "image -> label")
    assert page.run("$('tries').textContent") == "Try:seven"
    page.run("$('tries').querySelector('button').click()")
    assert value_of(page) == png(7)
    ask(page)
    choose(page, "audio -> words:text")
    assert page.run("$('tries').textContent") == "Try:three"


def test_a_file_that_is_no_picture_is_said_to_be_none(page, tmp_path):
    choose(page, "image -> label")
    upload(page, tmp_path / "cat.txt", b"a cat")
    page.until(
        "document.querySelector('.drop').textContent.includes('cat.txt is no picture that this browser can show')"
    )
    assert page.run("document.querySelector('.drop img')") is None
    page.run("$('send').click()")
    page.until("!running && !$('field-0-error').hidden")
    assert "cannot read" in page.run("$('field-0-error').textContent")
    assert page.run("$('answer').textContent") == "There is no answer."
    page.said.clear()  # the refusal


def test_the_python_of_a_service_without_keys_has_nothing_to_spare(page, tmp_path):
    page.run("sessionStorage.removeItem('multimodal.key')")
    try:
        for task, needs in (("image -> label", {"base64"}), ("question -> text", set())):
            choose(page, task)
            if needs:
                upload(page, tmp_path / "cat.png", png())
            code = page.run("$('python').textContent")
            tree = ast.parse(code)
            names = {
                name.name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import)
                for name in node.names
            }
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert names == {"json", "urllib"} | needs
            assert names <= used
            assert "Authorization" not in code
            assert "def data_url" in code if needs else "def" not in code
        choose(page, "audio -> text")
        upload(page, tmp_path / "beep.wav", wav(5, 1.0))
        assert "import os" not in page.run("$('python').textContent")
    finally:
        page.run(f"sessionStorage.setItem('multimodal.key', {KEY!r})")


def test_the_endpoints_are_shown_at_docs(page, address):
    page.open(f"{address}/docs", "document.querySelectorAll('#reference section > details').length > 10")
    api = page.run("call('/openapi.json').then((answer) => answer.json())")
    named = page.run("[...document.querySelectorAll('#reference code')].map((each) => each.textContent)")
    wanted = {f"{verb.upper()} {path}" for path, methods in api["paths"].items() for verb in methods}
    assert len(named) == len(wanted)
    assert set(named) == wanted
    for task in ("image question -> text", "label -> drawing"):
        page.run(
            f"found = [...document.querySelectorAll('#reference section > details')].find((each) => each.querySelector('code')"
            f".textContent.endsWith({urllib.parse.quote(task)!r})); found.open = true; found.scrollIntoView()"
        )
        reads = page.run("[...found.querySelector('table').rows].map((row) => row.cells[0].textContent)")
        assert [name for name in reads if name.startswith("fields.")] == [
            f"fields.{field}" for field in task.split(" -> ")[0].split()
        ]
    for width in (360, 1200):
        page.size(width, 740)
        assert page.run("document.documentElement.scrollWidth") <= width
        brightness(page, f"docs_{width}")
    page.asked.append(f"{address}/v1/tasks")  # which this page does not ask for
