"""The chat page in a headless browser: type, stream, stop, new chat, a key; nothing is asked of other servers."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.onnx_runtime.slots import StaticSlots
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.browser import CHROMIUM, Browser, browser
from tests.support.tiny.service import Running, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

FIGURES = "document.querySelector('.message.assistant:last-of-type .figures').textContent"
ANSWER = "document.querySelector('.message.assistant:last-of-type .text').textContent"


def reload(page: Browser) -> None:
    """Load the page again, and wait for the new one rather than see the old one."""
    page.run("window.before = true; location.reload()")
    page.wait("!window.before && document.querySelectorAll('#card dt').length > 5")


def test_a_chat_in_the_browser(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, step = threading.Event(), StaticSlots.step

    def slow_step(slots: StaticSlots, *arguments: Any) -> Any:
        go.wait(0.2)
        return step(slots, *arguments)

    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("document.querySelectorAll('#card dt').length > 5")
        assert page.run("document.getElementById('model').textContent") == "tiny"
        page.run("document.getElementById('max_completion_tokens').value = 20")
        page.press("Hello")  # the message has the focus
        page.enter()
        page.wait("document.querySelector('.message.assistant .figures')?.textContent.includes('tokens/s')")
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
        expected = server.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
        assert page.run(ANSWER).strip() == expected.strip()
        assert page.run(FIGURES).endswith("20 tokens · cut off")
        assert page.run("document.activeElement.id") == "text"

        monkeypatch.setattr(StaticSlots, "step", slow_step)
        page.run("document.getElementById('max_completion_tokens').value = 100")
        page.press("More")
        page.enter()
        page.wait(f"document.querySelectorAll('.message').length === 4 && {ANSWER} !== ''")
        page.run("document.getElementById('stop').click()")
        page.wait("document.getElementById('state').textContent === 'Stopped.'")
        go.set()
        page.wait(f"{FIGURES}.endsWith('stopped')")
        reload(page)
        assert page.run("document.querySelectorAll('.message').length") == 4
        page.run("document.getElementById('new').click()")
        assert page.run("document.querySelectorAll('.message').length") == 0
        reload(page)
        assert page.run("document.querySelectorAll('.message').length") == 0
        page.run("show('assistant', 'See:\\n```python\\n1 < 2\\n```\\nDone.')")
        assert page.run("document.querySelector('.message pre').textContent") == "1 < 2\n"
        assert page.run("[...document.querySelectorAll('input, textarea')].every(each => each.labels.length > 0)")
        assert [url for url in page.requested if not url.startswith((server.url, "about:", "blob:"))] == []


@pytest.mark.slow
@pytest.mark.model
def test_a_chat_with_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    """In light and dark; SmolLM2 knows a colour. The pictures are for who looks at them: screenshot-*.png."""
    checkpoint = open_checkpoint(str(smollm2))
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, None, ExportOptions("float32", cache=CacheOptions("static", 256)), bundle)
    grounds = set()
    with running(bundle, threads=None, engine_process=True) as real:
        for scheme in ("light", "dark"):
            with browser(tmp_path / scheme, dark=scheme == "dark") as page:
                page.open(real.url)
                page.run("document.getElementById('max_completion_tokens').value = 40")
                page.press("Name the three primary colours.")
                page.enter()
                page.wait("document.querySelector('.message.assistant .figures')?.textContent.includes('tokens/s')")
                assert "Red" in page.run(ANSWER)
                page.screenshot(tmp_path / f"screenshot-{scheme}.png")
                grounds.add(page.run("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_the_page_names_no_other_server(server: Running) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r"(?:src|href)=|https?://|@import", answer.text) == []
    card = server.get("/model-card").json()
    assert card["model"] == "tiny"
    assert card["linears"] == {"int8": 1.0}
    assert json.dumps(card)
