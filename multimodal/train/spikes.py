"""Detects loss spikes, saves the batch of a bad step for replay, and ranks its samples.

gradient norm --SpikeWatch--> why --save_spike--> RUN/trouble/step-0000123/ --replay--> samples, the worst first
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from multimodal.attention import Layout, Span
from multimodal.checkpoint import RUN, below, read_header
from multimodal.files import check_fields, check_inside, parse_json, read_json, write_atomic
from multimodal.masks import MaskInfo
from multimodal.model import Model
from multimodal.relations import Links, PairTable
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.stream import Reading, Stream
from multimodal.texts import short_repr, shortened

FORMAT = 1
FOLDER, DROPPED = "trouble", "dropped.jsonl"  # in the run folder; the names of version 0.1
MOST = 8  # number of bad steps that a run saves by default
_ON_DISK = {"bidirectional": "free"}  # files have the names of version 0.1
_PLACES = ("sample", "order", "bidirectional", "segment")
_IN_MEMORY = {old: new for new, old in _ON_DISK.items()}


@dataclass(kw_only=True)
class SpikeWatch:
    """Detects bad steps by their gradient norms: not finite, or above `spike` times the mean of those before.

    The mean is exponential, and each norm counts as at most `spike` times the mean: one bad step hardly changes it, but it follows
    norms that rise for good.

    spike: the factor; 0: only norms that are not finite are bad.
    decay: of the mean, per step.
    warmup: the number of norms before one can be too large.
    total: the sum of the norms, each times decay ** (its age in steps).
    weight: the sum of these factors.
    seen: the number of finite norms.
    """

    spike: float = 10.0
    decay: float = 0.98
    warmup: int = 20
    total: float = 0.0
    weight: float = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        if self.spike and not 1 < self.spike < math.inf:
            raise ConfigError(f"spike={self.spike} must be above 1 (times the mean gradient norm), or 0 for none")

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else math.nan

    def why(self, loss: float, norm: float) -> str | None:
        """Why a step with this loss and this gradient norm before clipping is bad; None if it is not. Call it once a step."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss}, the gradient norm {norm}"
        most, found = math.inf, None
        if self.spike and self.seen >= self.warmup and self.weight:
            most = self.spike * self.mean
            if norm > most:
                found = f"the gradient norm {norm:.4g} is {norm / self.mean:.1f} times the mean of those before ({self.mean:.4g})"
        self.total = self.decay * self.total + (1 - self.decay) * min(norm, most)
        self.weight = self.decay * self.weight + (1 - self.decay)
        self.seen += 1
        return found

    def state_dict(self) -> dict[str, float]:
        """The state to resume with; JSON restores these numbers exactly."""
        return {"total": self.total, "weight": self.weight, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.total, self.weight, self.seen = float(state["total"]), float(state["weight"]), int(state["seen"])


def save_stream(path: Path, stream: Stream) -> None:
    """Write a stream, packed with answers, to one safetensors file; all but tensors is JSON in its header."""
    tensors = {f"content/{kind}": x for kind, x in stream.content.items()} | {"position_TA": stream.position_TA}
    if stream.order_T is not None:
        tensors["order_T"] = stream.order_T
    info = stream.layout.info
    tensors |= {f"places/{_ON_DISK.get(name, name)}": getattr(info, name) for name in _PLACES}
    relations: dict[str, Any] = {}
    if info.links is not None:
        table = vars(info.links.table)
        tensors |= {f"links/{name}": x for name, x in table.items() if isinstance(x, Tensor)}
        tensors["links/number"] = info.links.number
        relations = {"relations": {name: x for name, x in table.items() if not isinstance(x, Tensor)}}
    readings = []
    for number, (pattern, reading) in enumerate(stream.readings.items()):
        tensors |= {f"reading {number}/{name}": x for name, x in vars(reading).items() if isinstance(x, Tensor)}
        readings.append({"task": pattern, **{n: x for n, x in vars(reading).items() if not isinstance(x, Tensor)}})
    metadata = {"format": FORMAT, "kinds": list(stream.content), "spans": stream.layout.spans, "readings": readings}
    metadata |= relations
    # clones, because safetensors refuses tensors that share memory
    whole = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    save_file(whole, path, metadata={"stream": json.dumps(metadata)})


def load_stream(path: Path) -> Stream:
    """The stream that `save_stream` wrote, bit for bit.

    Raises:
        CheckpointError: missing, damaged, or of a later version.
    """
    what = "this is no stream that save_stream wrote, or it is damaged"
    try:
        read_header(path)  # checks the header before the library reads it
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {what}: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {})["stream"].encode())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        if metadata["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {metadata['format']!r}, but this version reads {FORMAT}; update multimodal-stream"
            )
        readings = {}
        for number, entry in enumerate(metadata["readings"]):
            made: dict[str, Any] = below(tensors, f"reading {number}/")
            made |= {name: tuple(x) if isinstance(x, list) else x for name, x in entry.items() if name != "task"}
            readings[entry["task"]] = Reading(**made)
        links = None
        if relations := metadata.get("relations"):
            parts = below(tensors, "links/")
            number = parts.pop("number")
            links = Links(number, PairTable(names=tuple(relations["names"]), steps=int(relations["steps"]), **parts))
        stream = Stream(
            content={kind: tensors[f"content/{kind}"] for kind in metadata["kinds"]},
            order_T=tensors.get("order_T"),
            position_TA=tensors["position_TA"],
            layout=Layout(
                tuple(Span(*span) for span in metadata["spans"]),
                MaskInfo(
                    **{_IN_MEMORY.get(name, name): x for name, x in below(tensors, "places/").items()}, links=links
                ),
            ),
            readings=readings,
        )
        if not _is_consistent(stream):
            raise ValueError("its parts do not fit each other")
        return stream
    except CheckpointError:
        raise
    except Exception as error:  # a file of others may be wrong in any way
        raise CheckpointError(f"{path}: {what}: {type(error).__name__}: {str(error)[:300]}") from error


def _is_consistent(stream: Stream) -> bool:
    """Whether all lengths and row indices of a stream agree with the number of its tokens."""
    count = len(stream)
    order_T, spans, places = stream.order_T, stream.layout.spans, stream.layout.info.numbers
    fits = [
        stream.position_TA.dim() == 2
        and stream.position_TA.is_floating_point()
        and bool(stream.position_TA.isfinite().all()),
        order_T is None or torch.equal(order_T.sort().values, torch.arange(count)),
        sum(len(x) for x in stream.content.values()) == count,
        all(type(n) is int for span in spans for n in span)
        and all(-1 <= s.bidirectional <= s.total > 0 for s in spans),
        sum(span.total for span in spans) == count,
        all(isinstance(x, Tensor) and x.shape == (count,) and x.dtype == torch.int32 for x in places),
    ]
    if (links := stream.layout.info.links) is not None:
        fits.append(links.number.shape == (count,) and links.table.is_consistent(int(links.number.max())))
    for r in stream.readings.values():
        counts = (r.lengths, r.samples, r.target_lengths, r.key_lengths, r.pointed_lengths)
        fits.append(all(type(n) is int and n >= 0 for some in counts for n in some))
        rows = ((r.row_N, r.lengths), (r.key_N, r.key_lengths))
        for row_N, lengths in rows:
            if row_N is not None:
                fits += [row_N.dtype == torch.int64 and row_N.dim() == 1 and len(row_N) == sum(lengths)]
                fits += [not len(row_N) or (int(row_N.min()) >= 0 and int(row_N.max()) < count)]
        fits.append(len(r.lengths) <= len(r.samples) and (r.target is None or len(r.target) == sum(r.target_lengths)))
    return all(fits)


def save_spike(
    folder: Path,
    step: int,
    streams: Sequence[Stream],
    why: str,
    model: Model | None,
    *,
    counts: Mapping[str, float] | None = None,
    names: Sequence[Sequence[str]] | None = None,
    precision: str = "float32",
    process: int = 0,
    most: int = MOST,
) -> Path | None:
    """Write the batch of a step into RUN/trouble/step-0000123, for `replay`; returns None if `most` steps are saved already.

    folder: the run folder. streams: the micro-batches of the step; every process writes its own. why: the reason, as text. model:
    with its weights before the step; None if the caller saves it into `model/` there. counts: by task, what the loss was divided
    by, of all processes: the number of real targets, or the sum of their weights. names: the names of the samples of each stream,
    in packing order. precision: the type in which the step was computed. process: the rank. most: the number of steps that are
    saved, the first ones; each further step is a line in RUN/trouble/dropped.jsonl.
    """
    place = folder / FOLDER / f"step-{step:07}"
    if sum(other != place for other in (folder / FOLDER).glob("step-*")) >= most:
        if process == 0:
            with (folder / FOLDER / DROPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "why": why}) + "\n")
        return None
    place.mkdir(parents=True, exist_ok=True)
    (place / f"trouble-{process}.json").unlink(missing_ok=True)  # written for the same step before the run was resumed
    for old in place.glob(f"stream-{process}-*.safetensors"):
        if re.fullmatch(rf"stream-{process}-\d{{3,}}", old.stem):
            old.unlink()
    files = [f"stream-{process}-{number:03}.safetensors" for number in range(len(streams))]
    for file, stream in zip(files, streams, strict=True):
        save_stream(place / file, stream)
    if model is not None:
        model.save(place / RUN)
    metadata = {"format": FORMAT, "step": step, "why": why, "precision": precision, "streams": files}
    metadata |= {"counts": dict(count_targets(streams, model) if counts is None else counts)}
    metadata |= {"names": None if names is None else [list(some) for some in names]}
    # written last, so that an incomplete folder is not taken for a complete one
    write_atomic(place / f"trouble-{process}.json", json.dumps(metadata, indent=2) + "\n")
    return place


def count_targets(streams: Sequence[Stream], model: Model | None = None) -> dict[str, float]:
    """By task, what its losses are divided by: the number of real targets or, as the model's heads say, their weights' sum."""
    counts: dict[str, float] = {}
    for stream in streams:
        for task, reading in stream.readings.items():
            counts[task] = counts.get(task, 0) + (model.divisor(stream, task) if model else reading.count)
    return counts


@dataclass(frozen=True, kw_only=True)
class SavedBatch:
    """A saved micro-batch.

    process: the rank of the process that trained it.
    file: its name in the folder.
    stream: the packed samples.
    names: the names of the samples; None: not saved.
    """

    process: int
    file: str
    stream: Stream
    names: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A step as `save_spike` saved it, without the model.

    step: its number, from 1.
    why: the reason why it is bad.
    precision: "float32" or "bfloat16".
    counts: by task, what its losses were divided by: the number of real targets, or the sum of their weights, of all processes.
    batches: the micro-batches of all processes.
    """

    step: int
    why: str
    precision: str
    counts: dict[str, float]
    batches: tuple[SavedBatch, ...]


def load_spike(place: Path) -> SavedStep:
    """Read a folder that `save_spike` wrote, the batches of all processes.

    Raises:
        CheckpointError: the folder holds no such step, or it is damaged.
    """
    numbered = [path for path in place.glob("trouble-*.json") if re.fullmatch(r"trouble-[0-9]{1,9}", path.stem)]
    found = sorted(numbered, key=lambda path: int(path.stem.removeprefix("trouble-")))
    if not found:
        raise CheckpointError(f"{place}: no step is saved here; give a folder such as RUN/{FOLDER}/step-0000123")
    batches: list[SavedBatch] = []
    metadata: dict[str, Any] = {}
    for path in reversed(found):  # the metadata that stay are those of the first process
        try:
            metadata = read_json(path, CheckpointError)
            kinds = {
                "step": int,
                "why": str,
                "precision": str,
                "counts": dict,
                "streams": list,
                "names": (list, type(None)),
            }
            check_fields(path, metadata, kinds, CheckpointError)
            check_inside(path, metadata["streams"], CheckpointError)
            if not 0 <= metadata["step"] < 2**63:  # it becomes a seed
                raise CheckpointError(f"{path}: 'step' is {short_repr(metadata['step'])}, wanted 0 to 2^63 - 1")
            if not all(type(n) in (int, float) and 0 <= n < math.inf for n in metadata["counts"].values()):
                raise CheckpointError(f"{path}: 'counts' is {short_repr(metadata['counts'])}, wanted numbers from 0 on")
            names = metadata["names"] or [None] * len(metadata["streams"])
            saved = [
                SavedBatch(
                    process=int(path.stem.removeprefix("trouble-")),
                    file=file,
                    stream=load_stream(place / file),
                    names=None if some is None else tuple(map(str, some)),
                )
                for file, some in zip(metadata["streams"], names, strict=True)
            ]
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {shortened(error)}") from error
        batches = saved + batches
    return SavedStep(
        step=metadata["step"],
        why=metadata["why"],
        precision=metadata["precision"],
        counts=metadata["counts"],
        batches=tuple(batches),
    )


def samples_of(stream: Stream) -> Iterator[tuple[str, int, Stream]]:
    """Yields (task, number in the batch, a stream of this sample only) for every sample; the packer would have made the same."""
    stream = stream.to("cpu")
    starts = list(accumulate((span.total for span in stream.layout.spans), initial=0))
    for task, reading in stream.readings.items():
        span_of = [bisect_right(starts, int(rows_N[0])) - 1 for rows_N in reading.row_N.split(list(reading.lengths))]
        for number in dict.fromkeys(reading.samples):
            which = [i for i, sample in enumerate(reading.samples) if sample == number]  # a pair has two, its sides
            yield task, number, _alone(stream, task, which, sorted({span_of[i] for i in which}), starts)


def _alone(stream: Stream, task: str, which: list[int], spans: list[int], starts: list[int]) -> Stream:
    row_T = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in spans])
    from_T = row_T if stream.order_T is None else stream.order_T[row_T]
    found: list[tuple[int, str, Tensor, Tensor]] = []  # of each kind: its first row, name, content, rows
    before = 0
    for kind, x in stream.content.items():
        (at,) = ((from_T >= before) & (from_T < before + len(x))).nonzero(as_tuple=True)
        if len(at):
            found.append((int(at[0]), kind, x[from_T[at] - before], at))
        before += len(x)
    found.sort(key=lambda part: part[0])
    places = stream.layout.info[row_T]
    layout = Layout(
        tuple(stream.layout.spans[i] for i in spans),
        replace(places, sample=torch.searchsorted(torch.tensor(spans, dtype=torch.int32), places.sample).int()),
    )

    def some(x: Tensor | None, lengths: tuple[int, ...]) -> Tensor | None:
        if x is None:
            return None
        parts = x.split(list(lengths))
        return torch.cat([parts[i] for i in which if i < len(parts)])  # only the left side of a pair has a target

    def chosen(lengths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(lengths[i] for i in which if i < len(lengths))

    r = stream.readings[task]
    row_N, key_N = some(r.row_N, r.lengths), some(r.key_N, r.key_lengths)
    assert row_N is not None
    reading = replace(
        r,
        row_N=torch.searchsorted(row_T, row_N),
        lengths=chosen(r.lengths),
        samples=(0,) * len(which),
        target=some(r.target, r.target_lengths),
        target_lengths=chosen(r.target_lengths),
        key_N=None if key_N is None else torch.searchsorted(row_T, key_N),
        key_lengths=chosen(r.key_lengths),
        pointed_N=some(r.pointed_N, r.pointed_lengths),
        pointed_lengths=chosen(r.pointed_lengths),
        left=None if r.left is None else sum(i < r.left for i in which),
    )
    order_T = torch.cat([at for *_, at in found]).argsort() if len(found) > 1 else None
    content = {kind: x for _, kind, x, _ in found}
    return Stream(content, order_T, stream.position_TA[row_T], layout, {task: reading})


@dataclass(frozen=True, kw_only=True)
class ReplayRow:
    """Loss and gradient of one sample of a step, or of a whole micro-batch.

    file: the file of its micro-batch.
    sample: its number in the micro-batch; None: the whole micro-batch.
    name: the sample's name in the data.
    task: its task.
    tokens: the number of its tokens.
    loss: the mean over its real targets, in nats; of a micro-batch its share of the step's weighted loss.
    norm: the norm of its part of the step's gradient.
    first: the part of the model, or of the sample, with the first value that is not finite; None: all are finite.
    parameters: the names of those whose gradient is not finite.
    """

    file: str
    sample: int | None
    name: str
    task: str
    tokens: int
    loss: float
    norm: float
    first: str | None
    parameters: tuple[str, ...]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm) and self.first is None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; numbers that are not finite as text."""
        numbers = {name: x if math.isfinite(x) else str(x) for name, x in (("loss", self.loss), ("norm", self.norm))}
        return {**asdict(self), **numbers, "finite": self.finite, "parameters": list(self.parameters)}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of `replay`.

    batches: the micro-batches.
    samples: all samples, the worst first: those with values that are not finite, then by gradient norm.
    weights: the names of parameters that were not finite before the step.
    notes: what limits the result, as text.
    """

    batches: tuple[ReplayRow, ...]
    samples: tuple[ReplayRow, ...]
    weights: tuple[str, ...]
    notes: tuple[str, ...]


def replay(model: Model, saved: SavedStep, *, progress: Callable[[], None] = lambda: None) -> Replay:
    """Run the step again, forward and backward, micro-batch by micro-batch and sample by sample, without dropout.

    Samples of a pack do not see each other, so a sample alone has the same loss and gradient as in the pack.
    progress: called after each sample.

    Raises:
        CheckpointError: the batches are of another model.
    """
    try:
        return _replay(model, saved, progress)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"the saved batch does not fit the model: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _replay(model: Model, saved: SavedStep, progress: Callable[[], None]) -> Replay:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()  # cuDNN has no backward for others; they drop nothing
    weights = tuple(name for name, p in model.named_parameters() if not bool(p.isfinite().all()))
    for batch in saved.batches:
        for task, reading in batch.stream.readings.items():
            if task not in model.tasks or task not in saved.counts:
                raise CheckpointError(
                    f"{batch.file}: task {short_repr(task)} is none of this model's, or not in the counts"
                )
            if batch.names is not None and any(number >= len(batch.names) for number in reading.samples):
                raise CheckpointError(f"{batch.file}: it has more samples than the {len(batch.names)} that have names")
    whole, rows, notes = [], [], []
    for batch in saved.batches:
        where = f"process {batch.process}, {batch.file}" if batch.process else batch.file
        row = _replay_one(model, batch.stream, saved, where, None, "", ", ".join(batch.stream.readings))
        whole.append(row)
        total = 0.0
        for task, number, alone in samples_of(batch.stream):
            name = "" if batch.names is None else batch.names[number]
            rows.append(_replay_one(model, alone, saved, where, number, name, task))
            total += _share(model, saved, task, rows[-1].loss, alone)
            progress()
        if math.isfinite(total) and math.isfinite(row.loss) and abs(total - row.loss) > 1e-2 * max(1.0, abs(row.loss)):
            notes.append(
                f"{where}: the samples' losses add up to {total:.4f}, not to {row.loss:.4f}, so this loss goes across samples "
                "(or its noise differs); a sample alone does not show it"
            )
    model.zero_grad(set_to_none=True)
    rows.sort(key=lambda row: (row.finite, -row.norm if math.isfinite(row.norm) else -math.inf))
    return Replay(batches=tuple(whole), samples=tuple(rows), weights=weights, notes=tuple(notes))


def _share(model: Model, saved: SavedStep, task: str, loss: float, alone: Stream) -> float:
    return model.tasks[task].weight * loss * model.divisor(alone, task) / (saved.counts[task] or 1)


def _replay_one(
    model: Model, stream: Stream, saved: SavedStep, file: str, sample: int | None, name: str, task: str
) -> ReplayRow:
    first: list[str] = [f"content of {kind}" for kind, x in stream.content.items() if not _is_finite(x)][:1]
    torch.manual_seed(saved.step)  # heads that learn from noise get the same one each time
    model.zero_grad(set_to_none=True)
    device = model.device
    bfloat16 = saved.precision == "bfloat16"
    with _find_not_finite(model, first), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        loss = model.loss(stream.to(device), counts=saved.counts)
    if not _is_finite(loss) and not first:
        first.append("loss")
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([grad.float().norm() for grad in grads.values()]).norm())
    value = float(loss.detach())
    if sample is not None:
        value /= max(_share(model, saved, task, 1.0, stream), 1e-30)
    return ReplayRow(
        file=file,
        sample=sample,
        name=name,
        task=task,
        tokens=len(stream),
        loss=value,
        norm=norm,
        first=first[0] if first else None,
        parameters=tuple(what for what, grad in grads.items() if not _is_finite(grad)),
    )


@contextmanager
def _find_not_finite(model: Model, first: list[str]) -> Iterator[None]:
    """Append to `first` the first module with an output that is not finite; inner modules end before outer ones."""

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if not first and not _is_finite(out):
                first.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name or "model")) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(x: Any) -> bool:
    if isinstance(x, Tensor):
        return not x.is_floating_point() or bool(x.isfinite().all())
    return all(_is_finite(part) for part in x) if isinstance(x, (tuple, list)) else True
