"""Where shipped assets lie: `package:NAME` names one, anything else is a path."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "shapes" / "assets"
PREFIX = "package:"


def resolve(path: str | Path) -> Path:
    """The folder or file that a configuration field names.

    Args:
      path: `package:NAME` for a shipped asset, else a path relative to the current folder.
    Raises:
      FileNotFoundError: there is no such asset or path.
    """
    text = str(path)
    target = ASSETS / text[len(PREFIX) :] if text.startswith(PREFIX) else Path(text).expanduser()
    if target.exists():
        return target
    shipped = sorted(p.name for p in ASSETS.iterdir()) if ASSETS.is_dir() else []
    raise FileNotFoundError(
        f"{text!r} names {target}, which does not exist; give an existing path or one of the "
        f"shipped assets {[PREFIX + name for name in shipped if not name.startswith('_')]}"
    )
