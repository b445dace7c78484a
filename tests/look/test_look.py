"""Where a model looked: against a softmax written out here, for a core of one layer."""

import numpy as np
import torch

import multimodal as mm
from multimodal.attention import DensePlan
from multimodal.look import attention_rollout
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

TASK = "image text -> label"


class Spy(DensePlan):
    """Keeps what a layer multiplied."""

    seen: tuple[torch.Tensor, torch.Tensor, float]

    def attend(self, q_THK, k_TGK, v_TGK, mechanism, layer):
        Spy.seen = mechanism.score.features(q_THK, k_TGK, mechanism.score_weights)
        return super().attend(q_THK, k_TGK, v_TGK, mechanism, layer)


def make(depth: int) -> mm.Model:
    tokenizers = {"image": ImagePatches(patch=2, channels=1), "text": TextBytes(), "label": Labels(("a", "b"))}
    model = mm.Model(tokenizers, mm.Core(width=32, depth=depth, heads=2), [TASK]).eval()
    with torch.no_grad():  # fresh attention is nearly even everywhere, which would hide a mix-up
        for block in model.core.blocks:
            block.layers[0].body.attention.norm_q.weight.fill_(4.0)
    return model


SAMPLE = {"image": np.random.default_rng(0).random((4, 6), dtype=np.float32), "text": "why"}


def test_one_layer_is_the_answers_own_attention():
    model = make(depth=1)
    shares = attention_rollout(model, TASK, SAMPLE)
    with torch.inference_mode():
        model(model.pack(TASK, [SAMPLE], answers=False), backend=Spy)
    q, k, scale = Spy.seen
    posterior = torch.stack([(scale * q[-1, h] @ k[:, h].T).softmax(-1) for h in range(2)]).mean(0)[:-1]
    expected = posterior / posterior.sum()
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.cat([shares["image"], shares["text"]]), expected, atol=1e-5, rtol=0)


def test_shares_cover_the_fields_that_are_there_and_sum_to_one():
    for sample, sizes in ((SAMPLE, {"image": 6, "text": 3}), ({**SAMPLE, "image": None}, {"text": 3})):
        shares = attention_rollout(make(depth=3), TASK, sample)
        assert {name: len(share) for name, share in shares.items()} == sizes
        assert abs(sum(float(share.sum()) for share in shares.values()) - 1) < 1e-5
