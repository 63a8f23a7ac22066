"""The page at /, in a real browser."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tinier.serving import Service

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def chromium() -> str:
    """Debian's: playwright's own is a download from elsewhere."""
    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(
            ["apt-get", "install", "-qy", "--no-install-recommends", "chromium"], check=False
        )
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs chromium: sudo apt-get install chromium")
    return found


@pytest.fixture
def page(service: Service, chromium: str) -> Iterator[Any]:
    """The page, which must ask nobody but the server, and raise nothing."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.extend(
            [request.url] if not request.url.startswith((service.url, "data:")) else []
        ))  # fmt: skip
        page.goto(service.url)
        sync_api.expect(page.locator("select").last).to_have_value("two", timeout=20_000)
        yield page
        assert faults == []
        browser.close()


def send(page: Any, prompt: str, **settings: str) -> None:
    page.click("#open")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#open")
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#send")).to_have_text("Send", timeout=30_000)


def test_a_conversation_runs_on_two_models_side_by_side(page: Any) -> None:
    assert page.locator("select").first.input_value() == "one"
    sent: list[dict[str, Any]] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    send(page, "Ten green bottles", tokens="12", system="Sing.")
    figures = page.locator(".answer .figures")
    for side in range(2):
        sync_api.expect(figures.nth(side)).to_contain_text("12 tokens · ")
        assert page.locator(".text").nth(side).text_content()
    texts = page.locator(".text").all_text_contents()
    assert texts[0] != texts[1]
    send(page, "And nine")
    assert page.locator(".turn").count() == 2
    chats = [body for body in sent if "messages" in body]
    assert [body["model"] for body in chats] == ["one", "two"] * 2
    for first, second in ((chats[0], chats[2]), (chats[1], chats[3])):
        roles = [message["role"] for message in second["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        assert second["messages"][:2] == first["messages"]
    # each side goes on from its own answer
    assert chats[2]["messages"][2] != chats[3]["messages"][2]
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0


def test_what_the_left_model_would_not_have_written_is_marked(page: Any) -> None:
    send(page, "Ten green bottles", tokens="30")
    figures = page.locator(".answer .figures").last
    sync_api.expect(figures).to_contain_text("one would write", timeout=20_000)
    share = int(str(figures.text_content()).split("one would write ")[1].split(" %")[0])
    page.locator(".answer").last.get_by_role("button", name="agreement").click()
    marks = page.locator(".marks").last
    assert marks.is_visible()
    assert not page.locator(".text").last.is_visible()
    missed = marks.locator("mark").count()
    tokens = int(str(figures.text_content()).split(" tokens")[0].split()[-1])
    assert round(100 * (1 - missed / tokens)) == share
    # the same model on both sides is not judged by itself
    page.locator("select").last.select_option("one")
    page.keyboard.press("Alt+n")
    send(page, "Ten green bottles")
    assert "would write" not in str(page.locator(".answer .figures").last.text_content())


def test_an_error_is_shown_and_the_question_can_be_asked_again(page: Any) -> None:
    page.click("#open")
    page.uncheck("#chat")
    page.click("#open")
    send(page, "Hi", tokens="99999")
    assert page.locator(".error").count() == 2
    assert "maximum context length" in str(page.locator(".error").first.text_content())
    send(page, "Hi", tokens="4")
    assert page.locator(".turn").last.locator(".error").count() == 0


def test_escape_stops_an_answer(page: Any) -> None:
    page.click("#open")
    page.fill("#tokens", "200")
    page.click("#open")
    page.fill("#prompt", "Hi")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#send")).to_have_text("Send", timeout=10_000)


MARKDOWN = """# Title
Some **bold**, *slanted* and `code < 1`.

1. one
2. two

- a
- b

```python
x = "<b>"
```
> said

| a | b |
| - | - |
| 1 | 2 |

<img src=x onerror=alert(1)> [link](https://example.org/) [bad](javascript:alert(1))"""


def test_markdown_is_drawn_and_is_never_markup_of_the_page(page: Any) -> None:
    made = page.evaluate(
        "text => { const d = document.createElement('div'); d.append(markdown(text)); return d.innerHTML }",
        MARKDOWN,
    )
    for part in (
        "<h1>Title</h1>", "<strong>bold</strong>", "<em>slanted</em>", "<code>code &lt; 1</code>",
        "<ol start=\"1\"><li>one</li><li>two</li></ol>", "<ul><li>a</li><li>b</li></ul>",
        '<pre><code>x = "&lt;b&gt;"</code></pre>', "<blockquote><p>said</p></blockquote>",
        "<tr><td>1</td><td>2</td></tr>", "&lt;img src=x onerror=alert(1)&gt;",
        '<a href="https://example.org/"', "[bad](javascript:alert(1))",
    ):  # fmt: skip
        assert part in made, made
    assert page.evaluate("text => markdown(text).textContent.length", "2 * 3 * 4 a_b_c") == 15


def test_it_fits_a_phone_and_follows_light_and_dark(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    send(page, "Ten green bottles with a_very_long_word_" + "x" * 200, tokens="8")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    first, second = (page.locator(".answer").nth(i).bounding_box() for i in range(2))
    assert first["y"] + first["height"] <= second["y"]
    back = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(back) != light
    page.click("#theme")
    assert page.evaluate(back) == light
    page.reload()  # kept
    assert page.evaluate(back) == light
