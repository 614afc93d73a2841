"""What this package did to a model, as data for JSON, and done again to a fresh copy of the float model: its modules
and hooks, without alphas and weights, which a state_dict has."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..blocks import KEYS, described, rebuild
from ..nn import QReLU
from ..packing import is_packed, pack_activations_
from ..parametrization import QWeight, parametrized_since, qweight_of
from ..signed import QSigned
from .editing import Edit
from .report import QuantizeReport
from .rewriting import function_at, original
from .surgery import Surgery, dotted
from .weights import put_on

# The settings of a module, besides those of its alpha.
_QRELU = ("bits", "ste", "rounding", "alpha_grad", "alpha_scale", "channel_dim", "inplace", "dropout", "squared")
_QSIGNED = ("bits", "group", "rotation", "ste", "alpha_grad", "alpha_scale", "channel_dim")
_QWEIGHT = ("bits", "channel_dim", "groups", "ste")
_ALPHA = ("alpha", "dtype", "num_channels", "learn_alpha")
_EDIT = ("where", "span", "site", "argument", "if_relu", "keys", "keyed", "keyed_callee")
# What a description has, by kind, and the keys of each entry, which also has the names of its modules.
_KEYS: dict[str, tuple[str, ...]] = {
    "qrelus": (*_QRELU, "limit", *_ALPHA),
    "qsigneds": (*_QSIGNED, *_ALPHA),
    "identities": (),
    "rewritten": ("edits", "sources"),
    **KEYS,
    "weights": _QWEIGHT,
    "packed": (),
}


def describe(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """{kind: entries}, each entry the settings and the names of the modules that have them. Empty if a model is float.

    Raises ValueError for what `rebuild_` cannot make again.
    """
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, name, settings in _found(model):
        entries = grouped.setdefault(kind, {})
        entries.setdefault(json.dumps(settings), {**settings, "names": []})["names"].append(name)
    return {kind: list(entries.values()) for kind, entries in grouped.items()}


def is_converted(model: nn.Module) -> bool:
    """Whether `describe` finds anything, or something that it cannot describe."""
    try:
        return bool(describe(model))
    except ValueError:
        return True


def check_description(description: object) -> None:
    """Raise ValueError for what is no description, without a model."""
    if not isinstance(description, Mapping):
        raise ValueError(f"staircases must be a mapping of {', '.join(_KEYS)}, got {description!r}")
    if unknown := description.keys() - _KEYS.keys():
        raise ValueError(f"staircases must have no keys but {', '.join(_KEYS)}, got {', '.join(sorted(unknown))}")
    for kind, entries in description.items():
        wanted = {*_KEYS[kind], "names"}
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            if not isinstance(entry, Mapping) or entry.keys() != wanted:
                raise ValueError(f"{kind} must be a list of mappings with the keys {sorted(wanted)}, got {entry!r}")


def rebuild_(model: nn.Module, description: Mapping[str, list[dict[str, Any]]]) -> None:
    """Do to a float model what `describe` found in another one of the same modules. It may be on the meta device; its
    alphas must be loaded afterwards.

    Raises ValueError if the model has not the modules, or the sources, that the description is of.
    """
    check_description(description)
    entries = [
        (kind, name, {key: value for key, value in entry.items() if key != "names"})
        for kind in _KEYS
        for entry in description.get(kind, ())
        for name in entry["names"]
    ]
    surgery, report = Surgery(model, 4, (), lambda module, name: True, False, {}), QuantizeReport()
    new = {
        dotted(name, site)
        for entry in description.get("rewritten", ())
        for name in entry["names"]
        for edit in entry["edits"]
        for site in (edit["site"], *(site for _, site in edit["keys"]))
    }
    blocks: list[tuple[str, str, dict[str, Any]]] = []
    for kind, name, settings in entries:
        try:
            if kind in ("qrelus", "qsigneds"):
                _put(surgery, name, _staircase(kind, settings), name in new)
            elif kind == "identities":
                _put(surgery, name, nn.Identity())
            elif kind == "rewritten":
                _rewrite(surgery, name, settings)
            elif kind == "weights":
                put_on(model.get_submodule(name), QWeight(**settings), report)
            elif kind == "packed":
                pack_activations_(model.get_submodule(name))
            else:
                blocks.append((kind, name, settings))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{kind}, {name or 'model'}: {error}") from error
    surgery.finish()
    try:
        rebuild(model, blocks)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"staircases of blocks: {error}") from error


def loaded_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that only a converted model has: alphas, and parameters under a QWeight."""
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, (QReLU, QSigned)) and module.alpha is not None:
            yield dotted(name, "alpha"), module.alpha
        elif qweight_of(module) is not None:
            yield dotted(name, "parametrizations.weight.original"), module.parametrizations.weight.original


# ---------------------------------------------------------------------------------------------- finding


def _found(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, name, settings) of all."""
    seen: dict[nn.Module, str] = {}
    for owner_name, owner in model.named_modules():
        folded = any(isinstance(child, QReLU) and child.dropout for child in owner.children())
        for attribute, module in owner._modules.items():
            name = dotted(owner_name, attribute)
            if type(module) in (QReLU, QSigned):
                if (other := seen.setdefault(module, name)) != name:
                    raise ValueError(f"{other} and {name} must be two modules to be saved, got one")
                yield "qrelus" if type(module) is QReLU else "qsigneds", name, _settings(module)
            elif isinstance(module, (QReLU, QSigned)) and is_parametrized(module):
                raise ValueError(f"{name}.alpha has a parametrization: remove it before the model is saved")
            elif folded and type(module) is nn.Identity:  # the dropout, or one that the model has had all along
                yield "identities", name, {}
    for name, module in model.named_modules():
        if (made := _rewritten_class(module)) is not None:
            cls, plan = original(made)
            sources = {where: _digest(cls, where) for where in sorted({edit.where for edit in plan})}
            edits = [{key: getattr(edit, key) for key in _EDIT} for edit in sorted(plan, key=repr)]
            yield "rewritten", name, {"edits": edits, "sources": sources}
    yield from described(model)
    for name, module in model.named_modules():
        if parametrized_since(module):
            raise ValueError(
                f"{name} has more parametrizations than its QWeight: remove them before the model is saved"
            )
        if (quantizer := qweight_of(module)) is not None:
            yield "weights", name, {key: getattr(quantizer, key) for key in _QWEIGHT}
        if is_packed(module):
            yield "packed", name, {}


def _settings(module: Any) -> dict[str, Any]:
    """Those of a QReLU or QSigned. alpha: the number that `reset_parameters` sets."""
    settings = {key: getattr(module, key) for key in (_QRELU if isinstance(module, QReLU) else _QSIGNED)}
    if isinstance(module, QReLU):
        settings["limit"] = None if module.limit == math.inf else module.limit
    alpha = module.alpha
    if alpha is None:
        return settings | dict.fromkeys(_ALPHA)
    first = getattr(module, "_initial", (1.0,))[0]
    return settings | {
        "alpha": first if isinstance(first, float) else 1.0,
        "dtype": str(alpha.dtype).removeprefix("torch."),
        "num_channels": None if module.channel_dim is None else alpha.numel(),
        "learn_alpha": isinstance(alpha, nn.Parameter),
    }


def _rewritten_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that `rewritten` made for a module; a parametrization or a sharding makes a subclass of it."""
    return next((cls for cls in type(module).__mro__ if "_rewritten_from" in vars(cls)), None)


def _digest(cls: type[nn.Module], where: str) -> str:
    """Of the source of a function, so that the spans of edits are still those of its calls."""
    text = textwrap.dedent(inspect.getsource(function_at(cls, where).function))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------- rebuilding


def _staircase(kind: str, settings: dict[str, Any]) -> QReLU | QSigned:
    settings = dict(settings)
    dtype, limit = settings.pop("dtype"), settings.pop("limit", None)
    if settings["num_channels"] is None:
        del settings["channel_dim"]
    if settings["learn_alpha"] is None:  # no alpha
        del settings["learn_alpha"]
    made: Any = QReLU(**settings) if kind == "qrelus" else QSigned(**settings)
    if dtype == "float64":
        made.double()
    if limit is not None:
        made.limit = limit
    return made


def _put(surgery: Surgery, name: str, made: nn.Module, new: bool = False) -> None:
    """new: whether the float model has nothing there."""
    owner_name, _, attribute = name.rpartition(".")
    owner = surgery.model.get_submodule(owner_name)
    if not new and not callable(getattr(owner, attribute, None)):
        raise ValueError(f"{type(owner).__name__} has no module or function {attribute!r}")
    surgery.put_again(owner, attribute, made.train(owner.training))


def _rewrite(surgery: Surgery, name: str, settings: dict[str, Any]) -> None:
    owner = surgery.model.get_submodule(name)
    cls = original(type(owner))[0]
    for where, digest in settings["sources"].items():
        module = where.partition(":")[0] if ":" in where else cls.__module__
        if module not in sys.modules or _digest(cls, where) != digest:
            raise ValueError(
                f"the source of {where} is not that of the model that was saved, in which calls of activations were"
                " replaced: load it with the versions of the packages that it was saved with"
            )
    plan = frozenset(Edit(**{key: _tuples(value) for key, value in edit.items()}) for edit in settings["edits"])
    sites = {site for edit in plan for site in (edit.site, *(site for _, site in edit.keys)) if site}
    if strange := [site for site in sites if not isinstance(owner._modules.get(site), QReLU)]:
        raise ValueError(f"edits must call QReLUs of the module, got {', '.join(map(repr, strange))}")
    if not {edit.where for edit in plan} <= settings["sources"].keys():
        raise ValueError("sources must have the functions of all edits")
    if why := surgery.edit(owner, plan):
        raise ValueError(why)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
