"""Measures questions per second of `serve_verifier` under ordinary clients, and of its verifier.

    python -m benchmarks.server_throughput [--clients 32] [--images 200] [--repeats 3]

Both answer the same held-out questions: the verifier in this process one image after the other, all
of an image's questions in a call; the server one question per request, each with the whole image,
from as many clients as asked for (plain sockets), each of which waits for its answer before it
sends the next question. The server is a process of its own and shares the cores with the clients.
Both are measured in turn, after a warm-up with other questions; the figures are medians.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import io
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.spelling import normalize_word
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.studies.verifier_eval import timed_lists

CANDIDATES = 20  # of the first token; the verifier in this process counts as many
APART = 1e-3  # largest difference of P(yes) that rounding and so few candidates explain
SECONDS = 600.0  # of all of a turn's requests

Sample = tuple[np.ndarray, Sequence[str]]  # image uint8[H, W, 3], its questions


@contextlib.contextmanager
def serving(model: str, flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Starts a server of its own; yields its base URL and its process's id.

    Raises:
      InputError: it does not start.
    """
    command = [sys.executable, "-m", "alphagrpo_jax.serve_verifier", "--model", model]
    process = subprocess.Popen(
        [*command, "--port", "0", "--name", "verifier", *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        match = re.search(r"http://\S+/v1", process.stdout.readline())
        if match is None:
            raise InputError("the server did not start; its errors stand above")
        yield match[0], process.pid
    finally:
        process.terminate()
        process.wait(60)


def bodies(samples: Sequence[Sample], side: int) -> list[bytes]:
    """Makes every question's request; images are enlarged to `side` pixels, 0: as they are."""
    contents = []
    for image, questions in samples:
        picture = Image.fromarray(image)
        if side:
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        for question in questions:
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question},
            ]
            request = {
                "model": "verifier",
                "messages": [
                    {"role": "system", "content": AUDIT_INSTRUCTION},
                    {"role": "user", "content": content},
                ],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": CANDIDATES,
            }
            contents.append(json.dumps(request).encode())
    return contents


async def ask_server(url: str, requests: Sequence[bytes], clients: int) -> tuple[float, list]:
    """Asks all questions by so many clients at once.

    The clients are plain sockets: they share the cores with the server, and a library's client
    takes as long per request as the server.

    Returns:
      Seconds, and the replies (status, body) in order.
    """
    address = urllib.parse.urlsplit(url)
    replies: list = [None] * len(requests)
    waiting = iter(enumerate(requests))
    head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: "

    async def run() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for index, request in waiting:
            writer.write(f"{head}{len(request)}\r\n\r\n".encode() + request)
            start = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", start)
            body = await reader.readexactly(int(length[1]) if length else 0)
            replies[index] = int(start.split(b" ", 2)[1]), body
        writer.close()

    start = time.perf_counter()
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(run() for _ in range(clients)))
    return time.perf_counter() - start, replies


def p_yes(reply: tuple[int, bytes]) -> float:
    """Reads P(yes) of a reply: its status and body.

    Raises:
      InputError: the server refused the request.
    """
    status, body = reply
    if status != 200:
        raise InputError(f"the server answered {status}: {body[:300]!r}")
    (token,) = json.loads(body)["choices"][0]["logprobs"]["content"]
    mass = {"yes": 0.0, "no": 0.0}
    for candidate in token["top_logprobs"]:
        word = normalize_word(candidate["token"])
        if word in mass:
            mass[word] += math.exp(candidate["logprob"])
    return mass["yes"] / (mass["yes"] + mass["no"])


def cpu_seconds(process: int) -> float:
    """Reads the CPU time of a process so far (Linux)."""
    words = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measures both ways in turn.

    Returns:
      Medians of questions/s of the verifier and of the server, of their CPU milliseconds per
      question and the clients', of the ratios; and the largest difference of a P(yes).
    Raises:
      InputError: the server refuses a request, or answers otherwise than the verifier.
    """
    flags = [] if options.threads is None else ["--threads", str(options.threads)]
    verifier = HFVerifier(
        model_folder(options.model), num_threads=options.threads, top_k=CANDIDATES
    )
    rates: dict[str, list[float]] = collections.defaultdict(list)
    apart = 0.0
    # No questions come twice: the verifier keeps the tokens of those that it has read.
    size = options.images
    samples = timed_lists(0, size * (options.repeats + 1))
    with serving(options.model, flags) as (url, process):
        for turn in range(options.repeats + 1):
            turn_samples = samples[turn * size : (turn + 1) * size]
            requests = bodies(turn_samples, options.side)
            start, cpu = time.perf_counter(), time.process_time()
            answers = [verifier.answer(*sample) for sample in turn_samples]
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            server_cpu, client_cpu = cpu_seconds(process), time.process_time()
            served_seconds, replies = asyncio.run(ask_server(url, requests, options.clients))
            expected = [answer.p_yes for row in answers for answer in row]
            differences = np.abs(np.array(expected) - [p_yes(reply) for reply in replies])
            apart = max(apart, float(differences.max()))
            if turn:  # the first one warms up
                rates["verifier"].append(len(requests) / seconds)
                rates["server"].append(len(requests) / served_seconds)
                milliseconds = 1000 / len(requests)
                rates["verifier_cpu_ms"].append(cpu * milliseconds)
                rates["server_cpu_ms"].append((cpu_seconds(process) - server_cpu) * milliseconds)
                rates["client_cpu_ms"].append((time.process_time() - client_cpu) * milliseconds)
    if apart > APART and not options.side:  # enlarged images have other answers
        raise InputError(f"a P(yes) of the server differs by {apart:.2g} from the verifier's")
    ratios = [s / v for s, v in zip(rates["server"], rates["verifier"], strict=True)]
    return {name: statistics.median(values) for name, values in rates.items()} | {
        "ratio": statistics.median(ratios),
        "apart": apart,
    }


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m benchmarks.server_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="package:verifier", help="a folder, ORG/NAME or package:NAME")
    add("--clients", type=cli.COUNT, default=32, help="at once")
    add("--images", type=cli.COUNT, default=100, help="per repetition, about 12 questions each")
    add("--side", type=cli.AMOUNT, default=0, help="pixels that images are enlarged to for the "
        "server; 0: as they are")  # fmt: skip
    add("--threads", type=cli.COUNT, help="of the model, in both; default: PyTorch's choice")
    add("--repeats", type=cli.COUNT, default=3, help="medians are shown")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Prints the figures."""
    figures = measure(options)
    print(f"verifier in this process: {figures['verifier']:8.1f} questions/s")
    print(f"server, {options.clients:3} clients:     {figures['server']:8.1f} questions/s")
    cpu = (f"{who} {figures[f'{who}_cpu_ms']:.2f}" for who in ("verifier", "server", "client"))
    print(f"CPU ms per question:      {', '.join(cpu)}")
    print(f"ratio {figures['ratio']:.2f}; P(yes) differs by at most {figures['apart']:.1e}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
