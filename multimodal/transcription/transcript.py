"""Transcripts: words with times, subtitles (SRT, WebVTT), JSON, and error rates."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from multimodal.notebook import tables_html
from multimodal.shapes import ConfigError
from multimodal.texts import shortened

LINE = 42  # characters in a subtitle line, as most broadcasters allow
CUE_S = 7.0  # the longest duration of a subtitle
PAUSE_S = 1.5  # seconds of silence that end a subtitle
SHORTEST_MS = 1


@dataclass(frozen=True)
class Word:
    """A word of a transcript.

    text: its letters.
    start_s, end_s: seconds from the start of the sound.
    confidence: geometric mean of the probabilities of its rows or tokens.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """The text of one sound.

    text: the whole text.
    words: each word, with its start and end in seconds.
    seconds: duration of the sound.
    complete: whether no part of it was ended by max_tokens.
    """

    text: str
    words: tuple[Word, ...]
    seconds: float
    complete: bool = True

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """For notebooks: the text, and the times of its words."""
        words = [(f"{word.start_s:.2f} s", f"{word.end_s:.2f} s", word.text) for word in self.words]
        cut = "" if self.complete else ", cut by max_tokens"
        text = shortened(self.text, 5000)
        return f"<div>{html.escape(text)}</div>" + tables_html(
            f"{self.seconds:.2f} s, {len(words):,} words{cut}", {"": words}
        )

    def cues(self) -> list[tuple[int, int, str]]:
        """The subtitles, in order and without overlaps: (start in ms, end in ms, text)."""
        return list(_cues(self.words))

    def srt(self) -> str:
        """SubRip subtitles."""
        cues = enumerate(self.cues(), start=1)
        return "".join(f"{i}\n{_clock(a, ',')} --> {_clock(b, ',')}\n{text}\n\n" for i, (a, b, text) in cues)

    def vtt(self) -> str:
        """WebVTT subtitles (W3C)."""
        cues = "".join(
            f"{_clock(a, '.')} --> {_clock(b, '.')}\n{html.escape(text, quote=False)}\n\n" for a, b, text in self.cues()
        )
        return "WEBVTT\n\n" + cues

    def json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)


FORMATS = {"text": "txt", "srt": "srt", "vtt": "vtt", "json": "json"}
"""Format -> the suffix of its files."""


def formatted(transcript: Transcript, form: str) -> str:
    """A transcript in one of FORMATS, which ends with a line end."""
    if form not in FORMATS:
        raise ConfigError(f"there is no transcript format {form!r}; there are {', '.join(FORMATS)}")
    text = transcript.text if form == "text" else getattr(transcript, form)()
    return text.rstrip("\n") + "\n"


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"


def _cues(words: Sequence[Word]) -> Iterator[tuple[int, int, str]]:
    """(start in ms, end in ms, text) of each subtitle: in order, without overlaps, each of 1 ms or more."""
    last = 0
    for cue in _grouped(list(_spread(words))):
        start = max(last, round(1000 * cue[0].start_s))
        last = max(start + SHORTEST_MS, round(1000 * cue[-1].end_s))
        yield start, last, " ".join(word.text for word in cue)


def _spread(words: Sequence[Word]) -> Iterator[Word]:
    """Words that all have the times of their window share its duration by their numbers of letters."""
    for (start_s, end_s), group in groupby(words, key=lambda word: (word.start_s, word.end_s)):
        several = list(group)
        letters = sum(len(word.text) for word in several)
        at = start_s
        for word in several:
            until = at + (end_s - start_s) * len(word.text) / letters
            yield Word(word.text, at, until, word.confidence)
            at = until


def _grouped(words: Sequence[Word]) -> Iterator[list[Word]]:
    cue: list[Word] = []
    for word in words:
        if cue:
            length = len(" ".join(w.text for w in (*cue, word)))
            long = length > LINE or word.end_s - cue[0].start_s > CUE_S
            if long or word.start_s - cue[-1].end_s > PAUSE_S or cue[-1].text.endswith((".", "?", "!")):
                yield cue
                cue = []
        cue.append(word)
    if cue:
        yield cue


def error_rates(references: Sequence[str], hypotheses: "Sequence[str | Transcript]") -> dict[str, float]:
    """Word and character error rates over all texts together: {"wer": .., "cer": ..}; 0 is perfect, and 1 can be passed.

    Words in the text of a silent sound count as insertions. If no reference has a word, the rates are numbers of insertions.

    Raises:
        ConfigError: lists of different lengths, or no texts.
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ConfigError("error_rates: give lists of texts, not one text")
    if len(references) != len(hypotheses) or not references:
        raise ConfigError(
            f"error_rates: {len(references)} references and {len(hypotheses)} hypotheses; give as many of both, and some"
        )
    read = [hypothesis.text if isinstance(hypothesis, Transcript) else hypothesis for hypothesis in hypotheses]
    import jiwer

    return {
        "wer": float(jiwer.wer(list(references), read)),
        "cer": float(jiwer.cer(list(references), read)),
    }
