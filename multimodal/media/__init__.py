"""Decodes pictures, videos and sounds from files, arrays and tensors, with units and clear errors.

    sources.py        paths, bytes, open files and data: URLs; the kind of a file; optional packages
    pictures.py       any source -> (C, Y, X) in 0..1, or a map of whole numbers (Y, X)
    sixteen_bit.py    colour pictures of 16 bits a channel, which Pillow cuts to 8
    videos.py         any source -> frames (N, C, Y, X) in 0..1, at the wanted rate
    sounds.py         any source -> one channel (S,) at the wanted rate, whole or block by block

Libraries decode every format in this process; no file starts another program.
"""

from multimodal.media.pictures import check_decoder, read_image, read_map, upright
from multimodal.media.sounds import channels_first, read_as_recorded, read_sound, sound_blocks
from multimodal.media.sources import file_source, is_file_like, optional_package, warn_once
from multimodal.media.videos import read_video
from multimodal.old_names import moved

__all__ = [
    "channels_first",
    "check_decoder",
    "file_source",
    "is_file_like",
    "optional_package",
    "read_as_recorded",
    "read_image",
    "read_map",
    "read_sound",
    "read_video",
    "sound_blocks",
    "upright",
    "warn_once",
]

__getattr__ = moved(__name__)  # goes with version 0.3
