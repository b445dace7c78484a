"""Places: rotary angles, added sine-cosines, and what must not change when places are shifted."""

import math

import pytest
import torch

import multimodal as mm
from multimodal.positions import LearnedGrid, rotary_frequencies, rotate, rotations, sine_cosine
from multimodal.shapes import ConfigError
from multimodal_tokenizers import TextBytes


def scores(q_K: torch.Tensor, k_K: torch.Tensor, place_q, place_k, split=(2, 1, 1), base=(1e4, 1e2, 1e2)) -> float:
    axis_K, frequency_K = rotary_frequencies(len(q_K), split, base)
    turns = rotations(torch.tensor([place_q, place_k], dtype=torch.float32), axis_K, frequency_K)
    turned = rotate(torch.stack([q_K, k_K])[:, None], turns)
    return float(turned[0, 0] @ turned[1, 0])


def test_frequencies_follow_the_formula():
    axis_K, frequency_K = rotary_frequencies(32, (2, 1, 1), (10000.0, 100.0, 50.0))
    expected = [(0, 10000 ** (-i / 8)) for i in range(8)]
    expected += [(1, 100 ** (-i / 4)) for i in range(4)] + [(2, 50 ** (-i / 4)) for i in range(4)]
    assert axis_K.tolist() == [axis for axis, _ in expected]
    torch.testing.assert_close(frequency_K, torch.tensor([f for _, f in expected]))


@pytest.mark.parametrize(
    ("head_width", "pairs"),
    [(2, (1, 0, 0)), (6, (3, 0, 0)), (8, (2, 1, 1)), (10, (3, 1, 1)), (64, (16, 8, 8)), (14, (5, 1, 1))],
)
def test_every_pair_of_a_head_is_turned_by_one_axis_and_time_gets_what_is_left_over(head_width, pairs):
    axis_K, frequency_K = rotary_frequencies(head_width, (2, 1, 1), (10000.0, 100.0, 100.0))
    assert tuple(torch.bincount(axis_K, minlength=3).tolist()) == pairs
    assert frequency_K.shape == axis_K.shape
    assert frequency_K.max() == 1.0


def test_turning_is_a_plane_rotation_of_neighbouring_pairs():
    x_THK = torch.randn(3, 2, 8)
    place_TA = torch.tensor([[0.0, 0, 0], [3.0, 1, 2], [0.5, 7, 4]])
    axis_K, frequency_K = rotary_frequencies(8, (2, 1, 1), (10000.0, 100.0, 100.0))
    turned = rotate(x_THK, rotations(place_TA, axis_K, frequency_K))
    for t in range(3):
        for h in range(2):
            for i in range(4):
                a, b = x_THK[t, h, 2 * i : 2 * i + 2].tolist()
                angle = float(place_TA[t, axis_K[i]] * frequency_K[i])
                expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
                torch.testing.assert_close(turned[t, h, 2 * i : 2 * i + 2], torch.tensor(expected))
    assert torch.equal(turned[0], x_THK[0])


def test_scores_depend_on_differences_of_places_only():
    q_K, k_K = torch.randn(32), torch.randn(32)
    here = scores(q_K, k_K, (5, 2, 3), (1, 4, 0))
    for shift in [(100, 0, 0), (0, 30, 0), (0, 0, 17), (9, 8, 7)]:
        moved = scores(
            q_K, k_K, *([p + s for p, s in zip(place, shift, strict=True)] for place in [(5, 2, 3), (1, 4, 0)])
        )
        assert moved == pytest.approx(here, abs=1e-4)
    assert scores(q_K, k_K, (6, 2, 3), (1, 4, 0)) != pytest.approx(here, abs=1e-2)


def test_axes_are_told_apart():
    q_K, k_K = torch.randn(32), torch.randn(32)
    by_axis = [
        scores(q_K, k_K, place, (0, 0, 0))
        for place in [(0, 0, 0), (2, 0, 0), (0, 2, 0), (0, 0, 2), (0, 2, 1), (0, 1, 2)]
    ]
    for i, one in enumerate(by_axis):
        for other in by_axis[:i]:
            assert abs(one - other) > 1e-3


def test_sine_cosine_is_the_formula():
    place_NA = torch.tensor([[0.0, 0.0], [1.0, 5.0], [3.5, 2.0]])
    width = 16  # 2 axes x (4 sines, 4 cosines)
    expected = [
        [f(p * 100 ** (-i / 4)) for p in place for f in (math.sin, math.cos) for i in range(4)]
        for place in place_NA.tolist()
    ]
    torch.testing.assert_close(sine_cosine(place_NA, width), torch.tensor(expected))


def test_sine_cosine_refuses_a_width_without_pairs():
    with pytest.raises(ConfigError, match=r"width=30 is not a multiple of 4"):
        sine_cosine(torch.zeros(1, 2), 30)


def test_learned_grid_gives_its_points_back_and_keeps_rows_from_columns():
    grid = LearnedGrid(width=5, size=4)
    fraction_NA = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).add(0.5).div(4)  # the middle of each cell
    expected = grid.grid_DYX.flatten(1).T
    torch.testing.assert_close(grid(fraction_NA), expected)
    between = grid(torch.tensor([[1.0 / 4, 0.5 / 4]]))[0]  # half way from row 0 to row 1 in column 0
    torch.testing.assert_close(between, (grid.grid_DYX[:, 0, 0] + grid.grid_DYX[:, 1, 0]) / 2)


def test_shifting_all_times_of_a_sample_changes_nothing(lay, core):
    layout = lay([[(6, True), (3, False)], [(5, False)]])
    transformer = core.build()
    stream_TD, position_TA = torch.randn(14, 32), torch.rand(14, 3) * 20
    shifted = position_TA.clone()
    shifted[:9] += torch.tensor([50.0, 3.0, 8.0])  # all of the first sample, none of the second
    with torch.no_grad():
        before, after = (transformer(stream_TD, p, layout) for p in (position_TA, shifted))
        shifted[0, 0] += 2  # one token only: this must show
        other = transformer(stream_TD, shifted, layout)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert (other[:9] - before[:9]).abs().max() > 1e-3
    assert torch.equal(other[9:], before[9:])


def test_swapping_rows_and_columns_of_a_picture_changes_the_answer(lively, core, tokenizers):
    model = lively(mm.Model({k: tokenizers[k] for k in ("image", "label")}, core, ["image -> label"]))
    stream = model.pack("image -> label", [{"image": torch.arange(96.0).view(1, 8, 12) / 96}], answers=False)
    swapped = stream.position_TA[:, [0, 2, 1]]
    stream_TD = torch.cat([model.embed(kind, x) for kind, x in stream.content.items()])[stream.order_T]
    with torch.no_grad():
        a, b = (model.core(stream_TD, p, stream.layout)[-1] for p in (stream.position_TA, swapped))
    assert (a - b).abs().max() > 1e-3


def test_text_places_count_up_from_zero():
    tokens = TextBytes()("abc")
    assert tokens.position_NA.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]


def test_turns_as_reals_turn_alike():
    x_THK = torch.randn(7, 3, 8, dtype=torch.float64)
    turns = rotations(torch.rand(7, 3) * 9, *rotary_frequencies(8, (2, 1, 1), (100.0, 10.0, 10.0)))
    torch.testing.assert_close(rotate(x_THK, torch.view_as_real(turns)), rotate(x_THK, turns), atol=1e-12, rtol=0)
