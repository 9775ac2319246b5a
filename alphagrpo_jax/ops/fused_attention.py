"""Attention by kernels that keep no scores: cuDNN's on GPUs, JAX's splash kernel on TPUs.

Both compute softmax over tiles of the keys and compute the scores again in the backward pass
(FlashAttention, Dao et al. 2022, arXiv 2205.14135). Memory grows with T + S instead of T * S,
but for the mask, the same for all heads: per query and key four bytes on TPUs, two on GPUs.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (the splash kernel has few annotations)

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

TILE = 128  # of both kernels, in tokens; shorter queries are not worth a copy of the keys
BLOCKS = (256, 384, 512, 640)  # tokens that the splash kernel may hold at a time
UNSPLIT = PartitionSpec(None, None)  # all rows and heads on every device

# query [B, T, N, H], key and value [B, K, S, H], mask bool[B or 1, T, S] -> [B, T, N, H]
Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def attend_fused(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    kernel: Kernel,
    spec: PartitionSpec,
) -> jax.Array:
    """Computes what `attention.attend` does by a kernel, without an array of all scores.

    The kernels read one block, so blocks are copied into one; what rows share, once per row. A
    query that may look nowhere gets a finite result that differs between kernels.

    Args:
      query: float[B, T, N, H].
      keys, values: blocks of float[R_i, K, S_i, H], B a multiple of R_i.
      masks: blocks of bool[B or R_i or 1, T or 1, S_i].
      kernel: a value of `KERNELS`.
      spec: mesh axes of rows and of heads. Compilers cannot split a kernel over devices, so each
        device gets its rows and heads by `jax.shard_map` over the mesh of `jax.set_mesh`; axes
        that do not divide the rows, or the heads, are not used.
    Returns:
      float[B, T, N, H] in the dtype of `query`.
    """
    batch, length = query.shape[:2]
    key, value = (
        jnp.concatenate([_repeat(block, batch) for block in blocks], axis=2)
        for blocks in (keys, values)
    )
    rows = batch if any(mask.shape[0] > 1 for mask in masks) else 1
    mask = jnp.concatenate(
        [jnp.broadcast_to(_repeat(m, rows), (rows, length, m.shape[2])) for m in masks], axis=2
    )
    return _over_mesh(kernel, spec, query, key, value, mask)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Computes attention by `jax.nn.dot_product_attention`.

    Args:
      query: bfloat16[B, T, N, H], H a multiple of 8 and at most 128.
      key, value: bfloat16[B, K, S, H].
      mask: bool[B or 1, T, S].
      implementation: "xla" computes the same anywhere, with all scores.
    Raises:
      NotImplementedError: a dtype or a width that cuDNN has no kernel for.
    """
    length = query.shape[1]
    # With a mask, cuDNN's backward pass takes even lengths alone.
    query = _pad(query, 1, 2)
    key, value = (_pad(x.swapaxes(1, 2), 1, 2) for x in (key, value))
    mask = _pad(_pad(mask, 1, 2), 2, 2)[:, None]
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation=implementation
    )
    return attended[:, :length]


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention by JAX's splash kernel.

    Args:
      query: float[B, T, N, H].
      key, value: float[B, K, S, H].
      mask: bool[B or 1, T, S].
      interpret: runs the kernel in plain JAX, on any device.
    """
    # Imported here: half a second that only TPUs and tests need.
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, width = query.shape[1], query.shape[3]
    block_q, block_kv = _block(length), _block(key.shape[2])
    sizes = splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    # The kernel does not scale.
    query = _pad((query * width**-0.5).swapaxes(1, 2), 2, block_q)
    key, value = (_pad(x, 2, block_kv) for x in (key, value))
    mask = _pad(_pad(mask, 1, block_q), 2, block_kv)
    # Blocks without a key are passed over: a query without any would be divided by zero.
    mask |= ~jnp.any(mask, axis=2, keepdims=True)

    def attend_row(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> jax.Array:
        kernel = splash_attention.make_splash_mha(
            mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        # The kernel asks this flag, which is made a traced array, by which of two names it goes.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return cast(jax.Array, kernel(query, key, value))  # without the optional second result

    if mask.shape[0] == 1:
        attend_rows = jax.vmap(functools.partial(attend_row, mask=mask[0]))
        attended = attend_rows(query, key, value)
    else:
        attended = jax.vmap(attend_row)(query, key, value, mask)
    return attended[:, :, :length].swapaxes(1, 2)


KERNELS: dict[str, Kernel] = {"cudnn": cudnn, "splash": splash}


def _repeat(block: jax.Array, rows: int) -> jax.Array:
    """Repeats the rows of a block for their neighbors; a block of one row for all."""
    return block if len(block) == rows else jnp.repeat(block, rows // len(block), axis=0)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pads the end of an axis with zeros to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _block(length: int) -> int:
    """Returns how many of so many queries or keys the splash kernel holds at a time.

    Whole blocks are computed: of the sizes that pad the length little, the largest.
    """
    if length <= TILE:
        return TILE
    padded = {size: math.ceil(length / size) * size for size in BLOCKS}
    return max(size for size, total in padded.items() if total <= 1.05 * min(padded.values()))


def _over_mesh(
    kernel: Kernel,
    spec: PartitionSpec,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Runs a kernel on every device's rows and heads; without a mesh, on all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query, key, value, mask)

    def fitting(axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    rows = fitting(spec[0], query.shape[0])
    heads = fitting(spec[1], key.shape[1])
    by_head = PartitionSpec(rows, heads)
    mapped = jax.shard_map(
        kernel,
        in_specs=(
            PartitionSpec(rows, None, heads),
            by_head,
            by_head,
            PartitionSpec(rows if mask.shape[0] > 1 else None),
        ),
        out_specs=PartitionSpec(rows, None, heads),
        check_vma=False,  # the kernels do not say how their results vary
    )
    return mapped(query, key, value, mask)
