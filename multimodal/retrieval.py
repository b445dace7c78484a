"""Retrieval with a model of pairs: the vectors of one side, the probability that two sides match, recall at k."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multimodal.heads.contrast import Contrast, ContrastReadout
from multimodal.network import Network
from multimodal.process_state import preserved_state
from multimodal.shapes import ConfigError, TaskError

BLOCK = 1024  # queries that are ranked at once, to bound the matrix of scores


def side_vectors(model: Network, task: str, parts: Iterable[Sequence[Mapping[str, Any]]], side: str | None) -> Tensor:
    """Unit vectors (N, F) of one side of each sample; the samples come in batches, and their other side is not encoded.

    side: "left" or "right"; None: the only side whose fields the samples have.

    Raises:
        ConfigError: another name of a side.
        TaskError: no pair, or `side` is None and the samples have both sides or none.
    """
    model.packer.check_task(task)
    head, readout = _contrast(model, task)
    sides = model.packer.patterns[task].sides
    names = {name: [field.name for field in fields] for name, fields in sides.items()}
    if side not in (None, *sides):
        raise ConfigError(f"task {task!r}: side={side!r} is neither 'left' nor 'right'")
    found, count, given = [torch.empty(0, head.width, device=model.device)], 0, set[str]()

    def chosen() -> str:
        if side is None and len(given) != 1:
            raise TaskError(
                f"task {task!r}: {'both sides' if given else 'no side'} came; give one, {' or '.join(names['left'])} "
                f"(left) or {' or '.join(names['right'])} (right), or say side='left' or side='right'"
            )
        return side or next(iter(given))

    with preserved_state(), model.inference_mode():
        for part in parts:
            for sample in part:
                if not isinstance(sample, Mapping):
                    model.packer.patterns[task].check_sample(sample, answer=False)  # raises
            given |= {name for name in names if any(field in sample for sample in part for field in names[name])}
            own = names[chosen()]
            other = dict.fromkeys(name for names_of in names.values() for name in names_of if name not in own)
            stream = model.pack(task, [{**sample, **other} for sample in part], answers=False, first=count)
            reading = stream.readings[task]
            found.append(readout.vectors(model(stream)[reading.row_N], chosen(), reading.lengths))
            count += len(part)
    chosen()  # raises, if there were no samples and no side was given
    return torch.cat(found)


def match_probabilities(model: Network, task: str, left_NF: Tensor, right_MF: Tensor) -> Tensor:
    """(N, M): the probability that each left vector matches each right vector, by the head of this pair."""
    head, readout = _contrast(model, task)
    with torch.no_grad():
        return head.probability(readout.scores(left_NF, right_MF))


def _contrast(model: Network, task: str) -> tuple[Contrast, ContrastReadout]:
    """The head of a pair and its module.

    Raises:
        TaskError: the task is no pair.
    """
    head, readout = model.packer.head(task), model.readout(task)
    if not isinstance(head, Contrast) or not isinstance(readout, ContrastReadout):
        raise TaskError(f"task {task!r} is no pair; a pair has two sides, as in 'image <-> text'")
    return head, readout


def evaluate_pairs(model: Network, task: str, samples: Any, *, batch: int = 64) -> dict[str, float]:
    """The mean loss of a pair in nats, with the others of its batch as negatives, and recall at 1 and 10 among all samples.

    "R@10 right" is the share of left sides for which a matching right side is among the 10 nearest. Sides that occur more than
    once count once: a photo with five captions is one photo, and each of the five matches it.
    """
    head, readout = _contrast(model, task)
    total, vectors, targets = 0.0, [], []
    with model.inference_mode():
        for start in range(0, len(samples), batch):
            part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
            stream = model.pack(task, part, first=start)
            r = stream.readings[task]
            assert r.target is not None
            state_ND = model(stream)[r.row_N]
            total += float(head.state_loss(readout, state_ND, r.lengths, r.target, r.target_lengths))
            vectors.append(head.logits(readout, state_ND, r.lengths).split(len(part)))
            targets.append(r.target)
    left_NF, right_NF = (torch.cat(side) for side in zip(*vectors, strict=True))
    return {"loss": total / len(samples), **recalls(left_NF, right_NF, torch.cat(targets))}


def recalls(left_NF: Tensor, right_NF: Tensor, target: Tensor, at: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Recall at k in both directions, for the vectors (N, F) of both sides of N pairs.

    target: fingerprints (N, 2) of the left and right sides; sides with equal numbers are the same. A tie counts as a miss.
    """
    sides, indices = [], []
    for vector_NF, number_N in zip((left_NF, right_NF), target.T, strict=True):
        # equal sides have equal vectors, so that it does not matter which copy is stored
        unique, index_N = number_N.unique(return_inverse=True)
        sides.append(vector_NF.new_empty(len(unique), vector_NF.shape[1]).index_copy(0, index_N, vector_NF))
        indices.append(index_N)
    match = torch.zeros(len(sides[0]), len(sides[1]), dtype=torch.bool, device=left_NF.device)
    match[indices[0], indices[1]] = True
    right, left = _ranks(sides[0], sides[1], match), _ranks(sides[1], sides[0], match.T)
    return {
        f"R@{k} {name}": float((rank_N < k).double().mean())
        for name, rank_N in (("right", right), ("left", left))
        for k in at
    }


def _ranks(query_NF: Tensor, key_MF: Tensor, match_NM: Tensor) -> Tensor:
    """For each query (N,), the number of keys that do not match and are at least as near as the nearest that does."""
    ranks = []
    for q_NF, own_NM in zip(query_NF.split(BLOCK), match_NM.split(BLOCK), strict=True):
        score_NM = q_NF @ key_MF.T
        best = score_NM.masked_fill(~own_NM, -torch.inf).amax(1, keepdim=True)
        ranks.append(((score_NM >= best) & ~own_NM).sum(1))
    return torch.cat(ranks)
