"""A converter of torchtitan's model configs, which inserts signed staircases in the model that is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torchtitan.protocols.model import ModelConfigConverter

from ..packing import pack_activations_
from ..quantization import check_arguments, quantize_


class StaircaseConverter(ModelConfigConverter):
    """Signed staircases in front of every linear layer of a model of torchtitan, in its list of converters:

        model_registry("8B", converters=[StaircaseConverter.Config(inputs=8, norms="coarse")])

    inputs, norms: as for `quantize_`. pack: whether layers save the codes for backward (`pack_activations_`).

    The config that `convert` returns is that of the model, but builds it with its staircases, on the meta device too.
    They add no module, parameter or buffer: the names in a checkpoint are those of the float model.
    torchtitan admits only its own modules, so that a `QReLU` or `QWeight` cannot be in its models; its gated MLPs and
    its attention are not those that `gates` and `attention` of `quantize_` find.

    Raises TypeError or ValueError for what `quantize_` refuses, when it is made and when the model is built.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        inputs: int | Mapping[str, Any] = 8
        norms: str | None = None
        pack: bool = True

    def __init__(self, config: Config, **kwargs: Any) -> None:
        check_arguments(None, inputs=config.inputs, norms=config.norms)
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """A config of the same model with its staircases; the given one is not changed.

        Raises TypeError if model_config is of a model that is converted already.
        """
        if hasattr(model_config, "staircases"):
            raise TypeError("model_config must be of a model without staircases, got one that is converted")
        given = {f.name: getattr(model_config, f.name) for f in fields(model_config) if f.init}
        arguments = {"inputs": self.config.inputs, "norms": self.config.norms}
        config_class: Any = type(model_config)  # of which mypy does not see that it can be hashed
        return _converted(config_class)(**given, staircases=arguments, pack=self.config.pack)


@functools.cache
def _converted(config_class: Any) -> type:
    """The class of such configs. What to do is in fields, which `dataclasses.replace` and `to_dict` keep."""

    @dataclass(kw_only=True, slots=True)
    class Converted(config_class):
        staircases: dict[str, Any] = field(default_factory=dict)
        pack: bool = True

        def build(self, **kwargs: Any) -> Any:
            model = config_class.build(self, **kwargs)  # slots: super() has no class to look at
            with torch.device("cpu"):  # in a block for meta, the norms that it tries out would be there too
                quantize_(model, None, **self.staircases)
            if self.pack:
                pack_activations_(model)
            return model

    Converted.__name__, Converted.__qualname__ = config_class.__name__, config_class.__qualname__
    return Converted
