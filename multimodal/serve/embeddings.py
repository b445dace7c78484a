"""POST /v1/embeddings: embedding vectors of texts, pictures or sounds, by a task that is a pair."""

import base64
from typing import Any

from multimodal.serve.answers import json_response
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.chat import part_of
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import bad, fields_are
from multimodal.serve.tasks import Input, TaskView, choose_task, task_views
from multimodal.serve.values import CLASS, TEXT

MOST_INPUTS = 2048


async def embed_inputs(call: Call, checkpoints: Checkpoints, params: Params) -> Any:
    """A vector of length 1 for each input, in order."""
    call.enter(checkpoints.named(params.text("model")))
    given = params.take("input")
    if given is None:
        raise params.missing("input", "input: wanted a text or a part of a message, or a list of them")
    inputs = _inputs(given)
    form = inputs[0][0]
    if any(other != form for other, _ in inputs):
        raise bad("input: it mixes texts, pictures and sounds; send one request for each of them", "input")
    view = choose_task(
        task_views(call.model),
        params.text("task"),
        lambda view: view.writes is None and bool(_sides(view, form)),
        f"gives vectors of one {form}; such a task is a pair, as in 'image <-> text'",
    )
    sides = _sides(view, form)
    side = params.text("side", None, ("left", "right"))
    if side is None and len(sides) > 1:
        raise bad(f"side: both sides of {view.task!r} are one {form}; choose left or right", "side")
    if side is not None and side not in sides:
        raise bad(f"side: the {side} side of {view.task!r} is not one {form}", "side")
    field = sides[side] if side else next(iter(sides.values()))
    encoding = params.text("encoding_format", "float", ("float", "base64"))
    params.text("user")
    width = call.model.packer.heads[view.task].vocab(call.model.packer.answer_tokenizers[view.task])
    params.without(f"vectors have {width} numbers and cannot be shortened", dimensions=(width,))
    params.done()
    with fields_are({field.name: "input"}):
        await call.read(view, [{field.name: raw} for _, raw in inputs])
    vectors = await call.results(len(inputs))
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": _packed(vector_F) if encoding == "base64" else vector_F.tolist(),
        }
        for i, vector_F in enumerate(vectors)
    ]
    counts = {"prompt_tokens": call.prompt, "total_tokens": call.prompt}
    return json_response({"object": "list", "data": data, "model": call.model_name, "usage": counts})


def _inputs(given: Any) -> list[tuple[str, Any]]:
    """[(TEXT, PICTURE or SOUND, raw value)] of the inputs."""
    given = given if isinstance(given, list) else [given]
    if not given or len(given) > MOST_INPUTS:
        raise bad(f"input: wanted from 1 to {MOST_INPUTS} inputs, not {len(given)}", "input")
    found = []
    for i, one in enumerate(given):
        if isinstance(one, str):
            found.append((TEXT, one))
        elif isinstance(one, dict):
            found.append(part_of(one, f"input[{i}]"))
        else:
            raise bad(
                f"input[{i}]: wanted a text, or a part of type image_url or input_audio; token ids are not supported",
                "input",
            )
    return found


def _sides(view: TaskView, form: str) -> dict[str, Input]:
    """{side: field} for the sides of a pair that have one field of this form."""
    found = {}
    for side in ("left", "right"):
        fields = view.side(side)
        if len(fields) == 1 and (fields[0].takes == form or (form == TEXT and fields[0].takes == CLASS)):
            found[side] = fields[0]
    return found


def _packed(vector_F: Any) -> str:
    """A vector as little-endian float32 in base64, the default of OpenAI's client."""
    return base64.b64encode(vector_F.numpy().astype("<f4").tobytes()).decode()
