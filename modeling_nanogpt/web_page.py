"""A page that runs a model in the browser: a folder of files, which any server of files and a static Space can serve.

The folder web/ holds the page itself. This file adds the facts about the model, and the library that runs the model.
"""

import json
import re
import shutil
from html import escape
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard

from .configuration_nanogpt import NanoGPTConfig
from .onnx_export import count_parameters
from .transformers_js import CDN, NEEDED

TEMPLATES = Path(__file__).with_name("web")
TOLD_BY_CARDS = ("text", "tokens", "trained on", "hardware", "time")  # rows of the card's table "How it was made"


def write_page(folder: Path, title: str, facts: dict[str, str], node_modules: str | None) -> None:
    """Write the page into a folder that has the model in model/. `facts` (name to value) stand beside the text.

    transformers.js is copied from `node_modules`. If that is None, the page loads the library from a CDN.
    """
    library = CDN
    if node_modules is not None:
        library = "./transformers.js/transformers.min.js"
        (folder / "transformers.js").mkdir()
        for name, copy in NEEDED.items():
            shutil.copyfile(Path(node_modules, name), folder / "transformers.js" / copy)
    lines = (f"      <dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    page = Template((TEMPLATES / "index.html").read_text(encoding="utf-8"))
    html = page.substitute(title=escape(title), library=library, facts="\n".join(lines))
    (folder / "index.html").write_text(html, encoding="utf-8")
    card = Template((TEMPLATES / "README.md").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card.substitute(title=json.dumps(title)), encoding="utf-8")
    shutil.copyfile(TEMPLATES / "page.js", folder / "page.js")


def describe(config: NanoGPTConfig, card: str) -> dict[str, str]:
    """Facts about a model: its shape, and what its card says about its losses and its training."""
    facts = {
        "parameters": f"{count_parameters(config):,}",
        "network": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}",
        "context": f"{config.block_size:,} tokens",
    }
    metadata = ModelCard(card, ignore_metadata_errors=True).data if card.startswith("---") else None
    for result in getattr(metadata, "eval_results", None) or []:
        facts[result.metric_name or result.metric_type] = str(result.metric_value)
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", card, re.M))
    for name in TOLD_BY_CARDS:
        if name in rows:
            facts[name] = rows[name].split(", sha256")[0].replace("`", "")
    return facts
