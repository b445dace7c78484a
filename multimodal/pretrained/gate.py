"""The gate: a loaded model beside the library that it came from, on the same input, packed and alone.

Each probe says for models of some sort which input both sides get, and what of theirs is compared with what of ours.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.check.measure import difference, split_logits
from multimodal.heads import NextToken
from multimodal.model import Model
from multimodal.pretrained import Pretrained, pretrained
from multimodal.shapes import CheckpointError
from multimodal.tokenizer import Tokens

MOST = 1e-4  # the largest difference that passes, in float32
LENGTHS = (5, 17)  # of the texts in tokens


@dataclass(frozen=True)
class Difference:
    """One input of the comparison.

    case: what was compared of what: the states of an encoder, whatever head it has, or the logits of a model that writes.
    packed, alone: the largest difference, packed with the others and by itself.
    """

    case: str
    packed: float
    alone: float

    @property
    def passed(self) -> bool:
        """Whether both are small enough."""
        return self.packed <= MOST and self.alone <= MOST  # NaN is never small enough


@dataclass(frozen=True)
class Case:
    """An input of both sides: a sample of ours, and what theirs computes of it."""

    name: str
    sample: dict[str, Any]
    wanted_ND: Tensor


def compare(source: str | Path, **options: Any) -> list[Difference]:
    """Load a model here and in the library that it came from, and compare what they compute.

    source, options: as `pretrained` takes them; a folder or a name on the hub.

    Raises:
        CheckpointError: it cannot be loaded, the library is not installed, or nobody has written a probe for such a model.
    """
    loaded = pretrained(source, **options)
    kind = str(loaded.origin["config"].get("model_type"))
    probe = next((probe for names, probe in PROBES if kind in names), None)
    if probe is None:
        raise CheckpointError(
            f"{loaded.name}: not checked: there is no comparison for models of type {kind!r}; there is one for "
            f"{', '.join(sorted(name for names, _ in PROBES for name in names))}"
        )
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            f"{loaded.name}: not checked: the comparison needs transformers; install it, and run this again"
        ) from None
    where = str(source) if loaded.revision is None else loaded.name
    given = {} if loaded.revision is None else {"revision": loaded.revision}
    model = loaded.model()
    with torch.inference_mode():
        task, states, cases = probe(loaded, model, lambda auto: _theirs(library, auto, where, given))
        together = computed(model, task, [case.sample for case in cases], states)
        found = []
        for case, packed_ND in zip(cases, together, strict=True):
            (alone_ND,) = computed(model, task, [case.sample], states)
            differences = (difference(x.float(), case.wanted_ND) for x in (packed_ND, alone_ND))
            found.append(Difference(f"{'states' if states else 'logits'} of {case.name}", *differences))
    return found


def _theirs(library: Any, auto: str, where: str, given: dict[str, Any]) -> Any:
    return getattr(library, auto).from_pretrained(where, dtype=torch.float32, **given).eval()


@torch.inference_mode()
def computed(model: Model, task: str, samples: Sequence[dict[str, Any]], states: bool) -> list[Tensor]:
    """Of each sample its logits, or the states of what it reads, all packed together."""
    stream = model.pack(task, samples, answers=not states)
    reading = stream.readings[task]
    if not states:
        parts = split_logits(model.logits(stream)[task], reading)
        return [part for _, part in sorted(zip(reading.samples, parts, strict=True), key=lambda pair: pair[0])]
    spans = stream.layout.spans
    by_place = model(stream).split([span.total for span in spans])
    length_B = torch.tensor(reading.lengths)
    first_B = reading.row_N[length_B.cumsum(0) - length_B]
    place_of = dict(zip(reading.samples, stream.layout.info.sample[first_B].tolist(), strict=True))
    return [by_place[place_of[i]][: spans[place_of[i]].read] for i in range(len(samples))]


Theirs = Callable[[str], Any]
Probe = Callable[[Pretrained, Model, Theirs], tuple[str, bool, list[Case]]]


def _ids(count: int, vocab: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocab, (count,), generator=generator).tolist()


def _writes_text(loaded: Pretrained, model: Model, theirs: Theirs) -> tuple[str, bool, list[Case]]:
    """Causal language models: the logits of random ids."""
    module, text = theirs("AutoModelForCausalLM"), loaded.tokenizers["text"]
    cases = []
    for count in LENGTHS:
        ids = _ids(count, text.vocab_size or 1)
        first, rest = (Tokens(torch.tensor(part), text.places(len(part))) for part in (ids[:1], ids[1:]))
        wanted_ND = module(torch.tensor([ids])).logits[0]
        cases.append(Case(f"{count} tokens of text", {"text": first, "answer": rest}, wanted_ND))
    return "text -> text", False, cases


def _reads_text(loaded: Pretrained, model: Model, theirs: Theirs) -> tuple[str, bool, list[Case]]:
    """Encoders of texts: the states of random ids."""
    module, task = theirs("AutoModel"), next(iter(model.tasks))
    field, *others = model.packer.patterns[task].reads
    text = loaded.tokenizers[field.kind]
    cases = []
    for count in LENGTHS:
        ids = torch.tensor(_ids(count, text.vocab_size or 1))
        sample = {field.name: Tokens(ids, text.places(count)), **dict.fromkeys(f.name for f in others)}
        cases.append(Case(f"{count} tokens of text", sample, module(ids[None]).last_hidden_state[0]))
    return task, True, cases


def _reads_pictures(loaded: Pretrained, model: Model, theirs: Theirs) -> tuple[str, bool, list[Case]]:
    """Encoders of pictures: the states of noise, prepared by our tokenizer for both sides."""
    module, task = theirs("AutoModel"), next(iter(model.tasks))
    field, *others = model.packer.patterns[task].reads
    pixels: Any = loaded.tokenizers[field.kind]
    pixels = getattr(pixels, "of", pixels)  # behind class tokens
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, columns in ((256, 300), (320, 256)):
        picture_CYX = torch.rand(pixels.channels, rows, columns, generator=generator)
        sample = {field.name: picture_CYX, **dict.fromkeys(f.name for f in others)}
        wanted_ND = module(pixel_values=pixels.preprocess(picture_CYX)[None]).last_hidden_state[0]
        cases.append(Case(f"a picture of {rows}x{columns} pixels", sample, wanted_ND))
    return task, True, cases


def _hears(loaded: Pretrained, model: Model, theirs: Theirs) -> tuple[str, bool, list[Case]]:
    """Whisper: the logits of random ids after noise, prepared by our tokenizer for both sides."""
    module = theirs("AutoModelForSpeechSeq2Seq")
    audio, text, head = loaded.tokenizers["audio"], loaded.tokenizers["text"], model.packer.heads["audio -> text"]
    assert isinstance(head, NextToken)
    start = list(head.start_ids or ())
    generator = torch.Generator().manual_seed(0)
    cases = []
    for seconds, count in zip((1, 3), LENGTHS, strict=True):
        sound = audio((torch.randn(16000 * seconds, generator=generator) * 0.1, 16000))
        features = sound.content.reshape(2 * len(sound), -1).T[None]
        ids = _ids(count, text.vocab_size or 1)
        logits_ND = module(input_features=features, decoder_input_ids=torch.tensor([[*start, *ids]])).logits[0]
        sample = {"audio": sound, "text": Tokens(torch.tensor(ids), text.places(count))}
        cases.append(Case(f"{seconds} s of sound, {count} tokens of text", sample, logits_ND[len(start) - 1 :]))
    return "audio -> text", False, cases


PROBES: tuple[tuple[tuple[str, ...], Probe], ...] = (
    (("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text"), _writes_text),
    (("bert", "modernbert"), _reads_text),
    (("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"), _reads_pictures),
    (("whisper",), _hears),
)
"""By the types of models, how they are compared."""
