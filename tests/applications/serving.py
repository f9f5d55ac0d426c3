"""A server as a process, and requests to it."""

import base64
import http.client
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
GENERATIONS = "/v1/images/generations"
PATIENCE = 120
NO_SERVER = 'the server extra is not installed: pip install ".[server]"'
BOUNDARY = "0123456789"
KIND = f"multipart/form-data; boundary={BOUNDARY}"


def start(*options, host="127.0.0.1"):
    """A server on a free port, and that port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.server", "--port", "0", *map(str, options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith(f"http://{host}:"), line + process.stderr.read()
    return process, int(line.split(":")[2].split("/")[0])


def stop(process):
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "Traceback" not in err, err
    return out


def ask(port, method="POST", path=GENERATIONS, headers=None, data=None, **body):
    """(status, headers, decoded JSON or bytes); sends `data`, or `body` as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    kind = {"Content-Type": "application/json"}
    if body:
        data = json.dumps(body)
    connection.request(method, path, data, kind | (headers or {}))
    response = connection.getresponse()
    data = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(data) if is_json else data


def opened(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def picture(width=64, height=32, mode="RGB", kind="png", **options):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def hole(width=64, height=32):
    """A mask whose left half is to be redrawn."""
    image = Image.new("RGBA", (width, height), "black")
    image.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def encoded(*parts):
    """A form's bytes; a value in bytes is a file."""
    lines = []
    for name, value in parts:
        disposition = f'Content-Disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            disposition += '; filename="../my picture.png"\r\nContent-Type: image/png'
        else:
            value = str(value).encode()
        lines.append(f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode() + value + b"\r\n")
    return b"".join(lines) + f"--{BOUNDARY}--\r\n".encode()
