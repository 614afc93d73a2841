"""save_pretrained and from_pretrained of transformers: what does not come back to the bit is a clear error, and the
folder says what to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file
from saved_models import MADE
from transformer_models import built, converted, opt, yolos

import coarsegrad as cg
from coarsegrad.integrations.transformers import CoarseGradQuantizer, keep_when_saved

pytestmark = pytest.mark.usefixtures("one_thread")


def edited(folder, change):
    """Change the quantization_config of a folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def qrelu_entry(config):
    return config["staircases"]["qrelus"][0]


WRONG = {
    "a newer format": (lambda c: c.update(format_version=2), "format_version must be an int up to 1, got 2"),
    "no format": (lambda c: c.pop("format_version"), "coarsegrad: .*staircases is no argument of quantize_"),
    "an unknown key": (lambda c: c.update(color="red"), r"must have the key staircases and no other, got \['color'"),
    "an unknown kind": (lambda c: c["staircases"].update(ramps=[]), "must have no keys but qrelus, .* got ramps"),
    "an unknown setting": (lambda c: qrelu_entry(c).update(color="red"), "qrelus must be a list of mappings"),
    "a setting less": (lambda c: qrelu_entry(c).pop("ste"), "qrelus must be a list of mappings with the keys"),
    "9 bits": (lambda c: qrelu_entry(c).update(bits=9), "qrelus, .*activation_fn: bits must be an int in 1..8, got 9"),
    "an STE that is not registered": (lambda c: qrelu_entry(c).update(ste="mine"), "activation_fn: .*'mine'"),
    "a module that is not there": (
        lambda c: qrelu_entry(c).update(names=["model.decoder.layers.7.act"]), "qrelus, model.decoder.layers.7.act"
    ),
    "an attribute that is not there": (
        lambda c: qrelu_entry(c).update(names=["model.decoder.act"]), "OPTDecoder has no module or function 'act'"
    ),
    "arguments": (
        lambda c: [c.clear(), c.update(quant_method="coarsegrad", bits=4)], "has arguments of quantize_, and not what"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_file(name, tmp_path):
    change, message = WRONG[name]
    MADE["opt"]()[0].save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        hf.OPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"bits": 9}, ValueError, "bits must be"),
        ({"bits": None, "inputs": 4, "norms": "fine"}, ValueError, "unknown norms 'fine'"),
        ({"inputs": {"bit": 4}}, ValueError, "inputs must have the key 'bits'"),
        ({"weight_bits": 3}, ValueError, "weight_bits must be one of"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"inplace": True}, TypeError, "inplace cannot be set for all QReLUs"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cg.CoarseGradConfig(**arguments)


@pytest.mark.parametrize("lost", ["alpha", "original"])
def test_an_alpha_or_weight_that_is_not_in_the_file(lost, tmp_path):
    """transformers would give them what was in memory."""
    converted(opt, 4, weight_bits=2)[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    name = (
        f"model.decoder.layers.1.{'activation_fn.alpha' if lost == 'alpha' else 'fc2.parametrizations.weight.original'}"
    )
    save_file({key: t for key, t in load_file(file).items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"but lack {name}. They were saved by"):
        hf.OPTForCausalLM.from_pretrained(tmp_path)


def test_a_source_that_has_changed(tmp_path):
    converted(yolos, 4)[0].save_pretrained(tmp_path)

    def other_source(config):
        for entry in config["staircases"]["rewritten"]:
            entry["sources"] = dict.fromkeys(entry["sources"], "0" * 16)

    edited(tmp_path, other_source)
    with pytest.raises(ValueError, match="the source of forward is not that of the model that was saved"):
        hf.YolosForObjectDetection.from_pretrained(tmp_path)


def test_an_edit_that_calls_something_else(tmp_path):
    converted(yolos, 4)[0].save_pretrained(tmp_path)

    def more(config):
        edits = config["staircases"]["rewritten"][0]["edits"]
        edits.append({**edits[0], "site": "requires_grad_"})

    edited(tmp_path, more)
    with pytest.raises(ValueError, match="edits must call QReLUs of the module, got 'requires_grad_'"):
        hf.YolosForObjectDetection.from_pretrained(tmp_path)


def test_what_cannot_be_described_is_not_saved(tmp_path):
    model, _ = MADE["opt"]()
    layers = model.model.decoder.layers
    layers[1].activation_fn = layers[0].activation_fn
    with pytest.raises(ValueError, match="layers.0.activation_fn and .*layers.1.activation_fn must be two modules"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fused_layer_put_in_by_hand_is_an_error_when_it_is_loaded(tmp_path):
    model, _ = built(opt)
    layer = model.model.decoder.layers[0]
    layer.fc2 = cg.nn.QReLULinear(cg.QReLU(4), layer.fc2)
    keep_when_saved(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.0.fc2.activation: Linear has no module or function 'activation'"):
        hf.OPTForCausalLM.from_pretrained(tmp_path)


def test_another_quantizer_keeps_its_config(tmp_path):
    model, _ = MADE["opt"]()
    model.config.quantization_config = {"quant_method": "theirs"}
    with pytest.warns(UserWarning, match="keeps the quantization_config of theirs, and not the staircases"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"quant_method": "theirs"}


# ------------------------------------------------------------------------------------ with and without us


def in_new_process(code, *arguments):
    made = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout + made.stderr


LOAD = """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(m).__name__ == "QReLU" for m in model.modules()), "QReLUs")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import coarsegrad; assert 'transformers' not in sys.modules",
        "import transformers, coarsegrad; assert 'transformers.quantizers.auto' not in sys.modules",
        "import transformers.modeling_utils, coarsegrad",
        "import coarsegrad, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_importing_coarsegrad_suffices(imports, tmp_path):
    MADE["opt"]()[0].save_pretrained(tmp_path)
    assert "2 QReLUs" in in_new_process(f"import sys\n{imports}\n{LOAD}", tmp_path)


def test_without_coarsegrad_the_folder_says_what_to_import(tmp_path):
    """transformers itself makes a float model; saved again, that is an error where coarsegrad is."""
    MADE["opt"]()[0].save_pretrained(tmp_path / "model")
    said = in_new_process(
        f"import sys\n{LOAD}\nmodel.save_pretrained(sys.argv[2])", tmp_path / "model", tmp_path / "lost"
    )
    assert "0 QReLUs" in said and "Unknown quantization type, got coarsegrad" in said
    assert "import coarsegrad" in (tmp_path / "model" / "README.md").read_text()
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert "import coarsegrad" in config["needs"]
    with pytest.raises(ValueError, match="but lack model.decoder.layers.0.activation_fn.alpha, .* had not imported"):
        hf.OPTForCausalLM.from_pretrained(tmp_path / "lost")


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None\nimport coarsegrad\n"
    assert "CoarseGradConfig" not in in_new_process(code + "print(coarsegrad.__all__)")
    said = in_new_process(code + "try: coarsegrad.CoarseGradConfig\nexcept ImportError as error: print('got', error)")
    assert "got" in said and "transformers" in said


def test_a_readme_that_is_there_stays(tmp_path):
    model, _ = MADE["opt"]()
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert "import coarsegrad" in (tmp_path / "README-coarsegrad.md").read_text()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none" / "README.md").exists()


def test_it_is_registered():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["coarsegrad"] is CoarseGradQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["coarsegrad"] is cg.CoarseGradConfig
    config = cg.CoarseGradConfig(4, inputs=8, filter_fn=print, ste="relu")
    assert json.loads(config.to_json_string())["inputs"] == 8 and "bits" in dict(config)
