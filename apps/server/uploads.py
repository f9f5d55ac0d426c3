"""Forms with pictures (multipart/form-data), as OpenAI's clients send them."""

import asyncio
import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from apps.server.errors import RequestError
from apps.server.request import Form
from mlx_snapgen.files import temporary_folder

MAX_FORM = 64 << 20
"""Bytes of a form, and of all its pictures."""
MAX_FIELD = 16 << 10
"""Bytes of a text field."""
MAX_FIELDS = 40
"""Text fields of a form."""
MAX_STORED = 512 << 20
"""Bytes of all forms whose pictures are in use."""
FORM_SECONDS = 60.0
"""How long a client may take to send a form."""

# It prints a line for each damaged form.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def check_length(request: Request, most: int, *, what: str) -> None:
    """`RequestError` for a body whose header gives more than `most` bytes, before any are read."""
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large(most, what)


def too_large(most: int, what: str) -> RequestError:
    return RequestError(f"the {what} is larger than {most} bytes", 413)


class Uploads:
    """Reads forms; each one's pictures are in a folder that only this user can read.

    Args:
        max_files: pictures of a form, at most.
    """

    def __init__(self, max_files: int = 17) -> None:
        self._stored, self._max_files = 0, max_files

    async def read(self, request: Request, files: contextlib.ExitStack) -> Form:
        """The form of a request; when `files` is closed, its pictures are deleted.

        Raises:
            RequestError: not a form, damaged, too large, or too slow.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A browser sends a form of any web page without asking first, but with its origin, which is
        # checked.
        if kind != "multipart/form-data":
            message = "send the picture in a form, with Content-Type: multipart/form-data"
            raise RequestError(message, 415)
        check_length(request, MAX_FORM, what="form")
        parser = MultiPartParser(
            request.headers,
            self._body(request, files),
            max_files=self._max_files,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD,
        )
        try:
            async with asyncio.timeout(FORM_SECONDS):
                form = await parser.parse()
            try:
                folder = files.enter_context(temporary_folder(Path(tempfile.gettempdir())))
                return await asyncio.to_thread(_store, form.multi_items(), folder)
            finally:
                await form.close()
        except TimeoutError:
            raise RequestError("the form took too long to arrive", 408) from None
        except MultiPartException as error:
            if error.message.startswith("Too many files"):
                message = f"too many pictures: a form has at most {self._max_files}, with the mask"
                raise RequestError(message, param="image") from None
            raise RequestError(f"the form is damaged or too large: {error.message}") from None
        except OSError as error:
            message = f"the server cannot store the pictures: {error.strerror or error}"
            raise RequestError(message, 507) from None
        except ValueError:
            # A header of a part that is no text, in an unusual encoding.
            raise RequestError("the form is damaged") from None

    async def _body(
        self, request: Request, files: contextlib.ExitStack
    ) -> AsyncGenerator[bytes, None]:
        size = 0

        def forget() -> None:
            self._stored -= size

        files.callback(forget)
        async for chunk in request.stream():
            size += len(chunk)
            self._stored += len(chunk)
            if size > MAX_FORM:
                raise too_large(MAX_FORM, "form")
            if self._stored > MAX_STORED:
                headers = {"Retry-After": "10"}
                raise RequestError("too many pictures at once", 429, headers=headers)
            yield chunk


def _store(items: Iterable[tuple[str, str | UploadFile]], folder: Path) -> Form:
    """Write the files of a form into a folder."""
    values: dict[str, str] = {}
    pictures: dict[str, list[Path]] = {"image": [], "mask": []}
    for name, value in items:
        place = pictures.get(kind := name.removesuffix("[]"))
        if isinstance(value, UploadFile) and place is not None:
            if not value.filename and not value.size:
                continue  # a browser's form where no file was chosen
            path = folder / f"{kind}-{len(place)}" / _safe(value.filename or "")
            path.parent.mkdir()
            with path.open("wb") as target:
                shutil.copyfileobj(value.file, target)
            place.append(path)
            continue
        name = name[:50]
        if isinstance(value, UploadFile):
            raise RequestError(f"'{name}' is a file: the pictures are image and mask", param=name)
        if place is not None:
            raise RequestError(f"{name} must be a file, sent with its name", param=name)
        if name in values:
            raise RequestError(f"there is more than one {name}", param=name)
        values[name] = value
    if len(pictures["mask"]) > 1:
        raise RequestError("there is more than one mask", param="mask")
    return Form(values, tuple(pictures["image"]), next(iter(pictures["mask"]), None))


def _safe(name: str) -> str:
    """A client's file name without folders and unusual characters; metadata has it."""
    name = " ".join(re.split(r"[/\\]", name)[-1].split())
    return re.sub(r"[^\w. -]", "_", name)[-60:].strip(". ") or "picture"
