"""Take docs/page.png again, the picture of the server's page: run as `python -m tests.tools.page_picture`.

The models and the machine are fake, and their ten minutes pass in a second. It needs Chromium.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from scheduler.http import create_app
from scheduler.testing import FakeMachine
from tests.support.running import running

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "page.png"
USES = (  # model, and for how many seconds it is used
    ("nomic-embed-text", 4), ("qwen3:8b", 40), ("gemma3:12b", 50), ("nomic-embed-text", 10), ("qwen3:8b", 30),
    ("mistral-small:24b", 45), ("nomic-embed-text", 15),
)  # fmt: skip


def main() -> None:
    """Let the models be used one after the other, then at once, and take the picture."""
    with FakeMachine(memory={"cpu": "64GiB", "gpu0": "24GiB"}, keep_alive="5m", auto_advance=False) as fake:
        fake.model("qwen3:8b", size={"gpu0": "7GiB", "cpu": "600MiB"}, load="9s")
        fake.model("gemma3:12b", size={"gpu0": "11GiB", "cpu": "800MiB"}, load="14s")
        fake.model("nomic-embed-text", size={"gpu0": "600MiB", "cpu": "300MiB"}, load="2s")
        fake.model("mistral-small:24b", size={"gpu0": "16GiB", "cpu": "1GiB"}, load="20s")
        app = create_app(fake.scheduler, dashboard_actions=True)
        fake.scheduler.pin("nomic-embed-text")
        for name, used_s in USES:
            asked = fake.scheduler.submit(name)
            fake.advance("25s")
            lease = asked.result(5)
            fake.advance(f"{used_s}s")
            lease.release()
        waiting = []  # and then held
        for name, then_s in (("qwen3:8b", 30), ("gemma3:12b", 4), ("mistral-small:24b", 12)):
            waiting.append(fake.scheduler.submit(name))
            fake.advance(f"{then_s}s")
        with running(app) as url:
            take(url)
        for each in waiting:
            if not each.cancel():
                each.result().release()


def take(url: str) -> None:
    """Write the picture of a page."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1200}, color_scheme="light")
        page.goto(url)
        page.locator("#decisions summary").nth(1).click()
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
