"""The page at /, in a real browser."""

import os
import shutil
import subprocess

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


def test_a_prompt_runs_on_two_models_side_by_side(service: Service, chromium: str) -> None:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(service.url)
        page.fill("#prompt", "Ten green bottles")
        page.fill("#tokens", "12")
        page.uncheck("#chat")
        assert page.locator("select").first.input_value() == "one"
        assert page.locator("select").last.input_value() == "two"
        page.click("button")
        figures = page.locator(".figures")
        for side in range(2):
            sync_api.expect(figures.nth(side)).to_contain_text("12 tokens · ", timeout=20_000)
            assert page.locator(".text").nth(side).text_content()
        texts = page.locator(".text").all_text_contents()
        assert texts[0] != texts[1]
        page.check("#chat")
        page.fill("#tokens", "99999")
        page.fill("#temperature", "2")
        page.evaluate("document.getElementById('tokens').removeAttribute('max')")
        page.click("button")
        sync_api.expect(page.locator(".error").first).to_contain_text("maximum context length")
        assert errors == []
        browser.close()
