"""Drive the page of the demo in a browser without a window."""

import shutil

import pytest

from sdt_diffusion.demo.serve import DemoArguments, open_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: They take a minute to install, and gradio holds Pillow back, so that the extra "tests" has neither.
WHY = 'needs gradio (the extra "demo"), playwright and an installed Chromium: pip install gradio playwright'

gradio = pytest.importorskip("gradio", reason=WHY)
playwright = pytest.importorskip("playwright.sync_api", reason=WHY)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=WHY),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
SECONDS = 1000
#: For a busy machine; on an idle one nothing waits for longer than a second or two.
PATIENCE = 120 * SECONDS


@pytest.fixture
def address(make_pipe, tmp_path):
    make_pipe(num_inference_steps=4).save_pretrained(tmp_path / "animals")
    page = open_page(DemoArguments(model=str(tmp_path / "animals"), device="cpu"))
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_sample_look_from_a_patch_and_make_a_mistake(address, browser):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(PATIENCE)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    status, sheet, view = page.locator("#status"), page.locator("#sheet img"), page.locator("#view img")

    page.locator("#class input").click()
    page.get_by_role("option", name="bee, honey bee (1)").click()
    page.locator("#interval textarea").fill("0.2 1")
    page.get_by_role("button", name="Sample").click()
    status.get_by_text("bee, honey bee: FlowMatchEulerDiscreteScheduler, 4 steps, 7 network").wait_for()
    view.wait_for()
    assert sheet.evaluate("image => image.naturalWidth") == 2 * 8 * 45 + 4  # four pictures, enlarged

    before = [image.get_attribute("src") for image in (sheet, view)]
    box = sheet.bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    page.wait_for_function(
        "sources => ['#sheet img', '#view img'].every((name, i) => document.querySelector(name).src != sources[i])",
        arg=before,
    )

    page.locator("#interval textarea").fill("3 5")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("guidance_interval (3.0, 5.0) lies outside the schedule").wait_for()
    page.locator("#interval textarea").fill("")
    page.locator("#steps input").fill("3")
    page.get_by_role("button", name="Sample").click()
    status.get_by_text("3 steps, 6 network evaluations").wait_for()  # the page goes on

    assert {url.split("/")[2] for url in requests if url.startswith("http")} == {address.split("/")[2]}
