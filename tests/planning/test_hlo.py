"""What is read from compiled programs, on small ones that are written out here."""

import numpy as np
import pytest

from alphagrpo_jax.planning import hlo

# A loop of 28 steps inside a loop of unknown length, as a TPU's compiler writes them; the inner
# one gathers a layer's weights and reads its slice of the stacked ones.
LOOPS = """
HloModule jit_write_text, is_scheduled=true

%slice_layer (p0: bf16[28,8,4], p1: s32[]) -> bf16[8,4] {
  %p0 = bf16[28,8,4]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = bf16[8,4]{1,0} bitcast(%cut)
}

%inner_condition (state: (s32[], bf16[28,8,4])) -> pred[] {
  %state = (s32[], bf16[28,8,4]) parameter(0)
  %limit = s32[] constant(28)
  %at = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}

%inner_body (state.1: (s32[], bf16[28,8,4])) -> (s32[], bf16[28,8,4]) {
  %state.1 = (s32[], bf16[28,8,4]) parameter(0)
  %one = s32[] constant(1)
  %at.1 = s32[] get-tuple-element(%state.1), index=0
  %stack = bf16[28,8,4]{2,1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %layer = bf16[8,4]{1,0} fusion(%stack, %at.1), kind=kLoop, calls=%slice_layer
  %whole = bf16[8,16]{1,0} all-gather(%layer), replica_groups=[2,4]<=[8], dimensions={1}
  %near = bf16[8,16]{1,0:T(8,128)S(1)} copy(%whole)
  %next = s32[] add(%at.1, %one)
  ROOT %out = (s32[], bf16[28,8,4]) tuple(%next, %stack)
}

%outer_condition (state.2: (s32[], bf16[28,8,4])) -> pred[] {
  %state.2 = (s32[], bf16[28,8,4]) parameter(0)
  %at.2 = s32[] get-tuple-element(%state.2), index=0
  %any = u32[] all-reduce(%at.2), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %go = pred[] convert(%any)
}

%outer_body (state.3: (s32[], bf16[28,8,4])) -> (s32[], bf16[28,8,4]) {
  %state.3 = (s32[], bf16[28,8,4]) parameter(0)
  ROOT %done = (s32[], bf16[28,8,4]) while(%state.3), condition=%inner_condition, body=%inner_body
}

ENTRY %main (w: bf16[28,8,4]) -> (s32[], bf16[28,8,4]) {
  %w = bf16[28,8,4]{2,1,0:T(8,128)} parameter(0)
  %zero.1 = s32[] constant(0)
  %start = (s32[], bf16[28,8,4]) tuple(%zero.1, %w)
  ROOT %end = (s32[], bf16[28,8,4]) while(%start), condition=%outer_condition, body=%outer_body
}
"""
GATHERED = 8 * 16 * 2 * 3 / 4  # bytes that a device sends: three quarters of the result


def test_loops_count_as_often_as_they_run():
    module = hlo.Module(LOOPS)
    traffic = module.traffic(while_steps=10)
    assert traffic.collectives["all-gather"] == [280.0, 280 * GATHERED]
    assert traffic.collectives["all-reduce"] == [10.0, 10 * 2 * 4 * 7 / 8]
    assert traffic.unknown_loops == 1
    assert module.parameter_bytes == 28 * 8 * 4 * 2


def test_a_token_is_one_step_of_the_loop_of_unknown_length():
    step = hlo.Module(LOOPS).per_step()
    assert step.collectives["all-gather"] == [28.0, 28 * GATHERED]
    assert step.collectives["all-reduce"][0] == 1.0
    # The fusion reads a slice and its number and writes the slice; the copy reads the gathered
    # array, and what it writes lies near the core; then the counter's sum and comparison.
    inner = (64 + 4 + 64) + 256 + 3 * 4 + (4 + 4 + 1)
    assert step.memory == 28 * inner + (4 + 1)


def test_a_known_number_of_steps_wins():
    known = LOOPS.replace(
        "body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    traffic = hlo.Module(known).traffic(while_steps=10)
    assert traffic.collectives["all-gather"][0] == 84.0
    assert traffic.unknown_loops == 0
    assert hlo.Module(known).per_step().collectives == {}


def test_a_counter_may_grow_by_more_than_one():
    doubled = LOOPS.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert hlo.Module(doubled).per_step().collectives["all-gather"][0] == 14.0


def test_collectives_between_slices_are_told_apart():
    one_slice, two = hlo.Module(LOOPS, [0] * 8), hlo.Module(LOOPS, [0] * 4 + [1] * 4)
    crossing = hlo.Module(LOOPS, [0, 1] * 4)
    assert one_slice.traffic(while_steps=1).network == 0
    assert two.traffic(while_steps=1).network == 2 * 4 * 7 / 8  # the all-reduce of the condition
    assert crossing.traffic(while_steps=1).network == 2 * 4 * 7 / 8 + 28 * GATHERED


# An all-reduce over two slices of four devices, as the TPU's compiler writes it (shortened).
SENT = """
ENTRY %main (p: f32[2048,1024]) -> f32[2048,1024] {
  %p = f32[2048,1024]{1,0} parameter(0)
  %mark = token[] after-all()
  %cut = f32[512,1024]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %send = (f32[512,1024]{1,0}, u32[], token[]) send(%cut, %mark), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[512,1024]{1,0}, u32[], token[]) recv(%mark), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), is_host_transfer=true
  %got = (f32[512,1024]{1,0}, token[]) recv-done(%recv), is_host_transfer=true
  %share = f32[512,1024]{1,0} get-tuple-element(%got), index=0
  ROOT %all = f32[2048,1024]{1,0} all-gather(%share), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_what_hosts_send_between_slices_is_counted():
    share = 4.0 * 512 * 1024
    traffic = hlo.Module(SENT, [0, 0, 0, 0, 1, 1, 1, 1]).traffic(while_steps=1)
    # Of two slices each sends its half of the share twice, as in a ring.
    assert traffic.collectives["all-reduce between slices"] == [1, share]
    assert traffic.network == share
    assert set(traffic.collectives) == {
        "reduce-scatter", "all-gather", "all-reduce between slices",
    }  # fmt: skip
    assert traffic.memory == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups(text: str, groups: list):
    line = f"ENTRY %m (p: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4] all-to-all(%p), {text}\n}}\n"
    module = hlo.Module(line)
    np.testing.assert_array_equal(module.groups(module.computations["m"]["r"]), groups)


def one_instruction(text: str) -> hlo.Traffic:
    program = (
        "ENTRY %m (p: f32[4,8]) -> f32[4,8] {\n"
        "  %p = f32[4,8]{1,0} parameter(0)\n"
        f"  ROOT %r = {text}\n"
        "}\n"
    )
    return hlo.Module(program).traffic(while_steps=1)


@pytest.mark.parametrize(
    ("text", "kind", "sent"),
    [
        ("f32[8,8] all-gather(%p), replica_groups=[1,2]<=[2]", "all-gather", 128),
        ("(f32[4,8], f32[8,8]) all-gather-start(%p), replica_groups=[1,2]<=[2]", "all-gather", 128),
        ("f32[4,8] all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%a", "all-reduce", 192),
        ("f32[2,8] reduce-scatter(%p), replica_groups=[1,2]<=[2]", "reduce-scatter", 64),
        ("f32[4,8] all-to-all(%p), replica_groups=[1,4]<=[4]", "all-to-all", 96),
        ("f32[4,8] collective-permute(%p), source_target_pairs={{0,1}}", "collective-permute", 128),
    ],
)
def test_bytes_that_a_device_sends(text: str, kind: str, sent: float):
    assert one_instruction(text).collectives == {kind: [1.0, sent]}


def test_memory_traffic_of_single_instructions():
    assert one_instruction("f32[4,8] negate(%p)").memory == 2 * 128
    assert one_instruction("f32[4,8]{1,0:S(1)} negate(%p)").memory == 128
    assert one_instruction("f32[1,8] dynamic-slice(%p, %p)").memory == 2 * 32
    start = "(f32[4,8], f32[4,8]{1,0:S(1)}, u32[]) copy-start(%p)"
    assert one_instruction(start).memory == 128
    assert one_instruction("f32[4,8] bitcast(%p)").memory == 0


def test_sizes_of_arrays():
    (pred, low) = hlo.arrays("(pred[7,3]{1,0}, s4[10]{0:S(1)})")
    assert (pred.bytes, pred.near, low.bytes, low.near) == (21, False, 5, True)
    assert hlo.arrays("f8e4m3fn[4]")[0].bytes == 4
    assert hlo.arrays("bf16[]")[0].bytes == 2


# A fusion whose weights pass through another one, which changes their shape alone.
HANDED_ON = """
%as_matrix (w: bf16[4,1,8]) -> bf16[4,8] {
  %w = bf16[4,1,8]{2,1,0} parameter(0)
  ROOT %flat = bf16[4,8]{1,0} bitcast(%w)
}

%product (x: bf16[2,4], y: bf16[4,1,8]) -> bf16[2,8] {
  %x = bf16[2,4]{1,0} parameter(0)
  %y = bf16[4,1,8]{2,1,0} parameter(1)
  %matrix = bf16[4,8]{1,0} fusion(%y), kind=kLoop, calls=%as_matrix
  ROOT %out = bf16[2,8]{1,0} convolution(%x, %matrix), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[2,4], q: bf16[4,1,8]) -> bf16[2,8] {
  %p = bf16[2,4]{1,0} parameter(0)
  %q = bf16[4,1,8]{2,1,0} parameter(1)
  ROOT %r = bf16[2,8]{1,0} fusion(%p, %q), kind=kOutput, calls=%product
}
"""


def test_weights_that_an_inner_fusion_hands_on_are_read():
    assert hlo.Module(HANDED_ON).traffic(while_steps=1).memory == 2 * (2 * 4 + 4 * 8 + 2 * 8)
