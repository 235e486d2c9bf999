"""
What stands between the page and whoever sends requests: limits, sentences, and no name of a file on the disk.

    request --> Guard (size of the body; errors) --> Gradio --> Page (errors of handlers) --> handlers
    upload  --> NamelessParser (name of the file) --> a folder that goes with the server
"""

import secrets
import traceback
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from gradio import route_utils
from gradio_client.utils import is_http_url_like, strip_invalid_filename_characters, traverse
from PIL import Image
from starlette.responses import JSONResponse

from ..errors_healthgpt import HealthGPTError

NOT_SERVED = (
    "This request cannot be served: the page's API, which /gradio_api/info describes, has no such call or input."
)


class TooLarge(Exception):
    """A body that has more bytes than it may have."""


class Guard:
    """
    ASGI middleware: refuses bodies that are too large, also those that do not say how large they are, and answers whatever goes wrong
    behind it with a sentence.

    Args:
        app (`Callable`): The application behind it.
        max_bytes (`int`): Of a body; an upload may have so many for each file, which Gradio counts.
        debug (`bool`): Whether tracebacks are shown.
    """

    def __init__(self, app: Callable, max_bytes: int, debug: bool):
        self.app, self.max_bytes, self.debug = app, max_bytes, debug

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = {"bytes": 0, "answered": False}
        is_upload = scope["path"].rstrip("/") == f"{route_utils.API_PREFIX}/upload"

        async def counted():
            message = await receive()
            state["bytes"] += len(message.get("body", b""))
            if state["bytes"] > self.max_bytes and not is_upload:
                raise TooLarge
            return message

        async def noted(message):
            if state["bytes"] > self.max_bytes and not is_upload:
                raise TooLarge  # in place of what the application makes of it
            state["answered"] = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            await refuse(413, f"A request may have {self.max_bytes} bytes.")(scope, receive, send)
        except Exception:  # Gradio's routes raise whatever comes of input that they do not expect
            if self.debug:
                traceback.print_exc()
            if not state["answered"]:
                await refuse(400, NOT_SERVED)(scope, receive, send)


def refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


class NamelessParser(route_utils.GradioMultiPartParser):
    """Gives uploads names of their own: a patient's stands in many a file's name, and stays in the browser."""

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        file = self._current_part.file
        if file is None:  # of any length, in memory
            raise route_utils.MultiPartException("An upload holds files and nothing else.")
        file.filename = secrets.token_hex(8) + known_ending(file.filename or "")


def known_ending(name: str) -> str:
    """The ending of a file's name that tells a format, without what stands before it."""
    name = name.lower()
    if name.endswith(".nii.gz"):
        return ".nii.gz"
    ending = Path(name).suffix
    return ending if ending in {".dcm", ".dicom", ".nii"} | Image.registered_extensions().keys() else ""


class Page(gr.Blocks):
    """
    Blocks whose every call is answered, and logs nothing of it.

    Args:
        debug (`bool`): Whether tracebacks of what is no user's mistake are shown.
        options: As in `gr.Blocks`.
    """

    def __init__(self, debug: bool = False, **options):
        self.debug = debug
        super().__init__(**options)

    async def process_api(self, block_fn, inputs, *arguments, **options):
        names = {}

        def look_at(file: dict) -> None:
            if is_http_url_like(file["path"]):
                raise HealthGPTError("The page opens no addresses: upload the file.")
            names[Path(file["path"]).name] = strip_invalid_filename_characters(
                str(file.get("orig_name") or "the file")
            )

        try:
            traverse(inputs, look_at, lambda value: isinstance(value, dict) and isinstance(value.get("path"), str))
            return await super().process_api(block_fn, inputs, *arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            for name, original in names.items():
                error.message = error.message.replace(name, original)
            raise
        except HealthGPTError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:  # Gradio's components raise whatever comes of input that they do not expect
            if self.debug:
                traceback.print_exc()
            raise gr.Error(NOT_SERVED, print_exception=False) from error
