"""The page at `/`: one file of HTML, style and script, which asks nobody but this server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_FACTS = "/*FACTS*/"
_EXAMPLE = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"


def page(model_name: str, layers: int, chat: bool) -> tuple[str, dict[str, str]]:
    """The page and the headers it is sent with.

    The headers let the browser run this page's own style and script, by their hashes, and connect
    to this server only.

    Args:
        model_name: what clients call the model.
        layers: of the model.
        chat: whether it has a chat template.
    """
    facts = {"model": model_name, "layers": layers, "chat": chat, "example": _EXAMPLE}
    # A name such as "</script>" must stay data.
    text = json.dumps(facts).replace("<", "\\u003c")
    html = (files("deliberate.serving") / "page.html").read_text(encoding="utf-8")
    html = html.replace(_FACTS, text)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; style-src {_hash(html, 'style')}; "
        f"script-src {_hash(html, 'script')}"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers


def _hash(html: str, tag: str) -> str:
    """Source expression of the one element of this tag without attributes."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)
    assert found is not None
    digest = hashlib.sha256(found.group(1).encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def add_page(app: FastAPI, model_name: str, layers: int, chat: bool) -> None:
    """Serves the page at `/`; arguments as for `page`."""
    html, headers = page(model_name, layers, chat)

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        """Playground and dashboard."""
        return HTMLResponse(html, headers=headers)
