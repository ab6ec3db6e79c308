"""Processors of the tiny models of `seeing_models`: words for tokens, images of 8 x 8."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from seeing_models import IMAGE
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

_SPECIAL = {
    IMAGE: "<image>",
    91: "<fake_token_around_image>",
    92: "<global-img>",
    93: "<end_of_utterance>",
}
# As those of SmolVLM and LLaVA: the content is a list of parts.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens, as many as the models have."""
    words = ["<unk>", "user", "assistant", "system", "look", "at", "this", "and", "that"]
    names = [_SPECIAL.get(one, words[one] if one < len(words) else f"w{one}") for one in range(97)]
    made = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(one, special=True) for one in _SPECIAL.values()])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def processor(name: str) -> Any:
    """What reads images for the tiny model of this name: ``llava``, ``smolvlm`` or ``idefics3``."""
    if name == "llava":
        eight = {"height": 8, "width": 8}
        images = CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size=eight, do_convert_rgb=True
        )
        return LlavaProcessor(
            images,
            tokenizer(),
            patch_size=2,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    eight = {"longest_edge": 8}
    kind = SmolVLMImageProcessorPil if name == "smolvlm" else Idefics3ImageProcessorPil
    images = kind(size=eight, max_image_size=eight, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=TEMPLATE)


def picture(seed: int = 0, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Random colours."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def data_url(image: Image.Image, form: str = "PNG", **how: Any) -> str:
    """An image as clients send it."""
    held = io.BytesIO()
    image.save(held, form, **how)
    return f"data:image/{form.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
