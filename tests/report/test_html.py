"""report.html: what it holds, and how it works in a real browser, on the demo's committed results."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinier.recipe import Failure, RunResults
from tinier.report import Run, write_html

DEMO = Path(__file__).parents[2] / "benchmarks/results/demo_amd-epyc-2-cores_2026-11-26.json"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KINDS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The demo's run, with manifests of two of its variants, MMLU and a load on a server."""
    results = json.loads(DEMO.read_text("utf-8"))
    folder = tmp_path / "demo"
    layers = {
        f"model.layers.{i}.{kind}": {"snr_db": 20.0 + i, "output_snr_db": 30.0 - i}
        for i in range(4) for kind in KINDS
    }  # fmt: skip
    for name, manifest in (
        ("int4", {"layers": layers, "measures": {}}),
        (
            "distilled",
            {"layers": {}, "measures": {"heldout_kl": {"0": 0.5, "10": 0.4, "20": 0.37}}},
        ),
    ):
        (folder / "variants" / name).mkdir(parents=True)
        (folder / "variants" / name / "tinier.json").write_text(json.dumps(manifest))
    for row in results["variants"]:
        row["mmlu"] = {
            "accuracy": 0.25, "stderr": 0.01, "questions": 100, "shots": 5,
            "subjects": {"anatomy": 0.2, "law": 0.3}, "categories": {"other": 0.25},
        }  # fmt: skip
    results["variants"][3]["warnings"].append("</script><b>no markup</b>")
    return Run(RunResults.from_json(results), folder)


def test_the_page_is_one_small_file_with_no_markup_from_the_data(run: Run, tmp_path: Path) -> None:
    page = write_html([run], tmp_path / "report.html").read_text("utf-8")
    assert len(page) < 2_000_000
    assert "</script><b>" not in page
    for what in (' src="', ' href="', "@import", "url("):
        # of the page itself: the library draws, and loads nothing
        assert what not in page.split("<script>")[0], what


def test_failed_variants_and_runs_side_by_side(run: Run, tmp_path: Path) -> None:
    failure = Failure(variant="int2", what="stage", error="no room")
    other = replace(run.results, failed=(failure,))
    page = write_html([run, Run(other, tmp_path / "other")], tmp_path / "both.html").read_text()
    assert "failed: int2 (stage): no room" in page
    for label in ("demo/int4", "other/int4"):
        assert label in page


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


def opened(
    browser: Any, path: Path, width: int = 1280, scheme: str = "light"
) -> tuple[Any, list[str]]:
    """The page, and what it complained about or asked the network for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, seen = context.new_page(), []
    page.on("console", lambda m: seen.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda r: seen.append(r.url) if not r.url.startswith("file:") else None)
    page.goto(path.as_uri())
    page.wait_for_timeout(200)
    return page, seen


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("#table tbody th").all_inner_texts()
    return [name.split()[0] for name in found]


def test_in_a_browser(run: Run, tmp_path: Path, browser: Any) -> None:
    path = write_html([run], tmp_path / "report.html")
    page, seen = opened(browser, path)
    assert names(page)[0] == "base"

    # sorting by a click, and back; by the keyboard
    size = page.locator('th[data-key="size"] button')
    size.click()
    assert names(page)[0] == "base"
    assert page.locator('th[data-key="size"]').get_attribute("aria-sort") == "descending"
    size.press("Enter")
    assert names(page)[0] == "int4-distilled"
    # columns to choose
    page.locator("summary", has_text="Columns").click()
    page.get_by_label("TTFT ms").check()
    assert page.locator('th[data-key="ttft"]').count() == 1

    # the figures of a mark: by pointing at it, and by the keyboard
    place = page.evaluate("() => charts.pareto.getDatasetMeta(0).data[2].getProps(['x', 'y'])")
    page.locator("#pareto").scroll_into_view_if_needed()
    box = page.locator("#pareto").bounding_box()
    page.mouse.move(box["x"] + place["x"], box["y"] + place["y"])
    page.wait_for_timeout(100)
    assert page.evaluate("() => charts.pareto.tooltip.opacity") == 1
    assert page.evaluate(
        "() => charts.pareto.tooltip.title.concat(charts.pareto.tooltip.body[0].lines)"
    )
    assert "int8" in page.locator("#said").inner_text()
    page.locator("#pareto").focus()
    page.keyboard.press("ArrowRight")
    assert "base" in page.locator("#said").inner_text()
    # other axes
    page.locator("#x").select_option("size")
    page.locator("#y").select_option("mmlu")
    assert "MMLU" in page.locator("#pareto").get_attribute("aria-label")

    assert page.locator("#heat td").count() == 8
    assert page.locator("#trainpart").is_visible()
    assert page.locator("#subjectpart").is_visible()
    assert "<b>no markup</b>" in page.locator("#notes").text_content()

    # both themes
    before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != before
    assert seen == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(run: Run, tmp_path: Path, browser: Any, scheme: str) -> None:
    page, seen = opened(browser, write_html([run], tmp_path / "report.html"), 390, scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    back, text = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(c => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
    )
    assert (back > text) == (scheme == "light")
    assert seen == []
