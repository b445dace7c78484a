"""The tokenizers that come with the framework; they use the same interface as yours."""

from multimodal_tokenizers.audio import AudioFrames
from multimodal_tokenizers.boxes import Boxes
from multimodal_tokenizers.chat import Chat
from multimodal_tokenizers.class_tokens import ClassTokens
from multimodal_tokenizers.codes import Codes
from multimodal_tokenizers.composites import Joint, Record, Sequence
from multimodal_tokenizers.events import Events
from multimodal_tokenizers.features import Features
from multimodal_tokenizers.graph import Graph
from multimodal_tokenizers.ids import Ids
from multimodal_tokenizers.image import ImagePatches
from multimodal_tokenizers.labels import Labels
from multimodal_tokenizers.number import Number
from multimodal_tokenizers.points import Points
from multimodal_tokenizers.segments import Segments
from multimodal_tokenizers.series import Series
from multimodal_tokenizers.spectrogram import SpectrogramPatches
from multimodal_tokenizers.table import TableRow
from multimodal_tokenizers.text import TextBPE, TextBytes
from multimodal_tokenizers.video import VideoTubes
from multimodal_tokenizers.waveform import Waveform
from multimodal_tokenizers.whisper import WhisperFrames
from multimodal_tokenizers.words import Words

__all__ = [
    "AudioFrames",
    "Boxes",
    "Chat",
    "ClassTokens",
    "Codes",
    "Events",
    "Features",
    "Graph",
    "Ids",
    "ImagePatches",
    "Joint",
    "Labels",
    "Number",
    "Points",
    "Record",
    "Segments",
    "Sequence",
    "Series",
    "SpectrogramPatches",
    "TableRow",
    "TextBPE",
    "TextBytes",
    "VideoTubes",
    "Waveform",
    "WhisperFrames",
    "Words",
]
