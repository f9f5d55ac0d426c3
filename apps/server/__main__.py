"""Serve OpenAI's images API: `python -m apps.server`."""

import argparse
import asyncio
import dataclasses
import os
import re
import signal
import socket

from apps.server.jobs import Jobs
from apps.server.request import Limits, is_loopback
from apps.worker.messages import Failed, Job, Loaded
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import (
    Parser,
    add_model_choice,
    add_model_widths,
    integer,
    model_choice,
)
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.settings import ModelChoice

KEY_VARIABLE = "MLX_SNAPGEN_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m apps.server",
        description="Serve OpenAI's images API. The server draws one picture at a "
        "time. It keeps all --model-widths in memory; a request without a model uses the first.",
        renamed={"--model-width": "--model-widths"},
        formatter_class=argparse.HelpFormatter,
    )
    model = parser.add_argument_group("model")
    add_model_choice(model)
    add_model_widths(model, default=["full"])
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add(
        "--port",
        type=integer(0, 65535),
        default=8000,
        metavar="N",
        help="port to listen on; 0 selects a free one (default: %(default)s)",
    )
    add(
        "--api-key",
        type=_api_key,
        default=os.environ.get(KEY_VARIABLE) or None,
        metavar="KEY",
        help="key that clients must send; required if other machines can connect to HOST "
        f"(default: ${KEY_VARIABLE})",
    )
    add(
        "--url-lifetime",
        type=integer(1),
        default=3600,
        metavar="S",
        help="seconds that a picture of response_format url can be fetched (default: %(default)s)",
    )
    add(
        "--step-timeout",
        type=integer(1),
        default=300,
        metavar="S",
        help="seconds that a step or loading a model may take; then the process that draws is "
        "replaced, and its request fails (default: %(default)s)",
    )
    add = parser.add_argument_group("limits").add_argument
    count = integer(1)
    add(
        "--queue",
        type=integer(0),
        default=8,
        metavar="N",
        help="requests that may wait; the server answers 429 to others (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=count,
        metavar="PX",
        help="most pixels of a picture, height x width (default: four times the model's)",
    )
    add(
        "--max-images",
        type=count,
        default=10,
        metavar="N",
        help="most pictures per request (default: %(default)s)",
    )
    add(
        "--max-steps",
        type=count,
        default=100,
        metavar="N",
        help="most denoising steps per picture (default: %(default)s)",
    )
    return parser


def main() -> int:
    """Serve until interrupted."""
    args = build_parser().parse_args()
    if not args.api_key and not is_loopback(args.host):
        raise UserError(
            f"other machines can connect to {args.host}: set an --api-key, or use 127.0.0.1"
        )
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'the server needs its extra: pip install ".[server]" ({error})') from None
    return asyncio.run(_serve(args))


def _api_key(text: str) -> str:
    # What an Authorization header carries unchanged.
    if not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError("a key has letters, digits and signs of ASCII, no spaces")
    return text


async def _serve(args: argparse.Namespace) -> int:
    from apps.server.app import Server, create_app
    from apps.server.connection import make_server

    sock = _bind(args.host, args.port)
    jobs = Jobs(args.queue, len(args.model_widths), timeout=args.step_timeout)
    watching = asyncio.ensure_future(jobs.watch())
    try:
        names: dict[str, ModelChoice] = {}
        configs: list[Description] = []
        base = model_choice(args)
        # The default is loaded last, so that it is the last to leave the worker's memory.
        for width in reversed(args.model_widths):
            choice = dataclasses.replace(base, model_width=width)
            with announce(f"loading {choice.model or 'stickers'} ({width}) ..."):
                configs.append(await _load(jobs, choice))
            model = configs[-1].name
            name = model if width == "full" else f"{model}-{width}"
            names = {name: choice} | names
        limits = Limits(
            max_pixels=args.max_pixels, max_images=args.max_images, max_steps=args.max_steps
        )
        routes = Server(
            jobs, names, config=configs[-1], limits=limits, url_lifetime=args.url_lifetime
        )
        app = create_app(routes, args.api_key or None)
        server = make_server(app)

        def end() -> None:
            # The first signal finishes open requests, the second ends at once.
            if server.should_exit:
                server.force_exit = True
                jobs.worker.kill()
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/v1 serves {', '.join(names)}", flush=True)
        await server.serve(sockets=[sock])
    finally:
        watching.cancel()
        await jobs.close()
        sock.close()
    return 0


async def _load(jobs: Jobs, choice: ModelChoice) -> Description:
    """Load a model in the worker; `UserError` if that fails."""
    drawing = jobs.submit(Job(choice))
    while True:
        event = await drawing.get()
        if isinstance(event, Loaded):
            return event.config
        if isinstance(event, Failed):
            raise UserError(event.message)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        ) from None


# The worker's process imports this module again.
if __name__ == "__main__":
    run_command(main)
