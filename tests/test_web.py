"""The chat page in a real browser.

Skips where gradio, playwright or Chromium is missing. To run it:
`pip install 'medibuddy[dev,web]' playwright && apt-get install chromium && pytest tests/test_web.py`
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import environment

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
if not os.path.exists(CHROMIUM):
    pytest.skip("Chromium is not installed", allow_module_level=True)

EMERGENCY = "My husband's face is drooping and his arm is weak"


def start(run, *options):
    "Start the page and wait until it can be reached"
    process = subprocess.Popen([sys.executable, "-m", "medibuddy", "chat", str(run), "--web", "--port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    line = process.stdout.readline()
    if "http" not in line:
        process.kill()
        raise AssertionError(process.communicate()[1])
    return process, re.search(r"http://\S+", line)[0]


def end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=20)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def address(finished_run):
    process, url = start(finished_run, "--max-new-tokens", "120")
    yield url
    end(process)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visitor:
    "One person in front of the page"

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.page, self.hosts = self.context.new_page(), set()
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2] if "://" in request.url and not request.url.startswith(("data:", "blob:")) else ""))
        self.page.goto(address)
        self.box.wait_for(timeout=30_000)

    @property
    def box(self):
        return self.page.get_by_role("textbox", name="Your message")

    def say(self, text, key=True):
        "Type a message, send it with the keyboard or the button, and wait for the whole reply"
        before = self.answers().count()
        for _ in range(5):  # a page that has only just been drawn may not listen yet
            self.box.fill(text)
            if key:
                self.box.press("Enter")
            else:
                self.page.get_by_role("button", name="Send").click()
            try:
                playwright.expect(self.box).to_have_value("", timeout=4_000)
                break
            except AssertionError:
                continue
        playwright.expect(self.answers()).not_to_have_count(before, timeout=60_000)
        self.wait()

    def wait(self):
        "Wait until the page has been idle for more than a second"
        last, still = None, 0
        for _ in range(150):
            text = self.page.locator("body").inner_text()
            still = still + 1 if text == last else 0
            if still == 3:
                return
            last = text
            self.page.wait_for_timeout(400)

    def answers(self):
        return self.page.locator(".message.bot")

    def text(self):
        return self.page.locator("body").inner_text()


def test_three_turns_stream_and_a_reload_begins_again(browser, address):
    visitor = Visitor(browser, address)
    assert "research only" in visitor.text().lower()
    visitor.page.evaluate("""() => {
        window.sizes = new Set()
        new MutationObserver(() => window.sizes.add(document.querySelector(".message.bot")?.innerText.length)).observe(document.body, {subtree: true, childList: true, characterData: true})
    }""")
    visitor.say("What is aspirin used for?")
    assert visitor.page.evaluate("window.sizes.size") > 3  # it grew while it was on the screen
    visitor.say("Why?", key=False)
    visitor.say(EMERGENCY)
    assert "Seek emergency care now" in visitor.page.get_by_role("alert").inner_text()
    box = visitor.page.get_by_role("alert").bounding_box()
    assert 0 <= box["y"] and box["y"] + box["height"] <= 720  # on screen, though the chat has scrolled
    assert visitor.page.locator(".message.user").count() == 3
    visitor.page.reload()
    visitor.box.wait_for()
    assert visitor.page.locator(".message.user").count() == 0
    visitor.say("Hello again")
    assert visitor.page.locator(".message.user").count() == 1
    assert visitor.hosts <= {address.split("/")[2], ""}, visitor.hosts
    visitor.context.close()


def test_two_people_at_once(browser, address):
    both = [Visitor(browser, address) for _ in range(2)]
    for visitor in both:
        visitor.say("Good day.")
    for visitor, text in zip(both, ("My name is Ada.", "My name is Ben.")):
        visitor.box.fill(text)
        visitor.box.press("Enter")
    for visitor in both:
        visitor.answers().first.wait_for(timeout=30_000)
        visitor.wait()
    assert "Ben" not in both[0].text() and "Ada" not in both[1].text()
    for visitor in both:
        visitor.say("And now?")
        assert visitor.page.locator(".message.user").count() == 3
        visitor.context.close()


def test_what_one_person_said_is_not_remembered_of_another(browser, address):
    "The two halves of an emergency, said by two people, are none; said by one, they are"
    both = [Visitor(browser, address) for _ in range(2)]
    both[0].say("My baby is 6 weeks old.")
    both[1].say("She has a temperature of 38.6.")
    assert both[1].page.get_by_role("alert").count() == 0
    both[0].say("She has a temperature of 38.6.")
    assert "Seek emergency care now" in both[0].page.get_by_role("alert").inner_text()
    for visitor in both:
        visitor.context.close()


def test_side_by_side_and_folded_reasoning(browser, address):
    visitor = Visitor(browser, address)
    visitor.page.get_by_label("Show the base model's answer beside it").check()
    visitor.say("What is insulin used for?")
    assert visitor.page.locator(".message.user").count() == 2  # once in each chat
    fold = visitor.page.get_by_role("button", name="Reasoning").first
    assert fold.count() == 1
    visitor.context.close()


def test_the_page_may_not_fetch_a_picture_from_elsewhere(browser, address):
    visitor = Visitor(browser, address)
    blocked = visitor.page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.violatedDirective))
        new Image().src = "http://192.0.2.1/seen.png"
        setTimeout(() => done("fetched"), 3000)
    })""")
    assert blocked == "img-src"
    visitor.context.close()


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_and_the_disclaimer_stays(browser, address, width, tmp_path):
    visitor = Visitor(browser, address, viewport={"width": width, "height": 740})
    visitor.say("What is aspirin used for?")
    visitor.page.screenshot(path=os.environ.get("MEDIBUDDY_SCREENSHOTS", str(tmp_path)) + f"/chat-{width}.png")
    visitor.page.mouse.wheel(0, 3000)
    visitor.page.wait_for_timeout(200)
    notice = visitor.page.get_by_role("note").bounding_box()
    assert notice and notice["y"] >= -1 and notice["y"] + notice["height"] <= 90
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Send", "Stop answering", "New conversation"):
        assert visitor.page.get_by_role("button", name=name).bounding_box()["width"] > 40
    visitor.context.close()


def test_the_keyboard_reaches_everything(browser, address):
    visitor = Visitor(browser, address)
    visitor.box.focus()
    reached = []
    for _ in range(6):
        visitor.page.keyboard.press("Tab")
        reached.append(visitor.page.evaluate("document.activeElement.innerText || document.activeElement.getAttribute('aria-label') || document.activeElement.name || document.activeElement.type"))
    assert {"Send", "Stop answering", "New conversation"} <= {str(name).strip() for name in reached}, reached
    visitor.say("Hello")
    visitor.page.get_by_role("button", name="New conversation").press("Enter")
    playwright.expect(visitor.page.locator(".message.user")).to_have_count(0, timeout=10_000)
    visitor.context.close()


def test_another_address_needs_a_password(finished_run, tmp_path):
    done = subprocess.run([sys.executable, "-m", "medibuddy", "chat", str(finished_run), "--web", "--host", "0.0.0.0"], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and "--password-file" in done.stderr
    (tmp_path / "password").write_text("correct horse battery\n")
    process, url = start(finished_run, "--host", "0.0.0.0", "--password-file", str(tmp_path / "password"))
    try:
        def login(password):
            body = f"username=medibuddy&password={password}".encode()
            try:
                return urllib.request.urlopen(urllib.request.Request(url + "/login", body, {"Content-Type": "application/x-www-form-urlencoded"})).status
            except urllib.error.HTTPError as error:
                return error.code

        page = urllib.request.urlopen(url).read().decode()
        assert "auth_required\":true" in page.replace(" ", "")
        assert login("wrong+horse") in (400, 401) and login("correct+horse+battery") == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url + "/gradio_api/queue/join", b"{}", {"Content-Type": "application/json"}))
        assert refused.value.code in (401, 403)
    finally:
        end(process)
