"""Measures how many questions a second a pool asks a chat server that takes a fixed time.

    python -m benchmarks.endpoint_throughput [--seconds=0.2] [--side=512] [--concurrency=64 96 128]

The server is a process of this command: it reads every request to its last byte, waits `--seconds`,
and replies with log-probs. It neither decodes the image nor runs a model, so that the figures are
those of the client: encoding, sending, parsing, ledger and audit log. Images are smooth with some
noise, about as large as PNGs of photographs. With a delay of d seconds and c requests in flight no
client can ask more than c / d questions a second.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alphagrpo_jax.config_checks import read_config
from alphagrpo_jax.rewards.verifiers.openai import encoded_url
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.runtime import cli

MODEL = "judge"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
BUFFER_BYTES = 1 << 20


def smooth_images(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """Makes images uint8[side, side, 3] that compress about as well as photographs.

    Args:
      count: number of images.
      side: in pixels.
      seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float64)
        noisy = smooth + rng.normal(0.0, 3.0, smooth.shape)
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return images


class _Server(asyncio.BufferedProtocol):
    """One connection: counts the bytes of a request and replies after the delay."""

    accepted = 0
    seconds = 0.0

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self._head, self._missing, self._reply = b"", 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        _Server.accepted += 1

    def get_buffer(self, sizehint: int) -> bytearray:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._missing:
            self._missing -= nbytes
        else:
            self._head += self._buffer[:nbytes]
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._read_head(head)
            self._missing -= len(body)
            self._head = b""
        if not self._missing:
            delay = self.seconds if self._reply is REPLY else 0.0
            asyncio.get_running_loop().call_later(delay, self._send, self._reply)

    def _read_head(self, head: bytes) -> None:
        """Takes the body's length, and what the request asks for."""
        request, *lines = head.lower().split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines)
        self._missing = int(fields.get(b"content-length", 0))
        if b"/models" in request:
            self._reply = MODELS
        elif b"/accepted" in request:
            self._reply = str(_Server.accepted).encode()
        else:
            self._reply = REPLY

    def _send(self, body: bytes) -> None:
        self._transport.write(HEAD % len(body) + body)


def _reply_body() -> bytes:
    """Writes a reply with five candidates."""
    words = (("Yes", -0.2), ("No", -1.8), ("It", -5.0), ("The", -6.0), ("There", -7.0))
    rows = [
        {"token": word, "logprob": logprob, "bytes": [*word.encode()]} for word, logprob in words
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Yes"},
        "finish_reason": "length",
        "logprobs": {"content": [rows[0] | {"top_logprobs": rows}]},
    }
    usage = {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301}
    return json.dumps({"id": "x", "model": MODEL, "choices": [choice], "usage": usage}).encode()


REPLY = _reply_body()
MODELS = json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode()


async def serve(seconds: float) -> None:
    """Serves on a free port of loopback, which it prints, until the process is ended."""
    _Server.seconds = seconds
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(
    url: str, images: Sequence[np.ndarray], questions: int, concurrency: int, repeats: int
) -> dict[str, float]:
    """Asks about all images by a pool with this many requests in flight; returns the figures.

    Args:
      url: of the server.
      images: uint8[H, W, 3] each.
      questions: about each image.
      concurrency: of the verifier.
      repeats: times that all images are asked about; the first is left out.
    """
    texts = [f"Is part {number} of the image well drawn?" for number in range(questions)]
    options = {"endpoints": (url,), "model": MODEL, "concurrency": concurrency}
    with tempfile.TemporaryDirectory() as folder:
        audit = str(Path(folder) / "audit.jsonl")
        with Pool([("openai", options)], read_config().verifier, audit_path=audit) as pool:
            pool.wait_ready()
            walls, cpus = [], []
            for repeat in range(repeats + 1):
                start, cpu_start = time.perf_counter(), _cpu_seconds()
                for number, image in enumerate(images):
                    pool.submit((repeat, number), image, texts)
                results = pool.gather((repeat, number) for number in range(len(images)))
                walls.append(time.perf_counter() - start)
                cpus.append(_cpu_seconds() - cpu_start)
                assert all(result.valid for result in results.values())
    asked = len(images) * questions
    best = min(range(1, repeats + 1), key=walls.__getitem__)
    return {
        "concurrency": concurrency,
        "questions": asked,
        "questions_per_second": asked / walls[best],
        "client_cpu_ms_per_question": 1e3 * cpus[best] / asked,
        "image_bytes": float(np.mean([len(encoded_url(image)) for image in images[:8]])),
    }


def _cpu_seconds() -> float:
    """Returns the CPU time of this process, all threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m benchmarks.endpoint_throughput",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = parser.add_argument
    add("--seconds", type=cli.number, default=0.2, help="time that the server takes for a question")
    add("--side", type=cli.COUNT, default=512, help="of the images, in pixels")
    add("--images", type=cli.COUNT, default=100)
    add("--questions", type=cli.COUNT, default=12, help="about each image")
    add("--concurrency", type=cli.COUNT, nargs="+", default=[64, 96, 128])
    add("--repeats", type=cli.COUNT, default=3, help="of which the fastest counts, after a first")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds < 0:
        parser.error("--seconds must not be negative")
    return options


def run(options: argparse.Namespace) -> None:
    """Starts the server, measures and prints a line per concurrency."""
    if options.serve:
        asyncio.run(serve(options.seconds))
        return
    command = [sys.executable, "-m", "benchmarks.endpoint_throughput", "--serve"]
    with subprocess.Popen(
        [*command, "--seconds", str(options.seconds)], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            images = smooth_images(options.images, options.side)
            for concurrency in options.concurrency:
                row = measure(url, images, options.questions, concurrency, options.repeats)
                limit = concurrency / options.seconds if options.seconds else float("inf")
                sys.stdout.write(json.dumps(row | {"limit_per_second": limit}) + "\n")
                sys.stdout.flush()
        finally:
            server.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
