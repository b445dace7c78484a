"""The limits of a service."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from multimodal.shapes import ConfigError, check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of a service. They hold for each checkpoint, unless they say otherwise.

    rows: rows of the decoding batch: the most answers that are generated at the same time.
    capacity: tokens of a row, prompt and answer together.
    queue: requests that may wait; more are refused with status 429.
    queue_tokens: tokens that may wait, prompts and answers together; None: four times what all rows hold.
    max_tokens: tokens of an answer if the client sets no limit.
    gather_ms: milliseconds that a sample which needs only one pass waits for others, to be packed with them.
    pass_tokens: the most tokens of a packed pass, and of the prompts that join the batch in one step; a longer sample is refused.
    timeout_s: seconds from a request to its whole answer.
    body_s: seconds for the head of a request to arrive, and then for its body.
    max_body: bytes of a request.
    max_pixels: pixels of a picture; a tokenizer may allow fewer.
    max_seconds: seconds of a sound; a tokenizer may allow fewer.
    window_s: seconds of the windows in which a recording is transcribed.
    live_sessions: live transcriptions that are open at the same time, of all checkpoints together.
    live_seconds: seconds of a live sound, if the mask of the model has no window, so that memory grows with the sound.
    live_idle_s: seconds after which a live transcription ends if its client sends nothing.
    max_message: bytes of a message of a live transcription.
    keys: API keys; every request must have one of them. (): no key is needed.
    hosts: hosts from which pictures and sounds may be fetched; (): only data: URLs are read.
    strings: kinds that you defined whose values are, or contain, texts. Their tokenizers must not open files.
    about: a line that the web page shows, such as the purpose of the models.
    examples: samples to try on the web page: by field, the name of a file and its data: URL.
    """

    rows: int = 16
    capacity: int = 1024
    queue: int = 64
    queue_tokens: int | None = None
    max_tokens: int = 256
    gather_ms: float = 5.0
    pass_tokens: int = 16384
    timeout_s: float = 600.0
    body_s: float = 60.0
    max_body: int = 2**25
    max_pixels: int = 2**24
    max_seconds: float = 600.0
    window_s: float = 30.0
    live_sessions: int = 16
    live_seconds: float = 600.0
    live_idle_s: float = 60.0
    max_message: int = 2**20
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    strings: tuple[str, ...] = ()
    about: str = ""
    examples: tuple[Mapping[str, tuple[str, str]], ...] = ()

    def __post_init__(self) -> None:
        whole = ("rows", "capacity", "queue", "max_tokens", "pass_tokens", "max_body", "max_pixels")
        whole = (*whole, "live_sessions", "max_message")
        check_whole("serve", **{name: getattr(self, name) for name in whole})
        numbers = ("gather_ms", "timeout_s", "body_s", "max_seconds", "window_s", "live_seconds", "live_idle_s")
        check_number("serve", **{name: getattr(self, name) for name in numbers})
        for name in (*whole, *numbers):
            least = 0 if name in ("queue", "gather_ms", "live_sessions") else 1 if name in whole else 1e-3
            if not least <= getattr(self, name) < float("inf"):
                raise ConfigError(f"serve: {name}={getattr(self, name)} must be at least {least:g}")

        for number, key in enumerate(self.keys, 1):
            check_key(f"serve: key {number}", key)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that may wait."""
        return 4 * self.rows * self.capacity if self.queue_tokens is None else self.queue_tokens


def check_key(where: str, key: str) -> None:
    """Raise a ConfigError for a key that no client could send in a header. The message does not show it."""
    if re.fullmatch("[!-~]+", key) is None:
        raise ConfigError(f"{where}: a key is made of letters, digits and signs of ASCII, without blanks between them")
