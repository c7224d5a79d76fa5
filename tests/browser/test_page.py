"""The page in a real browser: Chromium, driven by selenium.

SHOTS=FOLDER keeps screenshots of every view, light, dark and as on a phone.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SHOTS = os.environ.get("SHOTS")
MODEL = os.environ.get("PAGE_MODEL")  # a real one, for pictures


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    if MODEL:
        return MODEL
    import jax

    from gpt2_jax import model
    from gpt2_jax.config import ModelConfig
    from gpt2_jax.pretrained import GPT2
    from gpt2_jax.tokenizer import load_tokenizer

    shape = dict(n_ctx=256, n_layer=3, n_head=4, n_embd=32, initializer_range=0.2)
    config = model.resolve(ModelConfig(n_vocab=50_257, **shape))
    folder = tmp_path_factory.mktemp("page") / "tiny"
    params = model.init(config, jax.random.key(0))
    GPT2(config, params, load_tokenizer("gpt2")).save(folder)
    return str(folder)


class Program:
    """`gpt2-jax serve`, which can be stopped and started again at its port."""

    def __init__(self, model: str, port: int = 0, flags: tuple[str, ...] = ()):
        command = [sys.executable, "-m", "gpt2_jax.start", "serve", model]
        command += ["--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.url = line.split(" at ")[-1].split(";")[0]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def program(model):
    made = Program(model)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    downloads = str(tmp_path_factory.mktemp("downloads"))
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_window_size(1200, 900)
    driver.downloads = Path(downloads)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.get("model").text)

    def get(self, name: str):
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def view(self, name: str) -> None:
        self.get(f"tab-{name}").click()

    def wait(self, true, seconds: float = 90):
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: true())

    def fill(self, name: str, text: str) -> None:
        field = self.get(name)
        field.clear()
        field.send_keys(text)

    def says(self, name: str, text: str):
        return self.wait(lambda: text in self.get(name).text)

    def errors(self) -> list[str]:
        log = self.browser.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser, program):
    return Page(browser, program.url)


def test_a_prompt_streams_into_columns(page):
    page.fill("length", "12")
    page.fill("samples", "3")
    page.fill("seed", "4")
    page.all("#examples button")[7].click()
    assert len(page.all("#examples button")) == 8
    page.says("prompt-status", "Done")
    texts = [box.text for box in page.all(".text")]
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(text.startswith("Once upon a time,") for text in texts)
    tinted = page.all(".text [data-logprob]")
    assert len(tinted) == 36
    assert all("rgba" in one.get_attribute("style") for one in tinted)
    page.get("tint").click()
    assert not any("rgba" in one.get_attribute("style") for one in tinted)
    page.get("go").click()
    page.says("prompt-status", "Done")
    assert [box.text for box in page.all(".text")] == texts  # the same seed
    assert not page.errors()


def test_writing_can_be_stopped(page):
    page.fill("length", "200")
    page.fill("prompt-text", "Once")
    page.get("go").click()
    page.wait(lambda: page.all(".text [data-logprob]"))
    page.get("stop").click()
    page.says("prompt-status", "Stopped")
    count = len(page.all(".text [data-logprob]"))
    time.sleep(0.5)
    assert len(page.all(".text [data-logprob]")) == count < 200


def test_text_is_never_read_as_html(page):
    page.fill("length", "3")
    page.fill("prompt-text", "<img src=x onerror=alert(1)><b>bold</b>")
    page.get("go").click()
    page.says("prompt-status", "Done")
    assert "<b>bold</b>" in page.all(".text")[0].text
    assert not page.all(".text img") and not page.all(".text b")
    page.view("inside")
    page.fill("inside-text", "<script>alert(1)</script><i>x</i>")
    page.get("inside-form").submit()
    page.says("inside-status", "tokens")
    assert not page.all("#inside i") and not page.all("#tokens script")


def test_the_document_writes_on(page):
    page.view("write")
    page.fill("write-length", "6")
    document = page.get("document")
    document.clear()
    document.send_keys("The sea is")
    document.send_keys(Keys.TAB)
    page.wait(lambda: len(page.all("#suggestions li")) == 3)
    items = [item.get_attribute("data-text") for item in page.all("#suggestions li")]
    document.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    chosen = page.all("#suggestions li[aria-selected=true]")
    assert [one.get_attribute("data-text") for one in chosen] == [items[1]]
    document.send_keys(Keys.ENTER)
    assert document.get_property("value") == "The sea is" + items[1]
    assert not page.all("#suggestions li")
    document.send_keys(Keys.CONTROL, "z")
    assert document.get_property("value") == "The sea is"  # one step back
    document.send_keys(Keys.TAB)
    page.wait(lambda: page.all("#suggestions li"))
    document.send_keys(Keys.ESCAPE)
    assert not page.all("#suggestions li")
    assert document.get_property("value") == "The sea is"
    document.send_keys(" deep", Keys.ESCAPE, Keys.TAB)  # and Tab moves on
    assert page.browser.switch_to.active_element.get_attribute("id") != "document"
    page.browser.refresh()
    page.wait(lambda: page.get("model").text)
    page.view("write")
    assert page.get("document").get_property("value") == "The sea is deep"


def test_a_look_inside(page):
    page.view("inside")
    page.fill("inside-text", "The cat sat on the mat")
    page.get("inside-form").submit()
    page.says("inside-status", "6 tokens")
    assert len(page.all("#tokens span")) == 6 and len(page.all("#next tbody tr")) == 10
    assert len(page.all("#layer option")) >= 3 and len(page.all("#head option")) >= 5
    page.get("tokens").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    chosen = page.all("#tokens span[aria-selected=true]")
    assert [one.text for one in chosen] == ["·sat"]
    assert page.get("arcs-token").text == "·sat" and "%" in page.get("looks").text
    mean = page.get("looks").text
    page.all("#head option")[1].click()
    assert page.get("looks").text != mean
    shares = [one.text for one in page.all("#next td.share")]
    values = [float(share.strip(" %")) for share in shares]
    assert values == sorted(values, reverse=True)
    drawn = "return new Set(document.getElementById(arguments[0]).getContext('2d')"
    drawn += ".getImageData(0, 0, 200, 200).data).size"
    for name in ("matrix", "arcs", "surprise"):
        assert page.browser.execute_script(drawn, name) > 3, name
    page.get("save-picture").click()
    page.wait(lambda: list(page.browser.downloads.glob("attention*.png")))
    assert not page.errors()


def test_a_long_text_does_not_freeze_it(page):
    page.view("inside")
    page.browser.execute_script(
        "document.getElementById('inside-text').value = 'word and '.repeat(100)"
    )
    page.get("inside-form").submit()
    page.says("inside-status", "201 tokens")
    began = time.monotonic()
    for _ in range(20):
        page.get("tokens").send_keys(Keys.ARROW_RIGHT)
    assert (time.monotonic() - began) / 20 < 1.0
    page.view("write")
    page.browser.execute_script(
        "document.getElementById('document').value = 'All work. '.repeat(40000)"
    )
    document = page.get("document")
    document.send_keys(Keys.CONTROL, Keys.END)
    document.send_keys(Keys.TAB)
    page.wait(lambda: page.all("#suggestions li"))


def test_what_the_server_refuses_is_shown(page):
    page.fill("length", "9")
    page.fill("prompt-text", " ")
    page.browser.execute_script("document.getElementById('prompt-text').value = ''")
    page.get("go").click()
    page.says("problem", "prompt")
    page.view("inside")
    page.browser.execute_script(
        "document.getElementById('inside-text').value = 'word and '.repeat(130)"
    )
    page.get("inside-form").submit()
    page.wait(lambda: "256" in page.get("problem").text)


def test_a_lost_connection_loses_no_text(browser, model):
    mine = Program(model)
    page = Page(browser, mine.url)
    page.view("write")
    document = page.get("document")
    document.clear()
    document.send_keys("Kept for ever")
    mine.stop()
    document.send_keys(Keys.TAB)
    page.says("problem", "cannot be reached")
    assert document.get_property("value") == "Kept for ever"
    again = Program(model, mine.port)
    document.send_keys(Keys.TAB)
    page.wait(lambda: page.all("#suggestions li"))
    assert not page.get("problem").is_displayed()
    page.view("prompt")
    page.fill("length", "200")
    page.fill("prompt-text", "Once")
    page.get("go").click()
    page.wait(lambda: page.all(".text [data-logprob]"))
    again.stop()
    page.says("problem", "connection was lost")
    assert page.all(".text")[0].text.startswith("Once")


@pytest.fixture
def elsewhere():
    """The address of another server, whose one page is empty."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = """
const [url, done] = arguments;
fetch(url + "/v1/models").then((answer) => answer.json()).then(({ data }) =>
  fetch(url + "/v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model: data[0].id, prompt: "Hi", max_tokens: 3 }),
  })
).then((answer) => done(answer.status), (error) => done(error.name));
"""


def test_a_page_of_elsewhere_may_call_where_it_is_told(
    browser, program, model, elsewhere
):
    browser.get(elsewhere)
    assert browser.execute_async_script(ASK, program.url) == "TypeError"
    friendly = Program(model, flags=("--cors-origin", elsewhere))
    try:
        assert browser.execute_async_script(ASK, friendly.url) == 200
    finally:
        friendly.stop()
    browser.get_log("browser")  # what was refused is not the next test's


def test_tabs_by_keyboard_and_names_for_readers(page):
    page.get("tab-prompt").send_keys(Keys.ARROW_RIGHT)
    assert page.get("write").is_displayed() and not page.get("prompt").is_displayed()
    unnamed = """
      return [...document.querySelectorAll('input, textarea, select')].filter(
        (field) => !field.labels.length && !field.getAttribute('aria-label')
      ).map((field) => field.id)"""
    assert page.browser.execute_script(unnamed) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read(page, scheme):
    """WCAG 2.1: a contrast of 4.5 between text and ground."""
    emulate(page.browser, scheme)
    colours = """
      const of = (e) => [getComputedStyle(e).color, e];
      const ground = (e) => {
        for (; e; e = e.parentElement) {
          const found = getComputedStyle(e).backgroundColor;
          if (!found.endsWith(', 0)')) return found;
        }
        return getComputedStyle(document.body).backgroundColor;
      };
      return [...document.querySelectorAll('button, label, p, h1, figcaption, .quiet')]
        .map((e) => [getComputedStyle(e).color, ground(e), e.textContent.trim()])"""
    for ink, ground, text in page.browser.execute_script(colours):
        assert contrast(rgb(ink), rgb(ground)) >= 4.5, (text, ink, ground)


def rgb(text: str) -> list[float]:
    return [float(part) for part in text.partition("(")[2].rstrip(")").split(",")[:3]]


def contrast(one, other) -> float:
    def light(colour):
        parts = [c / 255 for c in colour]
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted([light(one), light(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def emulate(browser, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_its_screen(browser, program, size, scheme):
    width, height = size
    screen = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    emulate(browser, scheme)
    page = Page(browser, program.url)
    page.fill("length", "40")
    page.fill("samples", "2")
    page.fill("seed", "1")
    page.all("#examples button")[0].click()
    page.says("prompt-status", "Done")
    shoot(browser, f"prompt-{scheme}-{width}")
    page.view("write")
    document = page.get("document")
    document.clear()
    document.send_keys("It was a bright cold day in April, and the clocks")
    document.send_keys(Keys.TAB)
    page.wait(lambda: page.all("#suggestions li"))
    shoot(browser, f"write-{scheme}-{width}")
    document.send_keys(Keys.ESCAPE)
    page.view("inside")
    page.get("inside-form").submit()
    page.says("inside-status", "tokens")
    page.get("tokens").send_keys(*[Keys.ARROW_RIGHT] * 10)
    shoot(browser, f"inside-{scheme}-{width}")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser, "light")


def shoot(browser, name: str) -> None:
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(wide) <= 0, f"{name} is wider than its screen"
    if SHOTS:
        Path(SHOTS).mkdir(exist_ok=True)
        browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))
