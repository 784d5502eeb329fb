"""Texts to tokenize, prepare and train on, and functions that write them to files."""

import random
import textwrap
from pathlib import Path

END = "<|endoftext|>"

# Real text with words, punctuation and indentation: a module of the standard library.
TEXT = Path(textwrap.__file__).read_text(encoding="utf-8")

HARD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b\0",
    "line\r\nline\rline\n\n\n",
    "\ttab\t\ttab\t",
    "run of      spaces, and at the end      ",
    " \n \n  \n   x",
    "tab,\x0b vertical, \x0c feed, \x85 next, \u2028 line, \u2029 paragraph, \u00a0 no-break, \u3000 wide",
    "e\u0301 is not \u00e9, and z\u0351\u036b\u0343\u036a is neither",
    "\u0301starts with a combining mark",
    "\N{FAMILY} \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\U00010000\U0001d54f\U000e0041\U0010ffff",
    "\ufeffbyte order mark, \ufffd replacement, \ufffe\uffff no characters, \ue000 private",
    "日本語 العربية עברית ไทย हिन्दी Ελληνικά кириллица",
    END,
    f"{END}{END}",
    f"before {END} after",
    f"{END[:-1]} unfinished",
    "<0x41>",
    "<0x0A><0xE2><0x82><0xAC>",
    "\N{EURO SIGN}<0x41>\N{EURO SIGN}",
    "<unk> <s> </s> <pad> [MASK] <|im_start|> ## \u2581 \u0120 \u010a",
    "it's WE'LL they've i'd 'tis '''s",
    "spaces , before . marks ! and do n't 's 're ? kept",
    "1234567890 3.14 \u00b2 \u2167 \u0663",
]

# Many short lines that repeat, some with line ends of Windows.
FOXES = "".join(f"{i}: the quick brown fox\r\njumps over {i * i % 97} lazy dogs; {END} is text\n" for i in range(120))


def random_texts(count, seed):
    """Texts of up to 40 pieces. Each pool of pieces holds something that is easily lost."""
    dice = random.Random(seed)
    seen = sorted(set(TEXT))
    pools = [
        lambda: dice.choice(seen),
        lambda: " " * dice.randint(1, 9),
        lambda: dice.choice(["\0", "\t", "\n", "\r", "\r\n", "\x0b", "\x1b", "\x7f", "\x85", "\u2028"]),
        lambda: dice.choice([END, "<0x41>", "<0xFF>", "<|", "|>", "<unk>", "\u0120", "\u2581"]),
        lambda: chr(dice.randint(0x00A0, 0x02FF)),
        lambda: "e" + "".join(chr(dice.randint(0x0300, 0x036F)) for _ in range(dice.randint(1, 4))),
        lambda: chr(dice.randint(0x1F300, 0x1FAFF)) + dice.choice(["", "\ufe0f", "\u200d", "\U0001f3fd"]),
        lambda: chr(dice.randint(0x4E00, 0x9FFF)),
        lambda: chr(dice.randint(0xE000, 0xFFFF)),  # from private use to the non-characters; past the surrogates
        lambda: chr(dice.randint(0x10000, 0x10FFFF)),
    ]
    return ["".join(dice.choice(pools)() for _ in range(dice.randint(1, 40))) for _ in range(count)]


def write_words(path: Path) -> Path:
    """A text of 6,000 characters in which there is something to learn: words out of a small vocabulary."""
    words = random.Random(0).choices(["to", "be", "or", "not", "question", "noble", "slings\n"], k=2000)
    path.write_text(" ".join(words)[:6000])
    return path


def write_corpus(folder, texts, suffix=".txt"):
    """Files whose names sort in the order of the texts, but which are written in another order."""
    folder.mkdir(parents=True)
    for i in sorted(range(len(texts)), key=lambda i: i * 7919 % 104729):
        (folder / f"{i:05d}{suffix}").write_bytes(texts[i].encode())
    return str(folder)


def write_text(path, text=FOXES):
    path.write_bytes(text.encode())
    return str(path)
