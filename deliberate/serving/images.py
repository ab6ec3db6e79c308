"""Images in chats: from `data:` URLs to the ids that a vision-language model's prompt has for them.

Nothing is fetched: an image comes in the request, as ``data:image/png;base64,...``. What it may
take is limited before it is decoded: a small file can hold an image of any size.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.language_tower import LanguageTower
from deliberate.modeling.seen_rows import SeenRun
from deliberate.serving.errors import ApiError
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# Processors scale the shorter side to a fixed length, and the longer one with it.
MOST_ASPECT = 50
_MARK = "deliberate-probe"


def read_image(url: str, most_pixels: int) -> Image.Image:
    """The image in a `data:` URL, in RGB and upright.

    Args:
        url: as in the request.
        most_pixels: width times height.

    Raises:
        ApiError: another URL, no image of `FORMATS`, one that moves, or one that is too large.
    """
    head, comma, data = url.partition(",")
    if not head[:5].lower() == "data:":
        raise ApiError(
            400,
            f"image_url {url[:60]!r} is not fetched: this server calls no other; send the image "
            "itself, as data:image/png;base64,...",
        )
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, "image_url: a data: URL must be data:image/png;base64,...")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"image_url: not base64: {error}") from None
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
        if width * height > most_pixels:
            raise ApiError(
                400,
                f"image_url: an image of {width} x {height}: {most_pixels} pixels at most here",
            )
        if max(width, height) > MOST_ASPECT * min(width, height):
            raise ApiError(
                400,
                f"image_url: an image of {width} x {height}: a side may be {MOST_ASPECT} times "
                "the other at most",
            )
        if getattr(image, "is_animated", False):
            raise ApiError(400, "image_url: a moving image: send one picture of it")
        return ImageOps.exif_transpose(image).convert("RGB")
    except ApiError:
        raise
    except Exception as error:  # what a malformed file raises has any type
        text = " ".join(str(error).split())[:120]
        raise ApiError(
            400, f"image_url: no image of {', '.join(FORMATS)} can be read: {text}"
        ) from None


class Eyes:
    """What reads images for one served model.

    Args:
        model: that sees; requests decode on it, or on one that shares its weights.
        processor: of the model; None where it could not be loaded.
        settings: limits.
        reason: why there is no processor.
    """

    def __init__(
        self, model: AdaptiveModel, processor: Any, settings: ServerSettings, reason: str = ""
    ) -> None:
        self._model = model
        self._processor = processor
        self._settings = settings
        self._reason = reason
        self._lock = threading.Lock()  # one set of images is decoded and encoded at a time

    @classmethod
    def of(cls, model: AdaptiveModel, name: str, settings: ServerSettings) -> Eyes | None:
        """Of a model that was loaded by this name; None for one that reads text alone.

        A model without a processor is served for texts, and a line is logged.
        """
        if not isinstance(model.base, LanguageTower):
            return None
        try:
            return cls(model, checkpoint.load_processor(name), settings)
        except DeliberateError as error:
            logger.warning("%s is served for texts alone: %s", name, error)
            return cls(model, None, settings, str(error))

    def prompt(self, text: str, urls: Sequence[str]) -> list[int]:
        """Ids of a rendered chat, with those of its images in the places of the placeholders.

        Args:
            text: of the model's chat template, with a placeholder for each image.
            urls: of the images, in order.

        Raises:
            ApiError: an image that is not taken, or that the model cannot read.
        """
        settings = self._settings
        if self._processor is None:
            raise ApiError(400, f"image_url: {self._reason}")
        if len(urls) > settings.max_images:
            raise ApiError(400, f"{len(urls)} images: {settings.max_images} at most here")
        with self._lock:
            images = [read_image(url, settings.max_image_pixels) for url in urls]
            given = self._processed(text, images)
            count = given["input_ids"].shape[1]
            if count > settings.max_prompt_tokens:  # before the costly part
                raise ApiError(
                    400,
                    f"a prompt of {count} tokens, its images included: this server takes "
                    f"{settings.max_prompt_tokens} at most",
                )
            try:
                with torch.inference_mode():
                    ids: list[int] = self._model.see(**given)[0].tolist()
            except DeliberateError as error:
                raise ApiError(400, f"image_url: {error}") from None
            return ids

    @property
    def chat_template(self) -> Any:
        """Of its processor; None for none."""
        return getattr(self._processor, "chat_template", None)

    def hold(self, ids: Sequence[int]) -> tuple[SeenRun, ...]:
        """What keeps the embeddings of a prompt's images."""
        base: Any = self._model.base
        held: tuple[SeenRun, ...] = base.seen.hold(ids)
        return held

    def _processed(self, text: str, images: list[Image.Image]) -> dict[str, Any]:
        """What the model's processor gives for them."""
        try:
            given = self._processor(
                text=[text], images=images, add_special_tokens=False, return_tensors="pt"
            )
        except Exception as error:  # of the model's own processor, in whatever way it fails
            reason = " ".join(str(error).split())[:200]
            raise ApiError(
                400,
                f"image_url: the model's processor cannot place {len(images)} images in this chat: "
                f"{reason}",
            ) from None
        dtype = next(self._model.base.parameters()).dtype
        return {
            name: one.to(dtype) if torch.is_tensor(one) and one.is_floating_point() else one
            for name, one in given.items()
        }


def takes_parts(render: Callable[..., str]) -> bool:
    """Whether a chat template shows a text that is a part of a message's content.

    Those of many models that see do so, and leave out a content that is one text.

    Args:
        render: the template: called with messages.
    """
    try:
        shown = render([{"role": "user", "content": [{"type": "text", "text": _MARK}]}])
    except Exception:  # of the model's own template, in whatever way it fails
        return False
    return _MARK in shown and "'type'" not in shown and '"type"' not in shown
