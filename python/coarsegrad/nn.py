"""The modules: `QReLU`, nn.ReLU with low-bit outputs; and `QReLULinear` and `QReLUConv2d`, it and the next layer."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from ._fused import register_flop_formulas
from ._torch_internals import suggest_memory_format
from .functional import check_alpha_scale, qrelu, qrelu_conv2d, qrelu_linear
from .packing import packed_activations, square
from .reference import check_bits, check_number, check_word, checked_values, wide_dtype
from .ste import ALPHA_GRADS, ROUNDINGS, check_inplace, get_ste, kept


@functools.cache
def half_gaussian_alpha(bits: int, rounding: str = "ceil") -> float:
    """The alpha of least mean squared error E[(x - Q(x))**2] for x = max(z, 0), z a unit Gaussian, to 6 decimals.

    That is what a BatchNorm without affine hands to the activation. It is found by minimising in the one unknown,
    alpha; the error is a sum of closed forms, one for each stair. bits: 1..8. rounding: "ceil", "nearest" or "hwgq".
    """
    check_bits(bits)
    check_word("rounding", rounding, ROUNDINGS)
    q = 2**bits - 1

    def error(alpha: float) -> float:
        edges = [(k - 1 if rounding == "ceil" else k - 0.5) * alpha for k in range(1, q + 1)]
        if rounding == "hwgq":
            edges[0] = 0.0
        total = 0.0
        # A stair from `low` to `high` at height y: the integral of (x - y)**2 phi, from those of phi, x phi, x**2 phi.
        for k, (low, high) in enumerate(zip([0.0, *edges], [*edges, 40.0])):
            y = k * alpha
            density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in (low, high)]
            mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
            first = density[0] - density[1]
            second = mass + low * density[0] - high * density[1]
            total += second - 2 * y * first + y * y * mass
        return total

    # Golden section. The error has one minimum; the top level there is between 0.7 and 5 standard deviations.
    low, high, ratio = 0.5 / q, 6.0 / q, (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return round((low + high) / 2, 6)


# What makes an alpha another one. Said in the state_dict in so many bytes: distributed checkpoints want one size.
_MEANING = ("bits", "rounding", "squared")
_STATE_BYTES = 256


class QReLU(torch.nn.Module):
    """nn.ReLU with 2**bits output levels: y = alpha * clamp(ceil(x / alpha), 0, q), q = 2**bits - 1.

    Forward, gradients, what is kept for the backward, and the papers are those of `coarsegrad.qrelu`.

    bits: 1..8.
    ste: the coarse gradient, a name in `coarsegrad.stes()`.
    rounding: "ceil", "nearest" or "hwgq".
    alpha: the height of a stair, finite and > 0: a number, or a tensor of shape [1], or [num_channels] where that is
        given. None (default): the one of least mean squared error for a unit Gaussian input, as BatchNorm without
        affine makes it (`half_gaussian_alpha`).
    learn_alpha: alpha is a Parameter; else it is a buffer. Both are of shape [1] or [num_channels] and float32, also
        after `.half()`, `.bfloat16()` and the like; float64 where the tensor given is, and after `.double()`.
    alpha_grad: "exact", "three_valued", "two_valued" or "chain": the gradient of a learned alpha.
    alpha_scale: a factor of that gradient: a number, or "lsq", 1 / sqrt(n * q), n the elements of x per sample.
    num_channels: None: one alpha; else one for each channel.
    channel_dim: the dimension of the channels, where num_channels is given; negative counts from the end.
    inplace: write y into x, as nn.ReLU(inplace=True) does.
    dropout: in 0..1 without 1: the probability p of an nn.Dropout after the activation, in training. It is done before
        it, on x / (1 - p) with the levels of alpha / (1 - p) (where the output is squared, with the root of 1 - p): the
        same network, but for the rounding of the quotient. A dropped element is code 0 and has no gradient by that
        alone, so that no mask of dropout is kept, and the output has levels, which the next layer can keep as codes.
    squared: the output is y * y, as in models with relu(x)**2; its gradient is dy * 2 y * g'(u).

    Kept for the backward with the defaults: 1 bit an element. Squared, y too (its codes, in `packed_activations`).

    The state_dict has alpha, and beside it as `_extra_state` what it is for: bits, rounding, ste, squared, channel_dim.
    `load_state_dict` refuses the alpha of a QReLU that differs in one of the first four, and one that is not finite and
    > 0; it takes over the shape and channel_dim. Without `_extra_state` the alpha must be of this one's shape.

    Raises TypeError or ValueError here for whatever of these is wrong: inplace=True with an STE or rule whose backward
    keeps x itself, and dropout with an STE whose g'(0) is not 0 ("identity"), included.
    """

    limit = math.inf  # the highest value of the float activation that this stands for; `calibrate` asks

    def __init__(
        self,
        bits: int = 4,
        *,
        ste: str = "clipped_relu",
        rounding: str = "ceil",
        alpha: float | Tensor | None = None,
        learn_alpha: bool = False,
        alpha_grad: str = "three_valued",
        alpha_scale: float | str = 1.0,
        num_channels: int | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        dropout: float = 0.0,
        squared: bool = False,
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_word("rounding", rounding, ROUNDINGS)
        check_word("alpha_grad", alpha_grad, ALPHA_GRADS)
        check_alpha_scale(alpha_scale)
        if num_channels is not None and (type(num_channels) is not int or num_channels < 1):
            raise ValueError(f"num_channels must be None or an int >= 1, got {num_channels!r}")
        if type(channel_dim) is not int:
            raise TypeError(f"channel_dim must be an int, got {channel_dim!r}")
        get_ste(ste)
        if inplace:
            check_inplace(ste, rounding, alpha_grad if learn_alpha else None)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number in 0..1 and below 1, got {dropout!r}")
        if dropout and get_ste(ste).passes_zero:
            raise ValueError(f"dropout needs an STE without a gradient at 0, got ste={ste!r}")
        self.bits = bits
        self.ste = ste
        self.rounding = rounding
        self.alpha_grad = alpha_grad
        self.alpha_scale = alpha_scale
        self.channel_dim = None if num_channels is None else channel_dim
        self.inplace = inplace
        self.dropout = float(dropout)
        self.squared = squared
        alpha = half_gaussian_alpha(bits, rounding) if alpha is None else alpha
        made = _initial_alpha(alpha, num_channels or 1)
        self._initial = (made.clone() if isinstance(alpha, Tensor) else float(alpha)), self.channel_dim
        if learn_alpha:
            self.alpha = torch.nn.Parameter(made)
        else:
            self.register_buffer("alpha", made)

    def reset_parameters(self) -> None:
        """alpha as it was given; one number for all channels where it was a number. For deferred initialisation."""
        alpha, channel_dim = self._initial
        if not isinstance(alpha, Tensor):
            alpha, channel_dim = torch.full_like(self.alpha, alpha), self.channel_dim
        self._set_alpha(alpha, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self._buffers.get("alpha")  # Module's own search for a buffer costs a tenth of a small tensor's forward
        if alpha is None:
            alpha = self.alpha
        if self.training and self.dropout:
            y = self._with_dropout(x, alpha)
        else:
            # Word for word what `settings` says, as a dict costs a tenth of a small tensor's forward.
            y = qrelu(
                x, alpha, self.bits, ste=self.ste, rounding=self.rounding, alpha_grad=self.alpha_grad,
                alpha_scale=self.alpha_scale, channel_dim=self.channel_dim, inplace=self.inplace,
            )  # fmt: skip
        return square(y) if self.squared else y

    def _with_dropout(self, x: Tensor, alpha: Tensor) -> Tensor:
        # What dropout made is nobody else's: it may be written over, but where the backward keeps it.
        alpha_grad = None if "alpha" in self._buffers else self.alpha_grad
        inplace = not kept(self.ste, self.rounding, alpha_grad)[2]
        return _dropped_qrelu(x, alpha, *self._dropout(), self.bits, **self.settings(), inplace=inplace)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, alpha), or in training with dropout (x with elements dropped, alpha to go with them)."""
        if not self.training or not self.dropout:
            return x, self.alpha
        return _dropped(x, self.alpha, *self._dropout())

    def _dropout(self) -> tuple[float, float]:
        """(p, what x and alpha are divided by)"""
        return self.dropout, (1 - self.dropout) ** (0.5 if self.squared else 1.0)

    def settings(self) -> dict[str, str | float | int | None]:
        """The keywords of `coarsegrad.qrelu` that say what is computed."""
        return {
            "ste": self.ste,
            "rounding": self.rounding,
            "alpha_grad": self.alpha_grad,
            "alpha_scale": self.alpha_scale,
            "channel_dim": self.channel_dim,
        }

    @torch.no_grad()
    def _set_alpha(self, alpha: Tensor, channel_dim: int | None) -> None:
        """Gives alpha these values, of shape [1], or [C] along channel_dim, in the dtype and on the device that it has.

        A Parameter stays the same object, also where the shape changes: a ValueError if an optimizer has state for it.
        A parametrized alpha is set through its right_inverse, so that `self.alpha` is then what was given.
        """
        if alpha.shape != self.alpha.shape:
            _reshape(self._stored_alpha(), alpha)
        if is_parametrized(self, "alpha"):
            self.alpha = alpha.to(self.alpha, copy=True)
        else:
            self.alpha.copy_(alpha)
        self.channel_dim = channel_dim

    def _stored_alpha(self) -> Tensor:
        """alpha, or what a parametrization computes it from."""
        return self.parametrizations.alpha.original if is_parametrized(self, "alpha") else self.alpha

    def _apply(self, fn, recurse=True):
        """As nn.Module's, but alpha stays 32 bits wide: 8 bits of mantissa move every level, and no small step moves
        an alpha of so few; in float16 a small one is 0."""
        return super()._apply(lambda t: _wide(fn(t), t), recurse)

    def get_extra_state(self) -> Tensor:
        """What alpha is for, as JSON in a uint8 tensor, which every file format and collective takes."""
        said = {name: getattr(self, name) for name in (*_MEANING, "ste", "channel_dim")}
        return torch.tensor(list(json.dumps(said).encode().ljust(_STATE_BYTES)), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError where `state` is that of a QReLU whose alpha means something else. Sets nothing."""
        self._checked(state)

    def _checked(self, state: Tensor) -> dict[str, str | int | None]:
        """What an extra state says, if it can be read."""
        if not _readable(state):
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
            if (ste := said.get("ste", self.ste)) != self.ste:  # another way to train the same network
                trained = f"{prefix}alpha was trained with ste={ste!r}"
                warnings.warn(f"{trained}, and is loaded for {self.ste!r}", stacklevel=2)
            if isinstance(state.get(key), Tensor):
                alpha = state[key].detach()
                local = alpha.to_local() if hasattr(alpha, "to_local") else alpha
                if not parametrized and _readable(local):
                    checked_values(local.cpu(), self.alpha.dtype)
                if _wide(alpha, alpha) is not alpha:
                    state[key] = _wide(alpha, alpha)
                if "channel_dim" in said:
                    self._take_shape(alpha, said["channel_dim"])
        except ValueError as error:
            errors.append(f"{prefix}alpha: {error}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if extra in missing:  # in files from before it was saved
            missing.remove(extra)

    def _take_shape(self, alpha: Tensor, channel_dim: int | None) -> None:
        """Makes room for an alpha that is loaded, unless it has no shape that goes with channel_dim."""
        if alpha.dim() != 1 or (channel_dim is None and alpha.numel() != 1):
            return
        if alpha.shape != self._stored_alpha().shape:
            _reshape(self._stored_alpha(), alpha)
        self.channel_dim = channel_dim

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise TypeError("torch.jit.script cannot compile a QReLU; torch.jit.trace, torch.export and torch.compile can")

    def extra_repr(self) -> str:
        words = [f"bits={self.bits}", f"ste={self.ste!r}", f"rounding={self.rounding!r}"]
        if self.channel_dim is not None:
            words += [f"num_channels={self.alpha.numel()}", f"channel_dim={self.channel_dim}"]
        elif _readable(self.alpha):
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
    """(x / divisor with each element 0 with probability p, alpha / divisor), by the random numbers of nn.Dropout.

    The gradient of an element is that of one that was not dropped, as it is set to 0 behind autograd's back, and
    nothing is kept: what comes after it has no gradient where an element is 0.
    """
    y = x / divisor
    ones = torch.ones_like(x, memory_format=suggest_memory_format(x))  # in the layout of the activation's output
    y.detach().masked_fill_(F.dropout(ones, p).logical_not(), 0)
    return y, alpha / divisor


def _dropped_qrelu(
    x: Tensor, alpha: Tensor, p: float, divisor: float, bits: int, **settings: str | float | int | None
) -> Tensor:
    return qrelu(*_dropped(x, alpha, p, divisor), bits, **settings)


# So that a graph has alpha itself, not what it was divided by a constant at the time.
torch.fx.wrap("_dropped")
torch.fx.wrap("_dropped_qrelu")


def _readable(t: Tensor) -> bool:
    """Whether t has values, all of them here: it is not on meta, fake, or a shard."""
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"


def _wide(new: Tensor, old: Tensor) -> Tensor:
    """new, or where that has less than 32 bits, old in float32 on new's device."""
    return old.to(new.device, torch.float32) if new.is_floating_point() and new.element_size() < 4 else new


def _reshape(t: Tensor, alpha: Tensor) -> None:
    """Gives t the values and the shape of alpha; a ValueError where somebody would be left with the old shape."""
    change = f"alpha cannot change its shape from {list(t.shape)} to {list(alpha.shape)}"
    if type(t) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{change} as a {type(t).__name__}; do it before sharding")
    for holder in gc.get_referrers(t) if t.requires_grad else ():
        state = holder.get(t) if isinstance(holder, dict) else None
        if isinstance(state, dict) and any(isinstance(s, Tensor) and s.shape == t.shape for s in state.values()):
            raise ValueError(f"{change}, as an optimizer has state for it; do it before the optimizer's first step")
    t.data, t.grad = alpha.detach().to(t, copy=True), None


def _initial_alpha(alpha: float | Tensor, size: int) -> Tensor:
    """A new tensor of shape [size], checked."""
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        return torch.full((size,), float(alpha), dtype=torch.float32)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must be of a floating dtype, got {alpha.dtype}")
    if alpha.shape != (size,):
        raise ValueError(f"alpha must have shape [{size}], got {list(alpha.shape)}")
    if _readable(alpha):
        checked_values(alpha.cpu(), wide_dtype(alpha.dtype))
    return alpha.detach().to(wide_dtype(alpha.dtype), copy=True)


class _QReLUAndLayer(torch.nn.Module):
    """Shared by the two below. `layer` may be anything in the place of a `_fusable`; only that itself is fused."""

    _fusable: type[torch.nn.Module]

    def __init__(self, activation: QReLU, layer: torch.nn.Module) -> None:
        super().__init__()
        if not isinstance(activation, QReLU):
            raise TypeError(f"activation must be a QReLU, got {type(activation).__name__}")
        if not isinstance(layer, torch.nn.Module):
            raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}")
        self.activation = activation
        self.layer = layer
        register_flop_formulas()

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses():
            return self._fused(x)
        with packed_activations():
            return self.layer(self.activation(x))

    def _fuses(self) -> bool:
        """Whether nothing would be skipped: no square, no forward of a subclass, wrapper or instance, nobody's hook."""
        plain = type(self.activation) is QReLU and type(self.layer) is self._fusable and not self.activation.squared
        if not plain or "forward" in self.activation.__dict__ or "forward" in self.layer.__dict__:
            return False
        return not any(
            getattr(module, hooks)
            for module in (self.activation, self.layer)
            for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        )


class QReLULinear(_QReLUAndLayer):
    """A QReLU and the Linear after it, layer(activation(x)), as `coarsegrad.qrelu_linear` computes it.

    activation: a `QReLU`; its `inplace` has no effect.
    layer: an nn.Linear. Both stay modules of their own, with their parameters, and may be replaced: where `layer` is
        something else (a subclass, an adapter around it, such as LoRA's), or one of the two has hooks, they run one
        after the other inside of `packed_activations`.

    Kept for the backward: what `qrelu_linear` keeps. Raises TypeError for anything but a QReLU and a module.
    """

    _fusable = torch.nn.Linear

    def _fused(self, x: Tensor) -> Tensor:
        activation, layer = self.activation, self.layer
        x, alpha = activation.before(x)
        return qrelu_linear(x, alpha, layer.weight, layer.bias, activation.bits, **activation.settings())


class QReLUConv2d(_QReLUAndLayer):
    """A QReLU and the Conv2d after it, layer(activation(x)), as `coarsegrad.qrelu_conv2d` computes it.

    activation: a `QReLU`; its `inplace` has no effect.
    layer: an nn.Conv2d; one with padding in words or a padding_mode other than "zeros" is not fused. All else is as
        for `QReLULinear`.
    """

    _fusable = torch.nn.Conv2d

    def _fuses(self) -> bool:
        return super()._fuses() and self.layer.padding_mode == "zeros" and not isinstance(self.layer.padding, str)

    def _fused(self, x: Tensor) -> Tensor:
        activation, layer = self.activation, self.layer
        settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        x, alpha = activation.before(x)
        return qrelu_conv2d(x, alpha, layer.weight, layer.bias, activation.bits, **settings, **activation.settings())
