"""Loaded models beside transformers, with real weights: the largest differences, and what Whisper transcribes.

    MULTIMODAL_WEIGHTS=FOLDER uv run --group peers benchmarks/pretrained.py --write        about 20 minutes on one thread

The weights are those of benchmarks/fetched_weights.py, which says how to get them; missing ones are named and left out.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks import report, script
from benchmarks.data import recordings, records
from benchmarks.fetched_weights import NotFetched, ready
from multimodal import Model, Tokens, pretrained
from multimodal.check.measure import difference
from multimodal.heads import NextToken
from multimodal.pretrained.gate import What, computed

TEXTS = ("The capital of France is Paris, and that of Italy is Rome.", "def add(a, b):\n    return a + b\n")
CLIPS = 50


class Compared(NamedTuple):
    """One comparison.

    title: of its row in the table.
    what: "logits" or "states".
    theirs: what transformers computes for each sample.
    """

    title: str
    model: Model
    task: str
    samples: list[dict[str, Any]]
    what: What
    theirs: list[Tensor]

    def differences(self) -> tuple[float, float]:
        """The largest difference, packed together and one by one."""
        together = computed(self.model, self.task, self.samples, self.what)
        alone = [computed(self.model, self.task, [sample], self.what)[0] for sample in self.samples]
        return largest(together, self.theirs), largest(alone, self.theirs)


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any number; NaN if there is a NaN."""
    return float(torch.tensor([difference(a, b) for a, b in zip(ours, theirs, strict=True)]).max())


def smollm2(folder: Path) -> Compared:
    from transformers import AutoModelForCausalLM

    module, model = AutoModelForCausalLM.from_pretrained(folder).eval(), pretrained(folder).model()
    text = model.packer.tokenizers["text"]
    ids = [text(x).content.tolist() for x in TEXTS]
    samples = [
        {"text": Tokens(t.content[:1], t.position_NA[:1]), "answer": Tokens(t.content[1:], text.places(len(t) - 1))}
        for t in map(text, TEXTS)
    ]
    with torch.inference_mode():
        theirs = [module(torch.tensor([x])).logits[0] for x in ids]
    return Compared("logits of two texts", model, "text -> text", samples, "logits", theirs)


def minilm(folder: Path) -> Compared:
    from transformers import AutoModel

    module, model = AutoModel.from_pretrained(folder).eval(), pretrained(folder).model()
    task = next(iter(model.tasks))
    field = model.packer.patterns[task].reads[0]
    tokenizer = model.packer.tokenizers[field.kind]
    with torch.inference_mode():
        theirs = [module(tokenizer(x).content[None]).last_hidden_state[0] for x in TEXTS]
    blank = {f.name: None for f in model.packer.patterns[task].reads[1:]}
    samples = [{field.name: x, **blank} for x in TEXTS]
    return Compared("states of two texts", model, task, samples, "states", theirs)


def dinov2_s(folder: Path) -> Compared:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    module, model = AutoModel.from_pretrained(folder).eval(), pretrained(folder).model()
    processor = AutoImageProcessor.from_pretrained(folder)
    task = next(iter(model.tasks))
    field, *others = model.packer.patterns[task].reads
    blank = {f.name: None for f in others}
    photos = [Image.open(file).convert("RGB") for _, file in records("clothing.zip", lambda rows: rows[:2])]
    with torch.inference_mode():
        theirs = [module(**processor(photo, return_tensors="pt")).last_hidden_state[0] for photo in photos]
    samples = [{field.name: photo, **blank} for photo in photos]
    return Compared("states of two photographs, from the file on", model, task, samples, "states", theirs)


def whisper_base(folder: Path) -> Compared:
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    module, model = WhisperForConditionalGeneration.from_pretrained(folder).eval(), pretrained(folder).model()
    clips = list(speech(2))
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    head, text = model.packer.heads["audio -> text"], model.packer.tokenizers["text"]
    assert isinstance(head, NextToken)
    start = list(head.start_ids or ())
    samples = [{"audio": (wave_S, rate), "text": said} for wave_S, rate, said in clips]
    theirs = []
    with torch.inference_mode():
        for wave_S, rate, said in clips:
            features = extractor(at_16_khz(wave_S, rate), sampling_rate=16000, return_tensors="pt").input_features
            ids = [*start, *text(said).content.tolist()]
            logits = module(input_features=features, decoder_input_ids=torch.tensor([ids])).logits[0]
            theirs.append(logits[len(start) - 1 :])
    return Compared("logits of two clips, from the file on", model, "audio -> text", samples, "logits", theirs)


MODELS = {"smollm2": smollm2, "minilm": minilm, "dinov2-s": dinov2_s, "whisper-base": whisper_base}


def parity() -> Iterator[list[str]]:
    """The rows of the table of differences."""
    for name, compare in MODELS.items():
        try:
            folder = ready(name)
        except NotFetched as error:
            yield [name, str(error).splitlines()[0], "", ""]
            continue
        compared = compare(folder)
        packed, alone = compared.differences()
        yield [name, compared.title, f"{packed:.1e}", f"{alone:.1e}"]
        print(f"{name} compared", flush=True)


def speech(count: int) -> Iterator[tuple[Any, int, str]]:
    """Waves, rates and texts of the first clips of LJSpeech."""
    for row, wave_S, rate in recordings("ljspeech.zip", lambda rows: rows[:count]):
        yield wave_S, rate, row["normalized"]


def at_16_khz(wave_S: Any, rate: int) -> Any:
    """The same sound at 16 kHz, with one channel."""
    from multimodal.media import read_sound

    return read_sound((wave_S, rate), rate_hz=16000, who="benchmark").numpy()


def their_whisper(folder: Path) -> Callable[[Any], str]:
    """What Whisper of transformers writes of a sound at 16 kHz, which it pads to 30 s."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    module = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = WhisperProcessor.from_pretrained(folder)

    def write(wave_S: Any) -> str:
        features = processor(wave_S, sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            ids: Any = module.generate(input_features=features, language="en", task="transcribe", do_sample=False)
        return processor.decode(ids[0], skip_special_tokens=True).strip()

    return write


def transcribed(folder: Path, wavs: Path | None, count: int) -> str:
    """Transcripts here and in transformers: how many are the same, and the word error rates of both."""
    import jiwer
    import soundfile

    write, model = their_whisper(folder), pretrained(folder).model()
    clips = list(speech(count))
    if wavs is not None:
        for path in sorted(wavs.glob("*.wav")):
            wave_S, rate = soundfile.read(path, dtype="float32")
            clips.append((wave_S[: 30 * rate], rate, ""))
    same, pairs = 0, []
    for i, (wave_S, rate, said) in enumerate(clips):
        theirs = write(at_16_khz(wave_S, rate))
        ours = model.generate("audio -> text", audio=(wave_S, rate), max_tokens=400).value.strip()
        same += ours == theirs
        if ours != theirs:
            print(f"  differ: {ours!r} {theirs!r}", flush=True)
        pairs.append((said, ours, theirs))
        if i % 10 == 9:
            print(f"{i + 1} of {len(clips)} clips transcribed", flush=True)
    words = [(plain(said), plain(ours), plain(theirs)) for said, ours, theirs in pairs if said]
    ours, theirs = (100 * jiwer.wer([t[0] for t in words], [t[k] for t in words]) for k in (1, 2))
    return (
        f"Whisper-base: {same} of {len(clips)} recordings have the same text here and in transformers. Word error rate on "
        f"{len(words)} clips of LJSpeech: {ours:.2f} % here, {theirs:.2f} % there."
    )


def plain(text: str) -> str:
    """Letters, digits and apostrophes in lower case."""
    return " ".join("".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split())


def main() -> None:
    options = script.parser(__doc__, "write")
    options.add_argument("--clips", type=int, default=CLIPS)
    args = script.parsed(options)
    body = script.table(["model", "what", "packed", "alone"], parity())
    try:
        folder = ready("whisper-base")
    except NotFetched:
        transcripts = ""
    else:
        try:
            wavs = ready("wavs")
        except NotFetched:
            wavs = None
        transcripts = transcribed(folder, wavs, args.clips)
    body = f"Largest difference from transformers, fp32, real weights:\n\n{body}\n\n{transcripts}"
    print(body)
    if args.write:
        report.keep("pretrained", "Pretrained weights", "benchmarks/pretrained.py --write", body)


if __name__ == "__main__":
    main()
