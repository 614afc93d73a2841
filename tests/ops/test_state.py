"""A QReLU's state: what state_dict says, what load_state_dict refuses and takes over, conversions, deferred init."""

from __future__ import annotations

import copy
import io
import json
import warnings

import accelerate
import pytest
import torch
import transformers as hf
from safetensors.torch import load_model, save_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import coarsegrad as cg

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Exp(nn.Module):
    def forward(self, log):
        return log.exp()

    def right_inverse(self, value):
        return value.log()


def model(bits=2, **settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), cg.QReLU(bits, **settings), nn.Linear(16, 4))


def saved(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


# ----------------------------------------------------------------------------------------- what is refused


def test_the_state_says_what_alpha_is_for():
    state = model(3, rounding="hwgq", num_channels=16, channel_dim=-1).state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.alpha", "1._extra_state", "2.weight", "2.bias"]
    said = state["1._extra_state"]
    assert said.dtype == torch.uint8 and said.device.type == "cpu"
    want = {"bits": 3, "rounding": "hwgq", "ste": "clipped_relu", "squared": False, "channel_dim": -1}
    assert json.loads(bytes(said.tolist())) == want
    # Distributed checkpoints load into tensors of the shapes that the model's own state has.
    assert model(8).state_dict()["1._extra_state"].shape == said.shape


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("other", "got", "wanted"),
    [
        ({"bits": 4}, "bits=4", "bits=2"),
        ({"rounding": "nearest"}, "rounding='nearest'", "rounding='ceil'"),
        ({"squared": True}, "squared=True", "squared=False"),
        ({"bits": 4, "rounding": "hwgq"}, "bits=4, rounding='hwgq'", "bits=2, rounding='ceil'"),
    ],
)
def test_the_alpha_of_another_staircase_is_refused(other, got, wanted, strict):
    mine = model()
    before = mine[1].alpha.clone()
    message = f"1.alpha: got the alpha of a QReLU with {got}, wanted one with {wanted}"
    with pytest.raises(RuntimeError, match=message):
        mine.load_state_dict(saved(model(**other).state_dict()), strict=strict)
    assert torch.equal(mine[1].alpha, before)


def test_another_ste_is_said_and_loaded():
    """It changes how the network goes on to be trained, not what it computes."""
    mine, other = model(), model(ste="relu", alpha=0.7)
    with pytest.warns(UserWarning, match="1.alpha was trained with ste='relu' but is loaded for 'clipped_relu'"):
        mine.load_state_dict(saved(other.state_dict()))
    assert mine[1].ste == "clipped_relu" and torch.equal(mine[1].alpha, other[1].alpha)


def test_what_may_differ():
    """How it is trained: what the network computes is the same."""
    other = model(learn_alpha=True, alpha_grad="exact", alpha_scale="lsq", dropout=0.1, inplace=True, alpha=0.7)
    mine = model()
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine(X), other.eval()(X))


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_bad_alpha_is_refused(bad, learn_alpha, assign):
    mine = model(learn_alpha=learn_alpha, num_channels=16)
    before, state = mine[1].alpha.detach().clone(), model(num_channels=16).state_dict()
    state["1.alpha"][3] = bad
    with pytest.raises(RuntimeError, match=f"1.alpha: alpha must be finite and > 0 .* got {bad} at channel 3"):
        mine.load_state_dict(state, assign=assign)
    assert torch.equal(mine[1].alpha, before)


def test_a_float64_alpha_that_is_0_in_float32_is_refused():
    state = model(alpha=torch.tensor([1e-60], dtype=torch.float64)).state_dict()
    with pytest.raises(RuntimeError, match="1.alpha: alpha must be finite and > 0"):
        model().load_state_dict(state)
    mine = model().double()
    mine.load_state_dict(state)
    assert mine[1].alpha.item() == 1e-60


def test_a_state_without_it_loads_strictly():
    state = {name: t for name, t in model(4, alpha=0.7).state_dict().items() if not name.endswith("_extra_state")}
    mine = model()
    assert not mine.load_state_dict(state).missing_keys
    assert mine[1].alpha == torch.tensor(0.7)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1.alpha"):
        model(num_channels=16).load_state_dict(state)


def test_a_state_that_went_through_arithmetic():
    """An average of two state_dicts, and one of 16-bit floats, are read; what is no JSON is refused."""
    a, b = (model(alpha=alpha).state_dict() for alpha in (0.25, 0.75))
    mine = model()
    mine.load_state_dict({name: (a[name] + b[name]) / 2 for name in a})
    assert mine[1].alpha == 0.5
    mine.load_state_dict({name: t.half() for name, t in a.items()})
    assert mine[1].alpha == 0.25
    a["1._extra_state"] += 1
    with pytest.raises(RuntimeError, match="1.alpha: its _extra_state must be one that a QReLU saved"):
        mine.load_state_dict(a)


# ----------------------------------------------------------------------------------------- shape and channel_dim


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_the_shape_of_the_state_wins(learn_alpha, assign):
    def fresh():
        found = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        cg.quantize_(found, 4, ste="relu", learn_alpha=learn_alpha)
        return found

    calibrated = fresh()
    cg.calibrate(calibrated, [X], channel_dim=-1, progress=False)
    assert calibrated[1].alpha.shape == (16,)
    again = fresh()
    alpha = again[1].alpha
    again.load_state_dict(saved(calibrated.state_dict()), assign=assign)
    assert again[1].channel_dim == -1 and torch.equal(again(X), calibrated(X))
    assert assign or again[1].alpha is alpha, "the one that an optimizer has"
    again(X).sum().backward()
    assert not learn_alpha or again[1].alpha.grad.shape == (16,)
    again.load_state_dict(fresh().state_dict())
    assert again[1].channel_dim is None and again[1].alpha.shape == (1,)
    again(X)


def test_channel_dim_is_taken_over():
    other = model(num_channels=16, channel_dim=-1)
    mine = model(num_channels=16, channel_dim=1)
    mine.load_state_dict(other.state_dict())
    assert mine[1].channel_dim == -1


def test_a_shape_that_cannot_be_is_torchs_error_and_changes_nothing():
    for alpha in (torch.ones(2, 2), torch.ones(3)):
        state, mine = model().state_dict() | {"1.alpha": alpha}, model()
        with pytest.raises(RuntimeError, match="size mismatch for 1.alpha"):
            mine.load_state_dict(state)
        assert mine[1].channel_dim is None and mine(X).shape == (6, 4)


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9)])
def test_no_change_of_shape_under_an_optimizer_that_has_state(kind):
    mine, other = model(learn_alpha=True), model(learn_alpha=True, num_channels=16)
    optimizer = kind(mine.parameters())
    mine(X).sum().backward()
    mine.load_state_dict(model(learn_alpha=True, num_channels=16).state_dict())  # it has none yet
    mine(X).sum().backward()
    optimizer.step()
    assert all(s.shape in ((), (16,)) for s in optimizer.state[mine[1].alpha].values())
    with pytest.raises(RuntimeError, match=r"1.alpha: alpha cannot change its shape from \[16\] to \[1\], as an optim"):
        mine.load_state_dict(model().state_dict())
    with pytest.raises(ValueError, match="before the optimizer's first step"):
        mine[1]._set_alpha(torch.ones(1), None)
    mine.load_state_dict(other.state_dict())
    mine(X).sum().backward()
    optimizer.step()


# ----------------------------------------------------------------------------------------- formats, copies, averages


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("parametrized", [False, True])
def test_safetensors(tmp_path, learn_alpha, parametrized):
    def made(bits, **settings):
        found = model(bits, learn_alpha=learn_alpha, **settings)
        if parametrized:
            parametrize.register_parametrization(found[1], "alpha", Exp())
        return found

    mine = made(2, num_channels=16, alpha=0.3)
    save_model(mine, tmp_path / "model")
    again = made(2)
    load_model(again, tmp_path / "model")
    assert torch.equal(again(X), mine(X)) and again[1].channel_dim == 1
    with pytest.raises(RuntimeError, match="1.alpha: got the alpha of a QReLU with bits=2, wanted one with bits=3"):
        load_model(made(3), tmp_path / "model")


def test_onto_meta():
    other = model(num_channels=16, alpha=0.3)
    with torch.device("meta"):
        mine = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(mine(X), other(X))
    with pytest.raises(RuntimeError, match="got the alpha of a QReLU with bits=2, wanted one with bits=3"):
        model(3).to("meta").load_state_dict(other.state_dict(), assign=True)
    mine.load_state_dict(copy.deepcopy(other).to("meta").state_dict(), assign=True)
    assert mine[1].alpha.is_meta


def test_compiled():
    mine = torch.compile(model(alpha=0.3), backend="eager")
    again = torch.compile(model(), backend="eager")
    again.load_state_dict(mine.state_dict())
    assert torch.equal(again(X), mine(X))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_averaged_model(learn_alpha, use_buffers):
    mine = model(learn_alpha=learn_alpha, alpha=0.25)
    average = torch.optim.swa_utils.AveragedModel(mine, use_buffers=use_buffers)
    for alpha in (0.25, 0.75):
        mine[1]._set_alpha(torch.tensor([alpha]), None)
        average.update_parameters(mine)
    assert average.module[1].alpha == (0.5 if learn_alpha or use_buffers else 0.75)
    again = torch.optim.swa_utils.AveragedModel(model(learn_alpha=learn_alpha))
    again.load_state_dict(saved(average.state_dict()))
    assert torch.equal(again(X), average(X))
    # After a change of shape the average is made to follow by loading.
    mine[1]._set_alpha(torch.full((16,), 0.5), 1)
    average.module.load_state_dict(mine.state_dict())
    average.update_parameters(mine)
    assert torch.equal(average(X), mine(X))


def test_accelerate(tmp_path):
    """Checkpoints and offload; load_checkpoint_and_dispatch with a device_map takes no module with an extra state."""
    mine, accelerator = model(alpha=0.3), accelerate.Accelerator(cpu=True)
    want = mine(X)
    prepared = accelerator.prepare(mine)
    accelerator.save_state(tmp_path / "state")
    mine[1].alpha.fill_(1)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(prepared(X), want)
    save_model(mine, tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    assert torch.equal(accelerate.load_checkpoint_and_dispatch(model(), file)(X), want)
    assert torch.equal(accelerate.cpu_offload(mine, torch.device("cpu"))(X), want)


class Config(hf.PretrainedConfig):
    model_type = "with_qrelu"

    def __init__(self, bits=2, **settings):
        super().__init__(**settings)
        self.bits = bits


class OfOnesOwn(hf.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.fixed, self.learned = (cg.QReLU(config.bits, learn_alpha=learn_alpha) for learn_alpha in (False, True))
        self.post_init()


def test_a_transformers_model_that_has_qrelus(tmp_path):
    mine = OfOnesOwn(Config())
    for layer in (mine.fixed, mine.learned):
        layer._set_alpha(torch.tensor([0.1234567]), None)
    mine.save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        again, info = OfOnesOwn.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(again.fixed.alpha, mine.fixed.alpha) and torch.equal(again.learned.alpha, mine.learned.alpha)
    with pytest.raises(ValueError, match="got the alpha of a QReLU with bits=2, wanted one with bits=3"):
        OfOnesOwn.from_pretrained(tmp_path, config=Config(bits=3))


# ----------------------------------------------------------------------------------------- dtypes


NARROWED = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda m: m.to(torch.bfloat16),
    "to a device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.HalfTensor),
}


@pytest.fixture(params=["set_data", "overwrite", "swap"])
def conversion(request):
    setters = {
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
        "swap": torch.__future__.set_swap_module_params_on_conversion,
    }
    setter = setters.get(request.param, lambda _: None)
    setter(True)
    yield request.param
    setter(False)


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("narrow", NARROWED)
def test_alpha_stays_32_bits_wide(conversion, narrow, learn_alpha, parametrized):
    mine = model(learn_alpha=learn_alpha, alpha=1e-9 * (1 + 2**-20))
    if parametrized:
        parametrize.register_parametrization(mine[1], "alpha", Exp())
    mine(X).sum().backward()
    before, grads = mine[1].alpha.detach().clone(), [p.grad.clone() for p in mine[1].parameters()]
    NARROWED[narrow](mine)
    assert mine[0].weight.element_size() == 2
    assert mine[1].alpha.dtype == torch.float32 and torch.equal(mine[1].alpha, before)
    assert all(map(torch.equal, [p.grad for p in mine[1].parameters()], grads))
    assert mine[1].alpha.requires_grad is learn_alpha
    mine(X.to(mine[0].weight.dtype)).sum().backward()
    mine.double()
    assert mine[1].alpha.dtype == torch.float64 and (parametrized or torch.equal(mine[1].alpha, before.double()))
    assert NARROWED[narrow](mine)[1].alpha.dtype == torch.float32
    assert mine.float()[1].alpha.dtype == torch.float32


def test_a_learned_alpha_moves_in_a_bfloat16_model():
    mine = model(learn_alpha=True, alpha=0.5).bfloat16()
    optimizer = torch.optim.SGD([mine[1].alpha], 1e-4)
    mine[1].alpha.grad = torch.ones(1)
    optimizer.step()
    assert mine[1].alpha.item() == pytest.approx(0.4999, abs=1e-7)


@pytest.mark.parametrize("assign", [False, True])
def test_a_16_bit_alpha_is_widened(assign):
    assert cg.QReLU(2, alpha=torch.tensor([0.3]).bfloat16()).alpha.dtype == torch.float32
    state = model(learn_alpha=True).state_dict()
    state["1.alpha"] = nn.Parameter(torch.tensor([0.3]).bfloat16())
    mine = model(learn_alpha=True)
    mine.load_state_dict(state, assign=assign)
    assert torch.equal(mine[1].alpha, torch.tensor([0.3]).bfloat16().float()) and mine[1].alpha.is_leaf
    state = dict(model(learn_alpha=True).named_parameters())
    mine.load_state_dict(state, assign=True)
    assert mine[1].alpha is state["1.alpha"]


# ----------------------------------------------------------------------------------------- deferred initialisation


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize(
    "alpha", [{}, {"alpha": 0.3}, {"num_channels": 3}, {"alpha": torch.tensor([0.1, 0.2, 0.3]), "num_channels": 3}]
)
def test_reset_parameters(alpha, learn_alpha):
    want = cg.QReLU(2, learn_alpha=learn_alpha, **alpha)
    for layer in (copy.deepcopy(want), copy.deepcopy(want).to("meta").to_empty(device="cpu")):
        with torch.no_grad():
            layer.alpha.fill_(-8e21)
        layer.reset_parameters()
        assert torch.equal(layer.alpha, want.alpha) and type(layer.alpha) is type(want.alpha)


def test_reset_parameters_keeps_the_channels_of_a_calibrated_layer():
    mine = model(alpha=0.3)
    cg.calibrate(mine, [X], channel_dim=1, progress=False)
    mine[1].reset_parameters()
    assert torch.equal(mine[1].alpha, torch.full((16,), 0.3)) and mine[1].channel_dim == 1


def test_reset_parameters_puts_a_given_tensor_back_with_its_shape():
    for given in ({"alpha": torch.ones(1)}, {"alpha": torch.arange(1.0, 17), "num_channels": 16, "channel_dim": -1}):
        mine = model(**given)
        mine.load_state_dict(model(**({} if "num_channels" in given else {"num_channels": 16})).state_dict())
        assert mine[1].alpha.shape != given["alpha"].shape
        mine[1].reset_parameters()
        assert torch.equal(mine[1].alpha, given["alpha"]) and mine[1].channel_dim == given.get("channel_dim")
        mine(X)


def test_reset_parameters_of_a_parametrized_alpha():
    layer = cg.QReLU(2, learn_alpha=True)
    parametrize.register_parametrization(layer, "alpha", Exp())
    layer.to("meta").to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.alpha.detach(), cg.QReLU(2).alpha)


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.1}, {"learn_alpha": True}, {"num_channels": 3}, {"alpha": 0.3, "squared": True}]
)
def test_without_memory(settings):
    """On meta, in FakeTensorMode and in accelerate's init_empty_weights a QReLU is built, printed and run."""
    with torch.device("meta"):
        layer = cg.QReLU(2, ste="relu", **settings)
        assert layer(torch.empty(4, 3, requires_grad=True)).shape == (4, 3)
    assert layer.alpha.is_meta and repr(layer).startswith("QReLU(bits=2")
    with FakeTensorMode():
        layer = cg.QReLU(2, ste="relu", **settings)
        assert layer(torch.empty(4, 3, requires_grad=True)).shape == (4, 3)
        assert ", alpha=" not in repr(layer)
    assert ", alpha=" not in repr(layer)
    for include_buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=include_buffers):
            layer = cg.QReLU(2, ste="relu", **settings)
        assert layer.alpha.is_meta is (include_buffers or bool(settings.get("learn_alpha")))
        assert repr(layer).startswith("QReLU(bits=2")


def test_repr_of_a_real_layer_under_fake_tensors():
    layer = cg.QReLU(2)
    with FakeTensorMode():
        assert repr(layer).startswith("QReLU(bits=2")


def test_an_alpha_without_values():
    assert cg.QReLU(2, alpha=torch.ones(1, device="meta")).alpha.is_meta
    with FakeTensorMode():
        assert cg.QReLU(2, alpha=torch.ones(3), num_channels=3)(torch.empty(4, 3)).shape == (4, 3)
