"""Writes PNG files fast: a client of chat servers encodes every image of a run.

Pillow tries five filters for every row and looks for repetitions; in photographs one filter and
Huffman codes alone give files of the same size in a third of the time.
"""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UP = 2  # filter: every byte minus the one above it


def encode(image: np.ndarray) -> bytes:
    """Encodes an image without loss.

    Args:
      image: uint8[H, W, 3] RGB.
    """
    height, width, _ = image.shape
    pixels = image.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])  # modulo 256, as the format wants it
    packer = zlib.compressobj(1, zlib.DEFLATED, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    data = packer.compress(rows.data) + packer.flush()
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of the file, with its length and check sum."""
    check = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
