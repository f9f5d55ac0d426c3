"""Serve OpenAI's images API: `python -m apps.server`."""

import argparse
import asyncio
import ipaddress
import os
import signal
import socket

from mlx_snapgen.errors import UserError, run_command

KEY_VARIABLE = "MLX_SNAPGEN_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    from mlx_snapgen.settings import WIDTH_NAMES

    parser = argparse.ArgumentParser(
        prog="python -m apps.server",
        description="Draw for clients of OpenAI's images API, one picture at a time.",
    )
    add = parser.add_argument
    add("--model", metavar="M", help="folder or Hugging Face repository (default: stickers)")
    add("--revision", metavar="R", help="branch, tag or commit of the repository")
    add(
        "--model-width",
        nargs="+",
        choices=WIDTH_NAMES,
        default=["full"],
        metavar="W",
        help="widths to offer, the default first; all stay in memory (default: full)",
    )
    add("--quantize", type=int, choices=(4, 8), help="bits per weight in memory")
    add("--lora", nargs="+", metavar=("PATH", "SCALE"), help="a LoRA and how strongly (default: 1)")
    add("--keep-text-encoders", action="store_true", help="faster with many prompts, more memory")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"ask clients for this key; needed beyond loopback (default: ${KEY_VARIABLE})",
    )
    add("--queue", type=int, default=8, metavar="N", help="requests that may wait (default: 8)")
    add("--max-pixels", type=int, metavar="N", help="(default: four times the model's own size)")
    add("--max-images", type=int, default=10, metavar="N", help="per request (default: 10)")
    add("--max-steps", type=int, default=100, metavar="N", help="per picture (default: 100)")
    return parser


def main() -> int:
    """Serve until interrupted."""
    args = build_parser().parse_args()
    if not args.api_key and not _is_loopback(args.host):
        raise UserError(
            f"listening on {args.host} lets others in: give an --api-key, or stay on 127.0.0.1"
        )
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'the server needs its extra: pip install ".[server]" ({error})') from None
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    from apps.server.app import Server, create_app
    from apps.server.connection import make_server
    from apps.server.jobs import Jobs
    from apps.server.request import Limits
    from apps.worker.messages import Failed, Job, Loaded, ModelChoice

    sock = _bind(args.host, args.port)
    jobs = Jobs(args.queue, keep=len(args.model_width))
    try:
        names = {}
        # The default is loaded last, and so is the one used last.
        for width in reversed(args.model_width):
            choice = ModelChoice(
                args.model,
                args.revision,
                width,
                args.quantize,
                _lora(args.lora),
                keep_text_encoders=args.keep_text_encoders,
            )
            drawing = jobs.submit(Job(choice, None))
            while not isinstance(event := await drawing.get(), Loaded):
                if isinstance(event, Failed):
                    raise UserError(event.message)
            config = event.config
            name = config.name if width == "full" else f"{config.name}-{width}"
            names = {name: choice} | names
        limits = Limits(args.max_pixels, args.max_images, args.max_steps)
        app = create_app(Server(jobs, names, config, limits), args.api_key or None)
        server = make_server(app)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/v1 serves {', '.join(names)}", flush=True)
        await server.serve(sockets=[sock])
    finally:
        await jobs.close()
        sock.close()
    return 0


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _lora(given: list[str] | None) -> tuple[tuple[str, float], ...]:
    if not given:
        return ()
    path, *scales = given
    try:
        [scale] = scales or ["1"]
        return ((path, float(scale)),)
    except ValueError:
        raise UserError("--lora takes a file and one number") from None


# The worker's process imports this module again.
if __name__ == "__main__":
    run_command(main)
