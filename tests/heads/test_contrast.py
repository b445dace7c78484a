"""Pairs: their two sides in the stream, the losses of CLIP and SigLIP, vectors, recall, and what has no meaning for them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.check import verify
from multimodal.heads.contrast import Contrast, ContrastReadout, fingerprint
from multimodal.heads.pool import First, Last, Mean, Transformed
from multimodal.look import xray
from multimodal.pattern import Pattern
from multimodal.retrieval import evaluate_pairs, recalls
from multimodal_tokenizers import TextBytes

TASK = "image <-> text"


@pytest.fixture
def model(tokenizers, core, lively) -> mm.Model:
    return lively(mm.Model(tokenizers, core, [TASK, "image -> label", "sound text <-> image"]))


def test_patterns_of_pairs():
    pattern = Pattern.parse("photo:image sound<->caption:text  image")
    assert pattern.pair
    assert {name: [f.name for f in side] for name, side in pattern.sides.items()} == {
        "left": ["photo", "sound"],
        "right": ["caption", "image"],
    }
    assert [field.kind for field in pattern.fields] == ["image", "sound", "text", "image"]
    plain = Pattern.parse("image -> text")
    assert not plain.pair
    assert [field.name for field in plain.fields] == ["image", "text"]
    with pytest.raises(mm.TaskError, match=r"has no sides; a pair has two, as in 'image <-> text'"):
        _ = plain.sides


BAD = [
    """
    <-> text
    ^ has an empty side; name one field or more on each side of '<->'
    """,
    """
    image <->
             ^ has an empty side
    """,
    """
    image <-> text <-> audio
                    ^ has a second '->'
    """,
    """
    image <-> text -> label
                   ^ has a second '->'
    """,
    """
    image <-> image
              ^ reads 'image' twice; name them apart, as in 'left:image right:image'
    """,
    """
    image < -> text
          ^ has '<' where a field's name was wanted
    """,
    """
    image <- text
                 ^ has no '->'
    """,
]


@pytest.mark.parametrize("case", BAD, ids=[case.split("\n")[1].strip() for case in BAD])
def test_bad_patterns(case: str):
    text, mark = (line[4:] for line in case.split("\n")[1:3])
    column = mark.index("^")
    with pytest.raises(mm.TaskError) as caught:
        Pattern.parse(text)
    first, shown, place = str(caught.value).split("\n")
    assert shown == "    " + text
    assert place == "    " + " " * column + "^"
    assert first.startswith(f"task {text!r} {mark[column + 2 :]}")


def written_out(form: str, left: torch.Tensor, right: torch.Tensor, scale: float, bias: float, same) -> float:
    """Equation by equation, in float64: figure 3 of Radford et al., algorithm 1 of Zhai et al."""
    n, total = len(left), 0.0
    logit = [
        [scale * float((left[i].double() * right[j].double()).sum().detach()) + bias for j in range(n)]
        for i in range(n)
    ]
    for i in range(n):
        others = [j for j in range(n) if j != i and not same[i][j]]
        if form == "sigmoid":
            total -= math.log(1 / (1 + math.exp(-logit[i][i])))
            total -= sum(math.log(1 / (1 + math.exp(logit[i][j]))) for j in others)
        else:
            rows = math.exp(logit[i][i]) + sum(math.exp(logit[i][j]) for j in others)
            columns = math.exp(logit[i][i]) + sum(math.exp(logit[j][i]) for j in others)
            total -= (2 * logit[i][i] - math.log(rows) - math.log(columns)) / 2
    return total


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("twins", [False, True])
def test_the_loss_is_the_formula(form: str, twins: bool):
    head = Contrast(width=5, form=form)
    readout = head.readout(12, TextBytes())
    with torch.no_grad():
        readout.log_scale.fill_(math.log(3.0))
        if readout.bias is not None:
            readout.bias.fill_(-0.7)
    state_ND, target = torch.randn(14, 12), torch.arange(14).reshape(7, 2)
    if twins:
        target[4, 0], target[6, 1] = target[1, 0], target[2, 1]
    unit_NF = head.logits(readout, state_ND, [1] * 14)
    torch.testing.assert_close(unit_NF[:7], F.normalize(state_ND[:7] @ readout.get_parameter("left.weight").T, dim=1))
    torch.testing.assert_close(unit_NF[7:], F.normalize(state_ND[7:] @ readout.get_parameter("right.weight").T, dim=1))
    same = [[any(a == b for a, b in zip(x, y, strict=True)) for y in target.tolist()] for x in target.tolist()]
    wanted = written_out(form, unit_NF[:7], unit_NF[7:], 3.0, -0.7 if form == "sigmoid" else 0.0, same)
    found = float(head.state_loss(readout, state_ND, [1] * 14, target, [1] * 7).detach())
    assert found == pytest.approx(wanted, rel=1e-5)
    if form == "softmax" and not twins:
        score_NM, own = 3 * unit_NF[:7] @ unit_NF[7:].T, torch.arange(7)
        both = F.cross_entropy(score_NM, own, reduction="sum") + F.cross_entropy(score_NM.T, own, reduction="sum")
        assert found == pytest.approx(float(both.detach()) / 2, rel=1e-5)


@pytest.mark.parametrize(("form", "scale", "bias"), [("softmax", 1 / 0.07, None), ("sigmoid", 10.0, -10.0)])
def test_the_first_scale_and_bias_are_the_papers(form: str, scale: float, bias: float | None):
    readout = Contrast(form=form).readout(16, TextBytes()).requires_grad_(False)
    assert float(readout.log_scale.exp()) == pytest.approx(scale)
    assert (None if readout.bias is None else float(readout.bias)) == bias
    assert all(p.dim() > 0 for p in readout.parameters()), "FSDP2 takes no scalars"
    readout.log_scale.fill_(10.0)
    one = torch.ones(1, 1)
    assert float(readout.scores(one, one)) == pytest.approx(100.0 if form == "softmax" else math.exp(10.0) - 10.0)


def test_scores_are_float32_under_autocast():
    readout, x = Contrast(width=32).readout(32, TextBytes()), F.normalize(torch.randn(6, 32), dim=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = readout.vectors(torch.randn(3, 32), "left")
        score_NM = readout.scores(x, x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(score_NM, x @ x.T / 0.07, atol=1e-4, rtol=0.0)


def test_a_pair_lies_in_the_stream_as_two_samples_in_order(tokenizers, core):
    """Long left sides have short right ones, so that sorting by length turns one side round against the other."""
    model = mm.Model({"text": TextBytes()}, core, ["a:text <-> b:text"])
    task = "a:text <-> b:text"
    pairs = [{"a": "abcdefgh"[: 1 + i * 3 % 8], "b": "zyxwvuts"[: 8 - i * 3 % 8] + str(i)} for i in range(8)]
    prepared = [model.packer.prepare(task, pair, "") for pair in pairs]
    stream = model.packer.lay(prepared)
    reading, sample_T = stream.readings[task], stream.layout.info.sample
    assert list(stream.layout.spans) == sorted(stream.layout.spans)
    assert sum(map(len, prepared)) == len(stream)
    assert (reading.count, reading.left, reading.lengths) == (8, 8, (1,) * 16)
    assert reading.samples == tuple(range(8)) * 2
    number_T = torch.empty(len(stream), dtype=torch.long)
    number_T[:] = torch.cat(list(stream.content.values()))[stream.order_T]
    read = [
        bytes(number_T[(sample_T == sample_T[row]) & (torch.arange(len(stream)) != row)].tolist()).decode()
        for row in reading.row_N
    ]
    assert read == [pair["a"] for pair in pairs] + [pair["b"] for pair in pairs]
    last = torch.cat([sample_T[1:] != sample_T[:-1], torch.tensor([True])])
    assert last[reading.row_N].all(), "each side is ended by its learned token"
    assert number_T[reading.row_N].tolist() == [0] * 8 + [1] * 8
    other = model.pack(task, pairs[::-1])
    torch.testing.assert_close(model.loss(other), model.loss(stream))


def test_packed_is_alone_and_no_gradient_crosses(model, values: Callable):
    samples = [values(i) for i in range(6)]
    stream = model.packer([(TASK, sample) for sample in samples] + [("image -> label", values(7))])
    both_NF = model.logits(stream)[TASK]
    for place, side in enumerate(("left", "right")):
        together = model.vectors(TASK, samples, side=side)
        torch.testing.assert_close(both_NF[6 * place : 6 * place + 6], together, atol=1e-5, rtol=0.0)
        for i, sample in enumerate(samples):
            field = "image" if side == "left" else "text"
            alone = model.vectors(TASK, [{field: sample[field]}])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(both_NF.norm(dim=1), torch.ones(12))
    rows_TD = model.rows(stream).detach().requires_grad_()
    state_TD = model.core(rows_TD, stream.position_TA, stream.layout)
    reading, sample_T = stream.readings[TASK], stream.layout.info.sample
    for row in reading.row_N:
        (gradient,) = torch.autograd.grad((state_TD[row] * torch.randn(32)).sum(), rows_TD, retain_graph=True)
        assert (gradient[sample_T != sample_T[row]] == 0).all()
        assert (gradient[sample_T == sample_T[row]] != 0).any(dim=1).all(), "the whole side is read"


def test_several_fields_a_side_and_what_may_lack(model, values: Callable):
    task, samples = "sound text <-> image", [values(i) for i in range(3)]
    whole = model.vectors(task, samples, side="left")
    without = model.vectors(task, [{**sample, "sound": None} for sample in samples], side="left")
    assert (whole - without).abs().amax(1).min() > 1e-3
    with pytest.raises(mm.StreamError, match=r"sample 1 of task .*: every field of the side 'sound text' is None"):
        model.pack(task, [samples[0], {**samples[1], "sound": None, "text": None}])
    with pytest.raises(mm.StreamError, match="every field of the side 'image' is None"):
        model.pack(task, [{**samples[1], "image": None}])
    with pytest.raises(mm.StreamError, match="every field of the side 'image' is None"):
        model.pack(task, [dict.fromkeys(("sound", "text", "image"))], answers=False)
    with pytest.raises(mm.TaskError, match="the sample has no field 'sound'"):
        model.vectors(task, [{"text": "one"}])
    with pytest.raises(mm.TaskError, match=r"both sides came; give one, sound or text \(left\) or image \(right\), or"):
        model.vectors(task, samples)
    with pytest.raises(mm.TaskError, match="no side came"):
        model.vectors(task, [{}])
    with pytest.raises(mm.ConfigError, match="side='top' is neither 'left' nor 'right'"):
        model.vectors(task, samples, side="top")
    assert model.vectors(task, [], side="left").shape == (0, 256)
    one_sided = model.pack(TASK, [{"image": None, "text": text} for text in "abc"], answers=False)
    torch.testing.assert_close(model.logits(one_sided)[TASK], model.vectors(TASK, [{"text": text} for text in "abc"]))


def test_equal_sides_are_not_told_from_each_other(model, values: Callable):
    samples = [values(i) for i in range(5)]
    samples[3]["text"] = samples[1]["text"]
    samples[4]["image"] = samples[0]["image"].copy()
    target = model.pack(TASK, samples).readings[TASK].target
    assert target is not None
    same = (target[:, None] == target[None]).any(-1)
    wanted = torch.eye(5, dtype=torch.bool)
    wanted[[1, 3, 0, 4], [3, 1, 4, 0]] = True
    assert (same == wanted).all()
    left, right = (model.vectors(TASK, samples, side=side) for side in ("left", "right"))
    loss = written_out("softmax", left, right, 1 / 0.07, 0.0, wanted.tolist())
    assert float(model.loss(model.pack(TASK, samples)).detach()) == pytest.approx(loss / 5, rel=1e-4)
    ids, place_NA = torch.tensor([1, 2]), torch.zeros(2, 3)
    one, two = mm.Tokens(ids, place_NA), mm.Tokens(ids.clone(), place_NA.clone())
    assert fingerprint([one]) == fingerprint([two]) != fingerprint([mm.Tokens(ids, place_NA + 1)])
    assert fingerprint([one, two]) != fingerprint([one])


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_matches_are_probabilities(tokenizers, core, lively, values: Callable, form: str):
    model = lively(mm.Model(tokenizers, core, [mm.Task(TASK, Contrast(width=24, form=form))]))
    samples = [values(i) for i in range(4)]
    texts = [{"text": text} for text in ("one", "two", "three")]
    left, right = model.vectors(TASK, samples, side="left"), model.vectors(TASK, texts)
    score_NM = left @ right.T / 0.07 if form == "softmax" else 10 * left @ right.T - 10
    wanted = score_NM.softmax(1) if form == "softmax" else 1 / (1 + (-score_NM).exp())
    found = model.matches(TASK, samples, texts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not any(x.is_inference() or x.requires_grad for x in (left, found)), "what is made of them may be trained on"


POOLS: list[tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    ({"pool": Mean(), "maps": (), "width": 32}, lambda state_ND: state_ND.mean(0)),
    ({"pool": (Last(), First()), "width": 8}, lambda state_ND: state_ND[-1]),
    ({"pool": Transformed(First(), dense="tanh"), "maps": ("right",), "bias": ("right",), "width": 32}, lambda s: s[0]),
]


@pytest.mark.parametrize(("settings", "pooled"), POOLS)
def test_a_pool_in_the_place_of_learned_tokens(tokenizers, core, lively, settings, pooled):
    """The vectors are those of the states by hand, packed and alone; the sides share one pool's weights, or have their own."""
    head = Contrast(**settings)
    model = lively(mm.Model(tokenizers, core, [mm.Task("a:text <-> b:text", head)]))
    task, texts = "a:text <-> b:text", ["some", "longer words", "x"]
    readout = model.readout(task).requires_grad_(False)
    assert isinstance(readout, ContrastReadout)
    assert readout.query is None
    with torch.inference_mode():
        for left, text in enumerate(texts):
            stream = model.pack(task, [{"a": text, "b": None}], answers=False)
            vector_D = pooled(model(stream))
            if isinstance(head.pool, Transformed):
                vector_D = torch.tanh(readout.pool.dense.linear(vector_D))  # type: ignore[union-attr]
            wanted = F.normalize(readout.left(vector_D), dim=-1)
            assert len(stream) == len(text), "there is no learned token"
            together = model.vectors(task, [{"a": text} for text in texts])
            torch.testing.assert_close(together[left], wanted, atol=1e-5, rtol=0.0)
    names = {name.removeprefix("readouts.text__text_Contrast.") for name in model.state_dict() if "Contrast" in name}
    both = {f"{side}.weight" for side in head.maps} | {f"{side}.bias" for side in head.bias}
    dense = (
        {f"pool.dense.linear.{kind}" for kind in ("weight", "bias")} if isinstance(head.pool, Transformed) else set()
    )
    assert names == {"log_scale"} | both | dense
    pairs = [{"a": text, "b": text[::-1] + "!"} for text in texts]
    left, right = (model.vectors(task, pairs, side=side) for side in ("left", "right"))
    stream = model.pack(task, pairs)
    torch.testing.assert_close(model.logits(stream)[task], torch.cat([left, right]), atol=1e-5, rtol=0.0)
    loss = written_out("softmax", left, right, 1 / 0.07, 0.0, torch.eye(3, dtype=torch.bool).tolist())
    assert float(model.loss(stream).detach()) == pytest.approx(loss / 3, rel=1e-4)
    assert evaluate_pairs(model, task, pairs)["loss"] == pytest.approx(loss / 3, rel=1e-4)
    assert Contrast.from_config(head.config()) == head
    assert verify(model, {task: pairs}).passed


def test_settings_of_contrast_that_do_not_fit():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pool": (Mean(), Mean(), Mean())}, "pool has 3 pools; give one for both sides, or one for each"),
        ({"pool": "mean"}, "pool"),
        ({"maps": ("top",)}, r"maps=\('top',\) has a side that is not among \('left', 'right'\)"),
        ({"maps": (), "bias": ("left",)}, r"bias=\('left',\) has a side that is not among \(\)"),
    ]
    for settings, named in cases:
        with pytest.raises(mm.ConfigError, match=f"Contrast: {named}"):
            Contrast(**settings)
    with pytest.raises(mm.ConfigError, match="the right side has no map, so width=16 must be that of its vector, 12"):
        Contrast(width=16, maps=("left",)).readout(12, TextBytes())


def test_recall_is_what_counting_finds():
    generator = torch.Generator().manual_seed(3)
    left, right = (F.normalize(torch.randn(12, 4, generator=generator), dim=1) for _ in range(2))
    owner = torch.arange(12) // 3  # four photos of three captions each
    left = left[owner]
    target = torch.stack([owner + 100, torch.arange(12)], 1)
    found = recalls(left, right, target, at=(1, 3))
    photos = [0, 3, 6, 9]
    for k in (1, 3):
        hits = [
            bool({int(j) // 3 for j in (left[i] @ right.T).argsort(descending=True)[:k]} & {i // 3}) for i in photos
        ]
        assert found[f"R@{k} right"] == pytest.approx(np.mean(hits))
        order = [(right[j] @ left[photos].T).argsort(descending=True)[:k].tolist() for j in range(12)]
        assert found[f"R@{k} left"] == pytest.approx(np.mean([j // 3 in best for j, best in enumerate(order)]))
    assert found["R@1 right"] not in (0.0, 1.0)
    flat = torch.ones(12, 4) / 2
    assert set(recalls(flat, flat, torch.arange(24).reshape(12, 2)).values()) == {0.0}, "ties count against it"


def test_save_load_and_extend(model, tokenizers, values: Callable, tmp_path):
    samples = [values(i) for i in range(4)]
    again = mm.Model.load(model.save(tmp_path / "kept"))
    assert again.tasks == model.tasks
    torch.testing.assert_close(again.vectors(TASK, samples, side="left"), model.vectors(TASK, samples, side="left"))
    more = model.extended(tasks=[mm.Task("story <-> image", Contrast(width=8, form="sigmoid"))])
    assert torch.equal(more.vectors(TASK, samples, side="right"), model.vectors(TASK, samples, side="right"))
    assert more.vectors("story <-> image", samples, side="left").shape == (4, 8)
    assert {name for name in more.state_dict() if name not in model.state_dict()} == {
        f"readouts.story__image_Contrast.{name}"
        for name in ("query", "left.weight", "right.weight", "log_scale", "bias")
    }


def test_verify_looks_at_both_sides(model, core, values: Callable):
    found = verify(model, {TASK: [values(i) for i in range(3)]})
    assert found.passed
    assert {row.check for row in found.rows if row.subject == TASK} == {"batch", "packed", "mixed", "dense", "gradient"}
    assert any(TASK in note and "unit vectors of both sides" in note for note in found.notes)
    assert verify(mm.Model(model.packer.tokenizers, mm.EncoderDecoder(reader=core, writer=core), [TASK])).passed


@pytest.mark.parametrize("side", ["left", "right"])
def test_verify_notices_a_side_that_depends_on_its_neighbours(model, monkeypatch: pytest.MonkeyPatch, side: str):
    alone = ContrastReadout.vectors

    def mixed(self: ContrastReadout, state_ND: torch.Tensor, of: str, lengths: list[int]) -> torch.Tensor:
        return alone(self, state_ND - 0.1 * state_ND.mean(0) if of == side else state_ND, of, lengths)

    monkeypatch.setattr(ContrastReadout, "vectors", mixed)
    found = verify(mm.Model(model.packer.tokenizers, model.core.core, [TASK]))
    assert {row.check for row in found.failures} == {"packed", "gradient"}


def test_what_has_no_meaning_for_a_pair_says_what_has(model, values: Callable, tmp_path, capsys):
    from multimodal.cli import main

    useless = r"task 'image <-> text' writes nothing.*use Model\.vectors .* and Model\.matches"
    sample = {name: values(0)[name] for name in ("image", "text")}
    for call in (
        lambda: model.predict(TASK, [sample]),
        lambda: model.predict(TASK, **sample),
        lambda: model.generate(TASK, [sample]),
        lambda: model.generate(TASK, [sample], beams=3),
        lambda: list(model.stream(TASK, [sample])),
        lambda: model.read(TASK, image=sample["image"]),
    ):
        with pytest.raises(mm.TaskError, match=useless):
            call()
    with pytest.raises(
        mm.TaskError, match=r"xray: .* has two sides, and both came; give the fields of one, image or text"
    ):
        xray(model, TASK, sample)
    for call in (
        lambda: model.vectors("image -> label", [sample]),
        lambda: model.matches("image -> label", [sample], [sample]),
        lambda: evaluate_pairs(model, "image -> label", [sample]),
    ):
        with pytest.raises(mm.TaskError, match=r"task 'image -> label' (has no sides|is no pair); a pair has two"):
            call()
    tokenizers, core = model.packer.tokenizers, model.core.core
    for task in (mm.Task(TASK, mm.Classify()), mm.Task("image -> label", Contrast())):
        with pytest.raises(mm.TaskError, match="'<->' needs a head for pairs, such as Contrast"):
            mm.Model(tokenizers, core, [task])
    for width, form, named in (
        (0, "softmax", "width=0"),
        (True, "softmax", "width=True"),
        (8, "cosine", "form='cosine'"),
    ):
        with pytest.raises(mm.ConfigError, match=f"Contrast: {named}"):
            Contrast(width=width, form=form)
    kept = model.save(tmp_path / "kept")
    for command in ("predict", "generate"):
        assert main([command, str(kept), "--task", "image<->text", "--text", "a"]) != 0
        assert "Model.matches" in capsys.readouterr().err
    assert main(["verify", str(kept), "--text", "a word"]) == 2  # one side alone would go unused
    assert "--text alone makes no sample of any task" in capsys.readouterr().err
    np.save(tmp_path / "picture.npy", sample["image"])
    assert main(["verify", str(kept), "--text", "a word", "--image", str(tmp_path / "picture.npy")]) == 0
    assert "unit vectors of both sides" in capsys.readouterr().out


def test_a_small_training_finds_pairs_and_names_classes():
    """Sixteen pictures with words; the words of classes that come under several names are found by text alone."""
    random = np.random.default_rng(0)
    pictures = random.random((8, 8, 8)).astype(np.float32)
    names = ["dog", "cat", "sun", "car", "hat", "cup", "key", "egg"]
    pairs = [
        {"image": p, "text": form.format(n)} for p, n in zip(pictures, names, strict=True) for form in ("{}", "a {}")
    ]
    tokenizers = {"image": mm_image(), "text": TextBytes()}
    model = mm.Model(tokenizers, mm.Core(width=32, depth=1, heads=2), [mm.Task(TASK, Contrast(width=16))])
    before = evaluate_pairs(model, TASK, pairs[::2])
    mm.fit(model, {TASK: pairs}, steps=60, batch=16, lr=5e-3, quiet=True)
    after = evaluate_pairs(model, TASK, pairs[::2])
    assert before["R@1 right"] < 0.5
    assert after["R@1 right"] == after["R@1 left"] == 1.0
    assert after["loss"] < 0.5 * before["loss"]
    found = model.matches(TASK, [{"image": p} for p in pictures], [{"text": f"a {name}"} for name in names])
    assert found.argmax(1).tolist() == list(range(8))


def mm_image() -> mm.Tokenizer:
    from multimodal_tokenizers import ImagePatches

    return ImagePatches(patch=4, channels=1)
