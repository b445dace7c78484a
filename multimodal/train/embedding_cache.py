"""The vectors of a frozen tower on disk, so that each value is computed once.

content --key of each value--> records in the folder, or the tower for missing ones --> vectors --connector--> rows

FOLDER/PART/NAME.vectors: PART is a hash of the tower's weights and declaration. Each process appends to a file of its own, without
locks, and reads the files of all. A record is a header with checksums and one value's vectors; an incomplete or damaged one is
computed again.
"""

import hashlib
import json
import os
import secrets
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor, nn

from multimodal.checkpoint import short_name, weights_hash
from multimodal.core import Block
from multimodal.declare import declaration
from multimodal.files import read_at
from multimodal.model import Model
from multimodal.model_parts import weights_of
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Places
from multimodal.versions import installed_version

FORMAT = 1
SUFFIX = ".vectors"
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # records hold an index into it: append only
HEADER = struct.Struct(
    "<4s16sBIIII"
)  # magic, key, type, vectors, numbers in each, checksum of these, checksum of the fields before
MAGIC = b"mmv1"
MAKE_ONE = "make the frozen part one, as mm.Tower.of(mm.pretrained(..)), or leave cache out"
MOST_OPEN = 64  # files that are open for reading at once


@contextmanager
def cached(model: Model, folder: str | Path) -> Iterator["EmbeddingCache"]:
    """Within this context the towers of a model compute no value twice: their vectors are read from a folder, or added to it.

    Vectors are cached in evaluation mode, and in training if the tower is frozen. Changed weights get new records, so the model may
    change meanwhile; only changes through `parameter.data` go unnoticed. Yields the cache: its `read` and `computed` count values.

    Raises:
        ConfigError: the model has no tower, or the folder cannot be made.

    Examples:
        >>> eye = mm.Tower(ImagePatches(patch=4, channels=1), mm.Core.tiny())
        >>> seeing = mm.Model({"image": eye, "label": Labels(("circle", "square"))}, mm.Core.tiny(), ["image -> label"])
        >>> with mm.train.cached(seeing, "vectors") as cache:
        ...     first, again = (seeing.predict("image -> label", samples[:1])[0].value for _ in range(2))
        >>> first == again, cache.computed, cache.read
        (True, 1, 1)
    """
    towers = _towers(model)
    if not towers:
        raise ConfigError(f"cached: no kind of this model is a Tower, so there is nothing to cache; {MAKE_ONE}")
    cache = EmbeddingCache(model, Path(folder))
    before = {kind: module.cache for kind, module in towers.items()}
    try:
        for module in towers.values():
            module.cache = cache
        yield cache
    finally:
        for kind, module in towers.items():
            module.cache = before[kind]
        cache.close()


def check_cacheable(model: Model, freeze: Sequence[str]) -> None:
    """Refuse a cache for training in which no tower is frozen.

    Raises:
        ConfigError: says what to freeze.
    """
    names, towers = weights_of("freeze", model, freeze), _towers(model)
    for kind, module in towers.items():
        if all(f"embeds.{kind}.frozen_part.{name}" in names for name, _ in module.frozen_part.named_parameters()):
            return
    if not towers:
        raise ConfigError(
            f"fit: cache= is for the vectors of frozen towers, and no kind of this model is a Tower; {MAKE_ONE}"
        )
    wanted = " or ".join(f'"{kind}.frozen_part"' for kind in towers)
    raise ConfigError(
        f"fit: cache= is for the vectors of frozen towers, and freeze={tuple(freeze)} freezes none; add {wanted}, "
        "or leave cache out"
    )


def _towers(model: Model) -> dict[str, Any]:
    """By kind, the embeddings that call their `cache` where it is not None."""
    return {
        kind: module
        for kind, module in model.embeds.named_modules()
        if hasattr(module, "frozen_part") and hasattr(module, "cache")
    }


class EmbeddingCache:
    """Called instead of the frozen parts of a model's towers; `cached` makes one.

    read: values whose vectors were found. computed: values that passed a tower.
    """

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.read, self.computed, self.closed = model, folder, 0, 0, False
        self._hashes: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()
        self._stores: dict[str, _Store] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache: the folder {folder} cannot be made: {error.strerror or error}") from error

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of the model for averaged weights reads the same files

    def close(self) -> None:
        """Close all files. Copies of the model that still call this cache compute everything themselves."""
        self.closed = True
        for store in self._stores.values():
            store.close()

    def __call__(self, part: nn.Module, content_NF: Tensor, places: Places) -> Tensor:
        """What `part(content_NF, places)` returns."""
        if self.closed or not _is_constant(part, content_NF):
            return part(content_NF, places)
        with self._lock:
            return self._vectors(part, content_NF, places)

    def _vectors(self, part: nn.Module, content_NF: Tensor, places: Places) -> Tensor:
        store = self._store(part, content_NF.device.type)
        keys = _value_keys(content_NF, places)
        if any(key not in store.records for key in keys):
            store.scan()
        vectors = {key: store.find(key, length) for key, length in dict(zip(keys, places.lengths, strict=True)).items()}
        # the first value of each key that is not there
        missing = {key: keys.index(key) for key, found in vectors.items() if found is None}
        if missing:
            some = list(missing.values())
            wanted = torch.zeros(len(keys), dtype=torch.bool)
            wanted[some] = True
            row_N = wanted.repeat_interleave(torch.tensor(places.lengths)).nonzero()[:, 0].to(content_NF.device)
            lengths, extents = tuple(places.lengths[i] for i in some), tuple(places.extents[i] for i in some)
            with torch.no_grad():
                made_NF = part(content_NF[row_N], Places(places.position_NA[row_N], lengths, extents)).cpu()
            for key, value_NF in zip(missing, made_NF.split(lengths), strict=True):
                vectors[key] = value_NF
                store.add(key, value_NF)
        self.computed += len(missing)
        self.read += len(keys) - len(missing)
        return torch.cat([vectors[key] for key in keys]).to(content_NF.device)  # type: ignore[arg-type]

    def _store(self, part: nn.Module, device: str) -> "_Store":
        """The records of this part with the weights that it has now."""
        weights = part.state_dict(keep_vars=True)
        # torch counts changes in place, but not those of a tensor that was made in inference mode
        state = tuple((t.data_ptr(), object() if t.is_inference() else t._version) for t in weights.values())
        known = self._hashes.get(part)
        if known is None or known[0] != state:
            self._hashes[part] = known = (state, weights_hash(weights))
        # autocast gives other vectors
        autocast = short_name(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        adapters, quantization = self.model.adapters, self.model.quantization
        declared = {
            "format": FORMAT,
            "version": installed_version("multimodal-stream"),
            "part": part.declared(),  # type: ignore[operator]
            "adapters": None if adapters is None else declaration(adapters),
            **({} if quantization is None else {"quantization": declaration(quantization)}),
            "autocast": autocast,
            "weights": known[1],
        }
        name = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()[:32]
        if name not in self._stores:
            self._stores[name] = _Store(self.folder / name)
        return self._stores[name]


def _is_constant(part: nn.Module, content_NF: Tensor) -> bool:
    """Whether a part's output depends on the value alone, and needs no gradient."""
    if torch.is_grad_enabled() and (content_NF.requires_grad or any(p.requires_grad for p in part.parameters())):
        return False
    # a block's own mode decides only whether it is recomputed; hooks may change what it returns
    return len(content_NF) > 0 and not any(
        (m.training and not isinstance(m, Block)) or m._forward_hooks or m._forward_pre_hooks for m in part.modules()
    )


def _value_keys(content_NF: Tensor, places: Places) -> list[bytes]:
    """By value, a hash of its tokens."""
    lengths = list(places.lengths)
    kind = f"{content_NF.dtype} {tuple(content_NF.shape[1:])}".encode()
    sides = [
        x.detach().cpu().contiguous().view(torch.uint8).reshape(len(x), -1).split(lengths)
        for x in (content_NF, places.position_NA)
    ]
    keys = []
    for content, position in zip(*sides, strict=True):
        digest = hashlib.blake2b(kind, digest_size=16)
        digest.update(content.numpy().data)
        digest.update(position.numpy().data)
        keys.append(digest.digest())
    return keys


class _Record(NamedTuple):
    path: Path
    begin: int
    kind: int
    rows: int
    width: int
    checksum: int


class _Store:
    """The records of one part; this process and others append to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[bytes, _Record] = {}
        self.scanned: dict[Path, int] = {}  # by file, where the next record begins
        self.open: dict[Path, Any] = {}
        self.file: Any = None
        self.owner = 0  # the process that made the file: after a fork the other one makes its own
        self.full = False
        self.scan()

    def close(self) -> None:
        for file in self.open.values():
            file.close()
        self.open.clear()
        if self.file is not None:
            self.file.close()
            self.file = None

    def find(self, key: bytes, rows: int) -> Tensor | None:
        """The vectors of a value with this number of tokens; None: there are none, or they are damaged."""
        record = self.records.get(key)
        if record is None or record.rows != rows:
            return None
        dtype = TYPES[record.kind]
        try:
            data = read_at(self._opened(record.path), record.begin, rows * record.width * dtype.itemsize)
        except OSError:
            data = b""
        if not data or crc32(data) != record.checksum:
            del self.records[key]
            return None
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(rows, record.width)

    def add(self, key: bytes, value_NF: Tensor) -> None:
        """Append a record. A full disk is a warning: what is not stored is computed again."""
        if self.full or value_NF.dtype not in TYPES:
            return
        data = value_NF.contiguous().view(torch.uint8).numpy().tobytes()
        rows, width = value_NF.shape
        kind, checksum = TYPES.index(value_NF.dtype), crc32(data)
        header = HEADER.pack(MAGIC, key, kind, rows, width, checksum, 0)[:-4]
        header += struct.pack("<I", crc32(header))
        try:
            if self.file is None or self.owner != os.getpid():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = (self.folder / f"{secrets.token_hex(8)}{SUFFIX}").open("xb", buffering=0)
                self.owner = os.getpid()
            begin = self.file.tell()
            left = memoryview(header + data)
            while left:  # one call may write less
                left = left[self.file.write(left) :]
        except OSError as error:
            self.full = True
            warnings.warn(f"cache: {self.folder} could not be written to ({error}); going on without", stacklevel=2)
            return
        path = Path(self.file.name)
        self.records[key] = _Record(path, begin + HEADER.size, kind, rows, width, checksum)
        self.scanned[path] = begin + len(header) + len(data)

    def scan(self) -> None:
        """Find the records that any process added since the last scan."""
        try:
            # the newest file last: a damaged record was computed again later
            there = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        except OSError:  # the folder was deleted meanwhile
            return
        for path in there:
            begin = self.scanned.get(path, 0)
            try:
                size = path.stat().st_size
                while begin + HEADER.size <= size:
                    header = read_at(self._opened(path), begin, HEADER.size)
                    magic, key, kind, rows, width, checksum, own = HEADER.unpack(header)
                    if magic != MAGIC or own != crc32(header[:-4]) or kind >= len(TYPES):
                        begin = 2**62  # nothing behind it can be found
                        break
                    end = begin + HEADER.size + rows * width * TYPES[kind].itemsize
                    if end > size:  # it is being written, or its process was killed
                        break
                    self.records[key] = _Record(path, begin + HEADER.size, kind, rows, width, checksum)
                    begin = end
            except (OSError, struct.error):
                pass
            self.scanned[path] = begin

    def _opened(self, path: Path) -> Any:
        if path not in self.open:
            if len(self.open) >= MOST_OPEN:
                self.open.pop(next(iter(self.open))).close()
            self.open[path] = path.open("rb", buffering=0)
        return self.open[path]
