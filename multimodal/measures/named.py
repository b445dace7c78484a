"""The measures by name. Each is computed from rows of numbers, one row a sample, so that samples can be drawn again for intervals.

Where a library has a measure it is taken from there: scikit-learn for classes, sacrebleu, rouge-score and jiwer for texts.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from multimodal.measures.answered import Answered

BINS = 15  # of the calibration error (Guo et al. 2017)
Rows = np.ndarray  # (N, S): of each sample, S numbers that a measure needs


@dataclass(frozen=True)
class Measure:
    """A number for many answers.

    name: its name in reports.
    says: what it is, in one line.
    rows: gives the rows (N, S) of all samples.
    value: gives the measure of some of the rows; NaN where it is not defined.
    unit: "share" is 0 to 1 and shown in percent, "points" is 0 to 100, "value" has the unit of the answers.
    needs: the package that computes it, if it is one of the extra `measures`.
    """

    name: str
    says: str
    rows: Callable[[], Rows]
    value: Callable[[Rows], float]
    unit: Literal["share", "points", "value"] = "share"
    needs: str = ""


def own(function: Callable[[Sequence[Any], Sequence[Any]], float], answered: Answered) -> Measure:
    """A user's function of (wanted values, answers) as a measure."""
    wanted, answers = answered.wanted, answered.answers()

    def value(rows: Rows) -> float:
        return float(function([wanted[i] for i in chosen(rows)], [answers[i] for i in chosen(rows)]))

    name = getattr(function, "__name__", type(function).__name__)
    return Measure(name, "a function of one's own", lambda: _numbers(answered), value, "value")


def _numbers(answered: Answered) -> Rows:
    """Rows of measures that need more than numbers: the number of each sample."""
    return np.arange(len(answered))[:, None]


def chosen(rows: Rows) -> list[int]:
    return rows[:, 0].astype(int).tolist()


def class_rows(answered: Answered) -> Rows:
    """(the wanted class or, of several, which are wanted; the probability of each class) of each sample."""
    return np.column_stack([answered.classes, answered.probability])


# one class a sample


def _told(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, 0].astype(int), rows[:, 1:].argmax(1)


def _among(best: int) -> Callable[[Rows], float]:
    def value(rows: Rows) -> float:
        wanted, p = rows[:, 0].astype(int), rows[:, 1:]
        rank = (p > np.take_along_axis(p, wanted[:, None], 1)).sum(1)
        return float((rank < best).mean())

    return value


def _balanced(rows: Rows) -> float:
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes that are answered and never wanted
        return float(balanced_accuracy_score(*_told(rows)))


def _f1(pair: tuple[np.ndarray, np.ndarray], average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(*pair, average=average, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def _by_class(score: Callable[[np.ndarray, np.ndarray], float], wanted: np.ndarray, p: np.ndarray) -> float:
    """The mean of a score over the classes that some samples have, and some have not."""
    found = [score(wanted[:, c], p[:, c]) for c in range(p.shape[1]) if 0 < wanted[:, c].sum() < len(wanted)]
    return float(np.mean(found)) if found else math.nan


def _area(wanted: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return _by_class(roc_auc_score, wanted, p)


def _precision(wanted: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    return _by_class(average_precision_score, wanted, p)


def _one_hot(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    return np.eye(rows.shape[1] - 1, dtype=int)[rows[:, 0].astype(int)], rows[:, 1:]


def calibration_bins(rows: Rows) -> list[tuple[int, float, float]]:
    """(number of answers, their mean confidence, share that is right) of each bin of confidence that has some."""
    wanted, told = _told(rows)
    sure, right = rows[:, 1:].max(1), wanted == told
    at = np.minimum((sure * BINS).astype(int), BINS - 1)
    return [
        (int(some.sum()), float(sure[some].mean()), float(right[some].mean()))
        for some in (at == b for b in range(BINS))
        if some.any()
    ]


def _calibration(rows: Rows) -> float:
    return sum(count * abs(sure - right) for count, sure, right in calibration_bins(rows)) / len(rows)


# several classes a sample


def _halves(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    middle = rows.shape[1] // 2
    return rows[:, :middle].astype(int), rows[:, middle:]


def _decided(average: str) -> Callable[[Rows], float]:
    return lambda rows: _f1((_halves(rows)[0], _halves(rows)[1] >= 0.5), average)


# texts


@cache
def _plain() -> Any:
    import jiwer

    return jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()])


def edits(answered: Answered, letters: bool) -> Rows:
    """(errors, words or letters of the wanted text) of each sample, in lower case and without punctuation."""
    import jiwer

    count = jiwer.process_characters if letters else jiwer.process_words
    found = []
    for wanted, told in zip(answered.wanted, answered.value, strict=True):
        wanted, told = _plain()(str(wanted)), _plain()(str(told))
        if not wanted:
            found.append((len(told if letters else told.split()), 0))
            continue
        done = count(wanted, told)
        errors = done.substitutions + done.deletions + done.insertions
        found.append((errors, done.hits + done.substitutions + done.deletions))
    return np.array(found, dtype=float).reshape(-1, 2)


def _rate(rows: Rows) -> float:
    errors, length = rows.sum(0)
    return float(errors / length) if length else math.nan


def _grams(answered: Answered) -> Rows:
    """(right n-grams, n-grams of the answer, for n = 1 to 4; words of the answer and of the wanted text)."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(str(b), [str(a)]) for a, b in zip(answered.wanted, answered.value, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float).reshape(-1, 10)


def _bleu(rows: Rows) -> float:
    from sacrebleu.metrics.bleu import BLEU

    total = rows.sum(0).astype(int).tolist()
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9]).score)


def _chrf(answered: Answered) -> Callable[[Rows], float]:
    wanted, told = [str(x) for x in answered.wanted], [str(x) for x in answered.value]

    def value(rows: Rows) -> float:
        from sacrebleu.metrics.chrf import CHRF

        return float(CHRF().corpus_score([told[i] for i in chosen(rows)], [[wanted[i] for i in chosen(rows)]]).score)

    return value


class _Words:
    """Words as rouge-score wants them; its own tokenizer drops every letter that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return _plain()(text).split()


def _longest(answered: Answered) -> Rows:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]  an extra

    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(answered.wanted, answered.value, strict=True)
    return np.array([[100 * rouge.score(str(a), str(b))["rougeL"].fmeasure] for a, b in pairs]).reshape(-1, 1)


# numbers: (the mean error, its square, and the mean of the wanted numbers) of each sample


def errors(answered: Answered) -> Rows:
    found = []
    for wanted, told in zip(answered.wanted, answered.value, strict=True):
        a, b = (np.asarray(x, dtype=float).ravel() for x in (wanted, told))
        off = np.abs(a - b) if a.shape == b.shape else np.array([math.nan])
        found.append((off.mean(), np.square(off).mean(), a.mean(), np.square(a).mean()))
    return np.array(found).reshape(-1, 4)


def _explained(rows: Rows) -> float:
    spread = rows[:, 3].mean() - rows[:, 2].mean() ** 2
    return float(1 - rows[:, 1].mean() / spread) if spread > 0 else math.nan


def _mean(rows: Rows) -> float:
    return float(rows[:, 0].mean())


MEASURES = {
    "top-3": "share of samples whose class is among the three most probable",
    "top-5": "share of samples whose class is among the five most probable",
    "balanced accuracy": "mean over the classes of the share of their samples that is right",
    "F1": "mean over the classes of the harmonic mean of precision and recall",
    "F1, pooled": "harmonic mean of precision and recall of all decisions together",
    "AUROC": "mean over the classes of the chance that one of its samples has a higher probability than another",
    "average precision": "mean over the classes of the area under precision by recall",
    "calibration error": f"mean distance of confidence and share that is right, in {BINS} bins of confidence",
    "wer": "wrong, missing and added words for each wanted one, in lower case and without punctuation",
    "cer": "wrong, missing and added letters for each wanted one, in lower case and without punctuation",
    "BLEU": "n-grams shared with the wanted texts, 0 to 100 (sacrebleu's)",
    "chrF": "n-grams of letters shared with the wanted texts, 0 to 100 (sacrebleu's)",
    "ROUGE-L": "longest sequence of words shared with the wanted text, 0 to 100",
    "mean error": "mean absolute difference from the wanted numbers",
    "root mean square error": "root of the mean squared difference from the wanted numbers",
    "R2": "share of the variance of the wanted numbers that the answers explain",
}


SKLEARN, SACREBLEU, ROUGE = "scikit-learn", "sacrebleu", "rouge-score"
MODULES = {SKLEARN: "sklearn", SACREBLEU: "sacrebleu", ROUGE: "rouge_score"}


def named(answered: Answered, sort: str) -> list[Measure]:
    """The measures of answers of this sort: "class", "classes", "rows" (a class for each row), "texts", "numbers" or another."""

    def add(name: str, rows: Callable[[], Rows], value: Callable[[Rows], float], needs: str = "", **more: Any) -> None:
        found.append(Measure(name, MEASURES[name], rows, value, needs=needs, **more))

    found: list[Measure] = []
    number = partial(_numbers, answered)
    with_classes = cache(partial(class_rows, answered))
    if sort == "class":
        rows = with_classes
        for best in (3, 5):
            if best < len(answered.names):
                add(f"top-{best}", rows, _among(best))
        add("balanced accuracy", rows, _balanced, SKLEARN)
        add("F1", rows, lambda rows: _f1(_told(rows), "macro"), SKLEARN)
        add("AUROC", rows, lambda rows: _area(*_one_hot(rows)), SKLEARN)
        add("average precision", rows, lambda rows: _precision(*_one_hot(rows)), SKLEARN)
        add("calibration error", rows, _calibration)
    elif sort == "classes":
        rows = with_classes
        add("F1", rows, _decided("macro"), SKLEARN)
        add("F1, pooled", rows, _decided("micro"), SKLEARN)
        add("AUROC", rows, lambda rows: _area(*_halves(rows)), SKLEARN)
        add("average precision", rows, lambda rows: _precision(*_halves(rows)), SKLEARN)
    elif sort == "rows":
        wanted, told = ([np.array([str(x) for x in row]) for row in side] for side in (answered.wanted, answered.value))

        def flat(side: list[np.ndarray], rows: Rows) -> np.ndarray:
            return np.concatenate([side[i] for i in chosen(rows)])

        add("F1", number, lambda rows: _f1((flat(wanted, rows), flat(told, rows)), "macro"), SKLEARN)
    elif sort == "texts":
        add("wer", lambda: edits(answered, letters=False), _rate)
        add("cer", lambda: edits(answered, letters=True), _rate)
        add("BLEU", partial(_grams, answered), _bleu, SACREBLEU, unit="points")
        add("chrF", number, _chrf(answered), SACREBLEU, unit="points")
        add("ROUGE-L", partial(_longest, answered), _mean, ROUGE, unit="points")
    elif sort == "numbers":
        rows = cache(partial(errors, answered))
        add("mean error", rows, _mean, unit="value")
        add("root mean square error", rows, lambda rows: math.sqrt(rows[:, 1].mean()), unit="value")
        add("R2", rows, _explained, unit="value")
    return found
