"""POST /v1/tasks/{task}: any task of any model, with probabilities."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from multimodal.generate import Piece
from multimodal.heads import Contrast
from multimodal.model import Model
from multimodal.retrieval import match_probabilities
from multimodal.serve.answers import EventStream, answer_json, event, json_response, usage
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import bad
from multimodal.serve.options import OPTIONS, WritingOptions, refuse_options
from multimodal.serve.tasks import TaskView, named_task, task_views
from multimodal.shapes import did_you_mean
from multimodal.texts import shortened

PREFIX = "fields."  # before a field in a form whose name is also that of a parameter
RESERVED = {*OPTIONS, "model", "stream", "fields"}


async def answer_task(call: Call, checkpoints: Checkpoints, params: Params, task: str) -> Any:
    """Answers JSON {"model", "fields": {..}, options of generation, "stream"}, or a form with a part for each field and parameter.

    For a pair, the fields of one side return its vector; the fields of both sides also return their similarity.
    """
    call.enter(checkpoints.named(params.text("model"), task))
    view = named_task(task_views(call.model), task)
    stream, raws = params.flag("stream"), fields_of(params, view)
    if view.writes is None:
        return await _pair(call, view, raws, params)
    check_all_fields(view, raws)
    options = await call.ask(view, raws, params)
    if stream:
        return _streamed(call, view, options)
    count = 1 if options is None else len(options.seeds)
    return json_response(_whole(call, view, options, await call.results(count)))


def check_all_fields(view: TaskView, raws: Mapping[str, Any]) -> None:
    """Raise an error 400 if a field is missing; null is allowed."""
    missing = [field.name for field in view.reads if field.name not in raws]
    if missing:
        also = "also reads" if raws else "reads"
        raise bad(
            f"task {view.task!r} {also} {', '.join(missing)}; give it, or null for a field that this sample lacks",
            f"fields.{missing[0]}",
            "missing_field",
        )


def fields_of(params: Params, view: TaskView) -> dict[str, Any]:
    """{field: raw value} that the client sent."""
    known = [field.name for field in view.reads]
    if params.form:
        found = {}
        for name in list(params.values):
            field = name.removeprefix(PREFIX)
            if name.startswith(PREFIX) or (name in known and name not in RESERVED):
                found[field] = params.take(name)
    else:
        found = params.take("fields") or {}
    if not isinstance(found, Mapping):
        raise bad('fields: wanted an object, such as {"image": "data:image/png;base64,.."}', "fields")
    # before anything is missed: a name that is misspelt, or a field beside `fields`, is why it is missing
    for name in params.values:
        if name not in RESERVED:
            here = not params.form and name in known
            clue = f'; fields go into "fields": {{"{name}": ..}}' if here else did_you_mean(name, [*known, *RESERVED])
            raise bad(
                f"there is no parameter {shortened(repr(name), 60)} here{clue or ', and none is ignored'}; task {view.task!r} "
                f"reads {', '.join(known) or 'nothing'}",
                shortened(name, 60),
                "unknown_parameter",
                made_up=not here,
            )
    for name in found:
        if name not in known:
            raise bad(
                f"task {view.task!r} has no field {shortened(repr(name), 60)}; it reads {', '.join(known) or 'nothing'}"
                f"{did_you_mean(name, known)}",
                shortened(f"fields.{name}", 60),
                "unknown_field",
                made_up=True,
            )
    return dict(found)


def _whole(call: Call, view: TaskView, options: WritingOptions | None, answers: list[Any]) -> dict[str, Any]:
    seed = {"seed": options.seeds[0]} if options is not None and options.drawn else {}
    return {
        "id": call.id,
        "object": "task.answer",
        "created": call.created,
        "model": call.model_name,
        "task": view.task,
        "answers": [answer_json(call.model.packer.answer_tokenizers[view.task], answer) for answer in answers],
        **seed,
        "usage": usage(call.prompt, call.written),
    }


def _streamed(call: Call, view: TaskView, options: WritingOptions | None) -> EventStream:
    async def events() -> AsyncGenerator[bytes]:
        count = 1 if options is None else len(options.seeds)
        answers: dict[int, Any] = {}
        while len(answers) < count:
            number, piece = await call.next()
            if not isinstance(piece, Piece):
                answers[number] = piece
                continue
            if piece.text:
                yield event({"id": call.id, "object": "task.piece", "index": number, "text": piece.text})
            if piece.prediction is not None:
                answers[number] = piece.prediction
        yield event(_whole(call, view, options, [answers[i] for i in range(count)]))

    return call.stream(events())


async def _pair(call: Call, view: TaskView, raws: Mapping[str, Any], params: Params) -> Any:
    """The vectors of the given sides, and their similarity."""
    refuse_options(params, view.task)
    params.done()
    sides = {
        side: {field.name: raws[field.name] for field in view.side(side) if field.name in raws}
        for side in ("left", "right")
    }
    given = {side: sample for side, sample in sides.items() if any(raw is not None for raw in sample.values())}
    if not given:
        names = " ".join(field.name for field in view.reads)
        raise bad(f"task {view.task!r} is a pair; give the fields of one side or of both: {names}", "fields")
    for side, sample in given.items():
        if missing := [field.name for field in view.side(side) if field.name not in sample]:
            raise bad(f"the {side} side of {view.task!r} also reads {', '.join(missing)}", f"fields.{missing[0]}")
    await call.read(view, list(given.values()))
    vectors = dict(zip(given, await call.results(len(given)), strict=True))
    answer: dict[str, Any] = {side: vector.tolist() for side, vector in vectors.items()}
    if len(vectors) == 2:
        left_F, right_F = vectors["left"], vectors["right"]
        answer["similarity"] = float(left_F @ right_F)
        head = call.model.packer.head(view.task)
        if isinstance(head, Contrast) and head.form == "sigmoid":  # a softmax needs other candidates

            def match(model: Model) -> float:
                sides = (vector_F[None].to(model.device) for vector_F in (left_F, right_F))
                return float(match_probabilities(model, view.task, *sides))

            answer["match"] = await call.run_on_model(match)
    return json_response(
        {
            "id": call.id,
            "object": "task.vectors",
            "created": call.created,
            "model": call.model_name,
            "task": view.task,
            **answer,
            "usage": usage(call.prompt, 0),
        }
    )
