"""Transcription: recordings of any length, or sound while it is recorded, to text with the times of its words.

recordings.py        `transcribe`: windows of recordings in batches
streaming.py         `Listener`: a sound while it is recorded
ctc.py               decoders of CTC rows: greedy, beam search with a language model and a list of words
language_model.py    n-grams, or a task of the model itself
alignment.py         forced alignment, and rows to words with times
transcript.py        the result, its file formats, and error rates
"""

from multimodal.old_names import moved
from multimodal.transcription.alignment import align
from multimodal.transcription.ctc import Beam, Decoder, GreedyCTC, Lexicon
from multimodal.transcription.language_model import LanguageModel, ModelLM, NGramLM
from multimodal.transcription.recordings import transcribe, transcription_tasks, transcripts
from multimodal.transcription.streaming import Listener
from multimodal.transcription.transcript import FORMATS, Transcript, Word, error_rates, formatted

__all__ = [
    "FORMATS",
    "Beam",
    "Decoder",
    "GreedyCTC",
    "LanguageModel",
    "Lexicon",
    "Listener",
    "ModelLM",
    "NGramLM",
    "Transcript",
    "Word",
    "align",
    "error_rates",
    "formatted",
    "transcribe",
    "transcription_tasks",
    "transcripts",
]

__getattr__ = moved(__name__)  # goes with version 0.3
