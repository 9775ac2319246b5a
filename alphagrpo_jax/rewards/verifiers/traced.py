"""Records a model's packed pass as a program, which runs without the Python code of its modules.

A small judge spends a third of its time in that code. The program is recorded by `torch.jit.trace`,
which writes down the operations of one call: a branch that depends on values, or a size that is
read as a number, would be wrong for other inputs. So there is a program for each kind of image
inputs, and it is used only if it gives the same bits as the model for several lists of questions
and several images.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from alphagrpo_jax.rewards.verifiers.model_inputs import shallow_copy
from alphagrpo_jax.rewards.verifiers.trials import TRIAL_ERRORS

# Of any size: a program serves all lists of questions.
TEXT_INPUTS = ("attention_mask", "input_ids", "logits_to_keep", "position_ids")
MAX_PROGRAMS = 16  # one for each size of image; further sizes are left to the modules
MAX_PARAMETERS = 3e8  # a larger judge computes for so long that its modules' code does not count
_LOG = logging.getLogger(__name__)

Program = Callable[..., Tensor]
PassInputs = dict[str, Any]  # of a packed pass: tensors by name, and its cache or None


def is_recordable(model: Any) -> bool:
    """Tells if a model is worth recording: small, whole on the CPU, and without hooks.

    The weights of a model that is spread over devices or fetched from disk would become constants
    of the program.
    """
    parameters = list(model.parameters())
    return (
        all(parameter.device.type == "cpu" for parameter in parameters)
        and sum(parameter.numel() for parameter in parameters) <= MAX_PARAMETERS
        and not any(hasattr(module, "_hf_hook") for module in model.modules())
    )


class TracedPass:
    """Runs packed passes of a model by recorded programs, where those give the same bits."""

    def __init__(self, model: Any) -> None:
        """Records nothing yet.

        Args:
          model: of transformers, see `is_recordable`, in evaluation mode, which takes
            `logits_to_keep`.
        """
        self._model = model
        self._programs: dict[tuple, Program | None] = {}

    def logits(self, inputs: PassInputs, trials: Callable[[], Sequence[PassInputs]]) -> Tensor:
        """Computes the logits float[1, Q, V] of one pass.

        Args:
          inputs: the model's arguments, with its cache as `past_key_values` (None if empty) and
            the positions int64[Q] of the logits as `logits_to_keep`.
          trials: makes inputs of passes with other questions and images, by which a new program
            is compared with the model; those of another kind are passed over.
        """
        kind = _kind(inputs)
        if kind is None:
            return run_modules(self._model, inputs)
        if kind not in self._programs and len(self._programs) < MAX_PROGRAMS:
            self._programs[kind] = self._record(kind, inputs, trials)
        program = self._programs.get(kind)
        if program is not None:
            try:
                return _run(program, inputs)
            except TRIAL_ERRORS as error:  # a branch that no trial took: the model may do better
                _LOG.warning("a recorded program failed and is not used again: %s", error)
                self._programs[kind] = None
        return run_modules(self._model, inputs)

    def _record(
        self, kind: tuple, inputs: PassInputs, trials: Callable[[], Sequence[PassInputs]]
    ) -> Program | None:
        """Returns a program for inputs of this kind; None if it does not give the same bits."""
        try:
            # Of tensors that were made in inference mode, nothing can be recorded: hence copies.
            with torch.inference_mode(mode=False), torch.no_grad(), warnings.catch_warnings():
                # Of values read as numbers, which the trials tell, and that tracing is deprecated.
                warnings.simplefilter("ignore")
                examples = tuple(tensor.clone() for tensor in _tensors(inputs))
                module = _PackedPass(self._model, _names(inputs))
                # The cast is for the type checker: a module gives no pair of graph and results.
                program = cast(Program, torch.jit.trace(module, examples, check_trace=False))
            for trial in (inputs, *(trial for trial in trials() if _kind(trial) == kind)):
                if not torch.equal(_run(program, trial), run_modules(self._model, trial)):
                    raise ValueError("the recorded program gives other bits")
        except TRIAL_ERRORS as error:
            _LOG.info("no recorded program: %s: %s", type(error).__name__, error)
            return None
        return program


class _PackedPass(torch.nn.Module):
    """Calls a model's forward pass by tensors alone, as a recording needs it."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Computes logits from the named arguments, and keys and values in turns by layer."""
        states = tensors[len(self.names) :]
        cache = None
        if states:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            for layer, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
                cache.update(keys, values, layer)
        arguments = dict(zip(self.names, tensors, strict=False))
        return self.model(**arguments, past_key_values=cache).logits


def run_modules(model: Any, inputs: PassInputs) -> Tensor:
    """Computes the logits float[1, Q, V] of a packed pass by the model itself."""
    cache = shallow_copy(inputs["past_key_values"])
    return model(**{**inputs, "past_key_values": cache}).logits


def _run(program: Program, inputs: PassInputs) -> Tensor:
    # Not optimized: the first calls would take long, and fused operations may round otherwise.
    unoptimized = torch.jit.optimized_execution(  # pyright: ignore[reportPrivateImportUsage]
        should_optimize=False
    )
    with unoptimized:
        return program(*_tensors(inputs))


def _kind(inputs: PassInputs) -> tuple | None:
    """Returns what a program depends on: all but the questions and the image's pixels.

    None where an input is no tensor: nothing is recorded then.
    """
    cache = inputs["past_key_values"]
    cache_shapes = () if cache is None else tuple(layer.keys.shape for layer in cache.layers)
    image_inputs = [(name, inputs[name]) for name in _names(inputs) if name not in TEXT_INPUTS]
    if not all(isinstance(value, Tensor) for _, value in image_inputs):
        return None
    # Whole numbers, such as rows and columns of patches, become numbers of the program.
    return cache_shapes, tuple(
        (name, value.dtype, value.shape, None if value.is_floating_point() else _digest(value))
        for name, value in image_inputs
    )


def _digest(value: Tensor) -> bytes:
    return hashlib.blake2b(value.numpy().tobytes()).digest()


def _names(inputs: PassInputs) -> list[str]:
    return sorted(inputs.keys() - {"past_key_values"})


def _tensors(inputs: PassInputs) -> list[Tensor]:
    """Returns the tensors in the order of `_names`, then keys and values in turns by layer."""
    cache = inputs["past_key_values"]
    layers = [] if cache is None else cache.layers
    states = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return [inputs[name] for name in _names(inputs)] + states
