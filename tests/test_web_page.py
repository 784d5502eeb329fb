"""The page that runs a model in the browser: what is in its folder, and what headless Chromium does with it."""

import sys
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from modeling_nanogpt import convert
from modeling_nanogpt.decoding import continue_prompt
from modeling_nanogpt.sources import load_model
from modeling_nanogpt.transformers_js import CDN, LIBRARY, NEEDED
from modeling_nanogpt.web_page import write_page
from support import ROOT
from support.browser import Browser, missing_programs
from support.needs import node_packages
from support.tiny_run import with_random_weights

MISSING = [package for package in convert.PACKAGES["web"] if find_spec(package) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
needs_browser = pytest.mark.skipif(bool(missing_programs()), reason=f"{missing_programs()} not installed")
needs_transformers_js = pytest.mark.skipif(
    node_packages("@huggingface/transformers") is None,
    reason="NODE_MODULES names no folder with the package @huggingface/transformers",
)
PROMPT = "to be"
NEW = 60  # tokens: several times the context of the run


def in_chromium(test):
    """Skips a test if the machine lacks what it needs."""
    return needs_onnx(needs_transformers_js(needs_browser(test)))


def run_convert(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    convert.main(convert.parse_arguments())


@pytest.fixture(scope="module")
def source(run, tmp_path_factory):
    return with_random_weights(run, tmp_path_factory.mktemp("source") / "out")


@pytest.fixture(scope="module")
def page(source, tmp_path_factory):
    """The folder of a page with everything in it."""
    folder = tmp_path_factory.mktemp("page") / "page"
    with pytest.MonkeyPatch.context() as monkeypatch:
        library = f"--node_modules={node_packages('@huggingface/transformers')}"
        run_convert(monkeypatch, source, folder, "--to=web", library)
    return folder


@pytest.fixture(scope="module")
def browser(page):
    """Chromium with this page, once the model is loaded. `python -m http.server` serves files in the same way."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=page))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Browser(f"http://127.0.0.1:{server.server_port}/") as browser:
        browser.wait_for("!document.getElementById('status').textContent.startsWith('Loading')")
        yield browser
    server.shutdown()
    server.server_close()


def generate(browser, prompt=PROMPT, temperature=0, top_k=0, length=NEW):
    """Fill in the form, generate, and wait for the end. Returns the whole text."""
    fill_in_and_start(browser, prompt, temperature, top_k, length)
    browser.wait_for("!document.getElementById('generate').disabled")
    return browser.run("return document.getElementById('text').textContent")


def fill_in_and_start(browser, prompt, temperature, top_k, length):
    for name, value in {"prompt": prompt, "temperature": temperature, "top_k": top_k, "length": length}.items():
        browser.type(f"#{name}", str(value))
    browser.click("#generate")


def status_of(browser):
    return browser.run("return document.getElementById('status').textContent")


def expected(source, prompt, length=NEW):
    """What `sample` makes of it with temperature 0."""
    model, tokenizer = load_model(str(source)).eval(), AutoTokenizer.from_pretrained(source)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = [int(token) for token in continue_prompt(model, ids, length, temperature=0, top_k=0)]
    assert ids.shape[1] + len(tokens) > 2 * model.config.block_size
    return prompt + tokenizer.decode(tokens, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@needs_onnx
@needs_transformers_js
def test_the_folder_has_the_page_the_model_and_the_library(page):
    names = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    assert names == {
        *(f"model/{name}.json" for name in ("config", "generation_config", "tokenizer", "tokenizer_config")),
        "model/onnx/model.onnx",
        *(f"transformers.js/{name}" for name in NEEDED.values()),
        *("index.html", "page.js", "README.md"),
    }
    assert AutoConfig.from_pretrained(page / "model").model_type == "gpt2"
    assert CDN not in (page / "index.html").read_text()


@needs_onnx
@needs_transformers_js
def test_the_folder_is_a_static_space(page):
    settings = yaml.safe_load((page / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert settings["sdk"] == "static" and settings["title"] == "out"


@needs_onnx
@needs_transformers_js
def test_the_page_says_what_the_card_says(page, run):
    html = unescape((page / "index.html").read_text(encoding="utf-8"))
    card = (run.out_dir / "README.md").read_text(encoding="utf-8")
    loss = f"{run.val_losses[-1]:.4f}"
    assert f"<dt>validation loss (nats a token)</dt><dd>{float(loss)}</dd>" in html and loss in card
    parameters = f"{load_model(str(run.out_dir)).num_parameters():,}"
    assert f"<dt>parameters</dt><dd>{parameters}</dd>" in html and f"A GPT of {parameters} parameters" in card
    for name in ("text", "tokens", "trained on", "hardware", "time"):
        assert f"<dt>{name}</dt>" in html, name
    assert "$" not in html


def test_without_a_copy_the_page_names_the_version_that_ci_tests(tmp_path):
    write_page(tmp_path, "<b>", {"text": "a & b"}, node_modules=None)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f'"{CDN}"' in html and not (tmp_path / "transformers.js").exists()
    assert "<h1>&lt;b&gt;</h1>" in html and "<dd>a &amp; b</dd>" in html
    assert LIBRARY in CDN and LIBRARY in (ROOT / ".ci" / "run").read_text()


@needs_onnx
@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--to=web needs transformers.js: give either --node_modules=FOLDER"),
        (["--cdn", "--node_modules=x"], "--to=web needs transformers.js: give either --node_modules=FOLDER"),
        (["--node_modules=x"], "--node_modules=x has no file @huggingface/transformers/dist/transformers.min.js"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, run.out_dir, Path("page"), "--to=web", *flags)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Chromium


@in_chromium
def test_the_greedy_text_is_the_one_of_sample_far_past_the_context(browser, source):
    assert generate(browser) == expected(source, PROMPT)
    count, rest = status_of(browser).split(" tokens: ")
    assert int(count) <= NEW and "tokens/s" in rest


@in_chromium
def test_a_prompt_longer_than_the_context_keeps_its_end(browser, source):
    prompt = "or not to be, that is the question"
    assert generate(browser, prompt) == expected(source, prompt)


@in_chromium
def test_the_likeliest_of_one_token_is_the_greedy_one_at_any_temperature(browser, source):
    assert generate(browser, temperature=5, top_k=1) == expected(source, PROMPT)


@in_chromium
def test_two_draws_differ(browser):
    assert generate(browser, temperature=1, top_k=0) != generate(browser, temperature=1, top_k=0)


@in_chromium
def test_stop_ends_a_long_text(browser):
    fill_in_and_start(browser, PROMPT, temperature=0, top_k=0, length=10**6)
    grown = "document.getElementById('text').textContent.length"
    size = browser.wait_for(f"{grown} > 40 && {grown}")
    browser.wait_for(f"{grown} > {size}")  # the text grows on the page
    browser.click("#stop")
    browser.wait_for("!document.getElementById('generate').disabled")
    assert int(status_of(browser).split()[0]) < 10**6


@in_chromium
def test_nothing_is_asked_of_another_machine(browser, page):
    addresses = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(addresses) > 8 and all(name.startswith(browser.address) for name in addresses)
