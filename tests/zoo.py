"""A tiny network of every architecture of transformers, from its config class and rules on the names of its fields.

No architecture is named here. `architectures()` walks the tables of the Auto classes; `build(name)` takes the config's
defaults, divides all widths by one number (so that what fits together still does), cuts depths, vocabularies and
images, sets activations to relu, and makes inputs from the names in the signature of `forward`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Container, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers import logging as transformers_logging
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

transformers_logging.set_verbosity_error()

MAX_NUMEL = 12_500_000  # 50 MB of float32
MAX_SECONDS = 2.0  # of one core, for one forward
MAX_SECONDS_TO_BUILD = 5.0
BATCH, LENGTH, VOCABULARY = 2, 8, 128
_LAST = ("MODEL_FOR_PRETRAINING", "MODEL_MAPPING")  # tables tried after those of heads for one task


@dataclasses.dataclass(frozen=True)
class Rules:
    """divisor: of all widths. keeps_heads: their number is kept and their width divided, else the other way round.
    relu: activations are set to it."""

    divisor: int
    keeps_heads: bool = True
    relu: bool = True


_RULES = (
    Rules(16), Rules(16, False), Rules(32, False), Rules(8), Rules(4), Rules(4, False), Rules(1), Rules(16, relu=False),
)  # fmt: skip


class Unbuildable(Exception):
    """Why an architecture has no tiny network here."""


@dataclasses.dataclass
class Specimen:
    """A network in eval mode and keywords for its forward, which runs."""

    name: str
    model: nn.Module
    inputs: dict[str, object]
    seconds: float


def architectures() -> list[str]:
    """The model types that some table of the Auto classes has a class for, each config class once."""
    found: dict[str, str] = {}
    for name in sorted(set().union(*_tables().values()) & set(CONFIG_MAPPING_NAMES)):
        found.setdefault(CONFIG_MAPPING_NAMES[name], name)
    return sorted(found.values())


def seed() -> None:
    """Of every generator that a forward may use."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def build(name: str, is_wanted: Callable[[nn.Module, dict[str, object]], bool]) -> Specimen:
    """The first of the architecture's classes that runs, by the first rules by which it does, and that `is_wanted` with
    its inputs; else the first that runs. Raises Unbuildable with the reason of the class that came furthest."""
    fallback, reasons, until = None, [], time.process_time() + MAX_SECONDS_TO_BUILD
    for model_class in _classes(name):
        specimen = _first(name, model_class, reasons, until)
        if specimen is not None and is_wanted(specimen.model, specimen.inputs):
            return specimen
        fallback = fallback or specimen
    if fallback is None:
        raise Unbuildable(max(reasons, key=lambda reason: reason.startswith("forward"), default="no class"))
    return fallback


def _first(name: str, model_class: type[nn.Module], reasons: list[str], until: float) -> Specimen | None:
    """By the first rules by which the class runs; `reasons` gets those of the others."""
    own: list[str] = []
    for rules in _RULES:
        if time.process_time() > until:
            break
        if rules.relu and len(own) > 2 and len(set(own)) == 1:
            continue  # widths have nothing to do with it
        try:
            return _specimen(name, model_class, rules)
        except Unbuildable as error:
            own.append(str(error))
    reasons += own
    return None


def _specimen(name: str, model_class: type[nn.Module], rules: Rules) -> Specimen:
    try:
        config = tiny(model_class.config_class or CONFIG_MAPPING[name], rules, {})
        with torch.device("meta"):
            numel = sum(p.numel() for p in model_class(config).parameters())
    except Exception as error:
        raise Unbuildable(f"config: {_line(error)}") from error
    if numel > MAX_NUMEL:
        raise Unbuildable(f"size: {numel:,} parameters, widths divided by {rules.divisor}")
    seed()
    try:
        model = model_class(config).eval()
        for parameter in model.parameters():  # away from zeros, which would hide what comes before them
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    except Exception as error:
        raise Unbuildable(f"init: {_line(error)}") from error
    inputs, seconds = _running_inputs(model)
    return Specimen(name, model, inputs, seconds)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---- classes


def _tables() -> dict[str, dict[str, str]]:
    suffix = "_NAMES"
    tables = {k: v for k, v in vars(modeling_auto).items() if k.startswith("MODEL") and k.endswith("MAPPING" + suffix)}
    return dict(sorted(tables.items(), key=lambda item: (item[0].startswith(_LAST), item[0])))


def _classes(name: str) -> Iterator[type[nn.Module]]:
    package = importlib.import_module(CONFIG_MAPPING[name].__module__).__package__
    seen = set()
    for table in _tables().values():
        names = table.get(name, ())
        for class_name in (names,) if isinstance(names, str) else names:
            if class_name in seen:
                continue
            seen.add(class_name)
            folder = importlib.import_module(package)
            found = getattr(folder, class_name, None) or getattr(transformers, class_name, None)
            if found is not None and found.__module__.startswith("transformers.models."):  # no stand-in
                yield found


# ---- configs

_DEPTH = re.compile(r"(^|_)(num_|n_)?(hidden_|encoder_|decoder_)*(layers?|blocks|depth)$|num_encoder_blocks|layers_num")
_NOT_DEPTH = re.compile(r"residual|layers?_(id|type)|iou_head_depth|max_depth|min_depth|^num_mtp|feature_layer")
_DEPTHS = re.compile(r"^(depths?|n_attn_blocks|num_block_repeats|block_sizes|stage_num.*|blocks_per_stage)$")
_INDICES = re.compile(r"(ind(ic|ex)es|_hook_ids|out_features_ids|extract_layers|intermediate_hidden_state_indices)$")
_WIDTH = re.compile(
    r"hidden|width|embd|embed|inner|intermediate|ffn|filters|rank|d_(model|ff|kv|inner|head|embed)|(^|_)dims?(_|$)|channel"
    r"|dims$|head_dim|mlp_dim|key_dim|(^|_)size$|feature_size|projection|proj_size|out_features|pos_feats"
)
_NOT_WIDTH = re.compile(
    r"num_channels|audio_channels|image_size|patch|kernel|window|chunk|block|batch|group|vocab|code(book|vector)|crop"
    r"|position|length|num_(hidden|attention)|layers|heads|token|_act$|size_(per|divisor)|beam|mask(ed)?_unit|max_|ratio"
    r"|scale|rate|train_size|eval_size|sampling|fft|hop|spatial|temporal|stride|index|tubelet|merge|input_(size|dim)|pool_|multiplier"
)
_INNER = re.compile(r"intermediate_size$|ffn_dim$|^(d_ff|d_inner|n_inner|mlp_dim)$|inner_size$")
_HEADS = re.compile(r"(^|_)heads$|n_head$")
_HEAD_WIDTH = re.compile(r"head_dim$|^d_kv$|rope_dim|rotary_dim")
_MOST = [
    (re.compile(pattern), most)
    for pattern, most in (
        (r"vocab_size", VOCABULARY),
        (r"experts$|^zero_expert_num$", 4),
        (r"^(n_group|topk_group)$", 1),
        (r"experts_per_tok$|^moe_topk$|^moe_k$", 2),
        (r"queries|num_select", 10),
        (r"source_positions", 64),
        (r"chunk_size$", 16),
        (r"max_.*(position|seq|length)|^n_positions$|^n_ctx$|context_length|num_positions|hash.*(size|vocab)", 512),
    )
]
_ACTIVATION = re.compile(r"(^|_)act(ivation)?(_|$)|_act(_fn|_func)?$|dense_act_fn")
_TOKEN = re.compile(r"token_(id|index)$|(image|audio|video)_token")
_OFF = re.compile(r"layer_?drop$|^use_cache$")


def tiny(config_class: type[PreTrainedConfig], rules: Rules, given: dict[str, object]) -> PreTrainedConfig:
    """The config with its defaults made small. given: what another config has in place of them."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_class)}
    for name, value in vars(config_class(**given)).items():  # stages that __post_init__ fills in
        if defaults.get(name, 0) is None and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            if _DEPTHS.search(name) or _WIDTH.search(name):
                defaults[name] = value
    values = defaults | given
    indices = {k: v for k, v in values.items() if _INDICES.search(k) and isinstance(v, (list, tuple)) and v}
    depth = max(2, *(len(v) for v in indices.values())) if indices else 2
    depths = {k: v for k, v in values.items() if type(v) is int and _DEPTH.search(k) and not _NOT_DEPTH.search(k)}
    old = values.get("num_hidden_layers") or max(depths.values(), default=0)
    if any(len(v) == old for k, v in values.items() if _DEPTHS.search(k) and isinstance(v, (list, tuple))):
        depth = old  # stages, whose own depths are cut
    tokens = iter(range(VOCABULARY - 2, 8, -1))
    made = {}
    for name, value in values.items():
        if name in depths:
            made[name] = min(value, depth)
        elif name in indices and old and all(type(v) is int for v in value) and max(value) >= depth:
            made[name] = type(value)(range(depth - len(value), depth))
        elif _DEPTHS.search(name) and isinstance(value, (list, tuple)):
            made[name] = type(value)(min(v, 1) for v in value)
        elif isinstance(value, (list, tuple)) and len(value) == old > depth:  # an entry for each layer
            made[name] = value[:depth]
        elif _TOKEN.search(name) and type(value) is int and value >= VOCABULARY:
            made[name] = next(tokens)
        else:
            made[name] = _small(name, value, rules, _image_size(values))
    changed = {name: value for name, value in made.items() if name not in defaults or value != defaults[name]}
    for name, spec in (config_class.sub_configs_defaults or {}).items():
        if values.get(name) is None and not spec.optional:
            sub_class = CONFIG_MAPPING[spec.model_type] if spec.config_class is AutoConfig else spec.config_class
            changed[name] = tiny(sub_class, rules, spec.init_kwargs)
    config = config_class(**changed)
    if vars(config).get("head_dim", 0) is None:  # these three are what checkpoints of the architecture give
        config.head_dim = config.hidden_size // config.num_attention_heads
    if vars(config).get("num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    if vars(config).get("layer_types", ()) is None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def _image_size(values: dict[str, object]) -> int:
    patch = values.get("patch_size")
    if not isinstance(patch, int):
        return 64
    return 16 * patch if patch < 4 else max(64, 4 * patch)


def _default(field: dataclasses.Field) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _small(name: str, value: object, rules: Rules, image: int) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_small(name, v, rules, image) for v in value)
    if _OFF.search(name) and value is not None:
        return type(value)(0)
    if isinstance(value, str):
        is_activation = rules.relu and _ACTIVATION.search(name) and value in ACT2FN and "relu" not in value
        return "relu" if is_activation else value
    if value is None:
        return {"prediction_length": 8, "vocab_size": VOCABULARY}.get(name)
    if type(value) is not int:
        return value
    if "image_size" in name or "img_size" in name:
        return min(value, image)
    for pattern, most in _MOST:
        if pattern.search(name):
            return min(value, most)
    if not rules.keeps_heads and _HEADS.search(name):
        return max(1, value // rules.divisor)
    if not rules.keeps_heads and _HEAD_WIDTH.search(name):
        return value
    if _INNER.search(name):  # of one layer, so that nothing else depends on it
        return -(-value // rules.divisor)
    is_width = _WIDTH.search(name) and not _NOT_WIDTH.search(name)
    if is_width and value >= 2 * rules.divisor and value % rules.divisor == 0:
        return value // rules.divisor
    return value


# ---- inputs


def run(model: nn.Module, inputs: dict[str, object]) -> object:
    """A seeded forward. inputs are not written to."""
    seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, inputs))


def _running_inputs(model: nn.Module) -> tuple[dict[str, object], float]:
    """The first candidate that the model takes in train and in eval mode, and the seconds of a forward."""
    first, until = None, time.process_time() + 3 * MAX_SECONDS
    for inputs in itertools.islice(_candidates(model), 32):
        for _ in range(3):
            started = time.process_time()
            try:
                with torch.no_grad():
                    run(model.train(), inputs)
                    run(model.eval(), inputs)
            except Exception as error:
                first = first or error
                inputs = _with_placeholders(model, inputs, str(error))
                if inputs is None or time.process_time() > until:
                    break
                continue
            if (seconds := (time.process_time() - started) / 2) > MAX_SECONDS:
                raise Unbuildable(f"time: {seconds:.1f} s a forward")
            return inputs, seconds
        if time.process_time() > until:
            break
    raise Unbuildable(f"forward of {type(model).__name__}: {_line(first) if first else 'no inputs known'}") from first


def _with_placeholders(model: nn.Module, inputs: dict[str, object], message: str) -> dict[str, object] | None:
    """inputs with as many placeholder tokens in each row as the message says that there are features for them."""
    kind = re.search(r"image|video|audio", message.lower())
    count = re.search(r"tokens:? (\d+),? *features:? (\d+)", message)
    token = kind and _find(model.config, f"{kind[0]}_token_id", f"{kind[0]}_token_index")
    if token is None or not count or not isinstance(inputs.get("input_ids"), Tensor):
        return None
    ids = inputs["input_ids"]
    row = torch.cat([ids[0, :4], torch.full((-(-int(count[2]) // len(ids)),), token), ids[0, -4:]])
    return inputs | {"input_ids": row.expand(len(ids), -1).clone()}


def _find(config: PreTrainedConfig, *names: str, default: object = None) -> object:
    """The first of the names that the config has, or the first of its sub-configs that has one."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    for sub in config.sub_configs:
        inner = getattr(config, sub, None)
        if isinstance(inner, PreTrainedConfig) and (value := _find(inner, *names)) is not None:
            return value
    return default


def _number(config: PreTrainedConfig, *names: str, default: int) -> int:
    value = _find(config, *names, default=default)
    return value if isinstance(value, int) else default


_ALWAYS = re.compile(
    r"^(input_ids|decoder_input_ids|pixel_values.*|input_features|input_values|bbox|past_.*|future_.*|image_grid_thw"
    r"|input_points|visual_.*|states|actions|rewards|returns_to_go|timesteps)$"
)


def _candidates(model: nn.Module) -> Iterator[dict[str, object]]:
    """Keywords to try: the alternatives for each parameter of forward that needs something, one after the other and
    then in all combinations; text alone; the class's own dummy inputs."""
    seed()
    made, names = {}, inspect.signature(model.forward).parameters
    for name, parameter in names.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required or _ALWAYS.match(name) or name == model.main_input_name:
            if alternatives := _alternatives(name, model, names):
                made[name] = alternatives
    yield {name: alternatives[0] for name, alternatives in made.items()}
    if len(made) > 1 and "input_ids" in made:
        yield {name: made[name][0] for name in made if name in ("input_ids", "decoder_input_ids")}
    for values in itertools.islice(itertools.product(*made.values()), 1, None):
        yield dict(zip(made, values))


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, 8, shape)


def _alternatives(name: str, model: nn.Module, names: Container[str]) -> list[object]:
    """What a parameter of that name may want, the likeliest first; nothing for a name without a rule."""
    config, kinds = model.config, []
    if re.search(r"input_ids$|target_ids$", name):
        books = _number(config, "num_codebooks", "num_channels", default=0)
        kinds = [_ids(BATCH, LENGTH)]
        kinds += [_ids(BATCH * books, LENGTH), _ids(BATCH, LENGTH, books)] if books and books != 3 else []
        return [_ids(BATCH, 2, LENGTH)] if "MultipleChoice" in type(model).__name__ else kinds
    if name.startswith(("past_", "future_")):
        return _series(name, config)
    if name.startswith(("pixel_values", "visual_pixel", "image", "hidden_states", "x")) and "grid" not in name:
        kinds = _images(name, config, names)
    if re.search(r"grid_thw|image_grid", name):
        return [torch.tensor([[1, 4, 4]])]
    if name in ("spatial_shapes", "grid_hw", "target_sizes", "image_sizes", "tgt_sizes"):
        return [torch.tensor([[4, 4]] * BATCH)]
    if re.search(r"input_features|audio_mel|spectrogram|input_values|audio|waveform", name) and "mask" not in name:
        return _sounds(name, config)
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states", "query_embeds", "noise_embeds", "inputs"):
        width = _number(config, "hidden_size", "d_model", "d_latents", default=32)
        return [*kinds, torch.randn(BATCH, LENGTH, width)]
    if name == "latents":
        return [torch.randn(BATCH, _number(config, "latent_dim", "hidden_size", default=32), LENGTH)]
    if name == "flattened_patches":
        features = torch.randn(BATCH, LENGTH, _number(config, "patch_embed_hidden_size", default=768))
        return [torch.cat([torch.ones(BATCH, LENGTH, 2), features], dim=-1)]
    if name == "bbox":
        return [torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)]
    if name == "input_points":
        return [torch.rand(BATCH, 1, 1, 2) * 16]
    if name == "visual_feats":
        return [torch.randn(BATCH, LENGTH, _number(config, "visual_feat_dim", default=32))]
    if name == "visual_pos":
        return [torch.rand(BATCH, LENGTH, _number(config, "visual_pos_dim", default=4))]
    if re.search(r"mask$", name):
        lengths = (LENGTH, 2 * _number(config, "max_source_positions", default=64), 16)
        return [torch.ones(BATCH, n, dtype=kind) for kind in (torch.long, torch.bool) for n in lengths]
    if name in ("states", "actions"):
        return [torch.randn(BATCH, LENGTH, _number(config, "state_dim" if name == "states" else "act_dim", default=4))]
    if name in ("rewards", "returns_to_go"):
        return [torch.randn(BATCH, LENGTH, 1)]
    if name in ("timesteps", "token_type_ids"):
        return [torch.zeros(BATCH, LENGTH, dtype=torch.long)]
    return kinds


def _images(name: str, config: PreTrainedConfig, names: Container[str]) -> list[Tensor]:
    """A batch of images; of pairs or stacks of them; videos; patches in a row."""
    channels = _number(config, "num_channels", "in_channels", default=3)
    patch = _number(config, "patch_size", default=16)
    size = _find(config, "image_size", "img_size", default=64)
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = _number(config, "num_frames", "frames_per_clip", default=4)
    temporal = _number(config, "temporal_patch_size", default=1)
    images = torch.randn(BATCH, channels, *size)
    stacks = [torch.randn(BATCH, count, channels, *size) for count in (1, 2)]
    videos = [torch.randn(1, frames, channels, *size), torch.randn(1, channels, frames, *size)]
    row = torch.randn(16, channels * temporal * patch**2)
    patches = [row, row.expand(BATCH, -1, -1), row.view(16, channels * temporal, patch, patch)]
    if "video" in name:
        return [*videos, *stacks, images]
    if any("grid" in other or other in ("spatial_shapes", "pixel_position_ids", "tgt_sizes") for other in names):
        return [*patches, images, *stacks]
    return [images, *stacks, *videos, *patches]


def _sounds(name: str, config: PreTrainedConfig) -> list[Tensor]:
    """Mel features, either way round, or samples."""
    mels = _number(
        config, "feature_projection_input_dim", "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel",
        "input_feat_size", "input_dim", "spectrogram_bins", default=80,
    )  # fmt: skip
    steps = 2 * _number(config, "max_source_positions", default=64)
    steps = _number(config, "max_length", default=steps) if name == "input_values" else steps
    waves = [torch.randn(BATCH, 6400), torch.randn(BATCH, 1, 6400)]
    features = [torch.randn(BATCH, mels, steps), torch.randn(BATCH, steps, mels), torch.randn(BATCH, 1, 4 * mels, mels)]
    return [*features, *waves] if re.search("feature|mel|spectrogram", name) else [*waves, *reversed(features)]


def _series(name: str, config: PreTrainedConfig) -> list[Tensor]:
    """Of a network for time series: values, masks and features of the past and the future."""
    context = _number(config, "context_length", default=32)
    past = context + max(_find(config, "lags_sequence", default=[0]))
    length = past if name.startswith("past") else _number(config, "prediction_length", default=8)
    channels = _number(config, "num_input_channels", "input_size", default=1)
    shapes = [(BATCH, length)] * (channels == 1) + [(BATCH, length, channels)]
    if name.endswith("time_features"):
        features = _number(config, "num_time_features", default=1)
        return [torch.randn(BATCH, length, features), torch.randn(BATCH, length, features + 1)]
    if name.endswith("observed_mask"):
        return [torch.ones(shape) for shape in shapes]
    return [torch.randn(shape) for shape in shapes] if name.endswith("values") else []
