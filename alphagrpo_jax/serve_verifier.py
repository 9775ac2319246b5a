"""Serves a verifier to other machines, as an OpenAI-compatible endpoint.

    python -m alphagrpo_jax.serve_verifier --model package:verifier --port 8000

Routes: POST /v1/chat/completions (one question about one image, given as a data URL; greedy; with
log-probs of up to --max-logprobs candidates; whole or as a stream), GET /v1/models and
/v1/models/NAME, /health and /metrics (Prometheus). Questions about the same image that arrive
together share one forward pass.
"""

import argparse
import asyncio
import contextlib
import functools
import hmac
import logging
import pathlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence

import prometheus_client
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from alphagrpo_jax.rewards.verifiers.chat.keys import read_key
from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits
from alphagrpo_jax.rewards.verifiers.serving.batcher import AnswerFn, Batcher, GreedyReply
from alphagrpo_jax.rewards.verifiers.serving.model_process import ModelDiedError, ModelProcess
from alphagrpo_jax.rewards.verifiers.serving.replies import ReplyWriter, request_id_of
from alphagrpo_jax.rewards.verifiers.serving.requests import (
    ChatRequest,
    ImageQuestion,
    RequestError,
    RequestReader,
)
from alphagrpo_jax.runtime import cli, stopping
from alphagrpo_jax.runtime.errors import AccessError, UsageError
from alphagrpo_jax.runtime.paths import model_folder

_LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 * 2**20
RETRY_AFTER_SECONDS = 1
SMALL_BODY = 64 * 2**10  # bytes; what is parsed faster than handed to a thread
GRACE_SECONDS = 10  # for requests under way when the server is told to end


class Metrics:
    """Counters and gauges that /metrics shows."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("verifier_requests", "chat requests received", registry=registry)
        self.failures = Counter(
            "verifier_failures", "chat requests failed", ["kind"], registry=registry
        )
        self.seconds = Histogram(
            "verifier_request_seconds", "from request to reply", registry=registry
        )
        gauges = {
            "verifier_queue_length": ("questions that wait", lambda: len(batcher)),
            "verifier_questions": ("questions that the model answered", lambda: batcher.questions),
            "verifier_model_seconds": ("time the model took", lambda: batcher.busy_seconds),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(read)

    def text(self) -> bytes:
        """Returns them in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


class Service:
    """The routes over one model."""

    def __init__(
        self, reader: RequestReader, batcher: Batcher, writer: ReplyWriter, *, name: str, key: str
    ) -> None:
        """Takes what parses, answers and writes; see `make_app` for the others."""
        self._reader, self._batcher, self._writer = reader, batcher, writer
        self._name, self._key = name, key
        self._metrics, self._created = Metrics(batcher), int(time.time())

    async def chat(self, request: Request) -> Response:
        """Answers POST /v1/chat/completions."""
        started = time.monotonic()
        self._metrics.requests.inc()
        request_id = request_id_of(request.headers.get("x-request-id"))
        try:
            self._check_key(request)
            chat_request, question = await self._read(request)
            self._check_model(chat_request.model)
            answer = await self._batcher.ask(question)
            written = chat_request, question, answer, request_id
            reply: Response
            if chat_request.stream:
                reply = StreamingResponse(
                    self._writer.chunks(*written), media_type="text/event-stream"
                )
            else:
                reply = JSONResponse(self._writer.completion(*written))
        except RequestError as error:
            self._metrics.failures.labels(error.kind).inc()
            reply = _error_reply(error)
        except ClientDisconnect:
            self._metrics.failures.labels("disconnected").inc()
            reply = Response(status_code=400)
        except asyncio.CancelledError:  # the server's grace at its end is over
            self._metrics.failures.labels("ending").inc()
            reply = _error_reply(RequestError("the server ends", status=503, kind="ending"))
        except Exception:  # logged with its traceback and counted; the client is told where to look
            _LOG.exception("request %s", request_id)
            self._metrics.failures.labels("internal").inc()
            where = f"internal error; the server's log has it under request {request_id}"
            reply = _error_reply(RequestError(where, status=500, kind="internal"))
        reply.headers["X-Request-Id"] = request_id
        self._metrics.seconds.observe(time.monotonic() - started)
        return reply

    async def models(self, request: Request) -> Response:
        """Answers GET /v1/models and /v1/models/NAME."""
        name = request.path_params.get("name")
        try:
            self._check_key(request)
            if name is not None:
                self._check_model(name)
        except RequestError as error:
            return _error_reply(error)
        row = {"id": self._name, "object": "model", "created": self._created}
        row["owned_by"] = "alphagrpo_jax"
        return JSONResponse({"object": "list", "data": [row]} if name is None else row)

    async def health(self, _: Request) -> Response:
        """Answers GET /health: 200, or 503 while the model is stuck."""
        stuck = self._batcher.stuck
        content = {
            "status": "stuck" if stuck else "ok",
            "model": self._name,
            "queue": len(self._batcher),
        }
        return JSONResponse(content, status_code=503 if stuck else 200)

    async def metrics(self, _: Request) -> Response:
        """Answers GET /metrics."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _read(self, request: Request) -> tuple[ChatRequest, ImageQuestion]:
        """Parses a request; large ones, which decode large images, beside the event loop."""
        body = await _body_of(request)
        if len(body) < SMALL_BODY:
            return self._reader.read(body)
        return await asyncio.to_thread(self._reader.read, body)

    def _check_key(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise RequestError(
                "wrong or missing API key", status=401, kind="key", code="invalid_api_key"
            )

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise RequestError(
                f"model: got {name[:100]!r}, expected {self._name!r}",
                status=404,
                kind="model_name",
                param="model",
                code="model_not_found",
            )


def make_app(
    answer: AnswerFn,
    limits: PromptLimits,
    *,
    name: str,
    key: str,
    max_batch: int,
    max_queue: int,
    seconds: float,
    max_logprobs: int,
    max_tokens: int,
) -> Starlette:
    """Builds the web application.

    Args:
      answer: runs the model's passes.
      limits: of its prompts.
      name: of the model, as clients call it.
      key: that clients must send as a bearer token; "" for none.
      max_batch, max_queue, seconds: see `serving.batcher.Batcher`.
      max_logprobs: most candidates of a token that a request may ask for.
      max_tokens: most tokens of a reply, whatever a request asks for.
    """
    batcher = Batcher(answer, max_batch=max_batch, max_queue=max_queue, seconds=seconds)
    reader = RequestReader(limits, max_logprobs=max_logprobs, max_tokens=max_tokens)
    service = Service(reader, batcher, ReplyWriter(limits.tokenizer), name=name, key=key)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            task.cancel()

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body_of(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(
                f"a body of more than {MAX_BODY_BYTES} bytes", status=413, kind="too_large"
            )
    return bytes(body)


def _error_reply(error: RequestError) -> Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status == 503 else {}
    return JSONResponse({"error": fields}, status_code=error.status, headers=headers)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m alphagrpo_jax.serve_verifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face model folder, ORG/NAME of the "
        "hub, or package:NAME")  # fmt: skip
    add("--port", type=cli.integer(0, 65535), default=8000, help="0: any free one")
    add("--host", default="127.0.0.1", help="0.0.0.0: all of this machine's addresses")
    add("--name", help="of the model, as clients call it; default: the last part of --model")
    add("--device", default="cpu", help="cpu, cuda, or auto for all devices together")
    add("--dtype", default="float32", help="of the weights, or auto for the folder's own")
    add("--threads", type=cli.COUNT, help="CPU threads of the model; default: PyTorch's choice")
    add(
        "--max-batch",
        type=cli.COUNT,
        default=64,
        help="questions per pass; 1: the same bits always",
    )
    add(
        "--max-queue",
        type=cli.COUNT,
        default=1024,
        help="questions that may wait before 503 is said",
    )
    add("--max-wait", type=float, default=60.0, help="seconds that a question may wait, and a pass "
        "take until /health says 503")  # fmt: skip
    add("--max-logprobs", type=cli.COUNT, default=20, help="most candidates of a token")
    add("--max-tokens", type=cli.COUNT, default=2048, help="most tokens of a reply")
    add("--api-key-env", default="", help="environment variable with the key clients must send")
    options = parser.parse_args(arguments)
    if not options.max_wait > 0:
        parser.error("--max-wait must be positive")
    try:
        read_key(options.api_key_env)
    except UsageError as error:
        parser.error(f"--api-key-env: {error}")
    return options


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket to the address; clients are refused until it listens.

    Raises:
      AccessError: the address is in use or not this machine's; the message says which.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise AccessError(
            f"cannot listen on --host={host} --port={port}: {error}; choose another"
        ) from error
    return bound


def run(options: argparse.Namespace) -> None:
    """Loads the verifier and serves it until a signal ends the process.

    Raises:
      AccessError: the address cannot be used.
      MissingFileError, VerifierLoadError: there is no such verifier, or it cannot be loaded.
    """
    name = options.name or pathlib.PurePath(options.model.removeprefix("package:")).name
    bound = bind(options.host, options.port)
    folder = model_folder(options.model)
    model_options = {
        "device": options.device,
        "dtype": options.dtype,
        "num_threads": options.threads,
        "max_batch": options.max_batch,
        "text_fallback": True,  # whether the text may count is the client's affair
    }
    model = ModelProcess(folder, model_options)
    try:
        limits = PromptLimits.from_folder(folder)  # while the process loads the weights
        model.wait()
        _serve(options, model, limits, bound, name)
    finally:
        model.close()


def answer_or_leave(model: ModelProcess, questions: list[ImageQuestion]) -> Sequence[GreedyReply]:
    """Runs one pass; ends the server if the model has died, since clients do better with another.

    Raises:
      RequestError: the server has ended the model.
      InputError, ModelError: see `ModelProcess.answer`.
    """
    try:
        return model.answer(questions)
    except ModelDiedError as error:
        if model.closing:
            raise RequestError("the server ends", status=503, kind="ending") from error
        _LOG.critical("%s: the server ends", error)
        stopping.leave(cli.FAILED)


def _serve(
    options: argparse.Namespace,
    model: ModelProcess,
    limits: PromptLimits,
    bound: socket.socket,
    name: str,
) -> None:
    """Serves a loaded model until a signal ends the process."""
    app = make_app(
        functools.partial(answer_or_leave, model),
        limits,
        name=name,
        key=read_key(options.api_key_env),
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        seconds=options.max_wait,
        max_logprobs=options.max_logprobs,
        max_tokens=options.max_tokens,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn ends in order, then raises the signal again: that must not be a second end.
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
    )
    # Who reads the line may connect at once, before uvicorn has begun.
    bound.listen(config.backlog)
    host, port = bound.getsockname()[:2]
    print(f"serving {name} on http://{host}:{port}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[bound])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    stopping.leave(main())  # a pass of the model may take minutes yet
