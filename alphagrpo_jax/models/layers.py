"""Parameter declarations shared by the decoder, the ViT and the connectors."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from alphagrpo_jax.ops.norm import layer_norm, rms_norm

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
PRODUCT = "product"  # name of what `matmul` computes
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        # Policies do not see the product inside of a function with a derivative of its own.
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
}


# Why not plain Linen: `nn.Module.param` traces the initializer at every use, only to compare
# shapes, and `nn.scan` traces the layer twice, once to learn what its variables become. With
# `ReadsParams` and `scan_layers` Linen needs 1.2 to 2.5 times the CPU time to trace a function (by
# `python -m benchmarks.layer_scan`: text gradient 1.3, image gradient 1.5, ViT 2.5 at the shipped
# model's sizes) and the same to compile it. Two steps of the tests' tiny run with all functions in
# the compilation cache, as after a restart: 18 s of CPU time, 21 to 23 s by Linen, equal rows.
# Measured with jax 0.10.2, flax 0.12.8. tests/models/test_layers.py compares values and gradients.

# A mixin and not a Module: Linen wraps every method of a Module class, which costs tracing time.
_Module = nn.Module if TYPE_CHECKING else object


class ReadsParams(_Module):
    """Mixin before `nn.Module`: reads a stored parameter without tracing its initializer."""

    def param(self, name: str, init_fn: Callable[..., jax.Array], *args: Any, **kwargs: Any) -> Any:
        """Returns a parameter as `nn.Module.param` does; the first of `args` is the shape.

        Raises:
          ScopeParamShapeError: the stored parameter has another shape.
        """
        if not self.has_variable("params", name):
            return super().param(name, init_fn, *args, **kwargs)
        value = self.get_variable("params", name)
        if value.shape != tuple(args[0]):
            assert self.scope is not None  # `has_variable` refuses an unbound module
            where = self.scope.path_text
            raise errors.ScopeParamShapeError(name, where, value.shape, tuple(args[0]))
        return value


def scan_layers(
    block: nn.Module, carry: Any, per_layer: Any, *shared: Any, length: int, remat: str, unroll: int
) -> tuple[Any, Any]:
    """Runs a stack of equal layers, `carry, y_i = block(carry, per_layer_i, *shared)`.

    Equals a Linen module made by `nn.scan(nn.remat(...))` whose variables are only read and whose
    layers use no random numbers.

    Args:
      block: bound to the parent's scope, where its variables have a leading axis of layers.
      carry: result that a layer hands to the next one.
      per_layer: pytree with that leading axis, or None.
      shared: arguments that are the same for all layers.
      length: number of layers.
      remat: key of `REMAT_POLICIES`.
      unroll: layers per iteration; all of them: no loop.
    Returns:
      The last carry, and the layers' second results, stacked.
    """
    if block.is_initializing():  # once per model: here `nn.scan` splits the keys of the layers
        initialize = nn.scan(
            lambda layer, carry, inputs: layer(carry, inputs, *shared),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
        )
        return initialize(block, carry, per_layer)
    layer = block.clone(parent=None, name=None)
    if unroll >= length:
        outputs, variables = [], block.variables
        for index in range(length):
            of_layer = jax.tree.map(lambda x, index=index: x[index], (variables, per_layer))
            # In no loop the compiler could merge what is computed again with the first time.
            again = _checkpointed(layer.apply, remat, prevent_cse=True)
            function = layer.apply if remat == "none" else again
            carry, output = function(of_layer[0], carry, of_layer[1], *shared)
            outputs.append(output)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

    def step(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        variables, inputs = scanned
        return layer.apply(variables, carry, inputs, *shared)

    if remat != "none":
        step = _checkpointed(step, remat, prevent_cse=False)
    return jax.lax.scan(step, carry, (block.variables, per_layer), length=length, unroll=unroll)


def _checkpointed(
    function: Callable[..., Any], remat: str, *, prevent_cse: bool
) -> Callable[..., Any]:
    return jax.checkpoint(function, prevent_cse=prevent_cse, policy=REMAT_POLICIES[remat])


def matmul(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    """Computes `x @ kernel`, float[..., F], of float[..., D] and float[D, F].

    Its derivative by the kernel turns the narrower of the two arrays that it multiplies: XLA for
    CPUs turns the other one, and computes it again while it does so.
    """
    product = checkpoint_name(_matmul(x, kernel, out_dtype), PRODUCT)
    return cast(jax.Array, product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


def _matmul_forward(
    x: jax.Array, kernel: jax.Array, out_dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, kernel, out_dtype), (x, kernel)


def _matmul_backward(
    out_dtype: Any, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        dims = ((rows, rows), ((), ()))
        return jax.lax.dot_general(left, right, dims, preferred_element_type=out_dtype)

    narrow = kernel.shape[0] <= kernel.shape[1]
    by_kernel = product(x, cotangent) if narrow else product(cotangent, x).T
    by_x = jnp.matmul(cotangent, kernel.T, preferred_element_type=out_dtype)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(ReadsParams, nn.Module):
    """Computes `x @ kernel + bias`, plus `(x @ a) @ b` if the "lora" tree has an adapter here."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    out_dtype: Any = None  # default `dtype`; float32 for heads whose sums are not to be rounded

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        out = self.out_dtype or self.dtype
        x = x.astype(self.dtype)
        y = matmul(x, kernel.astype(self.dtype), out)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(out).reshape((1,) * (y.ndim - 1) + bias.shape)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b"))
            y = y + (x @ a) @ b
        return y


class RMSNorm(ReadsParams, nn.Module):
    """Root-mean-square norm over the last axis."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon)


class LayerNorm(ReadsParams, nn.Module):
    """Mean-variance norm over the last axis."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon)


class Embedding(ReadsParams, nn.Module):
    """A table of learned rows."""

    rows: int
    features: int
    stddev: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        initializer = nn.initializers.normal(self.stddev)
        table = self.param("embedding", initializer, (self.rows, self.features))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class MLP(nn.Module):
    """Computes `fc2(act(fc1(x)))` with biases."""

    hidden: int
    features: int
    activation: str
    dtype: Any = jnp.float32
    names: tuple[str, str] = ("fc1", "fc2")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first_name, second_name = self.names
        x = Linear(self.hidden, dtype=self.dtype, name=first_name)(x)
        x = ACTIVATIONS[self.activation](x)
        return Linear(self.features, dtype=self.dtype, name=second_name)(x)


class GatedMLP(nn.Module):
    """Computes `down(silu(gate(x)) * up(x))` without biases (SwiGLU)."""

    hidden: int
    dtype: Any = jnp.float32
    out_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        gate = Linear(self.hidden, use_bias=False, dtype=self.dtype, name="gate_proj")(x)
        up = Linear(self.hidden, use_bias=False, dtype=self.dtype, name="up_proj")(x)
        return Linear(
            features,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="down_proj",
        )(jax.nn.silu(gate) * up)
