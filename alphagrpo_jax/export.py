"""Writes a run's model, adapters merged into the weights, in the official folder layout.

    python -m alphagrpo_jax.export --checkpoint RUN --out DIR [--format peft]

The folder serves wherever a pretrained one does (`--config.model.path=DIR`), and loads into the
official code. With --format peft it holds the adapters alone, in the files of the PEFT library,
which also start a run (`--config.lora.init_from=DIR`).
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from alphagrpo_jax import inference
from alphagrpo_jax.models import lora, peft
from alphagrpo_jax.models.bagel_weights import memory_dtypes, save_model
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import AccessError
from alphagrpo_jax.training import adapters


def merged_weights(policy: inference.Policy) -> dict:
    """Returns the policy's weights as one base tree, adapters merged in, in the dtypes loaded."""
    params = policy.params
    if params.lora is None:
        return params.base
    return lora.merge(params.base, params.lora, params.lora_scale)


def export(run: str, out: str, *, model_path: str | None = None, dtype: str | None = None) -> int:
    """Writes the folder; returns the step of the checkpoint.

    Args:
      run: the run's folder.
      out: a new or empty folder.
      model_path: see `inference.from_run`.
      dtype: of all tensors; None: each tensor's in memory, so that nothing is rounded (the
        pretrained folder's may be coarser than what was trained). The two position tables have the
        dtype that the model computes in.
    Raises:
      AccessError: `out` holds something.
    """
    folder = _new_folder(out)
    policy = inference.from_run(run, model_path=model_path)
    base = merged_weights(policy)
    loaded = dataclasses.replace(policy.loaded, dtypes=memory_dtypes(base, policy.loaded.model))
    save_model(folder, loaded, base=base, dtype=dtype)
    return policy.step


def export_adapter(
    run: str, out: str, *, model_path: str | None = None, dtype: str | None = None
) -> int:
    """Writes the adapters in PEFT's files; returns the step of the checkpoint.

    Args:
      run: the run's folder; the weights of its model are not read.
      out: a new or empty folder.
      model_path: see `inference.from_run`.
      dtype: of all tensors; None: float32, as they are trained.
    Raises:
      AccessError: `out` holds something.
      InputError: the run has no adapters.
    """
    folder = _new_folder(out)
    loaded = adapters.adapters_from_run(run, model_path=model_path)
    peft.write_adapter(
        folder,
        loaded.adapters,
        alpha=loaded.config.lora.alpha,
        base_model=loaded.config.model.path,
        dtype=dtype or "float32",
    )
    return loaded.step


def _new_folder(out: str) -> pathlib.Path:
    folder = pathlib.Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AccessError(f"{out} exists and is not an empty folder; give another --out")
    return folder


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m alphagrpo_jax.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run's folder")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--model", help="the pretrained folder, if it has moved since the run")
    parser.add_argument(
        "--format",
        choices=("model", "peft"),
        default="model",
        help="the whole model, or its adapters for the PEFT library",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: as in memory, float32 unless model.dtype says otherwise; bfloat16 rounds",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Exports a checkpoint as the flags say."""
    write = export_adapter if options.format == "peft" else export
    step = write(options.checkpoint, options.out, model_path=options.model, dtype=options.dtype)
    content = "adapters" if options.format == "peft" else "model"
    print(f"{options.out}: the {content} after {step} updates")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
