"""The library that runs a model in the browser, transformers.js: its version, and where a page takes it from.

Nothing here imports torch or transformers, which takes seconds: a command checks its flags before it imports them.
"""

from pathlib import Path

LIBRARY = "@huggingface/transformers@4.3.1"
INSTALL = f"npm install --ignore-scripts {LIBRARY}"
CDN = f"https://cdn.jsdelivr.net/npm/{LIBRARY}/dist/transformers.min.js"
NEEDED = {  # a file in node_modules -> its name in the folder transformers.js of the page
    "@huggingface/transformers/dist/transformers.min.js": "transformers.min.js",
    "@huggingface/transformers/LICENSE": "LICENSE",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}


def check_library(node_modules: str | None, cdn: bool) -> None:
    """Raise ValueError if the flags do not say where transformers.js comes from, or if one of its files is missing."""
    if (node_modules is None) != cdn:
        raise ValueError(
            f"--to=web needs transformers.js: give either --node_modules=FOLDER, made by `{INSTALL}`, to copy it, or "
            "--cdn to let the page load it from a CDN"
        )
    missing = [name for name in NEEDED if node_modules and not Path(node_modules, name).is_file()]
    if missing:
        raise ValueError(f"--node_modules={node_modules} has no file {missing[0]}: make the folder by `{INSTALL}`")
