"""One saved folder says the same on every release of transformers, with and without the key/value cache.

    python tests/support/one_folder.py save FOLDER     a model, and the greedy text that it must give
    python tests/support/one_folder.py check FOLDER    loads it by its own code and by the project's, and compares

.ci/run saves in one environment and checks in all of them.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"
PROMPTS = ["to be", "or not to be", "a"]
NEW_TOKENS = 24


def save(folder: Path) -> None:
    """Write the model, its tokenizer, and a text that a loop generates: each token from all tokens before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, it finds `support` there
    from support.models import make_model

    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=" ", padding_side="left", clean_up_tokenization_spaces=False
    )
    model = make_model(vocab_size=len(ALPHABET), block_size=64, pad_token_id=tokenizer.pad_token_id)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                next_id = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, next_id], dim=1)
        texts.append(tokenizer.decode(ids[0]))
    assert len({text[-NEW_TOKENS:] for text in texts}) == len(texts)  # each token depends on those before it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "texts.json").write_text(json.dumps(texts))


def check(folder: Path) -> None:
    """Load the folder with its own code, then with the project's, and exit with one line if a text differs."""
    expected = json.loads((folder / "texts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert "modeling_nanogpt" not in sys.modules  # else its classes would be taken below
    own = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    import modeling_nanogpt  # noqa: F401  which makes its classes known

    projects = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for model, package in ((own, "transformers_modules"), (projects, "modeling_nanogpt")):
        assert type(model).__module__.split(".")[0] == package, type(model)
        for use_cache in (True, False):
            how = f"transformers {transformers.__version__}, code of {package}, use_cache={use_cache}"
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache)
            texts = [row.lstrip() for row in tokenizer.batch_decode(ids)]  # padding is spaces
            if texts != expected:
                sys.exit(f"{how}: {texts}, but it must be {expected}")
            print(f"{how}: the same text")


if __name__ == "__main__":
    {"save": save, "check": check}[sys.argv[1]](Path(sys.argv[2]))
