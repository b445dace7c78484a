"""Keep freed memory for the next step instead of giving it back to the system: on Linux CPUs a step is up to 3 times as fast."""

import ctypes
import platform
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Tell glibc's malloc not to map and unmap each large tensor; does nothing elsewhere.

    A training step frees and asks for the same sizes again. By default every block of more than 32 MB at most is mapped
    anew, and the kernel clears it page by page. Measured in DECISIONS.md.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    most_mapped, trim_threshold, grow_by = -4, -1, -2  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    libc = ctypes.CDLL(None)
    for parameter, value in ((most_mapped, 0), (trim_threshold, 2**31 - 1), (grow_by, 2**26)):
        libc.mallopt(parameter, value)
