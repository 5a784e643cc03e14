"""The grids: by hand, by property, and against onnxruntime's own quantizers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlab_kit.compression.quantize import fake_quantize, grid_codes, parameter_dtypes, quantized

values = st.floats(-1e3, 1e3, width=32)
weights = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=values)
GRIDS = ("int8", "int4", "int2")


def test_int8_by_hand() -> None:
    codes, scale = grid_codes(torch.tensor([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0], [-254, 127, 0.0]]), "int8")
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 0]]  # 63.5 rounds to the even code
    assert scale.flatten().tolist() == [1.0, 1.0, 2.0]


def test_int4_and_int2_by_hand() -> None:
    codes, scale = grid_codes(torch.tensor([[8.0, -4.0, 0.0, 0.4], [4.0, -16.0, 3.0, 20.0]]), "int4")
    assert scale.tolist() == [[-1.0], [-2.5]]  # the largest magnitude is positive, it gets code -8
    assert codes.tolist() == [[-8, 4, 0, 0], [-2, 6, -1, -8]]
    assert quantized(torch.tensor([[8.0, -8.0]]), "int4").tolist() == [[7.0, -8.0]]  # there is no code 8
    codes, scale = grid_codes(torch.tensor([[-3.0, 1.0, 0.5, -2.0], [0.0, 0.0, 0.0, 0.0]]), "int2")
    assert (codes.tolist(), scale.tolist()) == ([[-2, 1, 0, -1], [0, 0, 0, 0]], [[1.5], [1.0]])


def test_scales_and_biases_are_bfloat16_values() -> None:
    scale = grid_codes(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), "int8").scale
    assert not (scale.numpy().view(np.uint32) & 0xFFFF).any()
    assert quantized(torch.tensor([1.0, 1 + 2**-9, 1 + 2**-7]), "bf16").tolist() == [1.0, 1.0, 1 + 2**-7]


@given(weights, st.sampled_from(GRIDS))
@settings(deadline=None)
def test_a_grid_errs_by_half_a_step_but_beyond_its_highest_code_and_keeps_zeros(array: np.ndarray, dtype: str) -> None:
    weight = torch.from_numpy(array)
    codes, scale = grid_codes(weight, dtype)
    lowest, highest = {"int8": (-127, 127), "int4": (-8, 7), "int2": (-2, 1)}[dtype]
    assert lowest <= codes.min() and codes.max() <= highest
    beyond = (codes == highest) & (dtype != "int8")  # the other side of zero ends a code earlier
    assert ((codes * scale - weight).abs() <= torch.where(beyond, 1.04, 0.5001) * scale.abs() + 1e-30).all()
    assert (quantized(weight, dtype)[weight == 0] == 0).all()


@given(weights, st.sampled_from(GRIDS))
@settings(deadline=None)
def test_what_is_on_a_grid_stays_there(array: np.ndarray, dtype: str) -> None:
    """So that onnxruntime, handed values of the grid, stores the codes that training saw."""
    weight = torch.from_numpy(array)
    first = grid_codes(weight, dtype)
    again = grid_codes(first.codes * first.scale, dtype)
    assert torch.equal(first.codes, again.codes)
    used = first.codes.any(1)
    assert torch.equal(first.scale[used], again.scale[used])


@pytest.mark.parametrize("shape", [(10, 50), (20, 10, 5, 5), (7, 33)])
def test_int8_codes_are_those_of_onnxruntime(shape: tuple[int, ...]) -> None:
    """Its scale is the largest magnitude / 127; ours is the nearest bfloat16, so it is handed values on our grid."""
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_data

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    codes, scale = grid_codes(weight, "int8")
    for channel in range(len(weight)):
        on_grid = (codes[channel] * scale[channel]).numpy().ravel()
        _, theirs, their_codes = quantize_data(on_grid, TensorProto.INT8, symmetric=True)
        assert scale[channel].item() == theirs
        assert np.array_equal(codes[channel].numpy().ravel(), their_codes)
        _, exact, _ = quantize_data(weight[channel].numpy().ravel(), TensorProto.INT8, symmetric=True)
        assert scale[channel].item() == pytest.approx(exact, rel=2**-8)


@pytest.mark.parametrize("bits", [4, 2])
def test_low_bit_codes_are_those_of_onnxruntime(bits: int) -> None:
    """Its quantizer of the same grid for int4, in one block a row; for int2 a hand count with numpy."""
    from onnxruntime.quantization.matmul_nbits_quantizer import quantize_matmul_4bits

    weight = quantized(torch.randn(10, 64, generator=torch.Generator().manual_seed(2)), f"int{bits}")
    codes, scale = grid_codes(weight, f"int{bits}")
    if bits == 4:
        packed, scales = np.zeros((10, 1, 32), np.uint8), np.zeros((10, 1), np.float32)
        quantize_matmul_4bits(packed, weight.T.numpy().copy(), scales, np.zeros((10, 1), np.uint8), 64, 10, 64, True)
        theirs = np.stack([packed & 15, packed >> 4], -1).reshape(10, -1).astype(int) - 8
    else:
        largest = weight.numpy()[np.arange(10), np.abs(weight.numpy()).argmax(1)]
        scales = largest[:, None] / -2
        theirs = np.clip(np.rint(weight.numpy() / scales), -2, 1)
    assert np.array_equal(scale.numpy(), scales)
    assert np.array_equal(codes.numpy(), theirs)


@pytest.mark.parametrize("dtype", ["fp16", *GRIDS])
def test_fake_quantization_is_the_grid_forward_and_the_identity_backward(dtype: str) -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    rounded = fake_quantize(weight, dtype)
    assert torch.equal(rounded.detach(), quantized(weight.detach(), dtype))
    assert not torch.equal(rounded, weight)
    (3 * rounded).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 40), 3.0))


@pytest.mark.parametrize("dtype", ["fp16", *GRIDS])
@pytest.mark.parametrize("shape", [(4, 40), (6, 1, 3, 3), (5, 4, 7)])
def test_stacked_clients_are_quantized_each_by_itself(dtype: str, shape: tuple[int, ...]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))
    stack *= torch.tensor([1.0, 10, 100]).reshape(-1, *[1] * len(shape))
    together = quantized(stack, dtype, (0, 1))
    assert torch.equal(together, torch.stack([quantized(weight, dtype) for weight in stack]))


def test_weights_get_the_dtype_their_biases_bfloat16_and_the_rest_nothing() -> None:
    shapes = {
        "lstm.weight_ih_l0": (8, 3), "lstm.weight_hh_l0": (8, 2), "lstm.bias_ih_l0": (8,),
        "lstm.weight_ih_l0_reverse": (8, 3), "lstm.weight_hh_l0_reverse": (8, 2), "position": (5, 4),
        "attention.in_proj_weight": (12, 4), "conv.weight": (3, 1, 2, 2), "scale.weight": (4,), "head.weight": (2, 4),
        "head.bias": (2,),
    }  # fmt: skip
    found = parameter_dtypes(shapes, "int2", "ends")
    ends = {"lstm.weight_ih_l0", "lstm.weight_ih_l0_reverse", "head.weight"}
    assert {name for name, dtype in found.items() if dtype == "int8"} == ends
    assert {name for name, dtype in found.items() if dtype == "bf16"} == {"lstm.bias_ih_l0", "head.bias"}
    assert found.keys() == shapes.keys() - {"position", "scale.weight"}
    assert set(parameter_dtypes(shapes, "int2", "none").values()) == {"int2", "bf16"}
    assert set(parameter_dtypes(shapes, "int8", "ends").values()) == {"int8", "bf16"}


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16, int8, int4, int2, got 'int3'"):
        fake_quantize(torch.zeros(2, 2), "int3")
