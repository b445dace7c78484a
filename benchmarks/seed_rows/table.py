"""All rows of benchmarks/seeds.py, and what is not claimed."""

from seed_rows.mechanisms import LANGUAGE, MIXTURE, SCORES
from seed_rows.row import Bar, Row
from seed_rows.systems import STREAMS, SYSTEMS

__all__ = ["NOT_CLAIMED", "ROWS", "Bar", "Row"]

ROWS = (*MIXTURE, *LANGUAGE, *SCORES, *SYSTEMS, *STREAMS)

NOT_CLAIMED = {
    "machine reading": "named once, as a use of self-attention; there is no data set for it here",
    "abstractive summarisation": "named once, as a use of self-attention; there is no data set for it here",
}
