"""The grids: by hand, by property, and against onnxruntime's own quantizers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlab_kit.compression.quantize import fake_quantize, int4_codes, int8_codes, quantized

values = st.floats(-1e3, 1e3, width=32)
weights = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=values)


def test_int8_by_hand() -> None:
    codes, scale = int8_codes(torch.tensor([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.0]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 0]]  # 63.5 rounds to the even code
    assert scale.flatten().tolist() == pytest.approx([1.0, 1.0, 0.02])


def test_int4_by_hand() -> None:
    codes, scale = int4_codes(torch.tensor([[8.0, -4.0, 0.0, 0.5]]))
    assert scale.tolist() == [[[-1.0]]]  # the largest magnitude is positive, it gets code -8
    assert codes[0, 0, :4].tolist() == [-8, 4, 0, 0]  # -0.5 + 8 rounds up, away from zero
    assert codes.shape == (1, 1, 32)
    assert not codes[0, 0, 4:].any()
    assert quantized(torch.tensor([[8.0, -8.0]]), "int4").tolist() == [[7.0, -8.0]]  # there is no code 8


@given(weights)
@settings(deadline=None)
def test_int8_errs_by_half_a_step_at_most_and_keeps_zeros(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    codes, scale = int8_codes(weight)
    assert codes.abs().max() <= 127
    assert ((codes * scale - weight).abs() <= 0.5001 * scale + 1e-30).all()
    assert (quantized(weight, "int8")[weight == 0] == 0).all()


@given(weights)
@settings(deadline=None)
def test_int4_errs_by_half_a_step_except_beyond_its_last_code(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    codes, scale = int4_codes(weight)
    assert codes.min() >= -8
    assert codes.max() <= 7
    steps = torch.where(codes == 7, 1.0, 0.5) * scale.abs()
    allowed = steps.flatten(-2)[:, : weight.shape[1]]
    assert ((quantized(weight, "int4") - weight).abs() <= allowed * 1.001 + 1e-30).all()
    assert (quantized(weight, "int4")[weight == 0] == 0).all()


@pytest.mark.parametrize("shape", [(10, 50), (20, 10, 5, 5), (7, 33)])
def test_int8_codes_are_those_of_onnxruntime(shape: tuple[int, ...]) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_data

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    codes, scale = int8_codes(weight)
    for channel in range(len(weight)):
        _, theirs, their_codes = quantize_data(weight[channel].numpy().ravel(), TensorProto.INT8, symmetric=True)
        assert scale[channel].item() == theirs
        assert np.array_equal(codes[channel].numpy().ravel(), their_codes)


@pytest.mark.parametrize(("outputs", "inputs"), [(10, 64), (5, 320), (3, 50)])
@pytest.mark.parametrize("rounded", [False, True])
def test_int4_codes_are_those_of_onnxruntime(outputs: int, inputs: int, rounded: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import quantize_matmul_4bits

    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2))
    if rounded:  # many ties, many zeros
        weight = (weight * 2).round() / 2
    blocks = -(-inputs // 32)
    padded = np.zeros((blocks * 32, outputs), np.float32)
    padded[:inputs] = weight.T.numpy()
    packed = np.zeros((outputs, blocks, 16), np.uint8)
    scales, zeros = np.zeros((outputs, blocks), np.float32), np.zeros((outputs, -(-blocks // 2)), np.uint8)
    quantize_matmul_4bits(packed, padded, scales, zeros, 32, outputs, inputs, True)
    theirs = np.stack([packed & 15, packed >> 4], -1).reshape(outputs, -1)[:, :inputs].astype(int) - 8
    codes, scale = int4_codes(weight)
    assert np.array_equal(scale[..., 0].numpy(), scales)
    assert np.array_equal(codes.numpy().reshape(outputs, -1)[:, :inputs], theirs)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_fake_quantization_is_the_grid_forward_and_the_identity_backward(dtype: str) -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    rounded = fake_quantize(weight, dtype)
    assert torch.equal(rounded.detach(), quantized(weight.detach(), dtype))
    assert not torch.equal(rounded, weight)
    (3 * rounded).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 40), 3.0))


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_stacked_clients_are_quantized_each_by_itself(dtype: str) -> None:
    stack = (
        torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 10, 100])[:, None, None]
    )
    together = quantized(stack, dtype, stacked=True)
    assert torch.equal(together, torch.stack([quantized(weight, dtype) for weight in stack]))


def test_what_no_grid_covers_stays_as_it_is() -> None:
    bias, kernel = torch.randn(5), torch.randn(2, 3, 5, 5)
    assert fake_quantize(bias, "int8") is bias
    assert quantized(bias.expand(3, 5), "int8", stacked=True).equal(bias.expand(3, 5))
    assert fake_quantize(kernel, "int4") is kernel
    assert fake_quantize(kernel, "int8") is kernel  # three channels: the runtime is faster in float
    wide = torch.randn(2, 4, 5, 5)
    assert not fake_quantize(wide, "int8").equal(wide)
    assert fake_quantize(kernel, "fp32") is kernel


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16, int8, int4, got 'int2'"):
        fake_quantize(torch.zeros(2, 2), "int2")
