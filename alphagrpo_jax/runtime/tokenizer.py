"""Reads and applies the Qwen2 byte-level BPE tokenizer of a BAGEL folder."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from alphagrpo_jax.runtime.errors import MissingFileError, UserError

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
PAD = "<|endoftext|>"


class TokenizerError(UserError, ValueError):
    """A tokenizer that cannot be read or lacks special tokens."""


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that delimit texts and images."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int


class Tokenizer:
    """Text to ids and back. Special-token strings inside a text become special ids."""

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, bytes], where: str) -> None:
        """Wraps a tokenizer.

        Args:
          backend: the tokenizer proper.
          files: contents of the folder's tokenizer files, by name (what `save` writes).
          where: the folder, for messages.
        Raises:
          TokenizerError: a special token is missing.
        """
        self._backend = backend
        self.files = files
        found_ids = {name: backend.token_to_id(token) for name, token in SPECIAL.items()}
        ids = {name: value for name, value in found_ids.items() if value is not None}
        missing = [token for name, token in SPECIAL.items() if name not in ids]
        if missing:
            raise TokenizerError(
                f"the tokenizer in {where} lacks the special tokens {missing}; expected "
                f"{list(SPECIAL.values())} among its added tokens (tokenizer.json); use the "
                "tokenizer files of the BAGEL folder"
            )
        self.special = SpecialTokens(**ids)
        added = backend.get_added_tokens_decoder()
        self._control = sorted(token.content for token in added.values() if token.special)
        pad = backend.token_to_id(PAD)
        self.pad = self.special.im_end if pad is None else pad

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt with tokenizer_config.json.

        Raises:
          MissingFileError: neither is there.
          TokenizerError: unreadable files, or special tokens missing.
        """
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
        try:
            if "tokenizer.json" in files:
                backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
            elif "vocab.json" in files and "merges.txt" in files:
                backend = _from_vocabulary(files)
            else:
                raise MissingFileError(
                    f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and "
                    f"merges.txt; found {sorted(files)}; copy the files of the BAGEL folder"
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(
                f"the tokenizer files in {folder} cannot be read ({error}); fetch them again"
            ) from error
        return cls(backend, files, str(folder))

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id that a text can have; ids need not be without gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without `<|im_start|>` and `<|im_end|>`."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def control_tokens(self, text: str) -> list[str]:
        """Returns the special tokens that a text would be read as, sorted.

        A prompt with one could end its own context, or begin an image.
        """
        return [token for token in self._control if token in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included as their strings."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def wrap(self, text: str) -> list[int]:
        """Returns the ids of a text as it enters a context: `<|im_start|>`, ids, `<|im_end|>`."""
        return [self.special.im_start, *self.encode(text), self.special.im_end]

    def batch(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Pads rows of ids on the right.

        Args:
          rows: B lists of ids.
          length: T.
        Returns:
          int32[B, T] and bool[B, T], False at padding.
        Raises:
          TokenizerError: a row is longer than `length`.
        """
        tokens = np.full((len(rows), length), self.pad, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for index, row in enumerate(rows):
            if len(row) > length:
                raise TokenizerError(
                    f"text {index} has {len(row)} tokens, at most {length} fit: "
                    f"{self.decode(row)[:80]!r}...; shorten it or raise the length"
                )
            tokens[index, : len(row)] = row
            mask[index, : len(row)] = True
        return tokens, mask

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files into a folder."""
        for name, contents in self.files.items():
            (Path(folder) / name).write_bytes(contents)


def _from_vocabulary(files: dict[str, bytes]) -> tokenizers.Tokenizer:
    """Builds the tokenizer from vocabulary, merges and the added tokens of its configuration."""
    vocabulary = json.loads(files["vocab.json"])
    lines = files["merges.txt"].decode("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    # Lines that are no pair are the library's to refuse.
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))  # pyright: ignore[reportArgumentType]
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    backend.add_special_tokens(
        [tokenizers.AddedToken(entry["content"], normalized=False) for _, entry in added]
    )
    return backend
