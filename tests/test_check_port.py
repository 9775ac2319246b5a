"""The port against the recorded outputs, and mutations that must not go unnoticed."""

import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax import check_port, policy
from alphagrpo_jax.check_port import check
from alphagrpo_jax.models import bagel, kv_cache
from alphagrpo_jax.parity.fixture import compare, load_fixture, role
from alphagrpo_jax.parity.gradient_cases import sequence_mask, sequence_positions
from alphagrpo_jax.parity.image_cases import parse_guidance
from alphagrpo_jax.policy import PolicyParams

FOLDER = pathlib.Path(__file__).parent / "data" / "golden_a"
OUTPUTS = 348
DRAW = r"c5\.v_s0p75_nocfg"
EDIT = r"c7\.v_s0p75_nocfg"


@pytest.mark.slow
def test_every_output_of_the_fixture(capsys: pytest.CaptureFixture):
    assert check_port.main(["--fixture", str(FOLDER)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{OUTPUTS} of {OUTPUTS} outputs within tolerance"
    assert len(lines) == 1 + 15 + 1  # header, c1 to c14 and c8edit, total


def test_host_cases_and_the_table(capsys: pytest.CaptureFixture):
    assert check_port.main(["--fixture", str(FOLDER), "--cases", "c1", "c9", "c12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["c1", "c9", "c12"]
    assert all(line.split()[-1] == "pass" for line in lines[1:-1])
    assert lines[-1] == "31 of 31 outputs within tolerance"


def test_failures_are_counted_and_named(monkeypatch: pytest.MonkeyPatch, capsys):
    def broken(port, case):
        raise KeyError("some text")

    monkeypatch.setitem(check_port.CASES, "c1", lambda port, case: {})
    monkeypatch.setitem(check_port.CASES, "c12", broken)
    assert check_port.main(["--fixture", str(FOLDER), "--cases", "c1", "c9", "c12"]) == 1
    out = capsys.readouterr().out
    assert "c1.str0_ids: max abs error inf" in out
    assert "KeyError: 'some text'" in out
    assert out.splitlines()[-1] == "17 of 31 outputs within tolerance"


def test_a_folder_that_is_no_fixture(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    assert check_port.main(["--fixture", str(tmp_path)]) == 1
    assert "lacks ['expected.json', 'expected.npz']" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no cases \['c99'\]"):
        check(FOLDER, ["c99"])


@pytest.mark.parametrize(
    ("file", "keep", "message"),
    [
        ("expected.npz", 0.5, "expected.npz cannot be read (File is not a zip file); it may be"),
        ("expected.npz", 0.0, "expected.npz cannot be read"),
        ("expected.json", 0.5, "expected.json is not valid JSON"),
    ],
)
def test_a_damaged_fixture(file: str, keep: float, message: str, tmp_path: pathlib.Path, capsys):
    for name in ("expected.json", "expected.npz"):
        content = (FOLDER / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * (keep if name == file else 1))])
    assert check_port.main(["--fixture", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    (tmp_path / "expected.json").write_text('{"arrays": {}}')
    assert check_port.main(["--fixture", str(tmp_path)]) == 1
    assert "expected.json lacks ['texts', 'grad_norm_names']" in capsys.readouterr().err


def test_roles():
    fixture = load_fixture(FOLDER)
    assert sum(len(names) for names in fixture.outputs().values()) == OUTPUTS
    assert role("c10.packed_text4_global_JOINT") == "exempt"
    assert role("c9.step0_x") == "input"
    assert role("c14.packed_vit_tokens") == "input"
    assert role("c14.packed_text_ids") == "packing"
    assert role("c8default.latents") == "output"


def test_pass_rule():
    expected = np.array([1.0, 100.0], np.float32)
    assert compare(expected + np.array([1.9e-4, 1e-2], np.float32), expected)[0]
    assert not compare(expected + np.array([2.1e-4, 0], np.float32), expected)[0]
    assert not compare(np.array([np.nan, 100.0]), expected)[0]
    assert not compare(expected[None], expected)[0]
    assert compare(None, expected) == (False, np.inf)
    ids = np.array([3, 4], np.int32)
    assert compare(ids.astype(np.int64), ids)[0]
    assert not compare(ids + 1, ids)[0]
    assert not compare(ids.astype(np.float32), ids)[0]
    pixels = np.array([0, 7], np.uint8)
    assert compare(pixels + np.uint8(1), pixels)[0]
    assert not compare(pixels + np.uint8(2), pixels)[0]


def test_names_of_guidances():
    guidance = parse_guidance("text4_img1p5_textchannel")
    assert (guidance.text_scale, guidance.image_scale) == (4.0, 1.5)
    assert guidance.renorm == "text_channel"
    assert parse_guidance("text4_global_rmin0p95").renorm_min == 0.95
    assert not parse_guidance("img2_only").uses_text
    with pytest.raises(ValueError, match="unknown word 'odd'"):
        parse_guidance("text4_odd")


def test_training_sequence_by_hand():
    lengths, modes = [2, 3, 2], ["causal", "noise", "full"]
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        *[[1, 1, 1, 1, 1, 0, 0]] * 3,
        *[[1, 1, 0, 0, 0, 1, 1]] * 2,
    ]
    np.testing.assert_array_equal(sequence_mask(lengths, modes), expected)
    assert sequence_positions(lengths, modes).tolist() == [0, 1, 2, 2, 2, 3, 3]


def with_weights_of(source: str, target: str, function: Callable) -> Callable:
    """A policy function whose `target` expert has the weights of the `source` expert."""

    def swap(tree: dict) -> dict:
        out = dict(tree)
        for name in tree:
            if isinstance(tree[name], dict):
                out[name] = swap(tree[name])
        for name in tree:
            plain = name.removesuffix("_moe_gen")
            if plain + "_moe_gen" in tree:
                out[plain + target] = tree[plain + source]
        return out

    def mutated(model, params, *args, **kwargs):
        base = params.base | {"language_model": swap(params.base["language_model"])}
        return function(model, PolicyParams(base), *args, **kwargs)

    return mutated


def increasing_positions(ctx, length):
    positions, mask = GEOMETRY(ctx, length)
    return positions + jnp.arange(length)[None], mask


def causal_block(ctx, length):
    positions, mask = GEOMETRY(ctx, length)
    return positions, jnp.tril(mask)


def swapped_table(width, side):
    return np.roll(TABLE(width, side), width // 2, axis=1)


def image_block_keeps_rope(ctx, segment, advance):
    return APPEND(ctx, segment, 0 if isinstance(advance, int) else advance)


GEOMETRY, TABLE, APPEND = policy._image_geometry, bagel.sincos_table, kv_cache.append
FEATURES, VELOCITY = bagel.timestep_features, policy.velocity
MUTATIONS = {
    "rope ids increase inside an image": (policy, "_image_geometry", increasing_positions, DRAW),
    "causal denoising block": (policy, "_image_geometry", causal_block, DRAW),
    "delimiters through the gen expert": (
        policy, "velocity", with_weights_of("_moe_gen", "", VELOCITY), DRAW,
    ),
    "latents through the und expert": (
        policy, "velocity", with_weights_of("", "_moe_gen", VELOCITY), DRAW,
    ),
    "timestep times 1000": (bagel, "timestep_features", lambda t: FEATURES(1000 * t), DRAW),
    "rows and columns swapped": (bagel, "sincos_table", swapped_table, DRAW),
    "full attention in text": (
        policy, "causal_mask", lambda mask: mask[:, None] & mask[:, :, None], DRAW,
    ),
    "rope stays after an image block": (kv_cache, "append", image_block_keeps_rope, EDIT),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_fail(name: str, monkeypatch: pytest.MonkeyPatch):
    module, attribute, mutation, arrays = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, mutation)
    (result,) = check(FOLDER, [arrays.split("\\")[0]], only=arrays)
    assert not result.message
    assert len(result.failed) == 1
    assert result.errors[result.failed[0]] > 0.05


def test_the_unmutated_arrays_pass():
    results = check(FOLDER, ["c5", "c7"], only=f"{DRAW}|{EDIT}")
    assert [(len(r.errors), r.failed) for r in results] == [(1, ()), (1, ())]
