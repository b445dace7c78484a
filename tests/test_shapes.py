"""The check that reads axes off argument names: what it finds, what it says, and that compilers see through it."""

import pytest
import torch

from multimodal.shapes import LEGEND, ShapeError, check_shapes, did_you_mean


def test_sizes_that_were_met_come_back() -> None:
    met = check_shapes(
        "Core", {"D": 64}, stream_TD=torch.zeros(5, 64), position_TA=torch.zeros(5, 3), q_THK=torch.zeros(5, 4, 16)
    )
    assert met == {"D": 64, "T": 5, "A": 3, "H": 4, "K": 16}


def test_good_shapes_without_sizes() -> None:
    assert check_shapes("here") == {}
    assert check_shapes("here", image_CYX=torch.zeros(3, 4, 5)) == {"C": 3, "Y": 4, "X": 5}
    assert check_shapes("here", two_words_T=torch.zeros(0)) == {"T": 0}
    assert check_shapes("here", square_DD=torch.zeros(2, 2)) == {"D": 2}


def test_given_sizes_are_left_alone() -> None:
    sizes = {"D": 2}
    check_shapes("here", sizes, stream_TD=torch.zeros(5, 2))
    assert sizes == {"D": 2}


def test_wrong_number_of_axes() -> None:
    with pytest.raises(ShapeError) as raised:
        check_shapes("Core", {"D": 64}, stream_TD=torch.zeros(1, 5, 64))
    assert str(raised.value) == "Core: stream_TD has 3 axes (1, 5, 64), but its name promises 2 (TD)"


def test_size_that_was_wanted() -> None:
    with pytest.raises(ShapeError) as raised:
        check_shapes("Core", {"D": 64}, stream_TD=torch.zeros(5, 32))
    assert str(raised.value) == "Core: stream_TD is (5, 32), so D=32, but D=64 was wanted (D: width of the core)"


def test_tensors_that_disagree() -> None:
    with pytest.raises(ShapeError) as raised:
        check_shapes("Core", stream_TD=torch.zeros(5, 64), position_TA=torch.zeros(6, 3))
    assert str(raised.value) == f"Core: position_TA is (6, 3), so T=6, but T=5 was wanted (T: {LEGEND['T']})"
    with pytest.raises(ShapeError, match=r"square_DD is \(2, 3\), so D=3, but D=2 was wanted"):
        check_shapes("here", square_DD=torch.zeros(2, 3))


def test_letter_outside_the_legend() -> None:
    with pytest.raises(ShapeError, match=r"so Q=2, but Q=3 was wanted \(Q: not in the legend\)"):
        check_shapes("here", {"Q": 3}, odd_Q=torch.zeros(2))


def test_no_graph_break() -> None:
    def checked(stream_TD: torch.Tensor, position_TA: torch.Tensor) -> torch.Tensor:
        met = check_shapes("Core", {"D": 8, "A": 3}, stream_TD=stream_TD, position_TA=position_TA)
        return stream_TD.sum(0) * met["T"]

    torch._dynamo.reset()
    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    for tokens in (5, 7, 9):  # the second size makes the compiler treat it as dynamic
        stream_TD, position_TA = torch.rand(tokens, 8), torch.rand(tokens, 3)
        torch.testing.assert_close(compiled(stream_TD, position_TA), checked(stream_TD, position_TA))
    torch._dynamo.reset()


def test_did_you_mean() -> None:
    assert did_you_mean("lable", ["image", "label"]) == "; did you mean 'label'?"
    assert did_you_mean("depth", ["image", "label"]) == ""
    assert did_you_mean("depth", []) == ""
    # half of the letters are the same, by chance
    assert did_you_mean("stream", ["extra", "text"]) == ""
    assert did_you_mean("dgo", ["cat", "dog"]) == "; did you mean 'dog'?"
