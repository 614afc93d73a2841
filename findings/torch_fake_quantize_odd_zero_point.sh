#!/usr/bin/env bash
# torch 2.13.0, x86-64: quantization-aware training and the integers that it stands for round halves to different neighbours if
# the zero point is odd: fake quantization rounds, then adds the zero point, as its formula in the documentation has it;
# quantize_per_tensor and quantize_per_channel add first, so that "to even" is even as a code, not as a number of steps.
# Guess before the run: one rule, so that fake quantization is quantize and dequantize, to the bit.
# Seen: with step 1 and zero point 1, 0.5, 1.5 and 2.5 are 0, 2 and 2 in the fake, 1, 1 and 3 in the integers; with an even
# zero point all are equal. quantized_decomposed, which exported programs use, sides with the fake. Of bfloat16 activations
# with a step of 1/16, 7 in 100 differ, each by a whole step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.ao.quantization.fx import _decomposed  # registers quantized_decomposed

HALVES = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5])
EVEN_STEPS, EVEN_CODES = [0, 2, 2, 0, -2, 4], [1, 1, 3, -1, -1, 3]
torch.manual_seed(0)
activations = torch.randn(100000).to(torch.bfloat16).float()


def all_ways(x, scale, zero):
    """Per tensor: fake, integers, decomposed; per channel: fake, integers."""
    scales, zeros = torch.tensor([scale]), torch.tensor([zero])
    decomposed = torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8)
    return (
        torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127),
        torch.quantize_per_tensor(x, scale, zero, torch.qint8).dequantize(),
        (decomposed.float() - zero) * scale,
        torch.fake_quantize_per_channel_affine(x[None], scales, zeros.int(), 0, -128, 127)[0],
        torch.quantize_per_channel(x[None], scales, zeros, 0, torch.qint8).dequantize()[0],
    )


for zero in (0, 1, 2, 3, -5):
    # One row of six runs the loop's tail, many of them its vectors.
    fake, codes, decomposed, fake_channel, codes_channel = (y.view(-1, 6) for y in all_ways(HALVES.repeat(64), 1.0, zero))
    print(f"torch {torch.__version__}, zero point {zero}: fake {fake[0].tolist()}, integers {codes[0].tolist()}")
    for found in (fake, decomposed, fake_channel):
        assert found.tolist() == [EVEN_STEPS] * 64
    for found in (codes, codes_channel):
        assert found.tolist() == [EVEN_CODES if zero % 2 else EVEN_STEPS] * 64

for zero in (0, 1):
    fake, codes, *_ = all_ways(activations, 1 / 16, zero)
    share = (fake != codes).float().mean().item()
    print(f"bfloat16, step 1/16, zero point {zero}: {share:.1%} differ, by at most {(fake - codes).abs().max().item()}")
    assert 0.05 < share < 0.1 and (fake - codes).abs().max() == 1 / 16 if zero else share == 0
PY
