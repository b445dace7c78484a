"""POST /v1/audio/speech and /v1/images/generations: tasks that generate a sound or a picture from one text or class."""

import base64
import io
from typing import Any

import numpy as np
from starlette.responses import Response

from multimodal.heads import Prediction
from multimodal.serve.answers import json_response, usage
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import ApiError, bad, fields_are
from multimodal.serve.tasks import Input, TaskView, choose_task, task_views
from multimodal.serve.values import CLASS, PICTURE, SOUND, TEXT
from multimodal.value_files import file_of

SOUND_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "pcm": "audio/pcm"}


async def speak(call: Call, checkpoints: Checkpoints, params: Params) -> Any:
    """The sound file. If the task also reads a class, `voice` gives it."""
    call.enter(checkpoints.named(params.text("model")))
    view = choose_task(
        task_views(call.model),
        params.text("task"),
        lambda view: view.writes == SOUND and _split(view) is not None,
        "writes sound from one text",
    )
    split = _split(view)
    assert split is not None
    text, voice = split
    raws = {text.name: params.text("input")}
    if raws[text.name] is None:
        raise params.missing("input", "input: wanted the text to speak")
    if voice is None:
        params.without(f"task {view.task!r} has one voice", voice=("default",))
    else:
        raws[voice.name] = params.text("voice")
        if raws[voice.name] is None:
            raise bad(f"voice: task {view.task!r} reads it, as its field {voice.name!r}", "voice")
    form = params.text("response_format", "wav", tuple(SOUND_TYPES))
    params.without("no model here speaks faster or slower", speed=(1, 1.0))
    params.without("no model here reads instructions how to speak", instructions=("",))
    params.without("there is one sound, which is not streamed", stream_format=("audio",), n=(1,))
    with fields_are({text.name: "input", **({voice.name: "voice"} if voice else {})}):
        await call.ask(view, raws, params)
    (answer,) = await call.results(1)
    value = answer.value
    if not (isinstance(value, tuple) and len(value) == 2):
        raise ApiError(500, f"task {view.task!r} gave {type(value).__name__} instead of a sound")
    return Response(
        await call.in_pool(_sound, value, form), media_type=SOUND_TYPES[form], headers=_ended(answer, value[1])
    )


def _ended(answer: Prediction, rate_hz: int) -> dict[str, str]:
    """Headers with what the file does not contain."""
    return {"X-Sample-Rate": str(rate_hz), "X-Finish-Reason": "stop" if answer.complete else "length"}


def _sound(value: Any, form: str) -> bytes:
    """A sound (wave_S, rate_hz) as a file; pcm: 16-bit little-endian samples, one channel."""
    wave_S = np.clip(np.asarray(value[0], dtype=np.float32), -1, 1)
    if form == "pcm":
        return np.rint(wave_S * 32767).astype("<i2").tobytes()
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave_S, int(value[1]), format=form.upper())
    return data.getvalue()


async def draw(call: Call, checkpoints: Checkpoints, params: Params) -> Any:
    """The pictures as PNG in base64."""
    call.enter(checkpoints.named(params.text("model")))
    view = choose_task(
        task_views(call.model),
        params.text("task"),
        lambda view: view.writes == PICTURE and (split := _split(view)) is not None and split[1] is None,
        "writes a picture from one text",
    )
    prompt = params.text("prompt")
    if prompt is None:
        raise params.missing("prompt", "prompt: wanted a text that describes the picture")
    params.without(
        "pictures are base64 in the response", response_format=("b64_json",), stream=(False,), partial_images=(0,)
    )
    params.without("pictures are PNG", output_format=("png",), output_compression=(100,), background=("auto", "opaque"))
    params.without("the model has one way to draw", quality=("auto", "standard"), style=(), moderation=("auto", "low"))
    params.text("user")
    size = params.text("size", "auto")
    own = _size(call, view)
    if size != "auto" and size != own:
        raise bad(
            f"size={size}: task {view.task!r} draws {own or 'its own size'}; leave it out", "size", "unsupported_value"
        )
    with fields_are({view.reads[0].name: "prompt"}):
        options = await call.ask(view, {view.reads[0].name: prompt}, params)
    answers = await call.results(1 if options is None else len(options.seeds))
    data = []
    for answer in answers:
        file = await call.in_pool(file_of, call.model.packer.answer_tokenizers[view.task], answer.value)
        if file is None or file[0] != ".png":
            raise ApiError(500, f"task {view.task!r} gave {type(answer.value).__name__} instead of a picture")
        data.append({"b64_json": base64.b64encode(file[1]).decode()})
    seed = {"seed": options.seeds[0]} if options is not None and options.drawn else {}
    counts = usage(call.prompt, call.written)
    tokens = {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"]}
    return json_response(
        {
            "created": call.created,
            "data": data,
            "output_format": "png",
            "usage": {**tokens, "total_tokens": counts["total_tokens"]},
        }
        | seed
    )


def _split(view: TaskView) -> tuple[Input, Input | None] | None:
    """Return (the field for the text, the field for a class or None); None: the task reads something else."""
    texts = [field for field in view.reads if field.takes == TEXT]
    classes = [field for field in view.reads if field.takes == CLASS]
    if len(texts) + len(classes) != len(view.reads) or len(texts) > 1:
        return None
    found = texts + classes
    if not found or len(found) > 2 or (len(found) == 2 and not texts):
        return None
    return found[0], found[1] if len(found) == 2 else None


def _size(call: Call, view: TaskView) -> str | None:
    """Columns x rows of the generated picture, such as "64x32"; None: the tokenizer has no fixed size."""
    tokenizer: Any = call.model.packer.answer_tokenizers[view.task]
    size = getattr(tokenizer, "size", None) or getattr(getattr(tokenizer, "of", None), "size", None)
    return f"{size[1]}x{size[0]}" if isinstance(size, tuple) and len(size) == 2 else None
