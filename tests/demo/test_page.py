"""The page in a browser: one call of the model per image, and everything else is answered without it."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor


pytest.importorskip("gradio")
pytest.importorskip("supervision")
pytest.importorskip("playwright")

from playwright.sync_api import sync_playwright

from hf_dino.demo.page import DRAWING, LOOKS, START, TABLE, launch_page, make_page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(directory / name)
    broken = tmp_path_factory.mktemp("broken") / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    return directory, broken


@pytest.fixture(scope="module")
def served(images, tmp_path_factory):
    """Address of the page, and a list to which each call of the model adds."""
    model = tiny_model()
    for head in model.class_embed:
        head.bias.data += 2.5
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = make_page({"tiny": (model, PROCESSOR)}, images[0])
        _, address, _ = launch_page(page, prevent_thread_lock=True, quiet=True)
        yield address, calls
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, served):
    """An open page, which asks for nothing from elsewhere."""
    address, calls = served
    calls.clear()
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    hosts = set()
    tab.on("request", lambda request: hosts.add(re.sub(r"^\w+:/*([^/]*).*", r"\1", request.url)))
    tab.goto(address)
    tab.wait_for_selector("#image input[type=file]", state="attached")
    tab.wait_for_selector("#text p")  # drawn last: its first appearance is not an answer to what a test does
    yield tab
    tab.close()
    assert {host for host in hosts if not host.startswith(("127.0.0.1", "data:", "image"))} == set()


def drop(tab, path):
    tab.set_input_files("#image input[type=file]", str(path))


def count(tab):
    return int(re.match(r"\d+", tab.inner_text("#text p")).group())


def wait_for(tab, change, *selectors):
    """Make a change, and wait until the text or an image is another one."""
    script = "names => names.map(name => (e => e && (e.src || e.innerText))(document.querySelector(name)))"
    before = tab.evaluate(script, selectors)
    change()
    expression = f"([names, before]) => ({script})(names).every((now, index) => now && now !== before[index])"
    tab.wait_for_function(expression, arg=[list(selectors), before])


def set_slider(tab, name, value):
    tab.locator(f"#{name} input[type=range]").fill(str(value))


def test_slider_classes_and_clicks_are_answered_without_the_model(tab, served, images):
    calls = served[1]
    assert tab.inner_text("#text p") == START
    wait_for(tab, lambda: drop(tab, images[0] / "one.png"), "#drawing img", "#text p")
    many = count(tab)
    assert len(calls) == 1

    wait_for(tab, lambda: set_slider(tab, "threshold", 0.05), "#drawing img", "#text p")
    few = count(tab)
    assert few > many  # a lower score shows more of them

    def choose_class():
        tab.locator("#classes input").click()
        tab.get_by_role("option").first.click()

    wait_for(tab, choose_class, "#drawing img", "#text p")
    assert 0 < count(tab) < few

    box = tab.locator("#drawing img").bounding_box()
    tab.get_by_role("tab", name=TABLE).click()
    cells = tab.locator("#table [role=gridcell]")
    x0, y0, x1, y1 = (float(value) for value in cells.all_inner_texts()[3:7])
    cells.first.click()
    tab.wait_for_selector("#sampled img")
    assert tab.get_by_role("tab", name=LOOKS).get_attribute("aria-selected") == "true"
    wait_for(tab, lambda: set_slider(tab, "layer", 1), "#sampled img")
    wait_for(tab, lambda: tab.locator("#close_up input").check(), "#sampled img", "#refined img")
    tab.get_by_role("tab", name=DRAWING).click()
    x, y = ((max(low, 0) + min(high, size)) / 2 / size for low, high, size in ((x0, x1, 90), (y0, y1, 60)))
    tab.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    tab.wait_for_selector("#points img")
    assert len(calls) == 1


def test_a_broken_image_is_one_line_in_the_page(tab, served, images):
    wait_for(tab, lambda: drop(tab, images[1]), "#text p")
    assert tab.inner_text("#text p").startswith("broken.png: cannot be read as an image")
    assert tab.locator("#drawing img").count() == 0
    assert not served[1]


def test_files_are_downloaded(tab, images):
    wait_for(tab, lambda: drop(tab, images[0] / "two.png"), "#drawing img")
    for kind, name in (("CSV", "two.results.csv"), ("PNG", "two.drawn.png")):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=kind, exact=True).click()
        assert download.value.suggested_filename == name
    assert Image.open(download.value.path()).width >= 480


def test_examples_fit_a_phone_and_are_reached_by_keyboard(tab, served):
    tab.set_viewport_size({"width": 390, "height": 844})
    example = tab.locator("button.gallery-item").first
    example.focus()
    wait_for(tab, lambda: tab.keyboard.press("Enter"), "#drawing img")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.locator("#threshold input[type=range]").focus()
    wait_for(tab, lambda: tab.keyboard.press("Home"), "#text p")
    assert len(served[1]) == 1
