"""Adapters in PEFT's files: the library gives our numbers; files that do not fit are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_library
import pytest
import safetensors.numpy
import tiny_world
import torch
from flax import traverse_util

from alphagrpo_jax.models import lora, peft
from alphagrpo_jax.models.name_table import entries
from alphagrpo_jax.models.peft import CONFIG_FILE, WEIGHTS_FILE, AdapterError
from alphagrpo_jax.runtime.errors import MissingFileError, UsageError

RANK, ALPHA = 3, 7.5
TARGETS = lora.TARGETS + "|connector/fc1|llm2vae"  # layers outside the stack, too


@pytest.fixture(scope="module")
def base():
    return tiny_world.model().base


@pytest.fixture(scope="module")
def adapters(base):
    """Adapters whose B is not zero."""
    fresh = lora.init(jax.random.key(1), base, TARGETS, RANK)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture
def folder(tmp_path, adapters):
    out = tmp_path / "adapter"
    peft.write_adapter(out, adapters, alpha=ALPHA, base_model="BAGEL", dtype="float32")
    return out


def torch_module(base, prefix: str) -> torch.nn.Module:
    """A tree of linear layers with the official names and the weights of all matrices."""
    root = torch.nn.Module()
    flat = traverse_util.flatten_dict(base)
    for entry in entries(base):
        name = entry.name.removeprefix(prefix)
        if entry.path[-1] != "kernel" or len(entry.shape) != 2 or (name == entry.name and prefix):
            continue
        *parents, last = name.removesuffix(".weight").split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        leaf = np.asarray(flat[entry.path], np.float32)
        linear = torch.nn.Linear(*entry.shape[::-1], bias=False)
        values = leaf if entry.layer is None else leaf[entry.layer]
        linear.weight.data = torch.tensor(entry.to_file(values))
        module.add_module(last, linear)
    return root


def test_the_library_loads_an_adapter_and_gives_our_outputs(base, adapters, folder):
    model = peft_library.PeftModel.from_pretrained(torch_module(base, ""), str(folder))
    flat, flat_base = traverse_util.flatten_dict(adapters), traverse_util.flatten_dict(base)
    seen = 0
    for entry in entries(base):
        layer = entry.path[:-1]
        if (*layer, "a") not in flat or entry.path[-1] != "kernel":
            continue
        leaves = flat_base[entry.path], flat[(*layer, "a")], flat[(*layer, "b")]
        kernel, a, b = (
            np.asarray(leaf if entry.layer is None else leaf[entry.layer]) for leaf in leaves
        )
        x = np.random.default_rng(seen).normal(size=(5, kernel.shape[0])).astype(np.float32)
        expected = x @ kernel + ALPHA / RANK * (x @ a) @ b
        module = model.base_model.model.get_submodule(entry.name.removesuffix(".weight"))
        with torch.no_grad():
            outputs = module(torch.tensor(x)).numpy()
        np.testing.assert_allclose(outputs, expected, rtol=2e-5, atol=2e-5)
        seen += 1
    layers = base["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape[0]
    assert seen == 14 * layers + 2
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == seen  # and no other layer has one


def test_the_files_say_what_they_are(folder, adapters):
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (RANK, ALPHA, "none")
    assert "language_model.model.layers.1.self_attn.q_proj_moe_gen" in config["target_modules"]
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    name = "base_model.model.language_model.model.layers.1.mlp.up_proj"
    leaves = adapters["language_model"]["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], leaves["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], leaves["b"][1].T)
    assert len(tensors) == 2 * len(config["target_modules"])


def test_what_was_written_is_read(folder, adapters):
    shapes = jax.eval_shape(lambda: adapters)
    read = peft.read_adapter(folder, shapes, alpha=ALPHA)
    assert jax.tree.structure(read) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


def test_an_adapter_of_the_library_is_read(base, tmp_path):
    """Of the language model alone, as trainers of the official code make it."""
    config = peft_library.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=r".*layers.\d+.(self_attn|mlp|mlp_moe_gen)\..*_proj.*"
    )
    model = peft_library.get_peft_model(torch_module(base, "language_model."), config)
    for name, values in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values)
    model.save_pretrained(str(tmp_path))
    fresh = lora.init(jax.random.key(1), base, lora.TARGETS, RANK)
    read = peft.read_adapter(tmp_path, fresh, alpha=6.0)
    attention = model.base_model.model.model.layers.get_submodule("1.self_attn.k_proj")
    leaves = read["language_model"]["layers"]["self_attn"]["k_proj"]
    with torch.no_grad():
        a, b = (attention.lora_A["default"].weight, attention.lora_B["default"].weight)
        np.testing.assert_array_equal(leaves["a"][1], a.numpy().T)
        np.testing.assert_array_equal(leaves["b"][1], b.numpy().T)


def rewritten(folder, change):
    """Changes names or values of the tensors of a folder."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    safetensors.numpy.save_file(
        dict(change(*item) for item in tensors.items()), folder / WEIGHTS_FILE
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda name, values: (name.removeprefix(peft.PREFIX), values),
        lambda name, values: (
            name.replace("_A.", "_A.default.").replace("_B.", "_B.default."),
            values,
        ),
        lambda name, values: (name, values.astype(jnp.bfloat16)),
    ],
    ids=["no prefix", "the adapter's own name", "bfloat16"],
)
def test_other_spellings_are_read(folder, adapters, change):
    rewritten(folder, change)
    read = peft.read_adapter(folder, adapters, alpha=ALPHA)
    for got, expected in zip(jax.tree.leaves(read), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2)


def drop_first(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    tensors.pop(sorted(tensors)[0])
    tensors["base_model.model.vit_model.q.lora_A.weight"] = np.zeros((1, 1), np.float32)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_first, r"1 missing: \S+lora_A.weight\n  1 unexpected: base_model.model.vit_model.q"),
        (lambda f: rewritten(f, lambda n, v: (n, v[:, :-1])), "of another shape: .*expected"),
        (lambda f: rewritten(f, lambda n, v: (n, v * np.inf)), "holds NaN or infinite values"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x" * 99), "not a complete safetensors file"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "is no JSON"),
    ],
    ids=["names", "shapes", "infinite", "truncated", "json"],
)
def test_files_that_do_not_fit_are_refused(folder, adapters, damage, message):
    damage(folder)
    with pytest.raises(AdapterError, match=message):
        peft.read_adapter(folder, adapters, alpha=ALPHA)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 8}, AdapterError, "got r=8, expected lora.rank=3; set lora.rank"),
        (
            {"lora_alpha": 8},
            UsageError,
            "got lora_alpha=8, expected lora.alpha=7.5.*set lora",
        ),
        ({"use_dora": True}, AdapterError, "got use_dora=True, expected False"),
        ({"use_rslora": True}, AdapterError, "got use_rslora=True"),
        ({"bias": "all"}, AdapterError, "got bias='all', expected 'none'"),
        ({"rank_pattern": {"q_proj": 4}}, AdapterError, "got rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, AdapterError, "got modules_to_save="),
        ({"alpha_pattern": {"q_proj": 4}}, AdapterError, "got alpha_pattern="),
        ({"lora_bias": True}, AdapterError, "got lora_bias=True, expected no such setting"),
        ({"use_qalora": True}, AdapterError, "got use_qalora=True, expected no such"),
        ({"layer_replication": [[0, 2]]}, AdapterError, "got layer_replication="),
        ({"of_tomorrow": 1}, AdapterError, "got of_tomorrow=1, expected no such setting"),
        ({"init_lora_weights": "pissa_niter_4"}, AdapterError, "belongs to changed weights"),
        ({"peft_type": "IA3"}, AdapterError, "expected peft_type LORA"),
    ],
)
def test_settings_that_mean_another_computation_are_refused(
    folder, adapters, changes, error, message
):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=message):
        peft.read_adapter(folder, adapters, alpha=ALPHA)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder, adapters, name):
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        peft.read_adapter(folder, adapters, alpha=ALPHA)


def test_pickled_weights_are_not_read(folder, adapters):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match=r"adapter_model\.bin there is not read"):
        peft.read_adapter(folder, adapters, alpha=ALPHA)


def test_an_interrupted_write_leaves_no_configuration(tmp_path, adapters, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "replace_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        peft.write_adapter(tmp_path, adapters, alpha=1.0, base_model="", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_convolutions_are_refused(base, tmp_path):
    adapters = lora.init(jax.random.key(0), base, "vae/decoder/conv_in", 2)
    with pytest.raises(UsageError, match="adapters of convolutions cannot be exchanged"):
        peft.write_adapter(tmp_path, adapters, alpha=1.0, base_model="", dtype="float32")
