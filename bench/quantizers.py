"""The quantizers whose behaviour bench.behaviour tabulates: ours, torch's, and those of packages that are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import coarsegrad as cg

BITS = 4
TOP = 2**BITS - 1
Activation = Callable[[Tensor], Tensor]


class _Called(nn.Module):
    """A function, or a module to which the state of others is foreign, as an activation."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _fake_quantize(step: float) -> nn.Module:
    return _Called(lambda x: torch.fake_quantize_per_tensor_affine(x, step, 0, 0, TOP))


class _Learnable(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.scale, self.zero = nn.Parameter(torch.tensor([step])), nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scale.to(x.dtype), self.zero.to(x.dtype)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, TOP, 1.0)


def _observed(step: float) -> nn.Module:
    """The module of eager QAT, after one batch from 0 to the top."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    made = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=TOP)
    made(torch.tensor([0.0, TOP * step]))
    made.disable_observer()
    return made


def _observing() -> nn.Module:
    made = _observed(0.25)
    made.enable_observer()
    return made


def _brevitas(step: float, scaling: str = "const") -> nn.Module:
    from brevitas.nn import QuantReLU

    options = {"max_val": TOP * step, "scaling_impl_type": scaling}
    return QuantReLU(bit_width=BITS, return_quant_tensor=False, **options)


def _brevitas_default() -> nn.Module:
    from brevitas.nn import QuantReLU

    return QuantReLU(bit_width=BITS, return_quant_tensor=False)


def _torchao(step: float) -> nn.Module:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    scale, zero = torch.tensor(step), torch.tensor(0, dtype=torch.int32)
    return _Called(lambda x: _fake_quantize_affine(x, tuple(x.shape), scale, zero, torch.int32, 0, TOP))


def _modelopt(step: float, **attributes: Any) -> nn.Module:
    """Behind an nn.ReLU: unsigned, it raises an error for a negative number."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    config = QuantizerAttributeConfig(num_bits=BITS, unsigned=True, **attributes)
    return nn.Sequential(nn.ReLU(), TensorQuantizer(config, amax=TOP * step))


def _modelopt_signed(step: float) -> nn.Module:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(num_bits=BITS), amax=(TOP // 2) * step)


def _nncf(step: float) -> nn.Module:
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its kernels are compiled at the first call
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer

    spec = PTQuantizerSpec(
        num_bits=BITS, mode=QuantizationScheme.SYMMETRIC, signedness_to_force=False, narrow_range=False,
        half_range=False, scale_shape=(1,), logarithm_scale=False,
    )  # fmt: skip
    made = SymmetricQuantizer(spec)
    made.scale = nn.Parameter(torch.tensor([TOP * step]))
    return made


def _compressed_tensors(step: float) -> nn.Module:
    """Its range for 4 asymmetric bits is -8 to 7, so that the zero point is -8."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize

    arguments = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="tensor")
    scale, zero = torch.tensor([step]), torch.tensor([-(2 ** (BITS - 1))])
    return _Called(lambda x: fake_quantize(x, scale.to(x.dtype), zero, arguments))


class _Jax(torch.autograd.Function):
    """A function of JAX, forward and backward, on float32."""

    @staticmethod
    def forward(ctx, x, function):
        import jax

        y, ctx.vjp = jax.vjp(function, x.detach().numpy())
        return torch.from_numpy(_numpy(y))

    @staticmethod
    def backward(ctx, dy):
        return torch.from_numpy(_numpy(ctx.vjp(dy.contiguous().numpy())[0])), None


class _TensorFlow(torch.autograd.Function):
    """The same of TensorFlow."""

    @staticmethod
    def forward(ctx, x, function):
        import tensorflow

        ctx.x = tensorflow.constant(x.detach().numpy())
        with tensorflow.GradientTape(persistent=True) as ctx.tape:
            ctx.tape.watch(ctx.x)
            ctx.y = function(ctx.x)
        return torch.from_numpy(_numpy(ctx.y))

    @staticmethod
    def backward(ctx, dy):
        import tensorflow

        seed = tensorflow.constant(dy.contiguous().numpy())
        return torch.from_numpy(_numpy(ctx.tape.gradient(ctx.y, ctx.x, output_gradients=seed))), None


def _numpy(array: Any) -> Any:
    import numpy

    return numpy.array(array, dtype=numpy.float32)


def _aqt(step: float) -> nn.Module:
    from aqt.jax.v2.numerics.int_numerics import IntSymmetric

    numerics = IntSymmetric(
        bits=BITS, preserve_zero=True, preserve_max_val=True, clip=True, clip_gradient=True, round=True, noise_fn=None
    )

    def function(x):
        import jax

        @jax.custom_vjp
        def code(u):
            return numerics.vjp_fwd(u, None)[0]

        code.defvjp(lambda u: numerics.vjp_fwd(u, None), lambda saved, grad: numerics.vjp_bwd(saved, grad)[:1])
        return code(x / step) * step

    return _Called(lambda x: _Jax.apply(x, function))


def _qkeras(step: float) -> nn.Module:
    """The number of integer bits, which is a power of two, sets the step: step * 2**4 = 2**integer."""
    from math import log2

    from qkeras import quantized_relu

    integer = log2(step * 2**BITS)
    if not integer.is_integer():
        raise ValueError("quantized_relu has steps that are powers of two")
    made = quantized_relu(BITS, int(integer))
    return _Called(lambda x: _TensorFlow.apply(x, made))


def _larq(step: float) -> nn.Module:
    """Its range is [0, 1]."""
    import larq

    made = larq.quantizers.DoReFa(k_bit=BITS, mode="activations")
    return _Called(lambda x: _TensorFlow.apply(x, lambda u: made(u / (TOP * step)) * (TOP * step)))


def _tensorflow(step: float) -> nn.Module:
    import tensorflow

    quantize = tensorflow.quantization.fake_quant_with_min_max_args
    return _Called(lambda x: _TensorFlow.apply(x, lambda u: quantize(u, 0, TOP * step, num_bits=BITS)))


@dataclass(frozen=True)
class Quantizer:
    """make(step): a quantizer of 4 bits whose levels are multiples of step.

    distribution: what is installed, by the name that pip knows, and `module`, which it must have; package: as the table
    calls it. settings: of a QReLU (QSigned if signed) that comes nearest, without bits and alpha, and None where there
    is no sense in one. after_relu: such a QReLU stands behind an nn.ReLU. moving(): one in the state in which a forward
    moves something. step_of(made): the parameter that is learned, and how many steps it is.
    """

    label: str
    distribution: str
    module: str
    make: Callable[[float], nn.Module]
    settings: dict[str, Any] | None = None
    after_relu: bool = False
    signed: bool = False
    framework: str = "torch"
    moving: Callable[[], nn.Module] | None = None
    step_of: Callable[[Any], tuple[nn.Parameter, int]] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module.split(".")[0]) is not None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.distribution).partition("+")[0]

    def match(self, step: float) -> nn.Module:
        """The QReLU or QSigned of `settings`."""
        assert self.settings is not None
        layer = (cg.QSigned if self.signed else cg.QReLU)(BITS, alpha=step, **self.settings)
        return nn.Sequential(nn.ReLU(), layer) if self.after_relu else layer


_ONLY_FLOAT32 = (torch.float32,)
_NEAREST = {"rounding": "nearest"}
_FAKE = {**_NEAREST, "ste": "trust"}

QUANTIZERS = {
    quantizer.label: quantizer
    for quantizer in (
        Quantizer("QReLU", "coarsegrad", "coarsegrad", lambda step: cg.QReLU(BITS, alpha=step)),
        Quantizer("QReLU, nearest", "coarsegrad", "coarsegrad", lambda step: cg.QReLU(BITS, alpha=step, **_NEAREST)),
        Quantizer(
            "QReLU, nearest, chain", "coarsegrad", "coarsegrad",
            lambda step: cg.QReLU(BITS, alpha=step, learn_alpha=True, alpha_grad="chain", **_NEAREST),
            step_of=lambda made: (made.alpha, 1),
        ),
        Quantizer("QSigned", "coarsegrad", "coarsegrad", lambda step: cg.QSigned(BITS, alpha=step), signed=True),
        Quantizer("torch.fake_quantize_per_tensor_affine", "torch", "torch", _fake_quantize, _FAKE),
        Quantizer(
            "torch._fake_quantize_learnable_per_tensor_affine", "torch", "torch", _Learnable,
            {**_FAKE, "learn_alpha": True, "alpha_grad": "chain"}, step_of=lambda made: (made.scale, 1),
        ),
        Quantizer("torch.ao.quantization.FakeQuantize", "torch", "torch", _observed, _FAKE, moving=_observing),
        Quantizer("brevitas.nn.QuantReLU", "brevitas", "brevitas", _brevitas, _FAKE, after_relu=True),
        Quantizer(
            "brevitas.nn.QuantReLU, learned", "brevitas", "brevitas", lambda step: _brevitas(step, "parameter"),
            {**_FAKE, "learn_alpha": True, "alpha_grad": "chain"}, after_relu=True, moving=_brevitas_default,
            step_of=lambda made: (next(made.parameters()), TOP),
        ),
        Quantizer("torchao _fake_quantize_affine", "torchao", "torchao", _torchao, _FAKE),
        Quantizer(
            "ReLU, modelopt TensorQuantizer", "nvidia-modelopt", "modelopt", _modelopt, {**_NEAREST, "ste": "relu"}
        ),
        Quantizer(
            "ReLU, modelopt TensorQuantizer, pass_through_bwd=False", "nvidia-modelopt", "modelopt",
            lambda step: _modelopt(step, pass_through_bwd=False), _NEAREST,
        ),
        Quantizer(
            "modelopt TensorQuantizer, signed", "nvidia-modelopt", "modelopt", _modelopt_signed, {"ste": "identity"},
            signed=True,
        ),
        Quantizer(
            "nncf SymmetricQuantizer", "nncf", "nncf", _nncf,
            {**_NEAREST, "learn_alpha": True, "alpha_grad": "chain"}, step_of=lambda made: (made.scale, TOP),
        ),
        Quantizer(
            "compressed-tensors fake_quantize", "compressed-tensors", "compressed_tensors", _compressed_tensors,
            _NEAREST,
        ),
        Quantizer(
            "aqt IntSymmetric", "aqtp", "aqt", _aqt, {"ste": "clipped"}, signed=True, framework="jax",
            dtypes=_ONLY_FLOAT32,
        ),
        Quantizer(
            "qkeras.quantized_relu", "qkeras", "qkeras", _qkeras, _NEAREST, framework="tensorflow",
            dtypes=_ONLY_FLOAT32,
        ),
        Quantizer(
            "larq.quantizers.DoReFa", "larq", "larq", _larq, _NEAREST, framework="tensorflow", dtypes=_ONLY_FLOAT32
        ),
        Quantizer(
            "tensorflow fake_quant_with_min_max_args", "tensorflow", "tensorflow", _tensorflow, _NEAREST,
            framework="tensorflow", dtypes=_ONLY_FLOAT32,
        ),
    )
}  # fmt: skip
