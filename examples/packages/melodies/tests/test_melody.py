"""The package's own tests: every check of the contract is one of them."""

from melodies import Melody

import multimodal as mm

MELODIES = [[(60, 4), (62, 4), (64, 8)], [(67, 2), (67, 2), (65, 4), (60, 8)], [(72, 1), (48, 4)]]

test_melody = mm.check.tests(Melody(), MELODIES)
