"""The modules: `QReLU`, an nn.ReLU with low-bit outputs, and `QReLULinear` and `QReLUConv2d`, which fuse it with the
next layer."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from ._alphas import initial_alpha, keep_wide, readable, reshape_alpha
from ._checks import check_alpha_scale, check_bits, check_option, checked_values
from ._fused import register_flop_formulas
from ._torch_internals import suggest_memory_format
from ._types import (
    ALPHA_GRADS,
    ROUNDINGS,
    AlphaGrad,
    AlphaGradName,
    AlphaScale,
    Rounding,
    RoundingName,
    SteName,
)
from .functional import qrelu, qrelu_conv2d, qrelu_linear
from .mlp import product_of, qrelu_gated_mlp, qrelu_mlp
from .packing import packed_activations, square
from .ste import check_inplace, get_ste, saved


@functools.cache
def half_gaussian_alpha(bits: int, rounding: RoundingName = "ceil") -> float:
    """The alpha that minimises the mean squared error E[(x - Q(x))**2] for x = max(z, 0), z a unit Gaussian.

    This is the input distribution after a BatchNorm without affine. The error is a sum of closed forms, one per stair,
    and is minimised numerically over alpha. The result is rounded to 6 decimals.

    bits: 1..8.
    rounding: "ceil", "nearest" or "hwgq".
    """
    check_bits(bits)
    check_option("rounding", rounding, ROUNDINGS)
    q = 2**bits - 1

    def error(alpha: float) -> float:
        edges = [(k - 1 if rounding == "ceil" else k - 0.5) * alpha for k in range(1, q + 1)]
        if rounding == "hwgq":
            edges[0] = 0.0
        total = 0.0
        # A stair from `low` to `high` at height y: the integral of (x - y)**2 phi from those of phi, x phi, x**2 phi.
        for k, (low, high) in enumerate(zip([0.0, *edges], [*edges, 40.0])):
            y = k * alpha
            density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in (low, high)]
            mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
            first = density[0] - density[1]
            second = mass + low * density[0] - high * density[1]
            total += second - 2 * y * first + y * y * mass
        return total

    # Golden-section search. The error has one minimum, with the top level between 0.7 and 5 standard deviations.
    low, high, ratio = 0.5 / q, 6.0 / q, (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return round((low + high) / 2, 6)


# What alpha's value depends on. Stored in the state_dict in a fixed number of bytes, as distributed checkpoints need.
_MEANING = ("bits", "rounding", "squared")
_STATE_BYTES = 256


class QReLU(torch.nn.Module):
    """nn.ReLU with 2**bits output levels: y = alpha * clamp(ceil(x / alpha), 0, q), q = 2**bits - 1.

    Forward, gradients, what is saved for backward, and the papers are those of `coarsegrad.qrelu`.

    bits: 1..8.
    ste: the coarse gradient, a name in `coarsegrad.stes()`.
    rounding: "ceil", "nearest" or "hwgq".
    alpha: the height of a stair, finite and > 0: a number, or a tensor of shape [1], or [num_channels] if that is
        given. None (default): the alpha with the least mean squared error for a unit Gaussian input, such as the output
        of a BatchNorm without affine (`half_gaussian_alpha`).
    learn_alpha: make alpha a Parameter instead of a buffer. Its shape is [1] or [num_channels]. It is float32, even
        after `.half()`, `.bfloat16()` and the like; float64 if the given tensor is, and after `.double()`.
    alpha_grad: "exact", "three_valued", "two_valued" or "chain": the gradient of a learned alpha.
    alpha_scale: a factor of that gradient: a number, or "lsq", 1 / sqrt(n * q) for n elements of x per sample.
    num_channels: the number of per-channel alphas. None: a single alpha.
    channel_dim: the dimension of the channels, if num_channels is given. Negative values count from the end.
    inplace: write y into x, like nn.ReLU(inplace=True).
    dropout: in [0, 1): the probability p of an nn.Dropout after the activation, in training. It is applied before the
        activation, to x / (1 - p) with the levels of alpha / (1 - p) (if the output is squared, with the root of
        1 - p). This is the same network up to the rounding of the quotient. A dropped element has code 0 and hence no
        gradient, so that no dropout mask is saved, and the next layer can save the output as codes.
    squared: the output is y * y, as in models with relu(x)**2. Its gradient is dy * 2 y * g'(u).

    Saved for backward with the defaults: 1 bit per element. If squared, also y (as codes in `packed_activations`).

    The state_dict contains alpha and, as `_extra_state`, what alpha belongs to: bits, rounding, ste, squared,
    channel_dim. `load_state_dict` rejects an alpha with other bits, rounding or squared, and one that is not finite
    and > 0. It warns if ste differs, and adopts the shape and channel_dim. Without `_extra_state` the shape must match.

    Raises TypeError or ValueError for an illegal argument, including inplace=True with an STE or alpha_grad that saves
    x itself, and dropout with an STE whose g'(0) != 0 ("identity").
    """

    alpha: Tensor
    parametrizations: Any
    limit = math.inf  # the upper bound of the replaced float activation, for `calibrate`

    def __init__(
        self,
        bits: int = 4,
        *,
        ste: SteName = "clipped_relu",
        rounding: RoundingName = "ceil",
        alpha: float | Tensor | None = None,
        learn_alpha: bool = False,
        alpha_grad: AlphaGradName = "three_valued",
        alpha_scale: AlphaScale = 1.0,
        num_channels: int | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        dropout: float = 0.0,
        squared: bool = False,
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_option("rounding", rounding, ROUNDINGS)
        check_option("alpha_grad", alpha_grad, ALPHA_GRADS)
        check_alpha_scale(alpha_scale)
        if num_channels is not None and (type(num_channels) is not int or num_channels < 1):
            raise ValueError(f"num_channels must be None or an int >= 1, got {num_channels!r}")
        if type(channel_dim) is not int:
            raise TypeError(f"channel_dim must be an int, got {channel_dim!r}")
        get_ste(ste)
        if inplace:
            check_inplace(ste, rounding, alpha_grad, need_grad_alpha=learn_alpha)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
        if dropout and get_ste(ste).passes_zero:
            raise ValueError(f"dropout needs an STE without a gradient at 0, got ste={ste!r}")
        self.bits = bits
        self.ste = ste
        self.rounding = rounding
        self.alpha_grad = alpha_grad
        self.alpha_scale = alpha_scale
        self.channel_dim = None if num_channels is None else channel_dim
        self.inplace = inplace
        # Without dropout an int: torch.compile(dynamic=True) makes the floats that a module reads inputs of its graph.
        self.dropout = float(dropout) if dropout else 0
        self.squared = squared
        alpha = half_gaussian_alpha(bits, rounding) if alpha is None else alpha
        made = initial_alpha(alpha, num_channels or 1)
        self._initial = (made.clone() if isinstance(alpha, Tensor) else float(alpha)), self.channel_dim
        if learn_alpha:
            self.alpha = torch.nn.Parameter(made)
        else:
            self.register_buffer("alpha", made)

    def reset_parameters(self) -> None:
        """Reset alpha to its initial value, for deferred initialisation."""
        alpha, channel_dim = self._initial
        if not isinstance(alpha, Tensor):
            alpha, channel_dim = torch.full_like(self.alpha, alpha), self.channel_dim
        self._set_alpha(alpha, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        # What is read here is what torch.compile guards on: not `training` without dropout, nor an unused scale.
        alpha_scale: AlphaScale = 1.0
        alpha = self._buffers.get("alpha")  # nn.Module's lookup takes a tenth of a small forward
        if alpha is None:
            alpha, alpha_scale = self.alpha, self.alpha_scale
        if self.dropout and self.training:
            y = self._with_dropout(x, alpha)
        else:
            # The same as `settings`, whose dict would take a tenth of a small tensor's forward.
            y = qrelu(
                x, alpha, self.bits, ste=self.ste, rounding=self.rounding, alpha_grad=self.alpha_grad,
                alpha_scale=alpha_scale, channel_dim=self.channel_dim, inplace=self.inplace,
            )  # fmt: skip
        return square(y) if self.squared else y

    def _with_dropout(self, x: Tensor, alpha: Tensor) -> Tensor:
        # The output of dropout has no other user: overwrite it unless the backward saves it.
        options = get_ste(self.ste).needs, Rounding[self.rounding], AlphaGrad[self.alpha_grad]
        inplace = not saved(*options, need_grad_x=True, need_grad_alpha="alpha" not in self._buffers).x
        return _dropped_qrelu(x, alpha, *self._dropout(), self.bits, **self.settings(), inplace=inplace)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, alpha), or in training with dropout (x with elements dropped, the matching alpha)."""
        if not self.training or not self.dropout:
            return x, self.alpha
        return _dropped(x, self.alpha, *self._dropout())

    def _dropout(self) -> tuple[float, float]:
        """(p, the divisor of x and alpha)"""
        return self.dropout, (1 - self.dropout) ** (0.5 if self.squared else 1.0)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments for `coarsegrad.qrelu`, except inplace."""
        return {
            "ste": self.ste,
            "rounding": self.rounding,
            "alpha_grad": self.alpha_grad,
            "alpha_scale": self.alpha_scale,
            "channel_dim": self.channel_dim,
        }

    @torch.no_grad()
    def _set_alpha(self, alpha: Tensor, channel_dim: int | None) -> None:
        """Set alpha to values of shape [1], or [C] along channel_dim. Its dtype and device stay.

        A Parameter stays the same object even if its shape changes; then a ValueError if an optimizer has state for it.
        A parametrized alpha is set through its right_inverse, so that `self.alpha` takes the given values.
        """
        if alpha.shape != self.alpha.shape:
            reshape_alpha(self._stored_alpha(), alpha)
        if is_parametrized(self, "alpha"):
            self.alpha = alpha.to(self.alpha, copy=True)
        else:
            self.alpha.copy_(alpha)
        self.channel_dim = channel_dim

    def _stored_alpha(self) -> Tensor:
        """alpha, or the tensor from which a parametrization computes it."""
        return self.parametrizations.alpha.original if is_parametrized(self, "alpha") else self.alpha

    def _apply(self, fn, recurse=True):
        """Like nn.Module's, but alpha stays at least float32: in bfloat16 every level would move and small updates be
        lost, and in float16 a small alpha would be 0."""
        return super()._apply(lambda t: keep_wide(fn(t), t), recurse)

    def get_extra_state(self) -> Tensor:
        """What alpha belongs to, as JSON in a uint8 tensor, which every file format and collective supports."""
        said = {name: getattr(self, name) for name in (*_MEANING, "ste", "channel_dim")}
        return torch.tensor(list(json.dumps(said).encode().ljust(_STATE_BYTES)), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raise a ValueError if `state` is of a QReLU whose alpha has another meaning. Sets nothing."""
        self._checked(state)

    def _checked(self, state: Tensor) -> dict[str, Any]:
        """The contents of an extra state; empty if it cannot be read here."""
        if not readable(state):
            return {}
        try:
            said = json.loads(bytes(state.to(torch.uint8).tolist()))
        except ValueError:
            raise ValueError("its _extra_state must be one that a QReLU saved, got other bytes") from None
        other = [name for name in _MEANING if said.get(name, getattr(self, name)) != getattr(self, name)]
        if other:
            got = ", ".join(f"{name}={said[name]!r}" for name in other)
            wanted = ", ".join(f"{name}={getattr(self, name)!r}" for name in other)
            raise ValueError(f"got the alpha of a QReLU with {got}, wanted one with {wanted}")
        return said

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        extra = f"{prefix}_extra_state"
        parametrized = is_parametrized(self, "alpha")
        key = prefix + ("parametrizations.alpha.original" if parametrized else "alpha")
        try:
            said = self._checked(state[extra]) if extra in state else {}
            if (ste := said.get("ste", self.ste)) != self.ste:  # the network computes the same
                trained = f"{prefix}alpha was trained with ste={ste!r}"
                warnings.warn(f"{trained} but is loaded for {self.ste!r}", stacklevel=2)
            if isinstance(state.get(key), Tensor):
                alpha = state[key].detach()
                local = alpha.to_local() if hasattr(alpha, "to_local") else alpha
                if not parametrized and readable(local):
                    checked_values(local.cpu(), self.alpha.dtype)
                if keep_wide(alpha, alpha) is not alpha:
                    state[key] = keep_wide(alpha, alpha)
                if "channel_dim" in said:
                    self._take_shape(alpha, said["channel_dim"])
        except ValueError as error:
            errors.append(f"{prefix}alpha: {error}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if extra in missing:  # files from older versions lack it
            missing.remove(extra)

    def _take_shape(self, alpha: Tensor, channel_dim: int | None) -> None:
        """Adopt the shape of an alpha to load, if it is valid with channel_dim."""
        if alpha.dim() != 1 or (channel_dim is None and alpha.numel() != 1):
            return
        if alpha.shape != self._stored_alpha().shape:
            reshape_alpha(self._stored_alpha(), alpha)
        self.channel_dim = channel_dim

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise TypeError("torch.jit.script cannot compile a QReLU; torch.jit.trace, torch.export and torch.compile can")

    def extra_repr(self) -> str:
        words = [f"bits={self.bits}", f"ste={self.ste!r}", f"rounding={self.rounding!r}"]
        if self.channel_dim is not None:
            words += [f"num_channels={self.alpha.numel()}", f"channel_dim={self.channel_dim}"]
        elif readable(self.alpha):
            with contextlib.suppress(RuntimeError, AssertionError):  # an empty shard; in a FakeTensorMode
                words.append(f"alpha={self.alpha.item():.6g}")
        if isinstance(self.alpha, torch.nn.Parameter):
            words += ["learn_alpha=True", f"alpha_grad={self.alpha_grad!r}"]
            words += [f"alpha_scale={self.alpha_scale!r}"] if self.alpha_scale != 1 else []
        words += [f"{name}=True" for name in ("inplace", "squared") if getattr(self, name)]
        if self.dropout:
            words.append(f"dropout={self.dropout:g}")
        return ", ".join(words)


def _dropped(x: Tensor, alpha: Tensor, p: float, divisor: float) -> tuple[Tensor, Tensor]:
    """(x / divisor with each element set to 0 with probability p, alpha / divisor), with nn.Dropout's random numbers.

    Elements are set to 0 without autograd, so that no mask is saved: the activation that follows has no gradient at 0.
    """
    y = x / divisor
    ones = torch.ones_like(x, memory_format=suggest_memory_format(x))  # in the layout of the activation's output
    y.detach().masked_fill_(F.dropout(ones, p).logical_not(), 0)
    return y, alpha / divisor


def _dropped_qrelu(x: Tensor, alpha: Tensor, p: float, divisor: float, bits: int, **settings: Any) -> Tensor:
    return qrelu(*_dropped(x, alpha, p, divisor), bits, **settings)


# Otherwise torch.fx would bake the value of alpha / divisor into the graph.
torch.fx.wrap("_dropped")
torch.fx.wrap("_dropped_qrelu")


def _is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether a call of the module is the forward of `kind` and nothing else: no subclass, no hooks."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    own = type(module) is kind and "forward" not in module.__dict__
    return own and not any(getattr(module, name) for name in hooks)


def _check_modules(kind: type[torch.nn.Module], wanted: str, **modules: object) -> None:
    for name, module in modules.items():
        if not isinstance(module, kind):
            raise TypeError(f"{name} must be {wanted}, got {type(module).__name__}")


class _ActivationAndLayer(torch.nn.Module):
    """Base of the fused modules. `layer` may be any replacement of a `_fusable`; only exact instances are fused."""

    _fusable: type[torch.nn.Module]
    activation: QReLU
    layer: Any

    def __init__(self, activation: QReLU, layer: torch.nn.Module) -> None:
        super().__init__()
        _check_modules(QReLU, "a QReLU", activation=activation)
        _check_modules(torch.nn.Module, "an nn.Module", layer=layer)
        self.activation, self.layer = activation, layer
        register_flop_formulas()

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses():
            return self._fused(x)
        with packed_activations():
            return self.layer(self.activation(x))

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _fuses(self) -> bool:
        """Whether fusing skips nothing: no square, no overridden forward, no hooks."""
        activation, layer = self.activation, self.layer
        plain = _is_plain(activation, QReLU) and _is_plain(layer, self._fusable)
        return plain and not activation.squared


class QReLULinear(_ActivationAndLayer):
    """A QReLU and the next Linear, layer(activation(x)), computed by `coarsegrad.qrelu_linear`.

    activation: a `QReLU`. Its `inplace` has no effect.
    layer: an nn.Linear.

    Both stay modules with their own parameters and may be replaced. If `layer` is something else, such as a subclass or
    a LoRA adapter, or one of them has hooks, they run one after the other inside `packed_activations`.

    Saved for backward: what `qrelu_linear` saves.

    Raises TypeError if activation is not a QReLU or layer not a module.
    """

    _fusable = torch.nn.Linear

    def _fused(self, x: Tensor) -> Tensor:
        activation, layer = self.activation, self.layer
        x, alpha = activation.before(x)
        return qrelu_linear(x, alpha, layer.weight, layer.bias, activation.bits, **activation.settings())


class QReLUMLP(QReLULinear):
    """A Linear, a QReLU and a Linear, layer(activation(first(x))), computed by `coarsegrad.qrelu_mlp`.

    first, layer: nn.Linears.
    activation: a `QReLU`. Its `inplace` has no effect.

    All stay modules with their own parameters and may be replaced. If `first` is something else, such as a LoRA
    adapter, or has hooks, or the activation has dropout in training, `first` runs by itself and the others as in
    `QReLULinear`. Saved for backward: what `qrelu_mlp` saves.

    Raises TypeError if activation is not a QReLU, or first or layer not a module.
    """

    first: Any

    def __init__(self, first: torch.nn.Module, activation: QReLU, layer: torch.nn.Module) -> None:
        super().__init__(activation, layer)
        _check_modules(torch.nn.Module, "an nn.Module", first=first)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        activation, layer = self.activation, self.layer
        first, drops = self.first, activation.dropout and activation.training
        linears = _is_plain(first, torch.nn.Linear) and _is_plain(layer, torch.nn.Linear)
        if drops or not linears or not _is_plain(activation, QReLU):
            return super().forward(first(x))
        return qrelu_mlp(
            x, first.weight, first.bias, activation.alpha, layer.weight, layer.bias, activation.bits,
            **activation.settings(), squared=activation.squared,
        )  # fmt: skip


class QReLUGatedMLP(torch.nn.Module):
    """A gated MLP with two QReLUs, down(gate_activation(gate(x)) * up_activation(up(x))), computed by
    `coarsegrad.qrelu_gated_mlp`.

    gate, up, down: nn.Linears; gate_activation, up_activation: `QReLU`s, each with its alpha. `inplace` has no effect.

    All stay modules and may be replaced. If a layer is something else, such as a LoRA adapter, one of them has hooks,
    or the activations differ in more than alpha or have dropout in training or squares, they run one after the other
    inside `packed_activations`. Saved for backward: what `qrelu_gated_mlp` saves.

    Raises TypeError if an activation is not a QReLU, or a layer not a module.
    """

    gate: Any
    up: Any
    down: Any

    def __init__(self, gate: torch.nn.Module, gate_activation: QReLU, up: torch.nn.Module, up_activation: QReLU,
                 down: torch.nn.Module) -> None:  # fmt: skip
        super().__init__()
        _check_modules(torch.nn.Module, "an nn.Module", gate=gate, up=up, down=down)
        _check_modules(QReLU, "a QReLU", gate_activation=gate_activation, up_activation=up_activation)
        self.gate, self.up, self.down = gate, up, down
        self.gate_activation, self.up_activation = gate_activation, up_activation
        register_flop_formulas()

    def _fuses(self) -> bool:
        first, second = activations = self.gate_activation, self.up_activation
        plain = all(_is_plain(each, torch.nn.Linear) for each in (self.gate, self.up, self.down))
        if not plain or not all(_is_plain(each, QReLU) for each in activations):
            return False
        changed = any(each.squared or (each.dropout and each.training) for each in activations)
        return not changed and first.bits == second.bits and first.settings() == second.settings()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate, self.up, self.down
        if self._fuses():
            return qrelu_gated_mlp(
                x, gate.weight, up.weight, down.weight, self.gate_activation.alpha, self.up_activation.alpha,
                self.gate_activation.bits, gate_bias=gate.bias, up_bias=up.bias, down_bias=down.bias,
                **self.gate_activation.settings(),
            )  # fmt: skip
        with packed_activations():
            return down(product_of(self.gate_activation(gate(x)), self.up_activation(up(x))))


class QReLUConv2d(_ActivationAndLayer):
    """A QReLU and the next Conv2d, layer(activation(x)), computed by `coarsegrad.qrelu_conv2d`.

    activation: a `QReLU`. Its `inplace` has no effect.
    layer: an nn.Conv2d. One with padding given as a string or a padding_mode other than "zeros" is not fused.

    Everything else is as for `QReLULinear`.
    """

    _fusable = torch.nn.Conv2d

    def _fuses(self) -> bool:
        return super()._fuses() and self.layer.padding_mode == "zeros" and not isinstance(self.layer.padding, str)

    def _fused(self, x: Tensor) -> Tensor:
        activation, layer = self.activation, self.layer
        settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        x, alpha = activation.before(x)
        return qrelu_conv2d(x, alpha, layer.weight, layer.bias, activation.bits, **settings, **activation.settings())
