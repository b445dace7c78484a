"""Pictures and sound from files, arrays and tensors, with units and with errors that say what is wrong.

    sources.py     paths, bytes, open files and data: URLs; what kind of file it is
    pictures.py    any of them -> (C, Y, X) in 0..1
    deep.py        colour pictures of 16 bits a channel, which Pillow cuts to 8
    sounds.py      any of them -> one channel (S,) at the rate that is wanted, whole or block by block

Every format is decoded in this process, by libraries; no file makes another program run.
"""

from multimodal.media.pictures import check_decoder, read_image, upright
from multimodal.media.sounds import channels_first, read_sound, sound_blocks
from multimodal.media.sources import announce, file_source, is_file_like, say_once

__all__ = [
    "announce",
    "channels_first",
    "check_decoder",
    "file_source",
    "is_file_like",
    "read_image",
    "read_sound",
    "say_once",
    "sound_blocks",
    "upright",
]
