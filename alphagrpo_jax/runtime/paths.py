"""Finds shipped assets and models: `package:NAME` names an asset, other names are paths.

A verifier may also be a model of the Hugging Face hub.
"""

import re
from pathlib import Path

from alphagrpo_jax.runtime.errors import MissingFileError

ASSETS = Path(__file__).resolve().parent.parent / "shapes" / "assets"
PREFIX = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
NEVER_LOADED = ("*.gguf", "*.onnx", "*.pth", "original/*")  # other forms of the same weights

PROCESSOR_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def resolve(path: str | Path) -> Path:
    """Returns the folder or file that a configuration field names.

    Args:
      path: `package:NAME` for a shipped asset, else a path relative to the current folder.
    Raises:
      MissingFileError: there is no such asset or path.
    """
    text = str(path)
    target = ASSETS / text[len(PREFIX) :] if text.startswith(PREFIX) else Path(text).expanduser()
    if target.exists():
        return target
    shipped = sorted(p.name for p in ASSETS.iterdir()) if ASSETS.is_dir() else []
    raise MissingFileError(
        f"{text!r} names {target}, which does not exist; give an existing path or one of the "
        f"shipped assets {[PREFIX + name for name in shipped if not name.startswith('_')]}"
    )


def existing_file(path: str | Path, hint: str) -> Path:
    """Returns the path of a file that the user named.

    Args:
      path: of the file.
      hint: what to do if it is missing, for the message.
    Raises:
      MissingFileError: there is no such file.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file {path}; {hint}")
    return Path(path)


def model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """Returns the folder of a Hugging Face model; one of the hub is fetched if it is not there yet.

    Call it once, before processes start that load the model: they are given the folder.

    Args:
      path: as `resolve` takes it, or ORG/NAME of the hub. What exists as a path is never fetched.
      weights: False fetches the files of the processor alone.
    Raises:
      MissingFileError: there is no such path or asset, and no such model can be fetched.
    """
    text = str(path)
    if not HUB_ID.fullmatch(text) or Path(text).exists():
        return resolve(path)
    import huggingface_hub  # here: what has a path needs no hub

    try:
        patterns = None if weights else [*PROCESSOR_FILES]
        return Path(
            huggingface_hub.snapshot_download(
                text, allow_patterns=patterns, ignore_patterns=[*NEVER_LOADED]
            )
        )
    except (OSError, ValueError) as error:  # all that the hub's client raises
        raise MissingFileError(
            f"{text!r} is no folder here, and the Hugging Face hub gives no model of that name "
            f"({type(error).__name__}: {error})\nFix: correct the path or the name; without "
            "network fetch the model elsewhere (hf download) and give its folder; a gated one "
            "needs hf auth login"
        ) from error
