"""Checks a loaded model against its own library: both compute the same outputs from the same input, packed and alone.

Each family names its peers: the classes of that library that compute its tasks. Inputs are random values of the kinds that the
tokenizers take. The head decides which outputs are compared:

head                           compared outputs
NextToken                      logits of an answer of random ids
Classify, EachRow              logits
Contrast of two kinds          logits of pairs, and the vectors of both sides
Contrast of one kind           states, and the vectors if the pool has weights
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.check.measure import difference, split_logits
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.heads import Contrast, NextToken
from multimodal.model import Model
from multimodal.pretrained import Pretrained, family_of, pretrained
from multimodal.pretrained import source as sources
from multimodal.pretrained.timm_vit import module_config
from multimodal.shapes import CheckpointError
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal.tower import Tower
from multimodal_tokenizers import ClassTokens, Ids, ImagePatches, SpectrogramPatches, WhisperFrames

TOLERANCE = 1e-4  # the largest allowed difference, in float32
LENGTHS = (5, 17)  # of the texts in tokens
SIZES = ((256, 300), (320, 256))  # of the pictures in pixels, rows and columns
SHARES = (0.1, 0.4)  # of the longest sound that fits

What = Literal["logits", "states", "vectors", "logits of pairs"]
Peer = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    """The result for one input.

    case: the compared outputs and the input, such as "logits of 5 tokens of text".
    packed, alone: the largest absolute difference, when the input is packed with others and when it is alone.
    """

    case: str
    packed: float
    alone: float

    @property
    def passed(self) -> bool:
        """Whether both are small enough."""
        return self.packed <= TOLERANCE and self.alone <= TOLERANCE  # NaN is never small enough


@dataclass(frozen=True)
class Case:
    """An input for our model, and the outputs (N, D) of theirs."""

    what: What
    name: str
    sample: dict[str, Any]
    wanted_ND: Tensor


@dataclass(frozen=True)
class Value:
    """A value: the input of our model, and the keyword arguments of theirs."""

    name: str
    ours: Any
    theirs: dict[str, Tensor]


def compare(source: str | Path | nn.Module, **options: Any) -> list[Difference]:
    """Load a model here and in its own library, and compare their outputs.

    source, options: as `pretrained` takes them.

    Raises:
        CheckpointError: the model cannot be loaded, its library is not installed, or no library computes its tasks.
    """
    if isinstance(source, nn.Module) and hasattr(source, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)  # type: ignore[operator]
            return compare(folder, **options)
    loaded = pretrained(source, **options)
    if options.get("part", "both") != "both":
        raise CheckpointError(
            f"{loaded.name}: not checked: this is the {options['part']} tower alone; leave part out to check both"
        )
    family, model = family_of(loaded.name, loaded.origin["config"]), loaded.model()
    peers = {task: family.peer(task, loaded.origin["tensors"]) for task in model.tasks}
    if missing := [task for task, peer in peers.items() if peer is None]:
        raise CheckpointError(
            f"{loaded.name}: not checked: no known library computes {missing[0]!r} of models of type "
            f"{family.names[0]!r}"
        )
    load = cache(lambda peer: _theirs(loaded, source, peer))
    found = []
    with torch.inference_mode():
        for task, peer in peers.items():
            module = load(peer)

            def call(inputs: Mapping[str, Tensor], read: int = 0, module: nn.Module = module) -> Mapping[str, Tensor]:
                return module(**family.peer_inputs(inputs, read))

            found += _differences(model, task, list(_cases(loaded, model, task, call)))
    return found


def _differences(model: Model, task: str, cases: Sequence[Case]) -> Iterator[Difference]:
    # only inputs of the same fields are packed together
    alike: dict[tuple[What, tuple[str, ...]], list[Case]] = {}
    for case in cases:
        alike.setdefault((case.what, tuple(case.sample)), []).append(case)
    for (what, _), own in alike.items():
        together = computed(model, task, [case.sample for case in own], what)
        for case, packed_ND in zip(own, together, strict=True):
            (alone_ND,) = computed(model, task, [case.sample], what)
            packed, alone = (difference(x.float(), case.wanted_ND) for x in (packed_ND, alone_ND))
            yield Difference(f"{what} of {case.name}", packed, alone)


@torch.inference_mode()
def computed(model: Model, task: str, samples: Sequence[dict[str, Any]], what: What) -> list[Tensor]:
    """For each sample, its logits, the states of its input tokens, or its vector, each (N, D); all samples are packed together."""
    if what == "vectors":
        return list(_normed(model.vectors(task, samples)))
    if what == "logits of pairs":
        left_NF, right_NF = (model.vectors(task, samples, side=side) for side in ("left", "right"))
        readout: Any = model.readout(task)
        return list(readout.scores(left_NF, right_NF).diagonal())
    head = model.packer.heads[task]
    stream = model.pack(task, samples, answers=what == "logits" and head.autoregressive)
    reading = stream.readings[task]
    if what == "logits":
        parts = split_logits(model.logits(stream)[task], reading)
        return [part for _, part in sorted(zip(reading.samples, parts, strict=True), key=lambda pair: pair[0])]
    spans = stream.layout.spans
    by_place = model(stream).split([span.total for span in spans])
    length_B = torch.tensor(reading.lengths)
    first_B = reading.row_N[length_B.cumsum(0) - length_B]
    place_of = dict(zip(reading.samples, stream.layout.info.sample[first_B].tolist(), strict=True))
    return [by_place[place_of[i]][: spans[place_of[i]].read] for i in range(len(samples))]


def _theirs(loaded: Pretrained, source: Any, peer: str) -> nn.Module:
    """Their model in evaluation mode: a module from keyword arguments to tensors by name."""
    if peer == "timm":
        return _Timm(_timm(loaded, source))
    try:
        library = importlib.import_module("transformers")
        auto = getattr(library, peer)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{loaded.name}: not checked: the comparison needs {peer} of transformers ({error}): "
            "pip install --upgrade 'transformers>=5'"
        ) from None
    path = Path(source)
    where = loaded.name if loaded.revision else str(path.parent if path.is_file() else path)
    given = {"revision": loaded.revision} if loaded.revision else {}
    with _without_bars():
        return auto.from_pretrained(where, dtype=torch.float32, **given).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within this context transformers draws no progress bars, which would stand in the middle of the report."""
    bars = importlib.import_module("transformers").utils.logging
    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()


def _timm(loaded: Pretrained, source: Any) -> nn.Module:
    """The timm module: `source` itself, or a new one with the weights in the folder `source`."""
    if isinstance(source, nn.Module):
        return source.eval()
    import timm

    config, sides = loaded.origin["config"], ("grid", "patch_size")
    size = [count * pixels for count, pixels in zip(*(loaded.origin["config"][name] for name in sides), strict=True)]
    made = timm.create_model(config["architecture"], num_classes=config["num_classes"], img_size=size)
    differ = [name for name, value in module_config(made).items() if value != config[name]]
    if differ:
        raise CheckpointError(
            f"{loaded.name}: not checked: {', '.join(differ)} differ from timm's {config['architecture']}; give the "
            "module itself to multimodal.pretrained.gate.compare"
        )
    made.load_state_dict(dict(sources.find(source).tensors))
    return made.eval()


class _Timm(nn.Module):
    """A VisionTransformer of timm with the interface of transformers' models."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        answer = self.vit(pixel_values)
        return {"logits": answer, "pooler_output": answer, "last_hidden_state": self.vit.forward_features(pixel_values)}


def _cases(loaded: Pretrained, model: Model, task: str, call: Peer) -> Iterator[Case]:
    """The test inputs of a task, with the outputs of theirs."""
    head, pattern, core = model.packer.heads[task], model.packer.patterns[task], model.core.core
    for i, count in enumerate(LENGTHS):
        if isinstance(head, NextToken):
            make = _encoder_decoder_case if isinstance(core, EncoderDecoder) else _decoder_case
            yield make(loaded, model, task, call, i)
            continue
        fields = [side[0] for side in pattern.sides.values()] if pattern.pair else list(pattern.reads)
        ends = isinstance(head, Contrast)
        values = {f.name: value_of(loaded, f.kind, i, count, ends=ends) for f in fields}
        if pattern.pair and fields[0].kind == fields[1].kind:
            values.pop(fields[1].name)
        name = " and ".join(value.name for value in values.values())
        sample = {field: value.ours for field, value in values.items()}
        found = call({key: x for value in values.values() for key, x in value.theirs.items()})
        if not isinstance(head, Contrast):
            yield Case("logits", name, sample, found["logits"].flatten(0, -2))
            continue
        vectors = {"image": "image_embeds", "text": "text_embeds"}
        if len(values) == 2:
            yield Case("logits of pairs", name, sample, found["logits_per_image"][0, 0])
            for field, value in values.items():
                yield Case("vectors", value.name, {field: value.ours}, _normed(found[vectors[field]][0]))
            continue
        yield Case("states", name, {**sample, fields[1].name: None}, found["last_hidden_state"][0])
        if head.pools and head.pools[0].weights(core.width) is not None:
            projected = vectors.get(fields[0].kind, "")
            key = projected if projected in found else "pooler_output"
            yield Case("vectors", name, sample, _normed(found[key][0]))


def _normed(vector_F: Tensor) -> Tensor:
    """Scaled to the length sqrt(F), so that its numbers are about as large as those of normalised states."""
    return F.normalize(vector_F, dim=-1) * vector_F.shape[-1] ** 0.5


def _decoder_case(loaded: Pretrained, model: Model, task: str, call: Peer, i: int) -> Case:
    """A case for one core. Theirs reads one row of ids: the input, a placeholder for each picture token, and the answer."""
    pattern, config = model.packer.patterns[task], loaded.origin["config"]
    alone = len(pattern.reads) == 1
    values = {f.name: value_of(loaded, f.kind, i, 1 if alone else 4 + i) for f in pattern.reads}
    answer = value_of(loaded, pattern.writes.kind, i + len(LENGTHS), LENGTHS[i])
    image_id = config.get("image_token_id", config.get("image_token_index"))
    parts = [
        value.theirs.get("input_ids", torch.full((1, len(value.ours)), image_id or 0)) for value in values.values()
    ]
    inputs = {key: x for value in values.values() for key, x in value.theirs.items()}
    read = sum(part.shape[1] for part in parts)
    inputs["input_ids"] = torch.cat([*parts, answer.theirs["input_ids"]], 1)
    name = f"{answer.name} after {' and '.join(value.name for value in values.values())}"
    sample = {**{field: value.ours for field, value in values.items()}, pattern.answer: answer.ours}
    return Case("logits", name, sample, call(inputs, read)["logits"][0, read - 1 :])


def _encoder_decoder_case(loaded: Pretrained, model: Model, task: str, call: Peer, i: int) -> Case:
    """A case for an encoder-decoder: the encoder reads the input, the decoder the answer."""
    pattern, head = model.packer.patterns[task], model.packer.heads[task]
    assert isinstance(head, NextToken)
    (field,) = pattern.reads
    value = value_of(loaded, field.kind, i, LENGTHS[-1 - i])
    answer = value_of(loaded, pattern.writes.kind, i + len(LENGTHS), LENGTHS[i])
    start = torch.tensor([head.start_ids])
    written = torch.cat([start, answer.theirs["input_ids"]], 1)
    logits_ND = call({**value.theirs, "decoder_input_ids": written})["logits"][0, start.shape[1] - 1 :]
    sample = {field.name: value.ours, pattern.answer: answer.ours}
    return Case("logits", f"{answer.name} after {value.name}", sample, logits_ND)


def value_of(loaded: Pretrained, kind: str, i: int, count: int, *, ends: bool = False) -> Value:
    """A random value of a kind, with seed i; our tokenizer preprocesses pictures and sounds for both models.

    count: tokens of a text. ends: whether a text must end with the end token, from which CLIP takes its vector.
    """
    generator = torch.Generator().manual_seed(i)
    tokenizer = loaded.tokenizers[kind]
    inner: Any = tokenizer.tokenizer if isinstance(tokenizer, Tower) else tokenizer
    inner = inner.of if isinstance(inner, ClassTokens) else inner
    if isinstance(inner, ImagePatches):
        rows, columns = SIZES[i % len(SIZES)]
        picture_CYX = torch.rand(inner.channels, rows, columns, generator=generator)
        pixels = {"pixel_values": inner.preprocess(picture_CYX)[None]}
        return Value(f"a picture of {rows}x{columns} pixels", tokenizer(picture_CYX), pixels)
    if isinstance(inner, (WhisperFrames, SpectrogramPatches)):
        longest = inner.frames / 100 if isinstance(inner, SpectrogramPatches) else inner.pad_seconds or 30.0
        seconds = longest * SHARES[i % len(SHARES)]
        sound = torch.randn(int(seconds * inner.rate_hz), generator=generator) * 0.1, inner.rate_hz
        tokens = tokenizer(sound)
        if isinstance(inner, SpectrogramPatches):
            theirs = {"input_values": inner.spectrogram(sound)[None]}
        else:
            theirs = {"input_features": tokens.content.reshape(-1, inner.mels).T[None]}
        return Value(f"{seconds:.1f} s of sound", tokens, theirs)
    ids = _ids(loaded.origin["config"], inner.vocab_size or 1, count, generator, ends)
    return Value(f"{count} tokens of text", _text(tokenizer, ids), {"input_ids": ids[None]})


def _ids(config: Mapping[str, Any], vocab: int, count: int, generator: torch.Generator, ends: bool) -> Tensor:
    """Random ids (count,), without the special ids in the configuration, such as padding."""
    every = {**config, **(config.get("text_config") or {})}
    named = {name: value for name, value in every.items() if name.endswith(("_token_id", "_token_index"))}
    special = {i for value in named.values() for i in (value if isinstance(value, list) else [value])}
    # not the last id: with some configurations CLIP pools at the highest id of a text
    free = [i for i in range(vocab - 1) if i not in special] or list(range(vocab))
    ids = torch.tensor(free)[torch.randint(len(free), (count,), generator=generator)]
    if ends:
        end = named.get("eos_token_id")
        ids[-1] = end if isinstance(end, int) and end != 2 and end < vocab else vocab - 1
    return ids


def _text(tokenizer: Tokenizer, ids: Tensor) -> Tokens:
    """Tokens with these ids, also if the tokenizer takes texts."""
    if isinstance(tokenizer, Tower):
        inner = tokenizer.tokenizer
        return replace(tokenizer, tokenizer=Ids(inner.vocab_size or 1, inner.causal))(ids.tolist())
    return Tokens(ids, tokenizer.places(len(ids)))
