"""Transcription: sounds of any length, or while they come in, to text with the times of its words."""

from multimodal.transcription.alignment import align
from multimodal.transcription.ctc import Beam, Decoder, Greedy
from multimodal.transcription.lexicon import Lexicon
from multimodal.transcription.listen import Listener
from multimodal.transcription.long import hearing_tasks, transcribe, transcripts
from multimodal.transcription.prior import ModelPrior, NGram, Prior
from multimodal.transcription.transcript import FORMATS, Transcript, Word, error_rates, written

__all__ = [
    "FORMATS",
    "Beam",
    "Decoder",
    "Greedy",
    "Lexicon",
    "Listener",
    "ModelPrior",
    "NGram",
    "Prior",
    "Transcript",
    "Word",
    "align",
    "error_rates",
    "hearing_tasks",
    "transcribe",
    "transcripts",
    "written",
]
