"""A headless Chromium on a page, driven through chromedriver's own protocol (WebDriver), without the network."""

import json
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from support import PATIENCE

PROGRAMS = ("chromium", "chromedriver")
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # a container runs it as root
    "--disable-dev-shm-usage",
    "--window-size=1100,860",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what a page asks of other machines fails
]


def missing_programs() -> str:
    """The programs that this machine does not have, for the reason of a skip."""
    return " and ".join(program for program in PROGRAMS if not shutil.which(program))


class Browser:
    """A browser that shows one page. It closes at the end of the `with` block."""

    def __init__(self, address: str):
        self.address = address

    def __enter__(self) -> "Browser":
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.driver.stdout is not None
        line = next(line for line in self.driver.stdout if "started successfully" in line)
        port = line.split()[-1].rstrip(".")
        self.root = f"http://127.0.0.1:{port}/session"
        options = {"binary": shutil.which("chromium"), "args": FLAGS}
        session = self.post("", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})
        self.root += f"/{session['sessionId']}"
        try:
            self.post("/url", url=self.address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            urlopen(Request(self.root, method="DELETE"), timeout=PATIENCE).close()
        finally:
            self.driver.terminate()
            self.driver.wait()

    def post(self, path: str, **values) -> Any:
        """A command of the protocol. Raises urllib's HTTPError if it fails."""
        request = Request(self.root + path, json.dumps(values).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)["value"]

    def run(self, script: str, *arguments) -> Any:
        """What JavaScript returns on the page."""
        return self.post("/execute/sync", script=script, args=list(arguments))

    def element(self, selector: str) -> str:
        """The path of an element in the protocol."""
        (identity,) = self.post("/element", using="css selector", value=selector).values()
        return f"/element/{identity}"

    def type(self, selector: str, text: str) -> None:
        """Put text into a field in place of what is there, key by key."""
        field = self.element(selector)
        self.post(f"{field}/clear")
        self.post(f"{field}/value", text=text)

    def click(self, selector: str) -> None:
        self.post(f"{self.element(selector)}/click")

    def wait_for(self, condition: str, message: str = "return document.body.innerText") -> Any:
        """What a JavaScript expression is once it is true. An error shows `message`, by default the page's text."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if value := self.run(f"return {condition}"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"{condition} did not come true: {self.run(message)}")

    def screenshot(self, path: Path) -> None:
        with urlopen(f"{self.root}/screenshot", timeout=PATIENCE) as response:
            path.write_bytes(b64decode(json.load(response)["value"]))
