"""Repositories of the Hugging Face hub: their files at one commit, and commits of new ones. Nothing here opens what it fetches."""

import hashlib
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
EXPLICIT = "hf:"  # before a name that could be a folder


def hub_name(source: str | Path) -> str | None:
    """The name on the hub that is meant, "owner/model" or "owner/model@revision"; None: a path of this machine.

    A name with the prefix "hf:" is always one of the hub. Without it, one is meant where neither that path nor the folder "owner"
    is there: "runs/digts" beside a folder "runs" is a typing error, and no model of a stranger.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    if text.startswith(EXPLICIT):
        return text.removeprefix(EXPLICIT).lstrip("/")
    if NAME.fullmatch(text) is None or text.startswith("."):
        return None
    return None if os.path.lexists(source) or os.path.lexists(Path(source).parent) else text


def split_name(name: str) -> tuple[str, str | None]:
    """("owner/model", its revision) of "owner/model@revision"; None where no revision is named."""
    name, _, revision = name.partition("@")
    return name, revision or None


def fetch(
    where: str, name: str, wanted: Sequence[str], *, revision: str | None = None, token: str | None = None
) -> tuple[Path, str]:
    """(a folder of the cache with the files that fit the patterns `wanted`, the commit that they are of).

    Without a connection the files in the cache count. where: the caller's name, for errors.

    Raises:
        CheckpointError: no such repository or revision, no right to read it, or no connection and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    given: dict[str, Any] = {} if token is None else {"token": token}
    try:
        # it asks for the commit first, so that all files are of one version, and notes that it was the last one of this branch
        found: Any = snapshot_download(name, revision=revision, allow_patterns=list(wanted), **given)
        folder = Path(found)
    except Exception as error:  # of many classes, some of which depend on the version of the library
        raise CheckpointError(
            f"{where}: {name!r} is no folder here, and could not be loaded from the hub: {shortened(error, 300)}"
        ) from None
    return folder, folder.name  # which is the commit


@dataclass(frozen=True)
class Repository:
    """A repository for models as it stands, whether it is there or not.

    name: "owner/model". revision: the branch; None: the main one.
    commit: the last one of the branch; None: there is no such repository or branch.
    private: whether only its owner sees it; None: there is no repository.
    sums: by file, its checksum as git counts it, or the SHA-256 of a large one. A new branch begins with the files of the main one.
    api: the client of the hub, which has the token.
    """

    name: str
    revision: str | None
    commit: str | None
    private: bool | None
    sums: Mapping[str, str] = field(repr=False)
    api: Any = field(repr=False)

    def has(self, file: str, data: bytes | Path) -> bool:
        """Whether the file is there with this content."""
        known = self.sums.get(file)
        return known is not None and known == (_sha256 if len(known) == 64 else _git_sum)(data)

    def read(self, file: str) -> bytes:
        """The content of a file of the last commit.

        Raises:
            CheckpointError: it cannot be read.
        """
        with _errors("the hub", self.name, CheckpointError):
            return Path(self.api.hf_hub_download(self.name, file, revision=self.commit)).read_bytes()

    def write(
        self, files: Mapping[str, bytes | Path], deleted: Sequence[str], message: str, *, private: bool | None
    ) -> str:
        """Commit files, and return the commit. Where there is no repository or branch, it is made.

        private: of a new repository.

        Raises:
            ConfigError: no right to write, a name that is taken, no connection, or somebody else has pushed since.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with _errors("push", self.name, ConfigError):
            if self.private is None:
                self.api.create_repo(self.name, private=private)
            if self.commit is None and self.revision is not None:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            if not files and not deleted:
                return self.api.model_info(self.name, revision=self.revision).sha
            # lists of operations and no folder, so that nothing else can go along
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
    """The repository of this name, to be written to.

    Raises:
        ConfigError: no such name, no token, no right to see it, or no connection.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if not NAME.fullmatch(name) or "@" in name:
        raise ConfigError(f"push: {name!r} is no name on the hub; wanted 'owner/model', such as 'ann/digits'")
    if not (token := token or get_token()):
        raise ConfigError(
            "push: there is no token of the hub; make one with the right to write in the settings of your account, and give it "
            "to `hf auth login`, or in the variable HF_TOKEN, or as token= (a file with it as --token-file)"
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
                if (blob := getattr(entry, "blob_id", None)) is not None:  # folders have none
                    sums[entry.path] = entry.lfs.sha256 if entry.lfs else blob
        except RepositoryNotFoundError as error:
            if getattr(error.response, "status_code", 404) != 404:  # a token that is wrong, or may not see it
                raise
    return Repository(name, revision, commit, private, sums, api)


@contextmanager
def _errors(where: str, name: str, kind: type[ValueError]) -> Iterator[None]:
    """Whatever the hub or the way to it raises, as one error that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise kind(f"{where}: {name!r} is no name on the hub: {shortened(error, 200)}") from None
    except Exception as error:  # without a connection, of a class that depends on the version of the library
        # an upload that fails in a thread is the cause of another error
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            status = getattr(cause.response, "status_code", None)
            # the answer of the server, without its address and our headers
            answer = shortened(getattr(cause, "server_message", None) or f"status {status}", 200)
            repair = {
                401: "the hub does not know this token; make a new one, and give it to `hf auth login` or in HF_TOKEN",
                403: f"this token has no right to write there; give one that has it, or write to a name of your own "
                f"instead of {name.partition('/')[0]!r}",
                404: "the hub has no such repository, or hides it from this token",
                409: "the name is taken, by a repository that this token may not see; choose another",
                412: "somebody else has written to it meanwhile; look at what is there now, and push again",
            }.get(status or 0, "the hub refused it")
            raise kind(f"{where}: {name}: {repair} ({answer})") from None
        if isinstance(cause, ValueError):  # the metadata of the card, or an answer that is none
            raise kind(f"{where}: {name}: the hub refused it: {shortened(cause, 500)}") from None
        raise kind(
            f"{where}: {name}: the hub at {constants.ENDPOINT} cannot be reached: {type(cause).__name__}: "
            f"{shortened(cause, 200)}"
        ) from None


def _git_sum(data: bytes | Path) -> str:
    """The checksum that git gives a file."""
    whole = data if isinstance(data, bytes) else data.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(whole) + whole, usedforsecurity=False).hexdigest()


def _sha256(data: bytes | Path) -> str:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else file_hash(data)
