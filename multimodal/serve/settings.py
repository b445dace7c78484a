"""The limits of a service."""

from dataclasses import dataclass

from multimodal.shapes import ConfigError, check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a service allows, by checkpoint where nothing else is said.

    rows: answers that are written at the same time.
    capacity: tokens of a row, prompt and answer together.
    queue: requests that may wait; further ones are refused with status 429.
    queue_tokens: tokens that may wait, prompts and answers together; None: four times what all rows hold.
    max_tokens: tokens of an answer where the client does not say how many.
    gather_ms: how long what is answered at once waits for others, to be packed with them.
    pass_tokens: tokens that one packed pass reads, and that join the rows in one step; a sample of more is refused.
    timeout_s: seconds from a request to its whole answer.
    body_s: seconds in which the head of a request has to arrive, and then its body.
    max_body: bytes of a request.
    max_pixels: pixels of a picture; a tokenizer may allow fewer.
    max_seconds: seconds of a sound; a tokenizer may allow fewer.
    window_s: seconds of a recording that are transcribed at once.
    live_sessions: live transcriptions that are open at the same time, of all checkpoints together.
    live_seconds: seconds of a live sound, where the model has no window and so its memory grows with the sound.
    live_idle_s: seconds after which a live transcription ends if its client sends nothing.
    max_message: bytes of a message of a live transcription.
    keys: API keys, one of which every request must have; (): none is asked for.
    hosts: hosts from which pictures and sounds may be fetched; (): only data: URLs are read.
    strings: kinds of one's own whose values are, or hold, texts; no such kind may open files.
    about: a line that the page shows, such as what the models are for.
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

    @property
    def waiting_tokens(self) -> int:
        """Tokens that may wait."""
        return 4 * self.rows * self.capacity if self.queue_tokens is None else self.queue_tokens
