"""The page at `/` in a real browser: answers coloured by depth, the dashboard, keyboard, labels."""

from __future__ import annotations

import itertools
import re
import shutil

import httpx
import pytest
from live_server import running, wait_until

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.serving.command import build_server
from deliberate.serving.page import page as page_of
from deliberate.serving.settings import ServerSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEMPLATE = (
    "{% for m in messages %}Question: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"
browsers = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def server():
    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    settings = ServerSettings(api_keys=("secret",))
    return build_server(AdaptiveModel.from_pretrained("tiny"), tokenizer, "tiny", settings)


@pytest.fixture(scope="module")
def address(server):
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, address):
    """The page, whose console and requests are watched: no error, and nobody else is asked."""
    context = browser.new_context()
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.get_by_label("API key").fill("secret")
    yield opened
    context.close()
    assert not [one for one in said if "401" not in one and "400" not in one]
    assert all(url.startswith((address, "data:")) for url in asked)


def ask(page, prompt=QUESTION, **settings):
    page.get_by_label("Prompt").fill(prompt)
    for label, value in settings.items():
        page.get_by_label(label.replace("_", " ")).fill(str(value))
    page.get_by_role("button", name="Send").click()


def test_the_page_needs_no_key_no_network_and_runs_its_own_script_only(address) -> None:
    answer = httpx.get(address)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and policy.count("sha256-") == 2
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", answer.text)
    assert "://" not in answer.text


def test_a_models_name_cannot_become_markup() -> None:
    html, _ = page_of("</script><script>alert(1)</script>", 8, chat=False)
    assert html.count("<script") == 2 and "\\u003c/script>" in html


@browsers
def test_every_token_of_an_answer_is_coloured_by_its_layer(page, server) -> None:
    page.get_by_label("Fidelity").select_option("threshold")
    ask(page)
    page.get_by_text("Answer complete").wait_for()
    tokens = page.locator(".token")
    said = page.locator("#status").inner_text()
    count = int(re.search(r"(\d+) tokens", said)[1])
    assert tokens.count() == count and "threshold" in said
    layers = [int(one) for one in tokens.evaluate_all("all => all.map(t => t.dataset.layer)")]
    assert set(layers) <= {2, 4, 6, 8} and len(set(layers)) > 1
    colours = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert len(set(zip(layers, colours, strict=True))) == len(set(layers)) == len(set(colours))
    assert tokens.first.get_attribute("title") == f"chosen after layer {layers[0]} of 8"
    mean = sum(layers) / len(layers)
    assert page.locator("#depth-text").inner_text() == f"{mean:.2f} of 8"
    text = page.locator(".turn").nth(1).locator("span:not(.who)").first.text_content()
    assert "####" in text and len(text) > 8


@browsers
def test_a_chat_goes_on_and_can_be_cleared(page) -> None:
    ask(page)
    page.get_by_text("Answer complete").wait_for()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "And if he buys 2 more?")
    roles = [one["role"] for one in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_text("Answer complete").wait_for()
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0


@browsers
def test_a_refusal_is_shown_in_the_servers_words(page) -> None:
    page.get_by_label("Most tokens").fill("999999")
    ask(page)
    page.get_by_text("this server makes 4096 at most").wait_for()
    page.get_by_label("API key").fill("wrong")
    ask(page)
    page.get_by_text("the API key is missing or unknown").wait_for()


@browsers
def test_a_deadline_is_sent_and_whether_it_was_kept_is_said(page) -> None:
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, **{"Deadline,_ms": 60000})
    assert sent.value.post_data_json["deadline_ms"] == 60000
    page.get_by_text("deadline kept").wait_for()
    assert page.locator("#budget-text").inner_text().endswith("of 60000 ms")


@browsers
def test_it_is_used_by_keyboard_and_escape_stops_an_answer(page, server) -> None:
    before = server.builder.end_tokens
    server.builder.end_tokens = ()  # an answer that ends at its limit only
    try:
        page.get_by_label("Most tokens").fill("3000")
        page.get_by_label("Prompt").focus()
        page.keyboard.type(QUESTION)
        page.keyboard.press("Control+Enter")
        page.locator(".token").nth(3).wait_for()
        assert page.get_by_role("button", name="Send").is_disabled()
        page.keyboard.press("Escape")
        page.get_by_text("Stopped after").wait_for()
        assert wait_until(lambda: server.service.unfinished == 0)
    finally:
        server.builder.end_tokens = before
    assert page.evaluate("document.activeElement.id") == "prompt"
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
    for name in ("form-of", "fidelity", "deadline", "tokens", "send", "clear", "numbers"):
        assert name in names, names


@browsers
def test_every_control_has_a_name_and_results_are_announced(page) -> None:
    nameless = page.locator("input, select, textarea, button, meter").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.id)"
    )
    assert nameless == []
    assert page.locator("#status").get_attribute("role") == "status"
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(e => +e.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@browsers
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_readable_on_every_depths_colour(browser, address, scheme) -> None:
    context = browser.new_context(color_scheme=scheme)
    opened = context.new_page()
    opened.goto(address)
    contrasts = opened.evaluate(CONTRASTS)
    context.close()
    assert min(contrasts) >= 4.5, contrasts


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (css) => {
    canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [0, 0.25, 0.5, 0.75, 1].map((depth) => {
    const token = document.createElement("span");
    token.className = "token"; token.style.setProperty("--depth", depth);
    document.getElementById("turns").append(token);
    const style = getComputedStyle(token);
    const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


@browsers
def test_the_dashboard_shows_rates_times_depths_and_the_queue(page) -> None:
    ask(page)
    page.get_by_text("Answer complete").wait_for()
    page.locator("#depths tr").first.wait_for()
    page.wait_for_function("document.getElementById('running').textContent === '0'")
    assert page.locator("#health").inner_text() == "ok"
    shares = page.locator("#depths td:nth-child(2)").all_inner_texts()
    assert sum(float(one.split()[0]) for one in shares) == pytest.approx(100, abs=0.3)
    page.wait_for_function(
        "!document.getElementById('times').textContent.includes('time to first token–')"
    )
    times = page.locator("#times tr").first.locator("td").all_inner_texts()
    assert [float(one) for one in times] == sorted(float(one) for one in times)
    row = page.locator("#versions tr")
    row.first.wait_for()
    assert row.count() == 1
    assert row.first.inner_text().split("\t") == ["the only one", "live", "0", "holds or none"]
