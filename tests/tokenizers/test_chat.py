"""Conversations: the template, media in turns, loss on every turn of the assistant in one pass, the next turn written."""

import base64
import copy
import io

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.serve.errors import ApiError
from multimodal.serve.settings import Settings
from multimodal.serve.values import encoded
from multimodal_tokenizers import Chat, ImagePatches, Labels, TextBPE, TextBytes
from multimodal_tokenizers.chat import GEMMA, in_turns

_random = np.random.default_rng(0)
PICTURES = [_random.random((8, 4 * n), dtype=np.float32) for n in (1, 2)]
CORE = mm.Core(width=32, depth=2, heads=2)
TASK = "turns:chat -> text"


def turn(role: str, content):
    return {"role": role, "content": content}


def shown(number: int, text: str):
    return [{"type": "image", "image": PICTURES[number]}, {"type": "text", "text": text}]


CHATS = [
    [turn("user", "2+2?"), turn("assistant", "4"), turn("user", "3+4?"), turn("assistant", "seven")],
    [turn("system", "Be brief."), turn("user", shown(0, "this?")), turn("assistant", "grey")],
    [
        turn("user", shown(1, "and")),
        turn("assistant", "no"),
        turn("user", shown(0, "")),
        turn("assistant", "yes"),
        turn("user", "bye"),
        turn("assistant", [{"type": "text", "text": "by"}, {"type": "text", "text": "e"}]),
    ],
    [turn("user", "hello"), turn("assistant", "")],
]


@pytest.fixture(scope="module")
def model():
    kinds = {
        "text": TextBytes(),
        "image": mm.Tower(ImagePatches(patch=4, channels=1), mm.Core(width=16, depth=1, heads=2)),
        "chat": Chat(image="image"),
        "label": Labels(("x", "y")),
    }
    tasks = [TASK, mm.Task("turns:chat -> last:text", mm.NextToken(start_ids=())), "turns:chat -> label"]
    model = mm.Model(kinds, CORE, tasks)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def text_of(tokens) -> str:
    return "".join(bytes(x.content.tolist()).decode() if "image" not in path else "#" for path, x in tokens.runs)


def test_turns_stand_between_the_markers_of_chatml(model):
    tokens = model.packer.tokenizers["chat"](CHATS[1])
    assert text_of(tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n#this?<|im_end|>\n"
        "<|im_start|>assistant\ngrey<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [path for path, _ in tokens.runs] == ["text", "text", "text", "image", "text", "text", "said", "text"]
    other = Chat(before=GEMMA[0], after=GEMMA[1], begin="<bos>", names=(("assistant", "model"),))
    assert text_of(other.bind({"text": TextBytes()})([turn("user", "a"), turn("assistant", "b")])) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>model\n"
    )


def test_every_turn_of_the_assistant_is_learned_in_one_pass_as_turn_by_turn(model):
    """The other head, with the same weights, learns the last turn only."""
    assert model.packer.keys[TASK] == model.packer.keys["turns:chat -> last:text"]
    for turns in CHATS[:3]:
        at_once = model.losses(model.pack(TASK, [{"turns": turns}]))[TASK]
        at = [i for i, one in enumerate(turns) if one["role"] == "assistant"]
        contents = [turns[i]["content"] if isinstance(turns[i]["content"], str) else "bye" for i in at]
        samples = [{"turns": turns[:i], "last": text} for i, text in zip(at, contents, strict=True)]
        task = "turns:chat -> last:text"
        one_by_one = model.losses(model.pack(task, samples))[task]
        torch.testing.assert_close(at_once, one_by_one, atol=1e-4, rtol=1e-5)
        assert model.pack(TASK, [{"turns": turns}]).readings[TASK].count == sum(len(x) + 1 for x in contents)


def test_only_turns_of_the_assistant_have_a_loss(model):
    turns = [turn("user", "abc"), turn("assistant", "xy"), turn("user", "def"), turn("assistant", "z")]
    reading = model.pack(TASK, [{"turns": turns}]).readings[TASK]
    stop = 256
    assert reading.target.tolist() == [*b"xy", stop, *b"z", stop]
    # each is read from the row before it: the end of the marker, and the text itself
    whole = model.packer.tokenizers["chat"](turns[:3])
    first = len("<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n") - 1
    assert reading.row_N.tolist() == [first, first + 1, first + 2, len(whole) - 1, len(whole)]


def test_packed_alone_cached_and_without_gradient_to_others(model):
    samples = [{"turns": turns} for turns in CHATS]
    last = [{"turns": turns[:-1], "last": "ab"} for turns in CHATS]
    labels = [{"turns": turns, "label": "x"} for turns in CHATS]
    tasks = dict(zip(model.tasks, (samples, last, labels), strict=True))
    found = verify(model, tasks)
    assert {"packed", "mixed", "dense", "cached", "answers", "gradient"} <= {row.check for row in found.rows}
    assert found.passed, str(found)


def test_a_later_turn_changes_no_earlier_target(model):
    longer = CHATS[2]
    before = model.logits(model.pack(TASK, [{"turns": longer[:4]}]))[TASK]
    after = model.logits(model.pack(TASK, [{"turns": longer}]))[TASK]
    torch.testing.assert_close(after[: len(before)], before, atol=1e-5, rtol=0)


def test_what_is_learned_is_said_in_every_turn(model):
    mine = copy.deepcopy(model)
    samples = [{"turns": CHATS[0]}, {"turns": CHATS[1]}]
    mm.fit(mine, {TASK: samples}, steps=80, batch=2, lr=1e-2, device="cpu", precision="float32", quiet=True)
    assert mm.evaluate(mine, TASK, samples)["exact"] == 1.0
    assert mine.generate(TASK, turns=CHATS[0][:1], max_tokens=8).value == "4"
    assert mine.generate(TASK, turns=CHATS[0][:3], max_tokens=8).value == "seven"
    assert mine.generate(TASK, turns=CHATS[0][:3], begin="se", max_tokens=8).value == "seven"
    assert mine.predict(TASK, turns=CHATS[1][:2]).value == "grey"


def chat_bpe() -> TextBPE:
    hf = HFTokenizer.from_str(TextBPE.train(["good day, what is this?"] * 9, vocab_size=270).spec)
    hf.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return TextBPE(hf.to_str())


def test_markers_are_the_tokens_of_a_text_kind_and_a_content_cannot_hold_one():
    text = chat_bpe()
    chat = Chat().bind({"text": text})
    turns = [turn("user", "is this <|im_end|>?"), turn("assistant", "good day")]
    ids = torch.cat([run.tokens.content for run in chat(turns).runs]).tolist()
    hf = HFTokenizer.from_str(text.spec)
    start, end = hf.token_to_id("<|im_start|>"), hf.token_to_id("<|im_end|>")
    assert (ids.count(start), ids.count(end)) == (3, 2)
    plain = [turn("user", "what is this?"), turn("assistant", "good day")]
    whole = (
        "<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>\n<|im_start|>assistant\n"
    )
    # the library's own tokens of the whole text
    assert torch.cat([run.tokens.content for run in chat(plain).runs]).tolist() == hf.encode(whole).ids
    with pytest.raises(mm.MediaError, match=r"turns\[0\]: the content holds the marker '<\|im_end\|>'"):
        Chat().bind({"text": TextBytes()})(turns)


def test_a_pretrained_head_and_its_weights_are_shared(tmp_path):
    text = chat_bpe()
    stop = HFTokenizer.from_str(text.spec).token_to_id("<|im_end|>")
    head = mm.NextToken(start_ids=(), stop_id=stop, tied=True, bias=False)
    trained = mm.Model({"text": text}, CORE, [mm.Task("text -> text", head)])
    chatting = trained.extended({"chat": Chat()}, [mm.Task(TASK, mm.NextTurn.of(head))]).eval()
    assert list(chatting.readouts) == ["text_NextToken"]
    assert sum(p.numel() for p in chatting.parameters()) == sum(p.numel() for p in trained.parameters())
    reading = chatting.pack(TASK, [{"turns": CHATS[0]}]).readings[TASK]
    assert reading.target.tolist().count(stop) == 2
    loaded = mm.Model.load(chatting.save(tmp_path / "chat"))
    assert loaded.packer.tokenizers == chatting.packer.tokenizers
    asked = CHATS[0][:1]
    assert loaded.generate(TASK, turns=asked, max_tokens=4) == chatting.generate(TASK, turns=asked, max_tokens=4)


def png(picture: np.ndarray) -> str:
    data = io.BytesIO()
    PIL.Image.fromarray((picture * 255).astype(np.uint8)).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def test_pictures_come_in_all_usual_forms(model, tmp_path):
    chat, text = model.packer.tokenizers["chat"], png(PICTURES[0])
    (tmp_path / "a.png").write_bytes(base64.b64decode(text))
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image", "url": f"data:image/png;base64,{text}"},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "base64": text},
        {"type": "image", "image": PIL.Image.open(tmp_path / "a.png")},
    ]
    found = [chat([turn("user", [part])]).content for part in parts]
    assert all(torch.equal(x, found[0]) for x in found)
    turns = in_turns([turn("user", [{"type": "image"}, {"type": "text", "text": "?"}])], [PICTURES[0]])
    assert turns == [turn("user", shown(0, "?"))]
    with pytest.raises(mm.MediaError, match="1 of 2 images are named by no turn"):
        in_turns([turn("user", [{"type": "image"}])], PICTURES)


def test_the_service_takes_messages_and_opens_no_file(model, tmp_path):
    chat, url = model.packer.tokenizers["chat"], f"data:image/png;base64,{png(PICTURES[0])}"
    messages = [turn("user", [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}])]
    assert torch.equal(encoded(chat, "chat", messages, "messages", Settings()).content, chat(messages).content)
    (tmp_path / "a.png").write_bytes(base64.b64decode(png(PICTURES[0])))
    stolen = [turn("user", [{"type": "image", "path": str(tmp_path / "a.png")}])]
    with pytest.raises(ApiError, match="is no data:"):
        encoded(chat, "chat", stolen, "messages", Settings())


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ("hello", "wanted a list of turns {'role': .., 'content': ..}, not str 'hello'"),
        ([], "there are no turns"),
        ([{"role": "user"}], "turns[0]: wanted {'role': .., 'content': ..}, not dict"),
        (
            [turn("asistant", "a")],
            "the role 'asistant' is none of system, developer, user, assistant, tool; did you mean",
        ),
        ([turn("user", None)], "content is NoneType None, wanted a text or a list of parts"),
        ([turn("user", "a"), {**turn("assistant", ""), "tool_calls": [1]}], "turns[1]: 'tool_calls' is not read"),
        (
            [turn("user", [{"type": "video", "video": "a"}])],
            "turns[0].content[0]: wanted a part with a type of text, image",
        ),
        (
            [turn("user", [{"type": "audio", "audio": "a.wav"}])],
            "this chat has no audio; name the kind that reads it, as Chat(audio=",
        ),
        ([turn("user", [{"type": "image"}])], "a part of type 'image' needs its value"),
    ],
)
def test_what_is_no_conversation_is_refused(model, turns, said):
    with pytest.raises(mm.MediaError) as error:
        model.packer.tokenizers["chat"](turns)
    assert said in str(error.value)


def test_what_cannot_be_declared_is_refused(model):
    with pytest.raises(mm.ConfigError, match="Chat: causal=False would let earlier turns see later ones"):
        Chat(causal=False)
    with pytest.raises(mm.ConfigError, match=r"must hold '\{role\}'"):
        Chat(before="user:")
    with pytest.raises(mm.ConfigError, match="give the name of a kind of the model"):
        Chat(image=ImagePatches(patch=4))
    with pytest.raises(mm.TaskError, match="the last turn of 'turns' is the answer itself"):
        model.predict(TASK, turns=CHATS[0])
    with pytest.raises(mm.TaskError, match="the sample has no field 'text'"):
        model.pack(TASK, [{"turns": CHATS[0][:1]}])


BOUND = Chat().bind({"text": TextBytes(causal=True)})
TALKS = [
    [{"role": "user", "content": "ab"}],
    [{"role": "user", "content": "c"}, {"role": "assistant", "content": "ddd"}, {"role": "user", "content": "e"}],
    [{"role": "system", "content": "xyz"}],
]


@pytest.mark.parametrize("check", tokenizer_checks(BOUND, TALKS), ids=str)
def test_conformance(check):
    check()
