"""The page of `python -m modeling_nanogpt.demo`: a real server, in headless Chromium; and the Space that it writes."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec

import psutil
import pytest
import yaml
from transformers import AutoTokenizer

from modeling_nanogpt import demo
from modeling_nanogpt.decoding import continue_prompt
from modeling_nanogpt.sources import load_model
from support import PATIENCE, ROOT
from support.browser import Browser, missing_programs

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
needs_browser = pytest.mark.skipif(bool(missing_programs()), reason=f"{missing_programs()} not installed")
TEXT = "document.querySelector('#text textarea').value"
STATUS = "document.querySelector('#status').innerText"
# whether the text has been the same for half a second, if this is asked again and again
STANDS_STILL = f"""(() => {{
    if (window.seen !== {TEXT}) {{ window.seen = {TEXT}; window.since = Date.now() }}
    return Date.now() - window.since > 500
}})()"""


def in_chromium(test):
    """Skips a test if the machine lacks what it needs."""
    return needs_gradio(needs_browser(test))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder, *command, **environment):
    """A server's process, which has said that it is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = next((line for line in process.stdout if "http://" in line), None)
    assert line, "the server ended"
    return process, line


def end(process):
    process.terminate()
    process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """A server, and what it has said."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    process, line = start(folder, "-m", "modeling_nanogpt.demo", str(run.out_dir), f"--port={port}")
    yield process, line
    end(process)


@pytest.fixture(scope="module")
def browser(server):
    with Browser(server[1].split()[4].rstrip(",")) as browser:
        browser.wait_for("document.querySelector('#generate') && document.querySelector('#text textarea')")
        yield browser


def fill_in_and_start(browser, prompt, length):
    browser.type("#prompt textarea", prompt)
    for name, value in {"temperature": 0, "top_k": 0, "length": length}.items():
        browser.type(f"#{name} input", str(value))
    browser.click("#generate")


def expected(folder, prompt, length):
    """What `sample` makes of it with temperature 0."""
    model, tokenizer = load_model(str(folder)).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = [int(token) for token in continue_prompt(model, ids, length, temperature=0, top_k=0)]
    return prompt + tokenizer.decode(tokens, skip_special_tokens=True)


@in_chromium
def test_the_greedy_text_is_the_one_of_sample(browser, run):
    fill_in_and_start(browser, "to be", 40)
    browser.wait_for(f"{STATUS}.includes('tokens/s')")
    assert browser.run(f"return {TEXT}") == expected(run.out_dir, "to be", 40)


@in_chromium
def test_a_text_grows_and_stops(browser):
    fill_in_and_start(browser, "or not", 10**6)
    size = browser.wait_for(f"{TEXT}.startsWith('or not') && {TEXT}.length > 30 && {TEXT}.length")
    browser.wait_for(f"{TEXT}.length > {size}")
    browser.click("#stop")
    browser.wait_for(STANDS_STILL)  # a click that comes before the stop has done its work would be stopped, too
    fill_in_and_start(browser, "to be", 5)  # would wait for the end of the long text
    browser.wait_for(f"{STATUS}.startsWith('5 tokens, ') && {TEXT}.startsWith('to be')")


@in_chromium
def test_the_losses_and_the_card_stand_beside_the_text(browser, run):
    assert browser.wait_for("document.querySelector('#losses img').naturalWidth") > 100
    card = browser.run("return document.querySelector('#card').innerText")
    assert "layers" in card and "pipeline_tag" not in card and f"{run.val_losses[-1]:.4f}" in card


@in_chromium
def test_only_this_machine_can_open_the_page(browser, server):
    sockets = psutil.Process(server[0].pid).net_connections()
    assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


@needs_gradio
def test_a_space_is_whole_without_the_project(run, tmp_path, monkeypatch, capsys):
    space = tmp_path / "space"
    monkeypatch.setattr(sys, "argv", ["demo", str(run.out_dir), f"--space={space}"])
    demo.main(demo.parse_arguments())
    assert "is a Space" in capsys.readouterr().out
    settings = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (settings["sdk"], settings["app_file"], settings["title"]) == ("gradio", "app.py", "out")
    assert not (space / "modeling_nanogpt" / "training").exists() and not (space / "model" / "checkpoints").exists()
    # as a Space starts it: nothing of the project but what lies in the folder
    script = "import gradio; gradio.Blocks.launch = lambda page: print('http://', page.title); import app"
    process, line = start(space, "-c", script, PYTHONPATH=str(space))
    end(process)
    assert line.split() == ["http://", "out"]


def test_a_space_asks_for_the_versions_that_the_project_asks_for():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{line}"' in declared for line in demo.SPACE_NEEDS.split())


@needs_gradio
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--port=70000"], "--port=70000, but it must be below 65536"),
        (["--space=there"], "--space=there is there already and not empty: name a new folder"),
        (["--sapce=x"], "unknown flag --sapce: did you mean --space?"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", str(run.out_dir), *flags])
    with pytest.raises(SystemExit):
        demo.main(demo.parse_arguments())
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_without_gradio_the_command_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["demo", str(run.out_dir)])
    with pytest.raises(SystemExit):
        demo.parse_arguments()
    assert "pip install gradio" in capsys.readouterr().err
