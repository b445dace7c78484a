"""The quick path: from a folder, a table or a data set to a trained and measured model in one call.

gather.py        what is given, as rows of columns
columns.py       what each column is
survey.py        every sample is looked at once
division.py      parts for training and testing
data_report.py   what was seen, to show
rules.py         which tokens, core, head and recipe
parts.py, code.py    the parts as files, and the program that trains the same
one_call.py      all of it, in this order
"""

from multimodal.start.data_report import DataReport
from multimodal.start.one_call import Quick, quick

__all__ = ["DataReport", "Quick", "quick"]
