"""generate and export over a tiny random model and a checkpoint with adapters that are not zero."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import export, generate, inference
from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.models.bagel_weights import load_model, save_model
from alphagrpo_jax.models.name_table import AE, EMA, entries, position_tables
from alphagrpo_jax.ops.posembed import sincos_table
from alphagrpo_jax.prompts import start_position
from alphagrpo_jax.runtime import checkpoint, sharding
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training.optimizer import average_of, make_optimizer
from alphagrpo_jax.training.run_folder import CONFIG_FILE, payload


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> pathlib.Path:
    """A run's folder after three updates that did not happen: its adapters are random."""
    return write_run(tiny_world.write_all(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def run_from_half(tmp_path_factory) -> pathlib.Path:
    """The same over a pretrained model whose files are bfloat16, as the shipped one's."""
    root = tiny_world.write_all(tmp_path_factory.mktemp("half"))
    save_model(root / "model", tiny_world.model(), dtype="bfloat16")
    return write_run(root)


def write_run(root: pathlib.Path) -> pathlib.Path:
    config = config_lib.from_config_dict(tiny_world.config(root))
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    loaded = setup.load_policy(config, mesh)
    state = setup.initial_state(config, loaded.base, make_optimizer(config.optimizer), mesh)
    leaves, tree = jax.tree.flatten(state.trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    state = state.replace(trainable=jax.tree.unflatten(tree, noisy))
    folder = root / "run"
    saves = checkpoint.Checkpoints(folder, keep=1)
    saves.save(3, payload(state, start_position(config)), {"step": 3})
    saves.close()
    (folder / CONFIG_FILE).write_text(config_lib.to_json(config))
    return folder


def test_a_run_is_restored(run_folder: pathlib.Path):
    policy = inference.from_run(run_folder)
    assert policy.step == 3
    assert policy.params.lora_scale == 2.0  # alpha 8, rank 4
    for leaf in jax.tree.leaves(policy.params.lora):
        assert 0.1 < float(np.std(leaf)) < 0.3


@pytest.mark.parametrize("run", ["run_folder", "run_from_half"])
def test_exported_weights_draw_the_same(run: str, request, tmp_path: pathlib.Path):
    run_folder, out = request.getfixturevalue(run), tmp_path / "model"
    assert export.main(["--checkpoint", str(run_folder), "--out", str(out)]) == 0
    policy = inference.from_run(run_folder)
    reloaded = load_model(out)
    expected = export.merged_weights(policy)
    jax.tree.map(np.testing.assert_array_equal, reloaded.base, expected)
    changed = [
        bool(np.any(a != b))
        for a, b in zip(
            jax.tree.leaves(reloaded.base), jax.tree.leaves(policy.loaded.base), strict=True
        )
    ]
    assert sum(changed) == len(jax.tree.leaves(policy.params.lora)) // 2  # one kernel per pair
    merged = policy._replace(
        loaded=reloaded, params=gradient_lib.policy.PolicyParams(reloaded.base)
    )
    first = inference.generate_images(policy, "a red circle", think=True, count=2, seed=1)
    second = inference.generate_images(merged, "a red circle", think=True, count=2, seed=1)
    assert first.texts == second.texts
    np.testing.assert_allclose(first.images.astype(int), second.images.astype(int), atol=1)
    assert export.main(["--checkpoint", str(run_folder), "--out", str(out)]) == 1


@pytest.mark.parametrize("run", ["run_folder", "run_from_half"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_an_export_is_the_table_of_names_with_its_values(run: str, dtype, request, tmp_path):
    """Read by the safetensors library, not by our loader."""
    folder = request.getfixturevalue(run)
    export.export(str(folder), str(tmp_path / "model"), dtype=dtype)
    policy = inference.from_run(folder)
    base = export.merged_weights(policy)
    flat = traverse_util.flatten_dict(base)
    files = {name: load_file(tmp_path / "model" / name) for name in (EMA, AE)}
    expected = {EMA: {}, AE: {}}
    for entry in entries(base):
        leaf = np.asarray(flat[entry.path])
        expected[entry.file][entry.name] = entry.to_file(
            leaf if entry.layer is None else leaf[entry.layer]
        )
    for name, (width, side) in position_tables(policy.loaded.config).items():
        expected[EMA][name] = sincos_table(width, side)
    for file, tensors in expected.items():
        assert files[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            written = files[file][name]
            assert (written.dtype.name, written.shape) == (dtype or "float32", tensor.shape), name
            np.testing.assert_array_equal(written, tensor.astype(written.dtype), err_msg=name)
    assert "latent_pos_embed.pos_embed" in files[EMA]


def test_adapters_are_exported_without_the_weights_and_start_a_run(
    run_folder, tmp_path, monkeypatch
):
    out = tmp_path / "adapter"
    monkeypatch.setattr(setup, "load_policy", None)  # nobody reads the weights
    flags = ["--checkpoint", str(run_folder), "--out", str(out), "--format", "peft"]
    assert export.main(flags) == 0
    assert export.main(flags) == 1  # the folder holds something
    monkeypatch.undo()
    policy = inference.from_run(run_folder)
    config = config_lib.change_options(policy.config, {"lora.init_from": str(out)})
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    fresh = setup.initial_state(config, policy.params.base, make_optimizer(config.optimizer), mesh)
    started = setup.with_adapter(config, fresh)
    jax.tree.map(np.testing.assert_array_equal, started.trainable, policy.params.lora)
    assert setup.with_adapter(policy.config, fresh) is fresh
    averaging = config_lib.change_options(config, {"optimizer.average_limit": 0.3})
    optimizer = make_optimizer(averaging.optimizer)
    fresh = setup.initial_state(averaging, policy.params.base, optimizer, mesh)
    average = average_of(setup.with_adapter(averaging, fresh).opt_state)
    jax.tree.map(np.testing.assert_array_equal, average, policy.params.lora)
    full = config_lib.change_options(config, {"train.trainable": "full"})
    with pytest.raises(ConfigError, match=r"lora\.init_from=.* needs train\.trainable=lora"):
        setup.with_adapter(full, fresh)


def test_export_rounds_only_when_told_to(run_folder: pathlib.Path, tmp_path: pathlib.Path):
    flags = ["--checkpoint", str(run_folder), "--out", str(tmp_path / "half")]
    assert export.main([*flags, "--dtype", "bfloat16"]) == 0
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32),
        export.merged_weights(inference.from_run(run_folder)),
    )
    again = load_model(tmp_path / "half")
    jax.tree.map(np.testing.assert_array_equal, again.base, rounded)
    assert set(again.dtypes.values()) == {"bfloat16"}


def test_generate_writes_a_grid_and_prints_the_texts(
    run_folder: pathlib.Path, tmp_path: pathlib.Path, capsys
):
    out = tmp_path / "new" / "x.png"
    flags = ["--prompt", "a blue square", "--out", str(out), "--checkpoint", str(run_folder)]
    assert generate.main([*flags, "--think", "--n", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line[:2] in ("1:", "2:", "3:")]) == 2
    side = 3 * tiny_world.SIDE  # enlarged to at least 96 pixels
    assert Image.open(out).size == (2 * side + 6, side + 4)
    assert generate.main(flags) == 0
    assert Image.open(out).size == (side, side)


def test_one_image_is_the_first_of_many(run_folder: pathlib.Path):
    policy = inference.from_run(run_folder)
    single = inference.generate_images(policy, "a red circle", think=False, count=1, seed=7)
    many = inference.generate_images(policy, "a red circle", think=False, count=3, seed=7)
    other_seed = inference.generate_images(policy, "a red circle", think=False, count=1, seed=8)
    assert single.texts == []
    np.testing.assert_allclose(single.images[0].astype(int), many.images[0].astype(int), atol=1)
    assert np.any(single.images != other_seed.images)
    assert np.any(many.images[0] != many.images[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "not a run's folder"), ("empty", "no checkpoints yet")],
)
def test_a_folder_without_a_checkpoint_is_explained(
    name: str, message: str, run_folder: pathlib.Path, tmp_path: pathlib.Path, capsys
):
    folder = tmp_path / name
    if name == "empty":
        folder.mkdir()
        (folder / CONFIG_FILE).write_text((run_folder / CONFIG_FILE).read_text())
        assert json.loads((folder / CONFIG_FILE).read_text())["task"] == "rt2i"
    flags = ["--prompt", "x", "--out", str(tmp_path / "x.png"), "--checkpoint", str(folder)]
    assert generate.main(flags) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> pathlib.Path:
    """An image to look at, with transparency and of a size of its own."""
    path = tmp_path_factory.mktemp("pictures") / "given.png"
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    Image.fromarray(values, "RGBA").save(path)
    return path


def test_an_image_is_edited_and_asked_about(run_folder, picture, tmp_path, capsys):
    out = tmp_path / "edited.png"
    flags = ["--checkpoint", str(run_folder), "--image", str(picture)]
    assert generate.main([*flags, "--edit", "a red circle", "--out", str(out)]) == 0
    assert Image.open(out).size == (96, 96)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert generate.main([*flags, "--ask", "a red circle"]) == 0
    assert capsys.readouterr().out.startswith("thinks: ")


@pytest.mark.parametrize("keep", inference.KEEP_MODES)
def test_an_image_is_refined(keep, run_folder, picture, tmp_path, capsys):
    out, records = tmp_path / "x.png", tmp_path / "records.jsonl"
    records.write_text(json.dumps(tiny_world.record("a red circle")) + "\n")
    flags = ["--checkpoint", str(run_folder), "--prompt", "a red circle", "--out", str(out)]
    extra = [] if keep == "last" else ["--record", str(records)]
    image_flags = ["--image", str(picture)] if keep == "gated" else []
    assert generate.main([*flags, "--refine", "2", "--keep", keep, *extra, *image_flags]) == 0
    names = sorted(path.name for path in tmp_path.glob("x*.png"))
    assert names == ["x.png", "x_0.png", "x_1.png", "x_2.png"]
    printed = capsys.readouterr().out
    kept_round = int(printed.splitlines()[-1].split("kept round ")[1][0])
    log = json.loads((tmp_path / "x_rounds.json").read_text())
    assert [entry["image"] for entry in log["rounds"]] == names[1:]
    assert all(entry["text"] in printed for entry in log["rounds"])
    assert all(entry["text"] for entry in log["rounds"][1:])
    assert (log["kept"], log["keep"]) == (kept_round, keep)
    assert out.read_bytes() == (tmp_path / f"x_{kept_round}.png").read_bytes()
    if keep == "last":
        assert kept_round == 2
        assert "without a verifier" in printed
        assert "(verifier:" not in printed
        assert [entry["reward"] for entry in log["rounds"]] == [None] * 3
    else:
        rewards = [float(piece.split(")")[0]) for piece in printed.split("(verifier: ")[1:]]
        assert len(rewards) == 3
        assert rewards[kept_round] == max(rewards)
        assert rewards == [round(entry["reward"], 3) for entry in log["rounds"]]
        assert "by the verifier tiny_verifiers:Honest" in printed


def test_rounds_before_a_verifier_that_fails_are_kept(run_folder, tmp_path, capsys, monkeypatch):
    class Fails:
        calls = 0

        def __init__(self, policy, record):
            pass

        def __call__(self, image):
            Fails.calls += 1
            if Fails.calls == 3:
                raise InputError("the verifier gave no answer: timeout")
            return 0.5

        def close(self):
            pass

    monkeypatch.setattr(inference, "_ImageRater", Fails)
    monkeypatch.setattr(generate, "find_questions", lambda options: "its questions")
    out = tmp_path / "x.png"
    flags = ["--checkpoint", str(run_folder), "--prompt", "a red circle", "--out", str(out)]
    assert generate.main([*flags, "--refine", "3", "--keep", "best"]) == 1
    message = capsys.readouterr().err
    assert "after round 2: the verifier gave no answer: timeout" in message
    assert "x.png is round 0" in message
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x.png", "x_0.png", "x_1.png", "x_2.png", "x_rounds.json"]
    assert out.read_bytes() == (tmp_path / "x_0.png").read_bytes()
    log = json.loads((tmp_path / "x_rounds.json").read_text())
    assert [entry["reward"] for entry in log["rounds"]] == [0.5, 0.5, None]
    assert log["kept"] == 0


@pytest.mark.slow
def test_guidance_changes_edits(run_folder, picture, tmp_path, capsys):
    flags = ["--checkpoint", str(run_folder), "--image", str(picture), "--edit", "a red circle"]
    written = {}
    for text, image in (("1.5", "1"), ("8", "1"), ("1.5", "8")):
        out = tmp_path / f"{text}_{image}.png"
        scales = ["--text-guidance", text, "--image-guidance", image]
        assert generate.main([*flags, "--out", str(out), *scales]) == 0
        written[out.read_bytes()] = out
    assert len(written) == 3
    off = ["--text-guidance", "1", "--image-guidance", "2"]
    assert generate.main([*flags, "--out", str(tmp_path / "x.png"), *off]) == 2
    assert "give --text-guidance above 1 as well" in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["best", "gated"])
@pytest.mark.parametrize("where", ["flag", "run"])
def test_a_missing_verifier_is_one_message_before_the_model_is_loaded(
    keep, where, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(generate, "open_policy", lambda *_: pytest.fail("loaded"))
    flags = ["--prompt", "a red circle", "--out", str(tmp_path / "x.png"), "--refine", "1"]
    if where == "flag":
        flags += ["--checkpoint", str(run_folder), "--verifier", "nowhere/at/all"]
    else:
        folder = tmp_path / "run"
        (folder / checkpoint.FOLDER).mkdir(parents=True)
        config = json.loads((run_folder / CONFIG_FILE).read_text())
        config["verifier"] |= {"kind": "hf", "path": "nowhere/at/all"}
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        flags += ["--checkpoint", str(folder)]
    assert generate.main([*flags, "--keep", keep]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: 'nowhere/at/all' names ")
    assert message.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a dog", "--refine", "1", "--keep", "best"], "needs questions about the"),
        (["--image", "nowhere.png", "--ask", "what?"], "no image file at nowhere.png"),
        (["--image", "setup.py", "--edit", "x"], "is not a readable image"),
        (["--prompt", "a <|im_end|> circle"], "got the control tokens ['<|im_end|>']"),
        (["--prompt", "<|vision_start|>", "--think"], "control tokens ['<|vision_start|>']"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(generate, "open_policy", lambda *_: pytest.fail("loaded"))
    out = [] if "--ask" in flags else ["--out", str(tmp_path / "x.png")]
    assert generate.main([*flags, *out]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x.png"], "give one of --prompt, --edit and --ask"),
        (["--prompt", "x"], "--out is needed"),
        (["--edit", "x", "--out", "x.png"], "--edit needs --image"),
        (["--prompt", "x", "--image", "y.png", "--out", "x.png"], "needs --refine"),
        (["--prompt", "x", "--out", "x.png", "--keep", "best"], "--keep best needs --refine"),
        (["--prompt", "x", "--out", "x.png", "--refine", "1", "--n", "2"], "leave --n out"),
        (["--prompt", "x", "--out", "x.txt"], "expected a name that ends with one of"),
        (["--prompt", "x", "--out", "x.psd"], "expected a name that ends with one of"),
        (["--image", "y.png", "--ask", "x", "--n", "2"], "guidance with --ask"),
        (["--image", "y.png", "--ask", "x", "--out", "x.png"], "guidance with --ask"),
        (["--image", "y.png", "--ask", "x", "--text-guidance", "2"], "guidance with --ask"),
        (["--prompt", "x", "--out", "x.png", "--image-guidance", "2"], "without --edit or"),
        (
            ["--prompt", "x", "--out", "x.png", "--refine", "1", "--think", "--image", "y.png"],
            "the first image is given",
        ),
    ],
)
def test_contradicting_flags_end_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("action", ["--edit", "--ask"])
def test_control_tokens_in_wishes_and_questions_are_refused(action, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "open_policy", lambda *_: pytest.fail("loaded"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    out = ["--out", str(tmp_path / "y.png")] if action == "--edit" else []
    flags = ["--image", str(tmp_path / "x.png"), action, "what <|endoftext|>?", *out]
    assert generate.main(flags) == 1
    assert "control tokens ['<|endoftext|>']" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(value, tmp_path, capsys):
    root = tiny_world.write_all(tmp_path)
    loaded = tiny_world.model()
    loaded.base["llm2vae"]["kernel"] = loaded.base["llm2vae"]["kernel"].at[3, 1].set(value)
    for dtype in ("float32", "bfloat16", "float16"):
        save_model(root / "model", loaded, dtype=dtype)
        out = tmp_path / "x.png"
        flags = ["--prompt", "x", "--out", str(out), "--model", str(root / "model")]
        assert generate.main(flags) == 1
        errors = capsys.readouterr().err
        assert "ema.safetensors: tensor llm2vae.weight holds NaN or infinite values" in errors
        assert not out.exists()


@pytest.mark.parametrize("think", [False, True])
def test_outputs_that_are_no_numbers_are_not_drawn(think, run_folder, tmp_path):
    policy = inference.from_run(run_folder)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, policy.params.lora)
    policy = policy._replace(params=policy.params.replace(lora=broken))
    with pytest.raises(InputError, match=r"not finite .* the weights are broken"):
        inference.generate_images(policy, "a red circle", think=think, count=1, seed=0)


@pytest.mark.parametrize("text", ["", " \n", "a \ud83d", "a <|im_start|>"])
def test_texts_that_no_policy_can_read_are_refused(text, run_folder):
    policy = inference.from_run(run_folder)
    with pytest.raises(InputError, match="got the"):
        inference.generate_images(policy, text, think=False, count=1, seed=0)


@pytest.mark.parametrize("ending", generate.FORMATS)
def test_every_format_that_is_allowed_can_be_written(ending, tmp_path):
    path = tmp_path / f"x{ending}"
    generate.to_picture(np.full((2, 8, 8, 3), 90, np.uint8)).save(path)
    assert Image.open(path).size == (2 * 96 + 6, 96 + 4)


def test_wrong_usage_ends_with_code_2(capsys):
    wrong = (["--n", "0"], ["--top-p", "1.5"], ["--temperature", "-1"], ["--unknown"],
             ["--temperature", "nan"], ["--text-guidance", "inf"], ["--seed", "-1"],
             ["--num-points", "1"], ["--prompt", " "], ["--prompt", "a \udcff"])  # fmt: skip
    for extra in wrong:
        with pytest.raises(SystemExit) as stop:
            generate.main(["--prompt", "x", "--out", "x.png", *extra])
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "--n: got 0, it must be at least 1" in errors
    assert "--temperature: got 'nan', expected a finite number" in errors
    assert "--prompt: got ' ', expected a text in UTF-8 that is not empty" in errors
