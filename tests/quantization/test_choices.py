"""Networks that choose, by top-k, a comparison or a match: how much of a converted network's error is another choice.

`python -m pytest tests/test_choices.py -rP` prints the errors that docs/fine-tuning.md has.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.overrides import TorchFunctionMode

import coarsegrad as cg

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4, "layer_type": "basic"}


class Choices(TorchFunctionMode):
    """Records the indices and masks that calls in the block choose; given such a record, makes these choices again."""

    def __init__(self, made: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.made = [] if made is None else made
        self._next = None if made is None else iter(made)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "").strip("_")
        if name in ("topk", "max") and isinstance(result, tuple):
            dim = (kwargs or {}).get("dim", args[1] if name == "max" else -1)
            indices = self._choice(result.indices)
            if indices.dim() < args[0].dim():  # max drops the dimension
                return type(result)((args[0].take_along_dim(indices.unsqueeze(dim), dim).squeeze(dim), indices))
            return type(result)((args[0].take_along_dim(indices, dim), indices))
        return self._choice(result) if name in ("lt", "gt") and args[0].is_floating_point() else result

    def _choice(self, found: torch.Tensor) -> torch.Tensor:
        if self._next is not None:
            return next(self._next)
        self.made.append(found)
        return found


def _classifier():
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET))
    return model, torch.randn(4, 3, 96, 96), "logits"


def _proposals():
    config = hf.DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, encoder_layers=2,
        backbone_config=hf.ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]), decoder_layers=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=10,
        two_stage=True, with_box_refine=True, two_stage_num_proposals=10,
    )  # fmt: skip
    return hf.DeformableDetrForObjectDetection(config), torch.randn(2, 3, 160, 160), "logits"


def _masks():
    backbone = hf.SwinConfig(
        image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, hidden_act="relu",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64,
        dim_feedforward=64, encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=10,
        use_pretrained_backbone=False,
    )  # fmt: skip
    return hf.Mask2FormerModel(config), torch.randn(2, 3, 64, 64), "transformer_decoder_last_hidden_state"


def _matches():
    keypoints = hf.SuperPointConfig(
        encoder_hidden_sizes=[16, 16, 24, 24], decoder_hidden_size=32, keypoint_decoder_dim=65,
        descriptor_decoder_dim=32, keypoint_threshold=0.0, max_keypoints=50,
    )  # fmt: skip
    config = hf.SuperGlueConfig(
        keypoint_detector_config=keypoints, hidden_size=32, keypoint_encoder_sizes=[16, 32], num_attention_heads=2,
        gnn_layers_types=["self", "cross"] * 2, sinkhorn_iterations=5,
    )  # fmt: skip
    return hf.SuperGlueForKeypointMatching(config), torch.rand(1, 2, 3, 64, 64), "matching_scores"


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.filterwarnings("ignore:calibrate")
@pytest.mark.parametrize(
    ("build", "chooses"), [(_classifier, False), (_proposals, True), (_masks, True), (_matches, True)],
    ids=["ResNet", "Deformable DETR, two stages", "Mask2Former", "SuperGlue"],
)  # fmt: skip
def test_with_the_choices_of_the_float_network_the_error_is_that_of_its_layers(build, chooses, request):
    torch.manual_seed(1)
    model, x, output = build()
    model.eval()
    with torch.no_grad(), Choices() as choices:
        wanted = model(pixel_values=x)[output]
    cg.quantize_(model, bits=8, rounding="nearest")
    report = cg.calibrate(model, [{"pixel_values": x}], progress=False)
    with torch.no_grad():
        free = _error(model(pixel_values=x)[output], wanted)
        with Choices(choices.made):
            held = _error(model(pixel_values=x)[output], wanted)
    least = min(layer.snr for layer in report.layers if layer.reached)
    print(f"{request.node.callspec.id}: error {free:.3f}, with the float network's choices {held:.3f}; {least:.0f} dB")
    assert held < 0.05 and least > 35
    assert free > 5 * held if chooses else free == held
