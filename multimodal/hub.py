"""Downloads files from a repository of the Hugging Face hub, and commits files to one. Nothing here opens a downloaded file."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multimodal.files import file_hash
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.texts import shortened

NAME = re.compile(r"[\w.-]+/[\w.-]+(@[^@\s]+)?", re.ASCII)
EXPLICIT = "hf:"  # prefix of a name on the hub that could also be a path


def hub_name(source: str | Path) -> str | None:
    """The name on the hub, "owner/model" or "owner/model@revision"; None: `source` is a path of this machine.

    A source with the prefix "hf:" is always a name on the hub. Without it, "owner/model" is one only if neither this path nor the
    folder "owner" exists here: if there is a folder "runs", then "runs/digts" is a mistyped path, not somebody's model.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    if text.startswith(EXPLICIT):
        return text.removeprefix(EXPLICIT).lstrip("/")
    if NAME.fullmatch(text) is None or text.startswith("."):
        return None
    return None if os.path.lexists(source) or os.path.lexists(Path(source).parent) else text


def split_name(name: str) -> tuple[str, str | None]:
    """Split "owner/model@revision" into ("owner/model", "revision"); None: there is no revision."""
    name, _, revision = name.partition("@")
    return name, revision or None


def fetch(
    where: str, name: str, wanted: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> tuple[Path, str]:
    """Download the files of a repository that match the patterns `wanted`; return (their folder in the cache, their commit).

    Without a connection, cached files are used. where: the name of the caller, for errors.

    Raises:
        CheckpointError: there is no such repository or revision, the token may not read it, or there is no connection and no
            cached file.
    """
    from huggingface_hub import snapshot_download

    given: dict[str, Any] = {} if token is None else {"token": token}
    try:
        # snapshot_download resolves the commit first, so all files are of one version
        found: Any = snapshot_download(name, revision=revision, allow_patterns=list(wanted), **given)
        folder = Path(found)
    except Exception as error:  # its classes depend on the version of huggingface_hub
        if _is_strange(error):
            raise CheckpointError(f"{where}: {name}: {_strange(error)}") from None
        raise CheckpointError(
            f"{where}: {name!r} is no folder here, and could not be loaded from the hub: {shortened(error, 300)}"
        ) from None
    return folder, folder.name  # the cache names the folder after the commit


def full_name(name: str, token: str | None = None) -> str:
    """The name with its owner; of a name without one, the owner is the user of the token, for which the hub is asked.

    Raises:
        ConfigError: no name of the hub, or no owner in it and no token that says one.
    """
    from huggingface_hub import HfApi, get_token

    wanted = f"push: {name!r} is no name on the hub; wanted 'OWNER/NAME', such as 'ann/digits'"
    if "/" not in name and NAME.fullmatch(f"owner/{name}") and "@" not in name:
        token = token or get_token()
        if not token:
            raise ConfigError(f"{wanted}: without OWNER/ it is that of the token, and there is none")
        with _errors("push", name, ConfigError):
            name = f"{HfApi(token=token).whoami()['name']}/{name}"
    if not NAME.fullmatch(name) or "@" in name:
        raise ConfigError(wanted)
    return name


@dataclass(frozen=True)
class Repository:
    """The present state of a model repository, which may not exist yet.

    name: "owner/model".
    revision: the branch; None: the main branch.
    commit: the newest commit of the branch; None: there is no such repository or branch.
    private: whether it is private; None: there is no repository.
    sums: {file: checksum}: the git blob SHA-1, or the SHA-256 of a large file. For a new branch, the files of the main branch.
    api: the `HfApi` client with the token.
    """

    name: str
    revision: str | None
    commit: str | None
    private: bool | None
    sums: Mapping[str, str] = field(repr=False)
    api: Any = field(repr=False)

    def has(self, file: str, data: bytes | Path) -> bool:
        """Whether the repository has the file with this content."""
        known = self.sums.get(file)
        return known is not None and known == (_sha256 if len(known) == 64 else _git_sum)(data)

    def read(self, file: str) -> bytes:
        """The content of a file at `commit`.

        Raises:
            CheckpointError: the file cannot be read.
        """
        with _errors("the hub", self.name, CheckpointError):
            return Path(self.api.hf_hub_download(self.name, file, revision=self.commit)).read_bytes()

    def write(
        self, files: Mapping[str, bytes | Path], deleted: Sequence[str], message: str, *, private: bool | None
    ) -> str:
        """Commit files, and return the new commit. Creates the repository and the branch if they do not exist.

        private: whether a new repository is private.

        Raises:
            ConfigError: the token may not write, the name is taken, there is no connection, or somebody pushed since `look_up`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with _errors("push", self.name, ConfigError):
            if self.private is None:
                self.api.create_repo(self.name, private=private)
            if self.commit is None and self.revision is not None:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            if not files and not deleted:
                return self.api.model_info(self.name, revision=self.revision).sha
            # explicit operations instead of a folder, so that no other file can be uploaded
            done = self.api.create_commit(
                self.name,
                [
                    *(CommitOperationAdd(name, data) for name, data in files.items()),
                    *(CommitOperationDelete(name) for name in deleted),
                ],
                commit_message=message,
                revision=self.revision,
                parent_commit=self.commit,
            )
            return done.oid


def look_up(name: str, revision: str | None = None, token: str | None = None) -> Repository:
    """The present state of the repository that a push will write to.

    Raises:
        ConfigError: the name is malformed, there is no token, the token may not see the repository, or there is no connection.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not (token := token or get_token()):
        raise ConfigError(
            "push: there is no token of the hub; create one with write access in the settings of your account, and pass it "
            "to `hf auth login`, in the variable HF_TOKEN, as token=, or in a file as --token-file"
        )
    api: Any = HfApi(token=token)
    private, commit = None, None
    sums: dict[str, str] = {}
    with _errors("push", name, ConfigError):
        try:
            main = api.model_info(name)
            private, commit = bool(main.private), main.sha
            if revision is not None:
                try:
                    commit = api.model_info(name, revision=revision).sha
                except RevisionNotFoundError:
                    commit = None
            for entry in api.list_repo_tree(name, recursive=True, revision=commit or main.sha):
                if (blob := getattr(entry, "blob_id", None)) is not None:  # folders have no blob
                    sums[entry.path] = entry.lfs.sha256 if entry.lfs else blob
        except RepositoryNotFoundError as error:
            if getattr(error.response, "status_code", 404) != 404:  # the token is wrong, or may not see the repository
                raise
    return Repository(name, revision, commit, private, sums, api)


@contextmanager
def _errors(where: str, name: str, kind: type[ValueError]) -> Iterator[None]:
    """Turn every error of the hub or the connection into a `kind` that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise kind(f"{where}: {name!r} is no name on the hub: {shortened(error, 200)}") from None
    except Exception as error:  # connection errors: their classes depend on the version of huggingface_hub
        # if an upload fails in a thread, its error is the cause of a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            status = getattr(cause.response, "status_code", None)
            # only the server's message: the full text has URLs and headers
            answer = shortened(getattr(cause, "server_message", None) or f"status {status}", 200)
            repair = {
                401: "the hub does not know this token; create a new one, and pass it to `hf auth login` or in HF_TOKEN",
                403: f"this token may not write there; use one that may, or push under a name of your own "
                f"instead of {name.partition('/')[0]!r}",
                404: "the hub has no such repository, or hides it from this token",
                409: "the name is taken, by a repository that this token may not see; choose another",
                412: "somebody else has written to it meanwhile; look at what is there now, and push again",
            }.get(status or 0, "the hub refused it")
            raise kind(f"{where}: {name}: {repair} ({answer})") from None
        if _is_strange(cause):
            raise kind(f"{where}: {name}: {_strange(cause)}") from None
        if isinstance(cause, ValueError):  # invalid metadata of the card
            raise kind(f"{where}: {name}: the hub refused it: {shortened(cause, 500)}") from None
        raise kind(
            f"{where}: {name}: the hub at {constants.ENDPOINT} cannot be reached: {type(cause).__name__}: "
            f"{shortened(cause, 200)}"
        ) from None


def _is_strange(error: BaseException) -> bool:
    """Whether something answered that is no hub, such as a page to log in: its client then looks for what is not there."""
    found = isinstance(error, (json.JSONDecodeError, TypeError, LookupError, AttributeError, AssertionError))
    return found or "Redirect" in type(error).__name__


def _strange(error: BaseException) -> str:
    from huggingface_hub import constants

    return (
        f"{constants.ENDPOINT} was reached, but its answer is not a hub's ({type(error).__name__}: {shortened(error, 200)}); "
        "is a page to log in between, or does HF_ENDPOINT name something else?"
    )


def _git_sum(data: bytes | Path) -> str:
    """The SHA-1 of a git blob with this content."""
    whole = data if isinstance(data, bytes) else data.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(whole) + whole, usedforsecurity=False).hexdigest()


def _sha256(data: bytes | Path) -> str:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else file_hash(data)
