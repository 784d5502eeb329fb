"""A page to play with a model: a prompt, its continuation as it comes, and the losses and the card beside it.

    python -m modeling_nanogpt.demo out/quickstart
    python -m modeling_nanogpt.demo out/quickstart --space out/space

The page is at http://127.0.0.1:7860, and only this machine can open it; --host 0.0.0.0 also lets other machines in.
--space writes a folder instead, and `hf upload user/name out/space . --repo-type space` makes the folder a Space.
"""
# ruff: noqa: E402 -- the command reads its flags before it imports torch and transformers, which takes seconds

import argparse
import sys
from importlib.util import find_spec

from command_start import begin_command

from .command_line import CommandParser

parser = CommandParser("modeling_nanogpt.demo", usage="MODEL [--flag VALUE ...]", description=__doc__)
parser.add_model()
parser.add_argument(
    "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen at (default: %(default)s)"
)
parser.add_number("--port", 7860, "port to listen at", at_least=1, below=2**16)
parser.add_path("--space", metavar="FOLDER", help="new folder to write a Space to, without starting the page")


def parse_arguments() -> argparse.Namespace:
    arguments = parser.parse(sys.argv[1:])
    if find_spec("gradio") is None:
        parser.error("the page needs the package gradio: pip install gradio")
    return arguments


if __name__ == "__main__":
    begin_command(parser.prog)
    arguments = parse_arguments()

import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .arithmetic import move_to_accelerator
from .convert import whole
from .decoding import continue_prompt
from .sample import encode, load
from .sources import find_file

FRAME = 0.05  # seconds between two updates of the page
PACKAGE = Path(__file__).parent
CARRIED = ("config.json", "generation_config.json", "*.safetensors*", "tokenizer*", "README.md", "loss.png")

SPACE_CARD = """\
---
title: $title
emoji: ✍️
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: $gradio
app_file: app.py
pinned: false
---

`app.py` starts the page of `python -m modeling_nanogpt.demo`. `hf upload user/name . --repo-type space` uploads this
folder.
"""
SPACE_APP = """\
from modeling_nanogpt.demo import make_page

make_page($model, $revision, $title).launch()
"""
SPACE_NEEDS = "torch>=2.11\ntransformers>=5.17\nsafetensors>=0.8\n"


def make_page(name: str, revision: str | None, title: str) -> Any:
    """The page of a model, as Gradio's Blocks, which `launch` starts. `name` is a folder or Hub id.

    Raises ValueError if the model or its tokenizer cannot be used.
    """
    import gradio as gr

    model, tokenizer = load(name, revision)
    move_to_accelerator(model)

    def generate(prompt: str, temperature: float, top_k: float, length: float) -> Iterator[tuple[str, str]]:
        try:
            yield from continue_text(model, tokenizer, prompt, temperature, int(top_k), int(length))
        except ValueError as mistake:
            raise gr.Error(str(mistake).removeprefix("--"), print_exception=False) from None

    losses = find_file(name, "loss.png", revision)
    card = find_file(name, "README.md", revision)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
                with gr.Row():
                    temperature = gr.Number(0.8, label="Temperature", minimum=0, step=0.1, elem_id="temperature")
                    top_k = gr.Number(200, label="Top-k (0: all)", minimum=0, precision=0, elem_id="top_k")
                    length = gr.Number(200, label="Length (tokens)", minimum=1, precision=0, elem_id="length")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                text = gr.Textbox(label="Text", lines=12, max_lines=30, interactive=False, elem_id="text")
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=2):
                if losses:
                    gr.Image(losses, show_label=False, buttons=[], elem_id="losses")
                if card:
                    gr.Markdown(body_of(Path(card).read_text(encoding="utf-8")), max_height=560, elem_id="card")
        running = start.click(generate, inputs=[prompt, temperature, top_k, length], outputs=[text, status])
        stop.click(None, cancels=running)
    return page


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    temperature: float,
    top_k: int,
    length: int,
) -> Iterator[tuple[str, str]]:
    """Yields the growing text and the line below it, up to 20 times a second.

    Raises ValueError if the tokenizer has no tokens for the prompt.
    """

    def text() -> str:
        return f"{prompt}{tokenizer.decode(tokens, skip_special_tokens=True)}"

    ids = encode(tokenizer, prompt or None).to(model.device)  # (1, T)
    tokens: list[int] = []
    started = painted = time.perf_counter()
    for token in continue_prompt(model, ids, length, temperature=temperature, top_k=top_k):
        tokens.append(int(token))
        if time.perf_counter() - painted > FRAME:
            painted = time.perf_counter()
            yield text(), f"{len(tokens)} tokens"
    rate = len(tokens) / (time.perf_counter() - started)
    yield text(), f"{len(tokens)} tokens, {rate:,.0f} tokens/s"


def title_of(name: str) -> str:
    """The last part of a folder's path or of a Hub id."""
    return os.path.basename(os.path.abspath(name))


def body_of(card: str) -> str:
    """A model card without its metadata and without its picture, which the page shows beside the card."""
    card = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.S)
    return re.sub(r"^!\[.*\]\(loss\.png\)$", "", card, flags=re.M)


def write_space(folder: Path, name: str, revision: str | None) -> None:
    """Write a Space: this package, a card, and the model itself if `name` is a folder.

    Raises ValueError if the folder is there already, or if the model or its tokenizer cannot be used.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space={folder} is there already and not empty: name a new folder")
    load(name, revision)  # raises ValueError for a model that would fail in the Space
    with whole(folder) as space:
        shutil.copytree(PACKAGE, space / PACKAGE.name, ignore=shutil.ignore_patterns("training", "web", "__pycache__"))
        shutil.copy(PACKAGE.parent / "command_start.py", space)
        model = name
        if os.path.isdir(name):
            model = "model"
            (space / model).mkdir()
            for path in (path for pattern in CARRIED for path in Path(name).glob(pattern)):
                shutil.copy(path, space / model)
        title = repr(title_of(name))
        card = Template(SPACE_CARD).substitute(title=title, gradio=version("gradio"))
        (space / "README.md").write_text(card, encoding="utf-8")
        app = Template(SPACE_APP).substitute(model=repr(model), revision=repr(revision), title=title)
        (space / "app.py").write_text(app, encoding="utf-8")
        (space / "requirements.txt").write_text(SPACE_NEEDS, encoding="utf-8")


def serve(page: Any, host: str, port: int) -> None:
    """Start the page and wait until Ctrl-C ends it. Raises ValueError if the address and port cannot be used."""
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]  # the browser would fetch Gradio's own fonts from another server
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(server_name=host, server_port=port, theme=theme, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise ValueError(f"--host={host} --port={port} cannot be listened at: name another port") from None
    print(f"the page is at http://{host}:{port}, and Ctrl-C ends it", flush=True)
    page.block_thread()


def main(arguments: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if arguments.space is None:
            page = make_page(arguments.model, arguments.revision, title_of(arguments.model))
            serve(page, arguments.host, arguments.port)
        else:
            write_space(Path(arguments.space), arguments.model, arguments.revision)
            print(f"{arguments.space} is a Space with {arguments.model}")
    except ValueError as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    main(arguments)
