"""A recipe for `multimodal train`: additions in words, read as text and answered in text.

uv run multimodal train examples/recipe.py                                    1 minute on 2 cores
uv run multimodal generate runs/recipe --text "three plus four"               seven
uv run multimodal train examples/recipe.py --set core.depth=1 --folder runs/shallow
uv run multimodal report runs                                                 both in one picture
"""

import multimodal as mm
from multimodal_tokenizers import TextBytes

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)


def recipe() -> mm.TrainingJob:
    """What `multimodal train` trains: a model, its data by task, and how."""
    sums = [{"text": f"{NUMBERS[a]} plus {NUMBERS[b]}", "answer": NUMBERS[a + b]} for a in range(10) for b in range(10)]
    return mm.TrainingJob(
        model=mm.Model({"text": TextBytes()}, mm.Core.tiny(), ["text -> text"]),
        data={"text -> text": sums},
        recipe=mm.Recipe(steps=400, batch=50, lr=3e-3),
    )
