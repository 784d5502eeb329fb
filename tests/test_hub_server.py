"""The loopback Hub of the tests answers the real client as the Hub would."""

import os
import subprocess
import sys
import textwrap

from support import ROOT


def client(hub, home, code, token="hf_alice"):
    """What a process prints that knows only this Hub."""
    done = hub.run(home, [sys.executable, "-c", textwrap.dedent(code)], token, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_comes_back_as_it_was_pushed(hub, tmp_path):
    push = """
        import torch
        from transformers import AutoTokenizer
        from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
        from tokenization.vocabularies import train_char_tokenizer
        torch.manual_seed(0)
        model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32))
        model.push_to_hub("tiny", private=True)
        train_char_tokenizer(["some text"]).push_to_hub("alice/tiny")
        print(model(torch.arange(16)[None]).logits.double().sum().item())
    """
    pull = """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("alice/tiny", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("alice/tiny", trust_remote_code=True)
        assert tokenizer.decode(tokenizer("some text").input_ids) == "some text"
        print(model(torch.arange(16)[None]).logits.double().sum().item())
    """
    homes = [tmp_path / name for name in ("push", "pull")]
    assert client(hub, homes[0], push) == client(hub, homes[1], pull)
    assert hub.model("alice/tiny").private
    assert "model.safetensors" in hub.model("alice/tiny").files


def test_files_come_back_as_they_were_uploaded(hub, tmp_path):
    output = client(
        hub,
        tmp_path,
        """
        import os
        from pathlib import Path
        from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import *
        api = HfApi()
        assert api.whoami()["name"] == "alice"
        assert api.create_repo("files").repo_id == api.create_repo("files", exist_ok=True).repo_id == "alice/files"
        Path("in/deep/er").mkdir(parents=True)
        big = os.urandom(300_000)
        contents = {"a.txt": b"a", "big.safetensors": big, ".gitignore": b""}
        contents |= {"deep/b.md": b"b", "deep/er/c d.txt": b""}
        for path, content in contents.items():
            Path("in", path).write_bytes(content)
        first = api.upload_folder(repo_id="alice/files", folder_path="in")
        again = api.upload_folder(repo_id="alice/files", folder_path="in")
        assert first.oid == again.oid  # nothing new, no commit
        found = Path(snapshot_download("alice/files"))
        assert {path: (found / path).read_bytes() for path in contents} == contents
        found = Path(snapshot_download("alice/files", local_dir="out", allow_patterns="deep/*"))
        assert {str(path.relative_to(found)) for path in found.rglob("*.*") if ".cache" not in path.parts} == {
            "deep/b.md", "deep/er/c d.txt"}

        top = {entry.path for entry in api.list_repo_tree("alice/files")}
        assert top == {"a.txt", "big.safetensors", "deep", ".gitignore"}
        deep = [entry.path for entry in api.list_repo_tree("alice/files", "deep", recursive=True)]
        assert deep == ["deep/b.md", "deep/er", "deep/er/c d.txt"]
        assert [info.path for info in api.get_paths_info("alice/files", ["a.txt", "deep", "no"])] == ["a.txt", "deep"]

        api.create_branch("alice/files", branch="other")
        api.create_tag("alice/files", tag="v1")
        api.upload_file(repo_id="alice/files", path_or_fileobj=b"b", path_in_repo="a.txt")
        assert Path(hf_hub_download("alice/files", "a.txt")).read_bytes() == b"b"
        assert Path(hf_hub_download("alice/files", "a.txt", revision="other")).read_bytes() == b"a"
        assert Path(hf_hub_download("alice/files", "a.txt", revision="v1")).read_bytes() == b"a"
        assert Path(hf_hub_download("alice/files", "a.txt", revision=first.oid)).read_bytes() == b"a"

        api.delete_folder("deep", "alice/files")
        assert api.list_repo_files("alice/files") == [".gitignore", "a.txt", "big.safetensors"]
        for error, call in [
            (EntryNotFoundError, lambda: hf_hub_download("alice/files", "no.txt")),
            (RevisionNotFoundError, lambda: hf_hub_download("alice/files", "a.txt", revision="no")),
            (RepositoryNotFoundError, lambda: hf_hub_download("alice/no", "a.txt")),
            (EntryNotFoundError, lambda: list(api.list_repo_tree("alice/files", "no"))),
            (RepositoryNotFoundError, lambda: api.model_info("alice/no")),
        ]:
            try:
                call()
            except error:
                continue
            raise SystemExit(f"no {error}")
        try:
            deletion = [CommitOperationDelete("a.txt")]
            api.create_commit("alice/files", deletion, commit_message="x", parent_commit=first.oid)
        except HfHubHTTPError as error:
            print(error.response.status_code)
        """,
    )
    assert output == "412\n"
    assert set(hub.model("alice/files").files) == {".gitignore", "a.txt", "big.safetensors"}
    assert sum(request.startswith("PUT /storage/") for request in hub.requests) == 1  # the large file went once


def test_a_dataset_comes_back_as_it_was_pushed_streamed_too(hub, tmp_path):
    hub.put("datasets", "bob/text", {"train.txt": b"one\ntwo\n", "test.txt": b"three\n"})
    push = """
        from datasets import Dataset, DatasetDict
        texts = {split: {"text": [f"{split} {i}" for i in range(100)]} for split in ("train", "test")}
        rows = DatasetDict({split: Dataset.from_dict(texts[split]) for split in texts})
        rows.push_to_hub("alice/rows", private=True)
    """
    pull = """
        from datasets import load_dataset
        for streaming in (False, True):
            rows = load_dataset("alice/rows", split="test", streaming=streaming)
            assert [row["text"] for row in rows] == [f"test {i}" for i in range(100)], streaming
            rows = load_dataset("bob/text", split="train", streaming=streaming)
            assert [row["text"] for row in rows] == ["one", "two"], streaming
    """
    homes = [tmp_path / name for name in ("push", "pull")]
    client(hub, homes[0], push)
    client(hub, homes[1], pull)
    assert hub.dataset("alice/rows").private


def test_who_may_read_and_write_what(hub, tmp_path):
    hub.put("models", "alice/secret", {"a.txt": b"a"}, private=True)
    hub.put("models", "bob/open", {"a.txt": b"a"})
    ask = """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import *
        api = HfApi()
        def status(call, *args, **kwargs):
            try:
                call(*args, **kwargs)
                return "ok"
            except HfHubHTTPError as error:
                return f"{error.response.status_code} {type(error).__name__}"
            except Exception as error:
                return type(error).__name__
        print(status(api.whoami))
        print(status(api.model_info, "alice/secret"))
        print(status(api.model_info, "bob/open"))
        print(status(api.create_repo, "alice/new", exist_ok=True))
        print(status(api.auth_check, "bob/open", write=True))
        print(status(api.upload_file, path_or_fileobj=b"b", path_in_repo="a.txt", repo_id="alice/secret"))
    """
    missing, forbidden, refused = "404 RepositoryNotFoundError", "403 HfHubHTTPError", "401 HfHubHTTPError"
    hidden = "401 RepositoryNotFoundError"
    answers = {
        "hf_alice": ["ok", "ok", "ok", "ok", forbidden, "ok"],
        # alice/new exists by now and is public: with exist_ok, create_repo is content with that
        "hf_alice_reads": ["ok", "ok", "ok", "ok", forbidden, forbidden],
        "hf_bob": ["ok", missing, "ok", "ok", "ok", missing],
        "hf_nobody": [refused] * 6,
        None: ["LocalTokenNotFoundError", hidden, "ok", "ok", refused, hidden],
    }
    for token, expected in answers.items():
        assert client(hub, tmp_path, ask, token).splitlines() == expected, token


def test_faults_are_what_they_say(hub, tmp_path):
    hub.put("models", "alice/files", {"a.txt": b"a"})
    hub.fail("GET /api/models/alice/files$", 500)
    hub.drop("PUT /storage/")  # the client tries again after a second
    hub.delay("POST .*/commit/", 0.5)
    output = client(
        hub,
        tmp_path,
        """
        import os, time
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        api = HfApi()
        try:
            api.model_info("alice/files")
        except HfHubHTTPError as error:
            print(error.response.status_code)
        api.model_info("alice/files")
        api.upload_file(path_or_fileobj=os.urandom(1 << 20), path_in_repo="b.bin", repo_id="alice/files")
        """,
    )
    assert output == "500\n"
    assert len(hub.model("alice/files").files["b.bin"]) == 1 << 20
    assert sum(request.startswith("PUT /storage/") for request in hub.requests) == 2
    hub.stop()
    ask = """
        from huggingface_hub import HfApi
        try:
            print(HfApi().whoami()["name"])
        except Exception as error:
            print(type(error).__name__)
        """
    assert client(hub, tmp_path, ask) == "ConnectError\n"
    hub.start()
    assert client(hub, tmp_path, ask) == "alice\n"


def test_it_runs_as_a_process_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "tests" / "support" / "hub.py"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        code = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_bob"}
        assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "bob\n"
    finally:
        server.terminate()
        server.wait()
