"""Counters and histograms of a service, in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
HELP = {
    "requests_total": ("counter", "Requests that were answered or refused, by endpoint and status."),
    "left_total": ("counter", "Requests whose client disconnected before the answer."),
    "tokens_total": ("counter", "Tokens that the cores read and generated."),
    "steps_total": ("counter", "Decoding steps."),
    "passes_total": ("counter", "Packed forward passes of samples that need only one."),
    "packed_total": ("counter", "Samples in these passes."),
    "rows": ("gauge", "Rows of the decoding batch that are in use."),
    "rows_most": ("gauge", "Rows of the decoding batch."),
    "waiting": ("gauge", "Jobs that wait for a row or a pass."),
    "waiting_tokens": ("gauge", "Tokens of the requests that wait for a row."),
    "open_requests": ("gauge", "Requests that are open."),
    "live_sessions": ("gauge", "Live transcriptions that are open."),
    "heard_seconds_total": ("counter", "Seconds of sound that live transcriptions received."),
    "reloads_total": ("counter", "Reloads of a checkpoint."),
    "first_seconds": ("histogram", "Seconds from a request to the first text of its answer."),
    "whole_seconds": ("histogram", "Seconds from a request to the end of its answer."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._times: dict[
            tuple[str, Labels], list[float]
        ] = {}  # a count for each bucket, then the sum of all durations

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def time(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            times = self._times.setdefault((name, tuple(sorted(labels.items()))), [0.0] * (len(SECONDS) + 2))
            times[bisect_left(SECONDS, seconds)] += 1
            times[-1] += seconds

    def text(self, now: Iterable[tuple[str, Labels, float]] = ()) -> str:
        """All metrics as text. now: values of gauges and counters that are not stored here, as (name, labels, value)."""
        with self._lock:
            rows = [(name, labels, value) for (name, labels), value in self._counts.items()] + list(now)
            times = {key: list(value) for key, value in self._times.items()}
        lines = []
        for name, (kind, help_) in HELP.items():
            mine = sorted((labels, value) for n, labels, value in rows if n == name)
            series = sorted((labels, value) for (n, labels), value in times.items() if n == name)
            if mine or series:
                lines += [f"# HELP multimodal_{name} {help_}", f"# TYPE multimodal_{name} {kind}"]
            lines += [f"multimodal_{name}{_braces(labels)} {value:g}" for labels, value in mine]
            for labels, counts in series:
                count = 0.0
                for bound, more in zip((*map(str, SECONDS), "+Inf"), counts, strict=False):
                    count += more
                    lines.append(f"multimodal_{name}_bucket{_braces((*labels, ('le', bound)))} {count:g}")
                lines.append(f"multimodal_{name}_sum{_braces(labels)} {counts[-1]:.6f}")
                lines.append(f"multimodal_{name}_count{_braces(labels)} {count:g}")
        return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    escaped = ((k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for k, v in labels)
    inside = ",".join(f'{name}="{value}"' for name, value in escaped)
    return f"{{{inside}}}" if inside else ""
