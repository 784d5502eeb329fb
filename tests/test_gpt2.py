"""GPT-2's vocabulary comes over the network once: a line announces the download, and a failure is one line too."""

import hashlib
import http.server
import itertools
import json
import os
import threading

import pytest
from tiktoken_ext import openai_public

from tokenization import vocabularies
from tokenization.vocabularies import GPT2_FILES, make_gpt2_tokenizer

FETCHING = "fetching GPT-2's vocabulary (1.5 MB) ...\n"


def vocabulary_files() -> dict[str, bytes]:
    """A vocabulary of GPT-2's size in GPT-2's two files: 256 bytes, then the first 50,000 pairs of bytes."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    letters = [character for character in characters if character != "ÿ"]  # the byte 0xFF is in no text
    pairs = list(itertools.islice(itertools.product(letters, repeat=2), 50_000))
    merges = "".join(f"{first} {second}\n" for first, second in pairs)
    tokens = characters + ["".join(pair) for pair in pairs]
    ids = {token: i for i, token in enumerate(tokens)}
    return {"vocab.bpe": f"#version: 0.2\n{merges}".encode(), "encoder.json": json.dumps(ids).encode()}


class Server(http.server.ThreadingHTTPServer):
    """The two files on loopback. `asked` holds the paths of all requests, and `broken` holds wrong answers by file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files, self.broken, self.asked = vocabulary_files(), {}, []
        self.hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked.append(name)
        content = (self.server.files | self.server.broken)[name]
        self.send_response(200 if content else 503)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Say nothing, because a test reads stderr, which must hold only what tiktoken and the project say."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """tiktoken's own download, cache and check of hashes, with this server's addresses and hashes."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = {f"{server.address}/{name}": server.hashes[name] for name in server.files}
        monkeypatch.setattr(vocabularies, "GPT2_FILES", files)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


def test_the_files_are_those_that_tiktoken_takes(monkeypatch):
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **catalogue: catalogue)
    theirs = openai_public.gpt2()["mergeable_ranks"]
    assert {theirs[f"{name}_file"]: theirs[f"{name}_hash"] for name in ("vocab_bpe", "encoder_json")} == GPT2_FILES


def test_the_vocabulary_is_fetched_once_and_one_line_says_so(server, capsys):
    tokenizer = make_gpt2_tokenizer()
    assert server.asked == ["vocab.bpe", "encoder.json"]
    assert capsys.readouterr() == ("", FETCHING)
    assert len(tokenizer) == 50_257 and tokenizer.eos_token_id == 50_256
    assert make_gpt2_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert server.asked == ["vocab.bpe", "encoder.json"]
    assert capsys.readouterr() == ("", "")


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path, capsys):
    make_gpt2_tokenizer()
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    make_gpt2_tokenizer()
    assert server.asked == 2 * ["vocab.bpe", "encoder.json"]
    assert capsys.readouterr().err == 2 * FETCHING


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "503 Server Error"), (b"<html>please log in</html>", "Hash mismatch")]
)
def test_a_server_that_gives_something_else_is_named_in_one_line(server, content, reason):
    server.broken["encoder.json"] = content
    with pytest.raises(ValueError, match=rf"tokenizer=gpt2: .*{reason}.*TIKTOKEN_CACHE_DIR") as raised:
        make_gpt2_tokenizer()
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_named_in_one_line(server, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ValueError, match="File exists.*TIKTOKEN_CACHE_DIR") as raised:
        make_gpt2_tokenizer()
    assert "\n" not in str(raised.value)


def test_without_a_network_one_line_names_the_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ValueError, match="tokenizer=gpt2: .*TIKTOKEN_CACHE_DIR.*--tokenizer=bpe") as raised:
        make_gpt2_tokenizer()
    assert "\n" not in str(raised.value)
    assert "Connection refused" in str(raised.value) and "Max retries" not in str(raised.value)
    assert capsys.readouterr() == ("", FETCHING)
    assert not os.listdir(tmp_path)
