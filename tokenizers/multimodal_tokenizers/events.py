"""Notes of music as in MIDI, read from lists and .mid files, and written token by token."""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.media import file_source, is_file_like, optional_package
from multimodal.shapes import AXES, ConfigError, MediaError, is_number
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal.value_files import with_ending

PITCHES = 128
LATEST = 2**24  # steps; float32 holds all whole numbers up to it
LOUDEST = 127
CHANNELS = 16
TICKS = 480  # the fewest ticks of a beat in written files
PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")

Note = tuple[int, int, int, int, int]  # (onset, pitch, duration, velocity, voice), times in steps


@dataclass(frozen=True)
class Events(Tokenizer):
    """Notes (onset, pitch, duration), in order of their onsets; or a MIDI file: its path, its bytes, or an open file.

    Onset and duration are in beats (quarter notes); pitch is 0 to 127, and 60 is middle C. With `velocities` a note also has a
    velocity (loudness) from 1 to 127, and with `voices` a voice after that, counted from 0, which in files is the channel. Files
    need the extra `midi`; their tempo, instruments and pedals are ignored, and of notes with the same onset, pitch and voice the
    longest is read.

    Notes with one onset are put in order of voice and pitch. A note is a token for its pitch and voice, one or more for its
    duration, and one for its velocity. If it begins later than the note before, tokens between them say how much later. All tokens
    of a note have its onset in beats as time, its pitch as row, and its voice on the axis "voice", which the core must know:
    `core.replace(axes=Events(voices=4).axes)`.

    resolution: steps of a beat; times are whole steps. 12 can express sixteenths and triplets.
    longest: the largest number of steps of one token; a longer time takes several.
    velocities: number of levels of velocity, at most 127; 0: notes have no velocity.
    voices: number of voices, at most 16; 0: notes have no voice.
    causal: whether a token that is read attends only to tokens before it.
    lossy: whether times and velocities are rounded to what tokens can express; if not, those that would change are refused.

    Examples:
        >>> notes = Events(resolution=4)
        >>> tokens = notes([(0, 60, 1), (0, 64, 1), (1, 67, 0.5)])
        >>> notes.token_names(tokens)
        ['C4', '1 beat', 'E4', '1 beat', 'wait 1 beat', 'G4', '1/2 beat']
        >>> notes.decode(tokens)
        [(0.0, 60, 1.0), (0.0, 64, 1.0), (1.0, 67, 0.5)]
    """

    resolution: int = 12
    longest: int = 96
    velocities: int = 0
    voices: int = 0
    causal: bool = False
    lossy: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("resolution", 1, 960),
            ("longest", 1, 2**16),
            ("velocities", 0, LOUDEST),
            ("voices", 0, CHANNELS),
        ):
            number = getattr(self, name)
            if type(number) is not int or not least <= number <= most:
                raise ConfigError(f"Events: {name}={number!r} must be a whole number from {least} to {most}")

    # ids: waits of 1 to `longest` steps, durations likewise, velocities, pitches of the first voice, of the second, ..

    @property
    def vocab_size(self) -> int:
        return self._first_pitch + PITCHES * max(self.voices, 1)

    @property
    def _first_pitch(self) -> int:
        """The first id of a pitch."""
        return 2 * self.longest + self.velocities

    @property
    def axes(self) -> tuple[str, ...]:
        return (*AXES, "voice") if self.voices else AXES

    @property
    def step(self) -> tuple[float, float, float]:
        return (1 / self.resolution, 1.0, 1.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a note's numbers."""
        more = (("velocity", self.velocities), ("voice", self.voices))
        return ("onset", "pitch", "duration", *(name for name, has in more if has))

    def encode(self, value: Any) -> Tokens:
        notes = self._read(value) if is_file_like(value) else [*self._notes(value)]
        ids: list[int] = []
        before = 0
        for onset, pitch, duration, velocity, voice in sorted(notes, key=_order):
            if len(ids) + (onset - before + duration) // self.longest > self.max_tokens:  # before they take memory
                raise MediaError(
                    f"Events.encode: {describe(value)} gives more than {self.max_tokens} tokens, with a time of "
                    f"{self._beats(max(onset - before, duration))}; cut it into pieces, or make longest={self.longest} more"
                )
            ids += [steps - 1 for steps in self._split(onset - before)]
            ids.append(self._first_pitch + PITCHES * voice + pitch)
            ids += [self.longest + steps - 1 for steps in self._split(duration)]
            if self.velocities:
                ids.append(2 * self.longest + self._level(velocity))
            before = onset
        return Tokens(torch.tensor(ids, dtype=torch.long), self._positions(ids))

    def _split(self, steps: int) -> list[int]:
        """A time as numbers of steps that one token can express."""
        rest = steps % self.longest
        return [self.longest] * (steps // self.longest) + ([rest] if rest else [])

    def _notes(self, value: Any) -> Iterator[Note]:
        """The notes of a list, in steps."""
        wanted = f"({', '.join(self.columns)})"
        if isinstance(value, (np.ndarray, Tensor)):
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            raise MediaError(f"Events.encode: wanted a list of notes {wanted}, or a MIDI file, not {describe(value)}")
        before, seen = 0, set()
        for i, note in enumerate(value):
            numbers = note.tolist() if isinstance(note, (np.ndarray, Tensor)) else note
            if not isinstance(numbers, (list, tuple)) or len(numbers) != len(self.columns):
                raise MediaError(f"Events.encode: note {i} is {describe(note)}, wanted {wanted}")
            found = {"velocity": LOUDEST, "voice": 0}
            for name, number in zip(self.columns, numbers, strict=True):
                found[name] = self._number(f"Events.encode: note {i}: {name}", name, number)
            onset, pitch, voice = found["onset"], found["pitch"], found["voice"]
            if onset < before:
                raise MediaError(f"Events.encode: note {i} begins before note {i - 1}; sort the notes by their onsets")
            if (onset, pitch, voice) in seen:
                raise MediaError(
                    f"Events.encode: note {i}, {_named(pitch)}, has the onset, pitch and voice of a note before; leave one out"
                )
            before = onset
            seen.add((onset, pitch, voice))
            yield onset, pitch, found["duration"], found["velocity"], voice

    def _number(self, where: str, name: str, number: Any) -> int:
        """One number of a note; times in steps."""
        number = number.item() if isinstance(number, Tensor) and number.dim() == 0 else number
        if not is_number(number) or number != number:
            raise MediaError(f"{where} is {describe(number)}, wanted a number")
        is_time = name in ("onset", "duration")
        unit = self.resolution if is_time else 1
        least, most = {
            "onset": (0, LATEST),
            "duration": (1, LATEST),
            "pitch": (0, PITCHES - 1),
            "velocity": (1, LOUDEST),
            "voice": (0, self.voices - 1),
        }[name]
        try:
            exact = float(number) * unit
        except OverflowError:
            exact = math.inf
        steps = round(exact) if math.isfinite(exact) else most + 1
        if is_time and self.lossy:
            steps = max(steps, 1) if name == "duration" and number > 0 else steps
        elif steps <= most and abs(exact - steps) > 1e-3:
            wanted = "a whole number"
            if is_time:
                wanted = f"a multiple of 1/{unit} beat; use another resolution, or lossy=True to round it"
            raise MediaError(f"{where} is {number}, wanted {wanted}")
        if not least <= steps <= most:
            beats = " beats" if is_time else ""
            shown = number if math.isfinite(exact) else describe(number)
            raise MediaError(f"{where} is {shown}, wanted {least / unit:g} to {most / unit:g}{beats}")
        if name == "velocity" and not self.lossy and self._velocity(self._level(steps)) != steps:
            raise MediaError(
                f"{where} is {number}, which is none of the {self.velocities} levels; use velocities={LOUDEST}, "
                "or lossy=True to round it"
            )
        return steps

    def _level(self, velocity: int) -> int:
        return round((velocity - 1) * (self.velocities - 1) / (LOUDEST - 1))

    def _velocity(self, level: int) -> int:
        """The velocity of a level; if there is only one, the middle."""
        return 1 + round(level * (LOUDEST - 1) / (self.velocities - 1)) if self.velocities > 1 else (LOUDEST + 1) // 2

    def _positions(self, ids: Iterable[int]) -> Tensor:
        rows: list[tuple[int, int, int, int]] = []
        last = (0, 0, 0, 0)
        for id_ in ids:
            last = self._after(last, id_)
            rows.append(last)
        position_N4 = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
        position_N4[:, 0] /= self.resolution
        return position_N4[:, : len(self.axes)].clone()

    def _after(self, last: tuple[int, int, int, int], id_: int) -> tuple[int, int, int, int]:
        """(time in steps, pitch, number within its note, voice) of a token, by those of the token before it."""
        time, pitch, number, voice = last
        if id_ >= self._first_pitch:
            voice, pitch = divmod(id_ - self._first_pitch, PITCHES)
            return time, pitch, 1, voice
        if id_ < self.longest:
            return time + id_ + 1, pitch, 0, voice
        return time, pitch, number + 1, voice

    def next_place(self, written: Tokens, content: Tensor) -> Tensor:
        last = (0, 0, 0, 0)
        if len(written):
            time, pitch, number, *voice = written.position_NA[-1].tolist()
            last = (round(time * self.resolution), int(pitch), int(number), int(*voice))
        place = torch.tensor(self._after(last, int(content)), dtype=torch.float32)
        place[0] /= self.resolution
        return place[: len(self.axes)]

    def decode(self, tokens: Tokens) -> list[tuple[float, ...]]:
        """The notes. A pitch without a duration lasts one step; a duration or velocity that follows no pitch is ignored."""
        notes: list[list[int]] = []  # onset, pitch, duration, velocity, voice
        time, middle = 0, self._velocity((self.velocities - 1) // 2) if self.velocities else LOUDEST
        for id_ in tokens.content.tolist():
            if id_ < self.longest:
                time += id_ + 1
            elif id_ >= self._first_pitch:
                voice, pitch = divmod(id_ - self._first_pitch, PITCHES)
                notes.append([time, pitch, 0, middle, voice])
            elif notes and notes[-1][0] == time:
                if id_ < 2 * self.longest:
                    notes[-1][2] += id_ - self.longest + 1
                else:
                    notes[-1][3] = self._velocity(id_ - 2 * self.longest)
        found: dict[tuple[int, int, int], tuple[float, ...]] = {}
        for onset, pitch, duration, velocity, voice in notes:
            more = [x for x, has in ((velocity, self.velocities), (voice, self.voices)) if has]
            beats = onset / self.resolution, max(duration, 1) / self.resolution
            found.setdefault((onset, pitch, voice), (beats[0], pitch, beats[1], *more))
        return [*found.values()]

    def token_names(self, tokens: Tokens) -> list[str]:
        names = []
        for id_ in tokens.content.tolist():
            if id_ < self.longest:
                names.append(f"wait {self._beats(id_ + 1)}")
            elif id_ < 2 * self.longest:
                names.append(self._beats(id_ - self.longest + 1))
            elif id_ < self._first_pitch:
                names.append(f"velocity {self._velocity(id_ - 2 * self.longest)}")
            else:
                voice, pitch = divmod(id_ - self._first_pitch, PITCHES)
                names.append(_named(pitch) + (f", voice {voice}" if self.voices else ""))
        return names

    def _beats(self, steps: int) -> str:
        """A time for people: "1/2 beat", "3 beats"."""
        return f"{Fraction(steps, self.resolution)} beat" + ("s" if steps > self.resolution else "")

    def _read(self, value: Any) -> list[Note]:
        """The notes of a MIDI file, in steps."""
        source, name = file_source(value, "Events.encode")
        mido = _mido("Events.encode")
        try:
            opened = mido.MidiFile(source) if isinstance(source, Path) else mido.MidiFile(file=source)
            beat = opened.ticks_per_beat  # in ticks
            sounding = [*_sounding(opened)]
        except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
            raise MediaError(
                f"Events.encode: {name} is no MIDI file that can be read: {shortened(str(error) or type(error).__name__, 100)}"
            ) from error
        if not 0 < beat < 2**15:  # other numbers mean frames of a film a second
            raise MediaError(
                f"Events.encode: {name} counts time in frames and not in beats; save it with ticks per beat"
            )
        notes: dict[tuple[int, int, int], Note] = {}
        for start, end, pitch, velocity, voice in sounding:
            if self.voices and voice >= self.voices:
                raise MediaError(
                    f"Events.encode: {name} has a note in channel {voice}, but voices={self.voices}; use more, or 0 to ignore "
                    "channels"
                )
            where = f"Events.encode: {name}"
            onset = self._number(f"{where}: onset", "onset", start / beat)
            duration = self._number(f"{where}: duration", "duration", (end - start) / beat)
            if self.velocities:
                velocity = self._number(f"{where}: velocity", "velocity", velocity)
            voice = voice if self.voices else 0
            key = (onset, voice, pitch)
            if key not in notes or notes[key][2] < duration:
                notes[key] = (onset, pitch, duration, velocity, voice)
        return [*notes.values()]

    def write(self, value: Any, path: str | Path) -> Path:
        """Save notes as a .mid file at 120 beats a minute; a note ends where its voice begins the same pitch again."""
        mido = _mido("Events.write")
        notes = [*self._notes(value)]
        ticks = self.resolution * -(-TICKS // self.resolution)
        track = mido.MidiTrack()
        events: list[tuple[int, int, Any]] = []
        until: dict[tuple[int, int], int] = {}
        for onset, pitch, duration, velocity, voice in reversed(notes):
            end = min(onset + duration, until.get((pitch, voice), onset + duration))
            until[pitch, voice] = onset
            loud = velocity if self.velocities else (LOUDEST + 1) // 2
            events.append((end, 0, mido.Message("note_off", note=pitch, channel=voice)))
            events.append((onset, 1, mido.Message("note_on", note=pitch, channel=voice, velocity=loud)))
        time = 0
        for at, _, message in sorted(events, key=lambda event: event[:2]):
            track.append(message.copy(time=(at - time) * ticks // self.resolution))
            time = at
        made = io.BytesIO()
        mido.MidiFile(type=0, ticks_per_beat=ticks, tracks=[track]).save(file=made)
        path = with_ending(path, ".mid", ".midi")
        path.write_bytes(made.getvalue())
        return path

    def examples(self) -> list[list[tuple[float, ...]]]:
        """Values for the conformance checks."""
        draw = np.random.default_rng(0)
        found = []
        for count in (4, 6, 6, 11):
            onset = np.cumsum(draw.integers(0, 3, count))
            pitch, duration = draw.permutation(np.arange(48, 84))[:count], draw.integers(1, 2 * self.longest, count)
            rows: list[Any] = [onset / self.resolution, pitch, duration / self.resolution]
            if self.velocities:
                rows.append([self._velocity(level) for level in draw.integers(0, self.velocities, count).tolist()])
            if self.voices:
                rows.append(draw.integers(0, self.voices, count))
            notes = [tuple(x.item() if hasattr(x, "item") else x for x in note) for note in zip(*rows, strict=True)]
            found.append(sorted(notes, key=lambda note: (note[0], note[-1] if self.voices else 0, note[1])))
        return found


def _order(note: Note) -> tuple[int, int, int]:
    onset, pitch, _, _, voice = note
    return onset, voice, pitch


def _named(pitch: int) -> str:
    """The name of a pitch; "C4" is middle C."""
    return f"{PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"


def _mido(who: str) -> Any:
    return optional_package("mido", "midi", f"{who}: the package mido reads and writes MIDI files")


def _sounding(opened: Any) -> Iterator[tuple[int, int, int, int, int]]:
    """(start, end, pitch, velocity, channel) of each note, in ticks; one that never ends is left out."""
    for track in opened.tracks:
        time, started = 0, dict[tuple[int, int], tuple[int, int]]()
        for message in track:
            time += message.time
            if message.type not in ("note_on", "note_off"):
                continue
            key = (message.channel, message.note)
            if key in started:  # it ends, or begins again
                start, velocity = started.pop(key)
                if time > start:
                    yield start, time, message.note, velocity, message.channel
            if message.type == "note_on" and message.velocity:
                started[key] = (time, message.velocity)
