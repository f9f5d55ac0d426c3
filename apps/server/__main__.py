"""Serve OpenAI's images API: `python -m apps.server`."""

import argparse
import asyncio
import dataclasses
import os
import re
import signal
import socket
import sys

from tqdm import tqdm

from apps.server.jobs import Jobs
from apps.server.models import Served, name_models
from apps.server.request import Limits, is_loopback
from apps.worker.client import CACHE_LIMIT
from apps.worker.messages import Downloading, Failed, Job, Notice, Opened
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import (
    Parser,
    add_cache_limit,
    add_model_choice,
    add_model_widths,
    finite_number,
    integer,
    model_choice,
)
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, plural, run_command
from mlx_snapgen.settings import BUILT_IN, ModelChoice

KEY_VARIABLE = "MLX_SNAPGEN_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m apps.server",
        description="Serve OpenAI's images API. It answers one request at a time and draws the "
        "pictures of a request in batches. It loads the first model at the start and the others "
        "when a request names them. If they do not fit into memory together, it frees the least "
        "recently used.",
        renamed={"--model-width": "--model-widths"},
        formatter_class=argparse.HelpFormatter,
    )
    model = parser.add_argument_group("model")
    add_model_choice(model, several=True)
    add_model_widths(model, default=["full"], more="; a model without one of them has the others")
    model.add_argument(
        "--alias",
        dest="aliases",
        type=_alias,
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help=f"another name for a model, such as gpt-image-1={BUILT_IN}; repeat the option to give "
        "several (default: none)",
    )
    model.add_argument(
        "--unload-after",
        type=_positive,
        metavar="MINUTES",
        help="free a model that nobody has used for so long; the next request loads it again "
        "(default: never)",
    )
    model.add_argument(
        "--memory",
        type=_positive,
        metavar="GB",
        help="memory that all loaded models may take together with the picture that is drawn "
        "(default: three quarters of this machine's)",
    )
    add_cache_limit(model, default="1.07, or 0 with --low-memory")
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
        "--allow-origin",
        dest="origins",
        type=_origin,
        action="append",
        default=[],
        metavar="URL",
        help="let web pages of this origin, such as https://example.com, use the server from a "
        "browser; repeat the option to allow several (default: only pages of this machine)",
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
        help="most pictures per request, drawn or sent (default: %(default)s)",
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
    if len(args.model or []) > 1 and (args.revision or args.loras or args.text_encoders):
        raise UserError("--revision, --lora and --text-encoders are for one --model: give one")
    choices(args)
    try:
        import python_multipart  # noqa: F401
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


def _origin(text: str) -> str:
    """An origin as browsers write it in the header of this name."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@\s,*]+)/?", text, re.IGNORECASE)
    if not (found and text.isascii()):
        raise argparse.ArgumentTypeError(f"takes an origin like https://example.com, not '{text}'")
    scheme, host = found[1].lower(), found[2].lower()
    usual = {"http": ":80", "https": ":443"}.get(scheme, "")
    return f"{scheme}://{host.removesuffix(usual)}"


def _alias(text: str) -> tuple[str, str]:
    name, _, model = text.partition("=")
    if not (name and model and name.isprintable()):
        raise argparse.ArgumentTypeError(f"takes NAME=MODEL, not '{text}'")
    return name, model


def _positive(text: str) -> float:
    number = finite_number(text)
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1e6")
    return number


async def _serve(args: argparse.Namespace) -> int:
    from apps.server.app import Server, create_app
    from apps.server.connection import make_server

    sock = _bind(args.host, args.port)
    jobs = Jobs(
        args.queue,
        timeout=args.step_timeout,
        keep=len(args.model or [None]) * len(args.model_widths),
        memory=None if args.memory is None else int(args.memory * 1e9),
        unload_after=None if args.unload_after is None else args.unload_after * 60,
        cache_limit=CACHE_LIMIT if args.cache_limit is None else args.cache_limit,
    )
    watching = asyncio.ensure_future(jobs.watch())
    try:
        models = await open_models(jobs, args)
        default = next(iter(models))
        with announce(f"loading {default} ..."):
            await _open(jobs, Job(models[default].choice))
        limits = Limits(
            max_pixels=args.max_pixels, max_images=args.max_images, max_steps=args.max_steps
        )
        routes = Server(jobs, models, limits=limits, url_lifetime=args.url_lifetime)
        app = create_app(routes, args.api_key or None, origins=args.origins)
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
        print(f"http://{shown}:{port}/v1 serves {', '.join(models)}", flush=True)
        await server.serve(sockets=[sock])
    finally:
        watching.cancel()
        await jobs.close()
        sock.close()
    return 0


async def open_models(jobs: Jobs, args: argparse.Namespace) -> dict[str, Served]:
    """The models of the command line, by name; one that is not on this machine is fetched.

    Before that, the configs of all show whether the names and widths are right.
    """
    # Every model must have one of the widths; a public one has full alone, and is refused at once.
    width = "full" if "full" in args.model_widths else args.model_widths[0]
    wanted = [dataclasses.replace(choice, model_width=width) for choice in choices(args)]
    named: dict[str, Served] = {}
    for fetch in (False, True):
        opened = list[tuple[ModelChoice, Description]]()
        for choice in wanted:
            with announce(f"opening {choice.model or BUILT_IN} ..."):
                config = await _open(jobs, Job(choice, load=False, fetch=fetch))
            opened.append((choice, config))
        named = name_models(opened, widths=args.model_widths, aliases=args.aliases)
    return named


def choices(args: argparse.Namespace) -> list[ModelChoice]:
    """The models of the command line; `UserError` for bases that belong to none of them."""
    models, bases = args.model or [None], args.base or []
    files = [i for i, model in enumerate(models) if str(model).endswith(".safetensors")]
    if bases and not files:
        raise UserError("--base is for models that are one .safetensors file: leave it out")
    if len(bases) == 1:
        bases = bases * len(files)
    if bases and len(bases) != len(files):
        raise UserError(
            f"--base has {plural(len(bases), 'model')} and --model {plural(len(files), 'file')}: "
            "give one for all, or one for each file"
        )
    plain = model_choice(argparse.Namespace(**vars(args) | {"base": None}))
    base_of = dict(zip(files, bases, strict=False))
    return [
        dataclasses.replace(plain, model=model, base=base_of.get(i))
        for i, model in enumerate(models)
    ]


async def _open(jobs: Jobs, job: Job) -> Description:
    """Open or load a model in the worker; `UserError` if that fails."""
    drawing = jobs.submit(job)
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None, delay=1) as bar:
        while not isinstance(event := await drawing.get(), Opened):
            if isinstance(event, Downloading):
                bar.desc, bar.total = event.name, event.total or None
                bar.update(event.done - bar.n)
            elif isinstance(event, Notice):
                tqdm.write(event.text, file=sys.stderr)
            elif isinstance(event, Failed):
                raise UserError(event.message)
    return event.config


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
