"""POST /v1/tasks/{task}/look: the attention of every head for one sample, as a picture."""

import io
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from multimodal.look import XRay, xray
from multimodal.look.drawing import draw
from multimodal.model import Model
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import bad
from multimodal.serve.native import check_all_fields, fields_of
from multimodal.serve.options import refuse_options
from multimodal.serve.tasks import named_task, task_views

MOST_WEIGHTS = 2**23  # of all heads together, each in float64 beside its score and prior: about 200 MB


async def look_into(call: Call, checkpoints: Checkpoints, params: Params, task: str) -> Any:
    """A PNG. It takes the parameters of the task except `stream`; for a pair, the fields of one side.

    If the task generates, the answer is generated first; one pass over sample and answer then records the attention.
    """
    call.enter(checkpoints.named(params.text("model"), task))
    view = named_task(task_views(call.model), task)
    raws = fields_of(params, view)
    params.without("there is one picture of one answer", stream=(False,), n=(1,))
    if view.writes is None:
        raws = {name: raw for name, raw in raws.items() if raw is not None}
    else:
        check_all_fields(view, raws)
    answer = None
    if view.token_by_token:
        await call.ask(view, raws, params)
        (answer,) = await call.results(1)
    else:
        refuse_options(params, view.task)
        params.done()
    call.task = view.task
    sample = await call.in_pool(call.encode, view, raws)
    tokens = None if answer is None else answer.tokens
    count = sum(len(part) for part in (*sample.values(), tokens) if part is not None)

    def look(model: Model) -> XRay:
        layers: list[Any] = [part for part in model.core.modules() if hasattr(part, "mechanism")]
        heads = sum(layer.heads for layer in layers)
        if heads * count**2 > MOST_WEIGHTS:
            most = int((MOST_WEIGHTS / heads) ** 0.5)
            raise bad(f"this is {count} tokens, and the attention of {heads} heads can be drawn over {most} at most")
        ray = xray(model, view.task, sample, answer=tokens)
        return ray if answer is None else replace(ray, prediction=answer)

    return Response(await call.in_pool(_png, await call.run_on_model(look)), media_type="image/png")


def _png(ray: XRay) -> bytes:
    data = io.BytesIO()
    draw(ray, data)
    return data.getvalue()
