"""Which tokenizer a flag names: made from the corpus, GPT-2's, of a folder or Hub id, or the characters of a file."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .char import read_char_tokenizer
from .documents import first_line
from .encoding import TiktokenEncoder, make_encoder
from .gpt2 import make_gpt2_tokenizer


def named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a flag names, unless it is made from the corpus; raises ValueError where there is none."""
    if name == "gpt2":
        return make_gpt2_tokenizer()
    if Path(name).is_file():
        return read_char_tokenizer(Path(name))
    return load_tokenizer(name)


def load_tokenizer(name: str, flag: str = "tokenizer", revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder or Hub id that a flag names; raises ValueError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of the Hub, of a broken file, of what a tokenizer_config.json asks for
        known = "char, bpe, gpt2, a text file, or a folder or Hub id with a tokenizer"
        allowed = known if flag == "tokenizer" else "it has no tokenizer"
        raise ValueError(f"{flag}={name}: {allowed} ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{flag}={name} has no tokenizer.json, nor what one can be made from")
    if max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer):
        raise ValueError(f"{flag}={name} has {len(tokenizer)} tokens, but ids beyond that number")
    return tokenizer


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn every text into the same ids, as far as that can be seen."""
    backends = [first.backend_tokenizer, second.backend_tokenizer]
    for backend in backends:  # settings that encoding overrides
        backend.no_padding()
        backend.no_truncation()
    if backends[0].to_str() == backends[1].to_str():
        return True
    encoders = [make_encoder(backend) for backend in backends]
    return (
        all(isinstance(encoder, TiktokenEncoder) for encoder in encoders)
        and encoders[0].ranks == encoders[1].ranks
        and (encoders[0].words == encoders[1].words or encoders[0].cuts and encoders[1].cuts)
        and (len(first), first.eos_token_id) == (len(second), second.eos_token_id)
    )


def check_learned(tokenizer: PreTrainedTokenizerBase, learned: PreTrainedTokenizerBase | None, data_dir: str) -> None:
    """Raise ValueError where a model learned other tokens than those of the data."""
    if learned is not None and not same_tokenizer(tokenizer, learned):
        raise ValueError(
            f"data_dir={data_dir} has other tokens than init_from={learned.name_or_path} learned: prepare another "
            f"data_dir with --tokenizer={learned.name_or_path}"
        )
