"""POST /v1/chat/completions: tasks that write text. The parts of the messages become the fields of a task, by kind and in order."""

from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from multimodal.generate import Piece
from multimodal.heads import Prediction
from multimodal.serve.answers import EventStream, event, finish_reason, json_response, usage
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import bad
from multimodal.serve.tasks import TaskView, choose_task, task_views
from multimodal.serve.values import CLASS, PICTURE, SOUND, TEXT
from multimodal.texts import shortened

MOST_MESSAGES = 256
UNSUPPORTED = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "audio": (),
    "modalities": (["text"],), "prediction": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
    "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
}  # fmt: skip
"""{parameter of OpenAI that is not supported: values that have no effect}."""


async def complete_chat(call: Call, checkpoints: Checkpoints, params: Params) -> Any:
    """The answer as a `chat.completion`, or as its chunks."""
    call.enter(checkpoints.named(params.text("model")))
    view, raws = _conversation(call, params) or _by_kind(call, params)
    stream, with_usage = params.flag("stream"), _stream_options(params)
    if with_usage and not stream:
        raise bad("stream_options is allowed only with stream", "stream_options")
    longest = params.whole("max_completion_tokens", low=1)
    if longest is not None and params.values.get("max_tokens") is not None:
        raise bad("max_tokens is the old name of max_completion_tokens; give one of them", "max_tokens")
    if longest is not None:
        params.values["max_tokens"] = longest
    params.text("user")
    _check_format(params.take("response_format"))
    params.without("no model here can do this", **UNSUPPORTED)
    options = await call.ask(view, raws, params)
    seeds = (0,) if options is None else options.seeds
    extra = {"seed": seeds[0]} if options is not None and options.drawn else {}
    if stream:
        return _streamed(call, len(seeds), with_usage, extra)
    answers = await call.results(len(seeds))
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": answer.value, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason(answer),
        }
        for i, answer in enumerate(answers)
    ]
    head = {"id": call.id, "object": "chat.completion", "created": call.created, "model": call.model_name}
    return json_response({**head, "choices": choices, "usage": usage(call.prompt, call.written), **extra})


def _conversation(call: Call, params: Params) -> tuple[TaskView, dict[str, Any]] | None:
    """The task that reads whole conversations, and its field; None where the model has none, or another task is named."""
    wanted = params.values.get("task")
    views = [
        view
        for view in task_views(call.model).values()
        if view.writes == TEXT and len(view.reads) == 1 and view.reads[0].turns
    ]
    if isinstance(wanted, str):
        views = [view for view in views if view.task.split() == wanted.split()]
    if len(views) != 1:
        return None
    params.text("task")
    messages = _messages(params)
    if not isinstance(messages, list) or not messages:
        raise bad("messages: wanted a list of one message or more", "messages")
    if len(messages) > MOST_MESSAGES:
        raise bad(f"messages: {len(messages)} came, and at most {MOST_MESSAGES} are read", "messages")
    return views[0], {views[0].reads[0].name: messages}


def _messages(params: Params) -> Any:
    messages = params.take("messages")
    if messages is None:
        raise params.missing("messages", "messages: wanted a list of one message or more")
    return messages


def _by_kind(call: Call, params: Params) -> tuple[TaskView, dict[str, Any]]:
    """The task whose fields the parts of the messages fill, by kind and in order, and its fields."""
    parts = _parts(_messages(params))
    counts = Counter(form for form, _ in parts)
    shown = ", ".join(f"{count} {form}" for form, count in counts.items()) or "nothing"
    view = choose_task(
        task_views(call.model),
        params.text("task"),
        lambda view: view.writes == TEXT and _fits(view, counts),
        f"writes text from what the messages hold ({shown}; there is no template of a conversation)",
    )
    waiting = {form: [raw for f, raw in parts if f == form] for form in counts}
    raws = {}
    for field in view.reads:
        rest = waiting.get(_form(field.takes), [])
        raws[field.name] = [rest.pop(0) for _ in list(rest)] if field.many else rest.pop(0)
    return view, raws


def _fits(view: TaskView, counts: Mapping[str, int]) -> bool:
    """Whether a task reads these numbers of parts; a field that takes a list takes all that are left of its form."""
    forms: dict[str, list[bool]] = {}
    for field in view.reads:
        forms.setdefault(_form(field.takes), []).append(field.many)
    # a list comes last of its form, as a field behind it would get nothing
    return counts.keys() <= forms.keys() and all(
        not any(many[:-1]) and (counts.get(form, 0) == len(many) or (many[-1] and counts.get(form, 0) >= len(many) - 1))
        for form, many in forms.items()
    )


def _form(takes: str) -> str:
    """The form of the message part for a field; a class is sent as its name, a text."""
    return TEXT if takes == CLASS else takes


def _stream_options(params: Params) -> bool:
    """Whether the last chunk should contain the usage."""
    given = params.take("stream_options")
    if given is None:
        return False
    if not isinstance(given, dict):
        raise bad("stream_options: wanted an object with include_usage", "stream_options")
    inner = Params(given)
    found = inner.flag("include_usage")
    inner.without("no padding is added", include_obfuscation=(False,))
    inner.done()
    return found


def _check_format(given: Any) -> None:
    if given is None or given == {"type": "text"}:
        return
    raise bad(
        'response_format: only {"type": "text"} is supported; `one_of` lists the allowed answers, and `only` the allowed words',
        "response_format",
        "unsupported_value",
    )


def _parts(messages: Any) -> list[tuple[str, Any]]:
    """[(TEXT, PICTURE or SOUND, raw value)] of all parts of all messages, in order."""
    if not isinstance(messages, list) or not messages:
        raise bad("messages: wanted a list of one message or more", "messages")
    if len(messages) > MOST_MESSAGES:
        raise bad(f"messages: there are {len(messages)}, and at most {MOST_MESSAGES} are allowed", "messages")
    found: list[tuple[str, Any]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad(f"{where}: wanted an object with role and content", where)
        inner = Params(message)
        role = inner.text("role", "user", ("system", "developer", "user", "assistant"))
        content = inner.take("content")
        inner.without("no model here reads the names of participants", name=())
        inner.without("no model here calls tools", tool_calls=([],), refusal=("",), audio=())
        inner.done()
        if role == "assistant":
            raise bad(
                f"{where}: no model here reads its former answers; pass the beginning of an answer as `begin`", where
            )
        if isinstance(content, str):
            found.append((TEXT, content))
        elif isinstance(content, list):
            found += [part_of(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
        else:
            raise bad(f"{where}.content: wanted a text or a list of parts", f"{where}.content")
    return found


def part_of(part: Any, where: str) -> tuple[str, Any]:
    """Return (TEXT, PICTURE or SOUND, raw value) for one part of a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(kind, str) and (more := set(part) - {"type", kind}):
        raise bad(
            f"{where}: {shortened(repr(min(more)), 60)} is no key of a part of type {shortened(repr(kind), 60)}", where
        )
    if kind == "text" and isinstance(part.get("text"), str):
        return TEXT, part["text"]
    inner = part.get(kind) if isinstance(kind, str) and isinstance(part, dict) else None
    if kind == "image_url":
        if isinstance(inner, dict) and isinstance(inner.get("url"), str):
            if set(inner) - {"url", "detail"} or inner.get("detail") not in (None, "auto"):
                raise bad(f"{where}: a picture is read at its own size; leave detail out", f"{where}.image_url")
            return PICTURE, inner["url"]
        raise bad(f'{where}: wanted {{"url": "data:image/png;base64,.."}}', f"{where}.image_url")
    if kind == "input_audio":
        if isinstance(inner, dict) and isinstance(inner.get("data"), str) and set(inner) <= {"data", "format"}:
            return SOUND, {"data": inner["data"]}  # the bytes show the format
        raise bad(f'{where}: wanted {{"data": "base64 ..", "format": "wav"}}', f"{where}.input_audio")
    shown = shortened(repr(kind), 60)
    raise bad(f"{where}: type {shown} is none of text, image_url and input_audio, or is incomplete", where)


def _streamed(call: Call, count: int, with_usage: bool, extra: dict[str, Any]) -> EventStream:
    head = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": call.model_name}
    nothing = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **nothing, **extra})

    async def events() -> AsyncGenerator[bytes]:
        for index in range(count):
            yield chunk(index, {"role": "assistant", "content": ""})
        left = count
        while left:
            number, piece = await call.next()
            text = piece.text if isinstance(piece, Piece) else piece.value
            answer: Prediction | None = piece.prediction if isinstance(piece, Piece) else piece
            if text:
                yield chunk(number, {"content": text})
            if answer is not None:
                left -= 1
                yield chunk(number, {}, finish_reason(answer))
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(call.prompt, call.written), **extra})

    return call.stream(events())
