"""The networks of bench.memory and bench.training, and the variants of each that bench.memory measures."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad.experiments.models import lenet5
from coarsegrad.experiments.transformers import OPT_1_3B, OPT_125M, T5_SMALL, Opt, T5Encoder

from .sweep import DTYPES

Activation: TypeAlias = Callable[[], nn.Module]
Run: TypeAlias = Callable[[Tensor], Tensor]

_PEERS = {"brevitas": "brevitas", "relu, torchao": "torchao", "liger": "liger_kernel"}  # variant -> its package
_PACKED, _COMPILED, _CHECKPOINT = "packed", "compiled", "checkpoint"  # parts of a variant's name


class Plan(Protocol):
    """A network in several variants. The first is without staircases, and what the others are compared with."""

    input: Callable[[], Tensor]

    def variants(self, device: str) -> list[str]:
        """Their names; a part of a name after a comma says how it runs."""

    def build(self, variant: str) -> tuple[nn.Module, Run]:
        """(the network, its forward), before the parts `packed` and `compiled` of the name."""


class _FakeQuantizedReLU(nn.Module):
    """The staircase of the same levels from torch's parts: relu, then fake_quantize (which rounds to nearest)."""

    def forward(self, x: Tensor) -> Tensor:
        alpha = cg.nn.half_gaussian_alpha(2)
        y = torch.fake_quantize_per_tensor_affine(torch.relu(x).float(), alpha, 0, 0, 3)
        return y.to(x.dtype)


def _brevitas() -> nn.Module:
    from brevitas.nn import QuantReLU

    return QuantReLU(bit_width=2)


def _torchao() -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    config = IntxFakeQuantizeConfig(torch.uint2, "per_token", is_symmetric=False)
    return nn.Sequential(nn.ReLU(), IntxFakeQuantizer(config))


_ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "relu, checkpoint": nn.ReLU,
    "relu, fake_quantize": _FakeQuantizedReLU,
    "brevitas": _brevitas,
    "relu, torchao": _torchao,
    "qrelu": cg.QReLU,
    "qrelu, packed": cg.QReLU,
    "relu, compiled": nn.ReLU,
    "qrelu, compiled": cg.QReLU,
    "qrelu, packed, compiled": cg.QReLU,
}


@dataclass(frozen=True)
class ReluNetwork:
    """make(activation, dropout after it) -> the network; dropout: its probability."""

    make: Callable[[Activation, float], nn.Module]
    input: Callable[[], Tensor]
    dropout: float = 0.0

    def variants(self, device: str) -> list[str]:
        return _installed(_ACTIVATIONS)

    def build(self, variant: str) -> tuple[nn.Module, Run]:
        activation = _ACTIVATIONS[variant]
        if activation is cg.QReLU:  # which applies the dropout itself
            model = self.make(lambda: cg.QReLU(2, ste="relu", dropout=self.dropout), 0.0)
        else:
            model = self.make(activation, self.dropout)
        if _CHECKPOINT in variant:
            return model, lambda x: checkpoint(model, x, use_reentrant=False)
        return model, model


_BLOCKS: dict[str, dict[str, Any] | None] = {  # variant -> settings of its staircases
    "silu": None,
    "silu, checkpoint": None,
    "liger": None,
    "8 bits, coarse norms": {"bits": 8, "norms": "coarse"},
    "8 bits, coarse norms, packed": {"bits": 8, "norms": "coarse"},
    "8 bits, exact norms, packed": {"bits": 8, "norms": "exact"},
    "4 bits, coarse norms, packed": {"bits": 4, "norms": "coarse", "rotation": 64},
}


@dataclass(frozen=True)
class Llama:
    """A Llama of SmolLM2-135M's shape with signed staircases in its blocks; its forward is the next token's loss."""

    layers: int
    input: Callable[[], Tensor]
    vocabulary: int = 49152

    def variants(self, device: str) -> list[str]:
        if importlib.util.find_spec("transformers") is None:
            return []
        return [name for name in _installed(_BLOCKS) if name != "liger" or device == "cuda"]  # Triton without fallback

    def build(self, variant: str) -> tuple[nn.Module, Run]:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=self.layers,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config).train()
        if _CHECKPOINT in variant:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if variant == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        if settings := _BLOCKS[variant]:
            bits, group = settings["bits"], 64
            cg.quantize_(
                model, bits, inputs={"bits": bits, "group": group, "rotation": settings.get("rotation")},
                gates={"bits": bits, "group": group}, attention=8, norms=settings["norms"],
                filter_fn=lambda module, name: name != "lm_head",
            )  # fmt: skip

        return model, lambda tokens: model(input_ids=tokens, labels=tokens).loss


def missing_peers() -> list[str]:
    """The packages of variants that are left out because they are not installed."""
    return sorted(package for package in _PEERS.values() if importlib.util.find_spec(package) is None)


def _installed(names: Iterable[str]) -> list[str]:
    """Those that need no package that is missing."""
    return [name for name in names if name not in _PEERS or importlib.util.find_spec(_PEERS[name])]


def _mlp(activation: Activation, dropout: float) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(512, 512), activation())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


def _wide_mlp(activation: Activation, dropout: float) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(4096, 4096), activation())]
    return nn.Sequential(*hidden, nn.Linear(4096, 10))


def _tokens() -> Tensor:
    return torch.randint(1024, (4, 256))


def _opt(activation: Activation, dropout: float) -> nn.Module:
    return Opt(OPT_125M.resized(layers=2, vocabulary=1024), activation)


def _t5(activation: Activation, dropout: float) -> nn.Module:
    return T5Encoder(T5_SMALL.resized(layers=2, vocabulary=1024, dropout=dropout), activation)


RELU_NETWORKS = {
    "mlp": ReluNetwork(_mlp, lambda: torch.randn(16384, 512)),
    "lenet": ReluNetwork(lambda activation, _: lenet5(activation), lambda: torch.randn(256, 1, 28, 28)),
    "opt": ReluNetwork(_opt, _tokens),
    "t5": ReluNetwork(_t5, _tokens, T5_SMALL.dropout),
}
NETWORKS: dict[str, Plan] = {**RELU_NETWORKS, "smollm2": Llama(30, lambda: torch.randint(49152, (4, 512)))}
# On a GPU: transformers at full size, on 16,384 and 4,096 tokens.
GPU_NETWORKS: dict[str, Plan] = {
    "wide mlp": ReluNetwork(_wide_mlp, lambda: torch.randn(32768, 4096)),
    "OPT-125M": ReluNetwork(
        lambda activation, _: Opt(OPT_125M, activation), lambda: torch.randint(OPT_125M.vocabulary, (16, 1024))
    ),
    "OPT-1.3B": ReluNetwork(
        lambda activation, _: Opt(OPT_1_3B, activation), lambda: torch.randint(OPT_1_3B.vocabulary, (4, 1024))
    ),
    "T5-small": ReluNetwork(
        lambda activation, dropout: T5Encoder(T5_SMALL.resized(dropout=dropout), activation),
        lambda: torch.randint(T5_SMALL.vocabulary, (32, 512)), T5_SMALL.dropout,
    ),
    "SmolLM2-135M": Llama(30, lambda: torch.randint(49152, (8, 2048))),
}  # fmt: skip


def set_up(network: str, variant: str, dtype: str, device: str = "cpu") -> tuple[nn.Module, Run, Tensor]:
    """(the network with the same weights for every variant, the variant's forward, the input)."""
    torch.manual_seed(0)
    plan = (NETWORKS | GPU_NETWORKS)[network]
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # deprecations within the peers
        x = plan.input()
        model, forward = plan.build(variant)
        model.to(device, DTYPES[dtype])
    if _PACKED in variant:
        cg.pack_activations_(model)
    if x.is_floating_point():
        x = x.to(DTYPES[dtype])
    return model, compiled(forward) if _COMPILED in variant else forward, x


def compiled(run: Run) -> Run:
    """Each function is compiled on its own, with a limit of its own on recompilations."""
    namespace = {"run": run}
    exec("def call(x): return run(x)", namespace)
    return torch.compile(namespace["call"], fullgraph=True)


def gradients(model: nn.Module, run: Run, x: Tensor) -> list[Tensor]:
    """Those of embeddings are left out: Inductor adds them up by several threads, in an order that changes."""
    model.zero_grad()
    run(x).float().square().mean().backward()
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return [p.grad.clone() for p in model.parameters() if p.grad is not None and p not in embeddings]
