import pytest
from helpers.layer_calls import draw
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_fedfisher.extraction.layer_types.attention import open_attention

WEIGHTS = [draw(12, 4, seed=1), draw(12, seed=2), draw(4, 4, seed=3), draw(4, seed=4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sides", ["q q q", "q k k", "q k v", "q q v", "q k q"], ids=lambda sides: sides.replace(" ", "")
)
def test_opened_attention_is_the_same_function(sides, bias):
    tensors = {name: draw(5, 2, 4, seed=ord(name)) for name in "qkv"}
    q, k, v = (tensors[name] for name in sides.split())
    packed, packed_bias, out, out_bias = WEIGHTS

    def run(function):
        return function(
            *(q, k, v, 4, 2, packed, packed_bias if bias else None, None, None, False, 0.0, out),
            out_bias,
            training=False,
        )

    assert_close(run(open_attention), run(F.multi_head_attention_forward), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_sizes(bias):
    module = nn.MultiheadAttention(4, 2, bias=bias, kdim=3, vdim=2).double()
    q, k, v = draw(5, 2, 4), draw(6, 2, 3), draw(6, 2, 2)

    def run(function):
        return function(
            *(q, k, v, 4, 2, None, None if not bias else WEIGHTS[1], None, None, False, 0.0),
            *(module.out_proj.weight, module.out_proj.bias),
            use_separate_proj_weight=True,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
        )

    assert_close(run(open_attention), run(F.multi_head_attention_forward), rtol=0, atol=1e-14)
