"""Converted models of transformers that `save_pretrained` keeps and `from_pretrained` makes again, to the bit."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..packing import pack_activations_
from ..quantization import (
    ON_QUANTIZE,
    check_arguments,
    check_description,
    describe,
    is_converted,
    loaded_tensors,
    quantize_,
    rebuild_,
)

# The first that loads an `_extra_state`, which belongs to each alpha.
_OLDEST = (5, 4)
if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(
        f"coarsegrad saves and loads models of transformers {'.'.join(map(str, _OLDEST))} or newer, got"
        f" {transformers.__version__}"
    )

METHOD = "coarsegrad"
FORMAT_VERSION = 1
_NEEDS = "pip install coarsegrad, and import coarsegrad before from_pretrained: else its staircases are lost"
_NOTE = """\
# A model with the low-bit staircases of coarsegrad

Load it with

    pip install coarsegrad

```python
import coarsegrad  # before from_pretrained
import transformers

model = transformers.{auto}.from_pretrained(...)
```

Without the import, transformers warns of an unknown quantization type, `coarsegrad`, and makes a float model that
computes something else. Do not save that one here: its files have none of the staircases.
"""


@register_quantization_config(METHOD)
class CoarseGradConfig(QuantizationConfigMixin):
    """What `from_pretrained(name, quantization_config=...)` of transformers does to a float model: `quantize_`.

    bits: 1..8, or None, as for `quantize_`.
    pack: whether every forward saves its activations as codes (`pack_activations_`).
    arguments: the other arguments of `quantize_`, but for the model.

    The model is loaded and then converted: the same as `quantize_(from_pretrained(name), ...)`. It must be on one
    device, as the conversion looks at its weights. `model.save_pretrained(folder)` then writes into `config.json` what
    each staircase is, and `from_pretrained(folder)` makes the same model from that, on several devices too.

    Raises TypeError or ValueError for what `quantize_` refuses.
    """

    def __init__(self, bits: int | None = 4, *, pack: bool = False, **arguments: Any) -> None:
        check_arguments(bits, **arguments)
        self.quant_method: Any = METHOD
        self.arguments: dict[str, Any] = {"bits": bits, **arguments}
        self.pack = pack
        self.staircases: dict[str, Any] | None = None

    @classmethod
    def of(cls, staircases: dict[str, Any]) -> CoarseGradConfig:
        """That of a converted model, of which `describe` says this."""
        check_description(staircases)
        made = cls()
        made.arguments, made.staircases = {}, staircases
        return made

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `to_dict`, as in config.json, or from a dict of arguments."""
        given = {key: value for key, value in config_dict.items() if key not in ("quant_method", "needs")}
        version = given.pop("format_version", None)
        if version is None:
            try:
                made = cls(**given)
            except TypeError as error:
                raise ValueError(f"quantization_config of coarsegrad: {error}") from error
        elif type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version must be an int up to {FORMAT_VERSION}, got {version!r}: a newer"
                " coarsegrad wrote it, install that"
            )
        elif given.keys() != {"staircases"}:
            raise ValueError(f"quantization_config must have the key staircases and no other, got {sorted(given)}")
        else:
            made = cls.of(given["staircases"])
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        if self.staircases is None:
            arguments = {name: _plain(value) for name, value in self.arguments.items()}
            return {"quant_method": METHOD, **arguments, "pack": self.pack}
        staircases = copy.deepcopy(self.staircases)
        return {
            "quant_method": METHOD, "format_version": FORMAT_VERSION, "needs": _NEEDS, "staircases": staircases
        }  # fmt: skip

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def _plain(value: Any) -> Any:
    """For JSON, as transformers logs it."""
    return value if isinstance(value, (bool, int, float, str, dict, type(None))) else repr(value)


@register_quantizer(METHOD)
class CoarseGradQuantizer(HfQuantizer):
    """Converts a model while transformers loads it.

    Afterwards nothing of transformers' own marks of quantized models is left on it: it is the float model that
    `quantize_` was given, with parameters that train, `half()` and adapters.
    """

    quantization_config: CoarseGradConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        converted = self.quantization_config.staircases is not None
        if self.pre_quantized and not converted:
            raise ValueError(
                "quantization_config in config.json has arguments of quantize_, and not what it made: remove it there,"
                " and pass it to from_pretrained"
            )
        if converted and not self.pre_quantized:
            raise ValueError(
                "quantization_config must be CoarseGradConfig(bits, ...) for a float model, got that of a converted one"
            )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.staircases is not None:
            rebuild_(model, _fitted(self.quantization_config.staircases, model))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        _remove_marks(model)
        if config.staircases is not None:
            _check_loaded(model)
            keep_when_saved(model)
            return model
        devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            raise ValueError(
                f"device_map must name one device where a model is converted, got {', '.join(sorted(devices))}: save"
                " the converted model, and load that on several"
            )
        quantize_(model, **config.arguments)
        if config.pack:
            pack_activations_(model)
        return model


def _remove_marks(model: Any) -> None:
    """What `postprocess_model` and `preprocess_model` of transformers say of a quantized model."""
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    for module in _models_in(model):
        for name in ("quantization_config", "_is_quantized"):
            vars(module.config).pop(name, None)


def _models_in(model: nn.Module) -> list[Any]:
    """Those of transformers, whose modules may not be imported yet."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return [] if modeling is None else [m for m in model.modules() if isinstance(m, modeling.PreTrainedModel)]


def _fitted(staircases: dict[str, Any], model: Any) -> dict[str, Any]:
    """The description for a model of another class with the same base model, such as another head on it, or none, by
    the rule of transformers for weights: the base model's names are with or without its prefix."""
    prefix = f"{model.base_model_prefix}."
    names = [name for entries in staircases.values() for entry in entries for name in entry["names"]]
    has_base = prefix != "." and isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    add = has_base and not any(name.startswith(prefix) for name in names)
    left_out = []

    def fitted(name: str) -> list[str]:
        new = f"{prefix}{name}" if add and name else name
        if not has_base and prefix != ".":
            new = name.removeprefix(prefix)
        if new and not hasattr(model, new.partition(".")[0]):
            left_out.append(name)
            return []
        return [new]

    made = {
        kind: [{**entry, "names": [new for name in entry["names"] for new in fitted(name)]} for entry in entries]
        for kind, entries in staircases.items()
    }
    if left_out:
        warnings.warn(
            f"{type(model).__name__} has no {', '.join(dict.fromkeys(left_out))}, whose staircases are left out",
            stacklevel=2,
        )
    return made


def _check_loaded(model: Any) -> None:
    """transformers gives parameters that a file lacks whatever is in memory; it marks those that a file had. Offloaded
    ones are on meta, and read when they are used."""
    unset = [name for name, t in loaded_tensors(model) if not t.is_meta and not getattr(t, "_is_hf_initialized", False)]
    if unset:
        raise ValueError(
            f"the files of the model must have all tensors of its quantization_config, but lack {', '.join(unset)}."
            " They were saved by a process that had not imported coarsegrad, or are of another model"
        )


# ----------------------------------------------------------------------------------------------- saving


class SavePretrained:
    """`model.save_pretrained` of a converted model."""

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, type(model).save_pretrained)
        self.model = model

    def __call__(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        save = functools.partial(type(model).save_pretrained, model, save_directory, *args, **kwargs)
        if getattr(model, "_hf_peft_config_loaded", False):  # which saves adapters alone
            return save()
        staircases, config = describe(model), model.config
        before = vars(config).get("quantization_config")
        if before is not None and _method_of(before) == METHOD:  # of another model that had this config
            del config.quantization_config
        elif before is not None and staircases:
            warnings.warn(
                f"save_pretrained keeps the quantization_config of {_method_of(before)}, and not the staircases of"
                " coarsegrad: convert the model again after it is loaded",
                stacklevel=2,
            )
            return save()
        if not staircases:
            return save()
        given = inspect.signature(save.func).bind(model, save_directory, *args, **kwargs).arguments
        if given.get("is_main_process", True):
            _write_note(Path(save_directory), type(model).__name__)
        config.quantization_config = CoarseGradConfig.of(staircases)
        try:
            return save()
        finally:
            del config.quantization_config


def keep_when_saved(model: Any) -> None:
    """Have `model.save_pretrained` of a model of transformers keep its staircases. `quantize_` does that to the model
    that it is given and those inside; call it where only a part of the model was given, or staircases were put in by
    hand."""
    if "save_pretrained" not in vars(model):
        vars(model)["save_pretrained"] = SavePretrained(model)


def _keep_all(model: nn.Module) -> Callable[[], None]:
    """After `quantize_`. Returns what undoes it, after everything else is undone."""
    new = [m for m in _models_in(model) if "save_pretrained" not in vars(m)]
    for module in new:
        keep_when_saved(module)

    def undo() -> None:
        for module in new:
            if not is_converted(module):
                vars(module).pop("save_pretrained", None)

    return undo


ON_QUANTIZE.append(_keep_all)


def _method_of(config: Any) -> str:
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def _write_note(folder: Path, kind: str) -> None:
    """README.md, or a file beside the one that is there, if that does not name this package."""
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(_NOTE.format(auto=kind))
    elif METHOD not in readme.read_text(errors="replace"):
        (folder / "README-coarsegrad.md").write_text(_NOTE.format(auto=kind))
