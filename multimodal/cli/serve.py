"""`serve`: models behind HTTP, from checkpoints on this machine."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from multimodal.cli.arguments import Device, Plugins
from multimodal.cli.loading import load, model_folder, text_of

if TYPE_CHECKING:
    from socket import socket

    from multimodal.model import Model
    from multimodal.serve.settings import Settings

LIMITS = Group("Limits", sort_key=1)
LOCAL = ("127.0.0.1", "localhost", "::1")
PATIENCE_S = 600.0  # how long a stop waits for answers that are being written
Limit = partial(Parameter, group=LIMITS)


def serve(
    *checkpoints: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    rows: Annotated[int, Limit(help="Answers that are written at the same time.")] = 16,
    capacity: Annotated[int, Limit(help="Tokens of an answer with its prompt.")] = 1024,
    queue: Annotated[int, Limit(help="Requests that may wait; further ones get status 429.")] = 64,
    max_tokens: Annotated[int, Limit(help="Tokens of an answer, unless the client says how many.")] = 256,
    timeout_s: Annotated[float, Limit(help="Seconds in which a request is answered.")] = 600.0,
    gather_ms: Annotated[float, Limit(help="What is answered at once waits this long for others in its pass.")] = 5.0,
    pass_tokens: Annotated[int, Limit(help="Tokens that are read at once.")] = 16384,
    max_body: Annotated[int, Limit(help="Bytes of a request.")] = 2**25,
    max_pixels: Annotated[int, Limit(help="Pixels of a picture.")] = 2**24,
    max_seconds: Annotated[float, Limit(help="Seconds of a sound.")] = 600.0,
    window_s: Annotated[float, Limit(help="Seconds of a recording that are transcribed at once.")] = 30.0,
    live_sessions: Annotated[int, Limit(help="Live transcriptions that are open at the same time.")] = 16,
    live_seconds: Annotated[float, Limit(help="Seconds of a live sound, if the model has no window.")] = 600.0,
    live_idle_s: Annotated[float, Limit(help="Seconds after which a silent live transcription ends.")] = 60.0,
    max_message: Annotated[int, Limit(help="Bytes of a message of a live transcription.")] = 2**20,
    allow_host: Annotated[list[str] | None, Parameter(negative="")] = None,
    strings: Annotated[list[str] | None, Parameter(negative="")] = None,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Serve checkpoints over HTTP, for clients of OpenAI's interface and for any task. docs/serving.md has examples.

    Ctrl-C or SIGTERM finishes what runs; SIGHUP loads the checkpoints again. The log goes to stderr, a JSON object a line.

    Example: multimodal serve runs/digits

    Example: multimodal serve runs/digits small=runs/words --host 0.0.0.0 --api-key-file keys.txt

    Parameters
    ----------
    checkpoints
        Run folders, the model folders in them, or names on the hub. Clients name a model by the last part of it, or by the NAME of
        NAME=FOLDER.
    host
        The address to listen at; 0.0.0.0 for every one of this machine.
    port
        The port; 0 for one that is not in use.
    api_key_file
        A text file with a key a line; lines that begin with # are comments. Every request then needs one of them:
        "Authorization: Bearer KEY".
    allow_host
        A host from which pictures and sounds may be fetched; otherwise only data: URLs are read. Repeat it for more.
    strings
        A kind of your own whose values are texts, though it is neither text nor classes. It must not open files. Repeat it for
        more.
    """
    from multimodal.shapes import ConfigError

    if not checkpoints:
        raise ConfigError("serve: give one checkpoint or more, such as runs/digits")
    check_installed("serve")
    from multimodal.serve.checkpoints import named_folder
    from multimodal.serve.settings import Settings

    settings = Settings(
        rows=rows,
        capacity=capacity,
        queue=queue,
        max_tokens=max_tokens,
        timeout_s=timeout_s,
        gather_ms=gather_ms,
        pass_tokens=pass_tokens,
        max_body=max_body,
        max_pixels=max_pixels,
        max_seconds=max_seconds,
        window_s=window_s,
        live_sessions=live_sessions,
        live_seconds=live_seconds,
        live_idle_s=live_idle_s,
        max_message=max_message,
        keys=_keys(api_key_file),
        hosts=tuple(host.lower() for host in allow_host or ()),
        strings=tuple(strings or ()),
    )
    folders = [named_folder(word) for word in checkpoints]
    return serve_folders("serve", folders, settings, host=host, port=port, plugin=plugin, device=device)


def serve_folders(
    command: str,
    folders: "Sequence[tuple[str, Path]]",
    settings: "Settings",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    plugin: Plugins = None,
    device: str = "auto",
    browser: bool = False,
) -> int:
    """Serve checkpoints, each under its name, until somebody stops it.

    command: for messages. browser: whether the page is opened in a browser.
    """
    import uvicorn

    from multimodal.serve.app import make_app
    from multimodal.serve.checkpoints import Checkpoint
    from multimodal.serve.http import http_protocol
    from multimodal.serve.logs import log, log_to

    for _, folder in folders:
        model_folder(folder)  # raises before any of them is loaded
    listening = listen(command, host, port)
    handler, others = log_to(sys.stderr), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    for other in others:  # their warnings and errors are lines of JSON too
        other.addHandler(handler)
        other.propagate = False
    try:
        with listening:

            def loader(folder: Path) -> "Callable[[], Model]":
                return lambda: load(folder, plugin, device)

            served = [Checkpoint(name, loader(folder), settings) for name, folder in folders]
            app = make_app(served, settings, patience_s=PATIENCE_S, on_hangup=True)
            if host not in LOCAL and not settings.keys:
                print(
                    f"multimodal: whoever reaches {host} may use this service; --api-key-file asks for a key",
                    file=sys.stderr,
                )
            shown = f"[{host}]" if ":" in host else host
            names = ", ".join(checkpoint.name for checkpoint in served)
            address = f"http://{shown}:{listening.getsockname()[1]}"
            print(f"serving {names} at {address}", flush=True)
            if browser:
                _open_soon(address)
            config = uvicorn.Config(
                app,
                http=http_protocol(settings),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(PATIENCE_S),
                ws_max_size=settings.max_message,
            )

            class Server(uvicorn.Server):
                async def shutdown(self, sockets: "list[socket] | None" = None) -> None:
                    # before the server closes their connections, which would cut off the last words
                    await app.state.service.end_live(PATIENCE_S)
                    await super().shutdown(sockets)

            Server(config).run(sockets=[listening])
    finally:
        log.removeHandler(handler)
        for other in others:
            other.removeHandler(handler)
            other.propagate = True
    return 0


def _open_soon(address: str) -> None:
    """Open a page in a browser, where there is a screen. The port is listened at already, so a browser that is early waits."""
    import threading
    import webbrowser

    # without a screen, `webbrowser` may start a browser of texts in this terminal
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def check_installed(command: str) -> None:
    """Raise a ConfigError that says what to install, if a library of the service is missing."""
    from multimodal.shapes import ConfigError

    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{command}: the package {error.name} is missing; pip install 'multimodal-stream[{command}]', "
            f"or uv sync --extra {command}"
        ) from error


def listen(command: str, host: str, port: int) -> "socket":
    """A socket that listens there; of port 0, at one that is not in use."""
    import socket

    from multimodal.shapes import ConfigError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{command}: cannot listen at {host} port {port}: {error}; choose another --port, or 0 for one that is not in use"
        ) from error


def _keys(file: Path | None) -> tuple[str, ...]:
    """The keys in a file.

    Raises:
        ConfigError: no key, or a line that is none; says which.
    """
    from multimodal.shapes import ConfigError

    if file is None:
        return ()
    from multimodal.serve.settings import check_key

    keys = []
    for number, line in enumerate(text_of("--api-key-file", file).split("\n"), 1):
        key = line.strip(" \t")
        if key and not key.startswith("#"):
            check_key(f"--api-key-file {file}, line {number}", key)
            keys.append(key)
    if not keys:
        raise ConfigError(f"--api-key-file {file}: holds no key; write one a line")
    return tuple(keys)
