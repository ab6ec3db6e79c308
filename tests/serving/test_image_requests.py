"""Chats with images over HTTP: answered as `generate` answers them, or refused by name."""

from __future__ import annotations

import io

import httpx
import openai
import pytest
import torch
from live_server import running
from seeing_models import seeing, shown
from seeing_processors import data_url, picture, processor, tokenizer

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.canary import judged
from deliberate.serving.command import build_server
from deliberate.serving.images import Eyes
from deliberate.serving.protocol import ChatRequest
from deliberate.serving.settings import ServerSettings

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SETTINGS = {"max_images": 3, "max_image_pixels": 4096, "max_new_tokens": 32}


def chat(*parts, role="user"):
    made = [
        {"type": "image_url", "image_url": {"url": one}}
        if ":" in one
        else {"type": "text", "text": one}
        for one in parts
    ]
    return [{"role": role, "content": made}]


def served(name, **settings):
    model = AdaptiveModel(seeing(name, torch.float32), [1, 2])
    limits = ServerSettings(**{**SETTINGS, **settings})
    eyes = Eyes(model, processor(name), limits)
    return model, build_server(model, tokenizer(), name, limits, eyes)


@pytest.fixture(scope="module")
def llava():
    model, server = served("llava", block_tokens=4, cache_entries=8)
    with running(server) as url:
        yield model, server, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, name, messages, **given):
    given = {"max_tokens": 10, "temperature": 0} | given
    return client.chat.completions.create(model=name, messages=messages, **given)


def by_generate(model, name, words, images, fidelity="dense"):
    text = f"user {words} assistant "
    given = processor(name)(
        text=[text], images=images or None, add_special_tokens=False, return_tensors="pt"
    )
    made = model.generate(**given, max_new_tokens=10, do_sample=False, fidelity=fidelity)
    return tokenizer().decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "idefics3"])
@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_chat_with_images_is_answered_as_generate_answers_it(name, fidelity, request) -> None:
    if name == "llava":
        model, _, client = request.getfixturevalue("llava")
        check(model, client, name, fidelity)
        return
    model, server = served(name)
    with running(server) as url:
        check(model, openai.OpenAI(base_url=f"{url}/v1", api_key="none"), name, fidelity)


def check(model, client, name, fidelity) -> None:
    first, second = picture(1), picture(2)
    how = {"extra_body": {"fidelity": fidelity}}
    two = ask(client, name, chat("look at", data_url(first), "and", data_url(second)), **how)
    words = "look at <image> and <image>"
    assert two.choices[0].message.content == by_generate(model, name, words, [first, second])
    turned = ask(client, name, chat("look at", data_url(second), "and", data_url(first)), **how)
    assert turned.choices[0].message.content == by_generate(model, name, words, [second, first])
    assert turned.choices[0].message.content != two.choices[0].message.content
    plain = ask(client, name, [{"role": "user", "content": "look at that"}], **how)
    assert plain.choices[0].message.content == by_generate(model, name, "look at that", [])


def test_the_same_image_is_encoded_once_and_its_prefix_is_run_once(llava) -> None:
    model, server, client = llava
    seen = model.sight.encoded
    image, ran = data_url(picture(7)), []
    for words in ("this", "that", "at"):  # not the cache of answers, which knows whole prompts
        before = server.service.stats.prefilled
        ask(client, "llava", chat("look at", image, words))
        ran.append(server.service.stats.prefilled - before)
    assert model.sight.encoded == seen + 1
    # 21 tokens, blocks of 4: "user look at" and 17 of the image's 16 + 1 further positions.
    assert ran[0] == 21 and ran[1] == ran[2] == 5


def test_an_answer_is_kept_for_the_same_image_and_no_other(llava) -> None:
    _, server, client = llava
    counts, how = server.completions.cache.counts, {"extra_body": {"fidelity": "dense"}}
    answers = []
    for seed in (11, 12, 11):
        answers.append(ask(client, "llava", chat("look at", data_url(picture(seed))), **how))
    assert (counts.local, answers[2].choices[0].message.content) == (
        1,
        answers[0].choices[0].message.content,
    )


def test_a_kept_answer_is_found_by_what_an_image_is_and_not_by_its_ids() -> None:
    cache, keys = AnswerCache(entries=2), []
    body = ChatRequest(model="llava", messages=chat("look", "data:,"), temperature=0)
    for earlier in (0, 1):  # another process has seen other images before
        model = AdaptiveModel(seeing("llava", torch.float32), [1, 2])
        for seed in range(5, 5 + earlier):
            model.see(**shown("llava", seed, dtype=torch.float32))
        for seed in (0, 3):
            ids = model.see(**shown("llava", seed, dtype=torch.float32))[0].tolist()
            request = Request(ids, 4, seen=model.base.seen.hold(ids))
            assert not judged(request)  # ids of images mean nothing to another version
            keys.append(cache.key(body, [request], "a model"))
    assert keys[:2] == keys[2:] and keys[0] != keys[1]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.org/a.png", "'http://example.org/a.png' is not fetched"),
        ("file:///etc/passwd", "'file:///etc/passwd' is not fetched"),
        ("data:image/png,abc", "must be data:image/png;base64"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png;base64,AAAA", "no image of PNG, JPEG, WEBP, GIF can be read"),
        (data_url(picture(size=(65, 64))), "65 x 64: 4096 pixels at most"),
        (data_url(picture(size=(400, 4))), "400 x 4: a side may be 50 times"),
        (
            data_url(picture(), "GIF", save_all=True, append_images=[picture(1)]),
            "a moving image",
        ),
        (data_url(picture(), "PNG")[:-60], "can be read"),
    ],
)
def test_what_is_no_image_in_the_request_is_refused_by_name(llava, url, said) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(llava[2], "llava", chat("look at", url))
    assert said in refused.value.message and len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("messages", "given", "said"),
    [
        (chat(*[data_url(picture())] * 4), {}, "4 images: 3 at most"),
        (chat("this <image>", data_url(picture())), {}, "cannot place 1 images"),
        (chat(data_url(picture()), role="system"), {}, "message of role system"),
        (chat(data_url(picture())), {"extra_body": {"votes": 3}}, "reasoning or votes with images"),
        (
            chat(data_url(picture())),
            {"extra_body": {"repetition_penalty": 1.3}},
            "RepetitionPenalty",
        ),
    ],
)
def test_what_images_cannot_have_is_refused_by_name(llava, messages, given, said) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(llava[2], "llava", messages, **given)


def test_detail_that_cannot_be_obeyed_is_refused(llava) -> None:
    messages = chat(data_url(picture()))
    messages[0]["content"][0]["image_url"]["detail"] = "high"
    with pytest.raises(openai.BadRequestError, match="detail"):
        ask(llava[2], "llava", messages)


def test_a_jpeg_that_lies_on_its_side_is_seen_upright(llava) -> None:
    held, image = io.BytesIO(), picture(3, (8, 12))
    turned = image.rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    turned.save(held, "PNG", exif=exif)
    model, _, client = llava
    made = ask(client, "llava", chat("look at", data_url(turned, "PNG", exif=exif)))
    upright = by_generate(model, "llava", "look at <image>", [image])
    assert made.choices[0].message.content == upright


def test_a_model_of_text_alone_names_itself(model, tokenizer) -> None:
    server = build_server(model, tokenizer, "tiny", ServerSettings())
    with running(server) as url:
        body = {"model": "tiny", "messages": chat("look", data_url(picture()))}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    said = answer.json()["error"]["message"]
    assert answer.status_code == 400 and "model 'tiny' reads text alone" in said


class QwenProcessor:
    """Gives what Qwen2-VL's gives for one image; its own needs torchvision."""

    chat_template = None
    tokenizer = tokenizer()

    def __call__(self, **_):
        return shown("qwen2_vl", dtype=torch.float32)


def test_images_that_m_rope_places_are_answered_as_generate_answers_them() -> None:
    model, limits = AdaptiveModel(seeing("qwen2_vl", torch.float32), [1, 2]), ServerSettings()
    server = build_server(model, tokenizer(), "qwen", limits, Eyes(model, QwenProcessor(), limits))
    given = shown("qwen2_vl", dtype=torch.float32)
    made = model.generate(**given, max_new_tokens=10, do_sample=False, fidelity="dense")
    expected = tokenizer().decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    with running(server) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for fidelity in ("dense", "exact"):
            how = {"extra_body": {"fidelity": fidelity}}
            answer = ask(client, "qwen", chat("look at", data_url(picture())), **how)
            assert answer.choices[0].message.content == expected
        text = [{"role": "user", "content": [{"type": "text", "text": "look at that"}]}]
        assert ask(client, "qwen", text).choices[0].message.content


def test_a_saved_model_is_served_with_its_processor_and_without_it_for_texts(
    tmp_path, caplog
) -> None:
    seeing("llava", torch.float32).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, limits = AdaptiveModel.from_pretrained(str(tmp_path)), ServerSettings()
    blind = Eyes.of(model, str(tmp_path), limits)
    assert "is served for texts alone" in caplog.text
    server = build_server(model, tokenizer(), "llava", limits, blind)
    with running(server) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="processor"):
            ask(client, "llava", chat("look at", data_url(picture())))
        # The template leaves out a content that is one text, so it is given parts.
        text = ask(client, "llava", [{"role": "user", "content": "look at that"}])
        assert text.usage.prompt_tokens == 5
    processor("llava").save_pretrained(tmp_path)
    eyes = Eyes.of(model, str(tmp_path), limits)
    assert checkpoint.load_processor(tmp_path).image_processor is not None
    ids = eyes.prompt("user look at <image> assistant ", [data_url(picture())])
    assert len(ids) == 20 and sum(one >= 97 for one in ids) == 16
    assert Eyes.of(AdaptiveModel.from_pretrained("tiny"), "tiny", limits) is None
