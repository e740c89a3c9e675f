"""The page of `ipa.tools.app` in a real Chromium: what a user clicks, what two users see, what bad uploads get.

Nothing may be requested from anywhere but the page's own server.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageDraw

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = [ROOT / f"demo/adapters/{name}_global.safetensors" for name in ("decoupled", "simple")]
PASSWORD = "a password of the tests"
TIMEOUT_MS = 120_000
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            debians = shutil.which("chromium") or shutil.which("chromium-browser")  # None: Playwright's own
            browser = started.chromium.launch(executable_path=debians, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: apt-get install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@dataclass
class Server:
    address: str
    log: Path


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Server]:
    """The command, ready to be used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    words = [f"adapter=[{','.join(map(str, ADAPTERS))}]", "device=cpu", f"port={port}", *arguments]
    with log.open("w") as output:
        command = [sys.executable, "-m", "ipa.tools.app", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            if "is open" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.2)
        assert "is open" in log.read_text(), log.read_text()
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    unet = UNet2DConditionModel.from_pretrained(ROOT / "demo/base", subfolder="unet")
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:  # layers that start at 0, without influence
            torch.nn.init.normal_(parameter, std=0.02)
    control.save_pretrained(folder / "control")
    with serve(folder, f"control_model={folder / 'control'}") as server:
        yield server
    assert "Traceback" not in server.log.read_text()


@dataclass
class User:
    """One browser of one user."""

    page: Any
    server: Server
    foreign: list[str] = field(default_factory=list)

    def open(self) -> "User":
        self.page.set_default_timeout(TIMEOUT_MS)
        own = (self.server.address, "data:", "blob:")
        self.page.on("request", lambda each: None if each.url.startswith(own) else self.foreign.append(each.url))
        self.page.goto(self.server.address)
        self.page.wait_for_selector("#generate")
        return self

    def upload(self, *files: Path, into: str = "image") -> None:
        self.page.locator(f"#{into} input[type=file]").first.set_input_files(files)

    def pictures(self, *files: Path) -> None:
        self.upload(*files)
        self.page.wait_for_function(f"document.querySelectorAll('#image .thumbnail-item').length >= {len(files)}")

    def unfold(self) -> None:
        closed = self.page.locator("button.label-wrap:not(.open)")
        while closed.count():
            closed.first.click()
        self.page.wait_for_timeout(500)

    def type(self, name: str, value: object) -> None:
        """Into a text or number field, or the number of a slider."""
        found = self.page.locator(f"#{name} textarea, #{name} input[type=number], #{name} input[type=text]").first
        found.fill(str(value))
        found.press("Tab")

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#{name} input").first.click()
        self.page.get_by_role("option", name=value, exact=True).click()
        self.page.keyboard.press("Escape")

    def paint(self) -> None:
        """The upper half of the mask."""
        canvas = self.page.locator("#mask canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for row in range(4):
            y = box["y"] + box["height"] * (0.05 + row * 0.1)
            self.page.mouse.move(box["x"] + 4, y)
            self.page.mouse.down()
            self.page.mouse.move(box["x"] + box["width"] - 4, y, steps=5)
            self.page.mouse.up()

    def wait_for(self, words: str) -> str:
        self.page.wait_for_function(f"document.querySelector('#status').innerText.match({json.dumps(words)})")
        return self.page.locator("#status").inner_text()

    def start(self) -> None:
        self.page.locator("#generate").click()

    def generate(self) -> Image.Image:
        """The next image; fails for a message in place of it."""
        source = "(document.querySelector('#picture img')?.src ?? '')"
        before = self.page.evaluate(source)
        self.start()
        self.page.wait_for_function(f"before => {source} && {source} != before", arg=before)
        assert "Ready" in self.wait_for("Ready")
        return self.image()

    def image(self) -> Image.Image:
        answer = self.page.request.get(self.page.locator("#picture img").get_attribute("src"))
        return Image.open(io.BytesIO(answer.body()))

    def copied(self, name: str) -> str:
        self.page.locator(f"#{name} button").first.click()
        self.page.wait_for_timeout(300)
        return self.page.evaluate("navigator.clipboard.readText()")

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")


@pytest.fixture
def users(browser: Any, server: Server) -> Iterator[Any]:
    """Opens the page as a new user; in the end nothing was requested from elsewhere."""
    opened: list[User] = []

    def new(size: tuple[int, int] = DESKTOP) -> User:
        width, height = size
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        opened.append(User(context.new_page(), server).open())
        opened[-1].unfold()
        opened[-1].type("num_steps", 4)
        return opened[-1]

    yield new
    for user in opened:
        user.page.context.close()
    assert [address for user in opened for address in user.foreign] == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    found = Image.new("RGB", (60, 60), "teal")
    ImageDraw.Draw(found).ellipse((10, 10, 50, 50), fill="orange")
    found.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


def settings_in(image: Image.Image) -> dict[str, Any]:
    return dict(json.loads(image.info["ipa"]))


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def test_everything_that_is_set_reaches_the_image(users: Any, picture: Path) -> None:
    user = users()
    user.pictures(picture)
    made = [pixels(user.generate())]
    for change in (
        lambda: user.type("text", "red apple"),
        lambda: user.type("negative_text", "blue"),
        lambda: user.type("scale", 0.4),
        lambda: user.choose("blocks", "weak output"),
        lambda: user.type("end", 0.5),
        lambda: user.paint(),
        lambda: user.type("seed", 5),
        lambda: user.type("guidance", 2),
        lambda: user.upload(picture, into="start_image"),
        lambda: user.upload(picture, into="control"),
    ):
        change()
        user.page.wait_for_timeout(500)
        made.append(pixels(user.generate()))
    user.type("width", 96)
    image = user.generate()

    assert len(set(made)) == len(made) and image.size == (96, 64)
    settings = settings_in(image)
    expected = {"text": ["red apple"], "negative_text": "blue", "scale": [0.4], "blocks": ["weak output"], "end": 0.5}
    assert settings.items() >= expected.items()
    assert (settings["mask"], settings["start_image"], settings["seed"]) == (None, "ball-2.png", [5])


def test_adapters_and_scales_are_compared_side_by_side(users: Any, picture: Path) -> None:
    user = users()
    user.pictures(picture)
    user.type("scales", "0, 0.5, 1")
    user.choose("adapter", "simple_global")
    image = user.generate()

    assert image.width > 3 * 64 and image.height > 2 * 64
    assert settings_in(image)["adapter"] == list(map(str, ADAPTERS)) and settings_in(image)["scale"] == [0, 0.5, 1]


def test_copied_settings_make_the_image_again(users: Any, picture: Path, tmp_path: Path) -> None:
    user = users()
    user.pictures(picture)
    user.type("text", "it's a [red] apple, 100 %")
    user.type("scale", 0.7)
    user.paint()
    image = user.generate()
    with user.page.expect_download() as download:
        user.page.locator("#files a").first.click()
    download.value.save_as(tmp_path / "mask.png")
    (tmp_path / "demo").symlink_to(ROOT / "demo")  # the adapter's base is named relative to the server's folder
    command = user.copied("command").replace("python -m", f"PYTHONPATH={ROOT} {sys.executable} -m", 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "again.py").write_text(user.copied("python") + "\nimages[0].save('python.png')\n")
    subprocess.run([sys.executable, "again.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)

    assert "mask=mask.png" in command and settings_in(image)["mask"] == "mask.png"
    for name in ("picture.png", "python.png"):
        assert pixels(Image.open(tmp_path / name)) == pixels(image)


def test_two_users_at_once_get_their_own_images(users: Any, picture: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "purple").save(tmp_path / "plain.png")
    pair = {"ball.png": users(), "plain.png": users(PHONE)}
    for name, user in pair.items():
        user.pictures(tmp_path / name)
        user.type("text", f"the text of {name}")
        user.type("num_steps", 60)
    for user in pair.values():
        user.start()
    pair["plain.png"].wait_for("queue: 1/1")
    for name, user in pair.items():
        user.wait_for("Ready")
        settings = settings_in(user.image())
        assert settings["image"] == [name] and settings["text"] == [f"the text of {name}"]
        other = next(each for each in pair if each != name)
        assert other not in user.page.content()
    assert len({pixels(user.image()) for user in pair.values()}) == 2


def test_a_cancelled_job_ends_at_once(users: Any, picture: Path) -> None:
    user = users()
    user.pictures(picture)
    user.type("num_steps", 200)
    user.type("count", 8)
    user.start()
    user.wait_for(r"[1-9]\d*/200 steps")
    user.page.locator("#cancel").click()
    began = time.monotonic()
    user.wait_for("Cancelled")
    assert time.monotonic() - began < 10

    user.type("num_steps", 4)
    user.type("count", 1)
    user.generate()


def test_bad_uploads_get_one_clear_message_and_the_page_goes_on(users: Any, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("dear diary")
    (tmp_path / "huge.png").write_bytes(bytes(50_000_000))
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    user = users()
    for into, name, words in (
        ("image", "notes", "cannot be read as a picture"),
        ("start_image", "bomb", "million pixels"),
    ):
        user.upload(tmp_path / f"{name}.png", into=into)
        user.wait_for(f"{name}.png .*{words}")
        assert user.page.locator("#status .problem").count() == 1
        user.page.wait_for_timeout(300)
        assert user.page.locator(f"#{into} img").count() == 0
        user.page.reload()
        user.page.wait_for_selector("#generate")
        user.unfold()
    user.upload(tmp_path / "huge.png")
    toast = user.page.locator(".toast-body")
    toast.wait_for()
    assert "maximum allowed size" in toast.inner_text() and toast.count() == 1

    user.page.reload()
    user.page.wait_for_selector("#generate")
    user.start()
    user.wait_for("please give a picture")
    user.pictures(picture)
    user.unfold()
    user.type("num_steps", 4)
    user.generate()


def test_the_server_itself_refuses_large_uploads_and_foreign_files(users: Any, server: Server) -> None:
    user = users()
    large = {"name": "a.png", "mimeType": "image/png", "buffer": bytes(50_000_000)}
    answer = user.page.request.post(f"{server.address}/gradio_api/upload", multipart={"files": large})
    assert answer.status == 413
    for path in ("/etc/passwd", str(ADAPTERS[0]), "../../../etc/passwd"):
        assert user.page.request.get(f"{server.address}/gradio_api/file={path}").status in (403, 404)


def test_a_phone_shows_everything_without_scrolling_sideways(users: Any, picture: Path) -> None:
    user = users(PHONE)
    assert user.width() <= PHONE[0]
    user.pictures(picture)
    user.type("text", "a text of many words " * 8)
    user.type("scales", "0, 0.5, 1")
    user.paint()
    user.generate()
    assert user.width() <= PHONE[0]
    for name in ("generate", "cancel", "text", "scale", "picture", "command", "python"):
        box = user.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]


def test_a_page_with_a_password_shows_nothing_without_it(browser: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOME_PASSWORD", PASSWORD)
    with serve(tmp_path, "host=127.0.0.1", "password=${oc.env:SOME_PASSWORD}") as server:
        page = browser.new_context().new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(server.address)
        for password, selector in (("wrong password", "text=Incorrect"), (PASSWORD, "#generate")):
            assert page.locator("#generate").count() == 0
            page.locator("input").nth(0).fill("anybody")
            page.locator("input[type=password]").fill(password)
            page.get_by_role("button", name="Login").click()
            page.wait_for_selector(selector)
        page.context.close()
        anybody = browser.new_context().request
        for path in ("config", "gradio_api/info", "gradio_api/queue/data"):
            assert anybody.get(f"{server.address}/{path}").status == 401
        anybody.dispose()
    assert PASSWORD not in server.log.read_text()
