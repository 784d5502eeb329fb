"""A folder goes to the Hub in the background. If something goes wrong there, a line says so, and nothing stops."""

import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from support import ROOT

# How each process below begins: a run that saves, without the training. The package's __init__ is left out, because it
# imports torch and transformers, which takes seconds.
RUN = (
    f"""
import sys, types
sys.modules["modeling_nanogpt"] = types.ModuleType("modeling_nanogpt")
sys.modules["modeling_nanogpt"].__path__ = [{str(ROOT / "modeling_nanogpt")!r}]
"""
    + """
from pathlib import Path
from modeling_nanogpt.training.hub import Pusher

class Run:
    def __init__(self, name, **kwargs):
        self.out_dir = Path("out", name.split("/")[-1])
        self.pusher = Pusher(name, self.out_dir, **{"private": True, "strategy": "every_save"} | kwargs)

    def save(self, step, folders=(".",)):
        for folder in folders:
            (self.out_dir / folder).mkdir(parents=True, exist_ok=True)
            for name in ("model.safetensors", "README.md", "history.jsonl"):
                aside = self.out_dir / folder / ".aside"
                aside.write_text(f"{name} of step {step}" * 1000)
                aside.rename(self.out_dir / folder / name)
        self.pusher.saved(f"step {step}")

    def settle(self):
        if self.pusher.next:
            self.pusher.next.result()
"""
)


def start(hub, home, code, token="hf_alice", **more):
    """The end of a process that pushes."""
    return hub.run(home, [sys.executable, "-c", RUN + textwrap.dedent(code)], token, **more)


def pushed(hub, home, code, token="hf_alice"):
    """What such a process printed on both streams. It must have ended without an error."""
    done = start(hub, home, code, token)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def step_of(repository, name="model.safetensors"):
    """The save from which a file in the repository comes. The whole file must come from one save."""
    content = repository.files[name].decode()
    (step,) = set(re.findall(r"of step (\d+)", content))
    assert content == f"{name} of step {step}" * 1000
    return int(step)


def test_each_save_is_one_commit_of_what_was_saved(hub, tmp_path):
    said, warned = pushed(
        hub,
        tmp_path,
        """
        run = Run("alice/run")
        for step in (1, 2):
            run.save(step)
            run.settle()
        run.pusher.finish()
        print(sorted(path.name for path in run.out_dir.iterdir()))
        """,
    )
    repository = hub.model("alice/run")
    assert repository.titles == ["initial commit", "step 1", "step 2"]
    assert [set(commit.files) for commit in repository.commits[1:]] == [
        {"model.safetensors", "README.md", "history.jsonl"}
    ] * 2
    assert step_of(repository) == 2 and repository.private
    assert said == [
        f"out/run is on the Hub: {hub.url}/alice/run",
        str(["README.md", "history.jsonl", "model.safetensors"]),
    ]
    assert not warned


def test_only_the_newest_waiting_save_is_pushed_and_no_save_changes_meanwhile(hub, tmp_path):
    hub.delay("POST .*/run/commit/", 1.0)
    hub.delay("POST /alice/run.git", 0.5)
    pushed(
        hub,
        tmp_path,
        """
        run = Run("run")  # alice's, as the token is
        for step in range(1, 5):
            run.save(step)
        run.pusher.finish()
        assert not (run.out_dir / ".pushing").exists()
        """,
    )
    repository = hub.model("alice/run")
    assert repository.titles == ["initial commit", "step 1", "step 4"]
    for commit, step in zip(repository.commits[1:], (1, 4), strict=True):
        assert all(f"of step {step}".encode() in stored.content for stored in commit.files.values())
    assert step_of(repository) == 4


@pytest.mark.parametrize(
    ("strategy", "titles", "files"),
    [
        ("end", ["step 3"], {"model.safetensors", "README.md", "history.jsonl", "logs/history.jsonl"}),
        ("every_save", ["step 1", "step 2", "step 3"], {"model.safetensors", "logs/model.safetensors"}),
        ("checkpoint", ["step 1", "step 2", "step 3"], {"last-checkpoint/step-00000003/history.jsonl"}),
    ],
)
def test_what_each_strategy_pushes(hub, tmp_path, strategy, titles, files):
    pushed(
        hub,
        tmp_path,
        f"""
        run = Run("alice/run", strategy="{strategy}")
        for step in (1, 2, 3):
            run.save(step, [".", "logs", f"checkpoints/step-0000000{{step}}", ".hidden", "logs/.hidden"])
            run.settle()
        run.pusher.finish()
        """,
    )
    repository = hub.model("alice/run")
    assert repository.titles[1:] == titles
    assert files <= repository.files.keys()
    folders = {str(Path(name).parent) for name in repository.files}
    last = {"last-checkpoint/step-00000003"} if strategy == "checkpoint" else set()  # the older ones were removed
    assert folders == {".", "logs"} | last
    assert all(b"of step 3" in content for content in repository.files.values())


FAULTS = {
    "refused": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 401),
    "forbidden": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 403),
    "conflict": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 409),
    "moved": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 412),
    "limited": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 429),
    "broken": lambda hub, name: hub.fail(f"POST .*/{name}/commit/", 500),
    "dropped": lambda hub, name: hub.drop(f"POST .*/{name}/commit/"),
}
STATUS = {"refused": 401, "forbidden": 403, "conflict": 409, "moved": 412, "limited": 429, "broken": 500}


def test_a_push_that_fails_is_one_line_and_the_next_save_brings_all(hub, tmp_path):
    for name in FAULTS:
        hub.put("models", f"alice/{name}", {}, private=True)
    for name, switch_on in FAULTS.items():
        switch_on(hub, name)
    _, warned = pushed(
        hub,
        tmp_path,
        f"""
        for name in {list(STATUS) + ["dropped"]}:
            run = Run(f"alice/{{name}}")
            run.save(1)
            run.settle()
            print(name, file=sys.stderr)
            run.save(2)
            run.settle()
        """,
    )
    assert warned[1::2] == [*STATUS, "dropped"]  # a line, then the name
    for line, status in zip(warned[::2], STATUS.values(), strict=False):
        assert line.startswith(f"warning: step 1 is not on the Hub yet ({status}: ")
    assert "step 1 is not on the Hub yet" in warned[-2] and "disconnected" in warned[-2]
    for name in [*STATUS, "dropped"]:
        repository = hub.model(f"alice/{name}")
        assert repository.titles == ["initial commit", "put", "step 2"], name
        assert step_of(repository) == step_of(repository, "README.md") == 2, name


def test_an_upload_that_is_cut_off_is_begun_again(hub, tmp_path):
    hub.drop("PUT /storage/")  # the client waits a second
    _, warned = pushed(hub, tmp_path, 'run = Run("alice/run")\nrun.save(1)\nrun.pusher.finish()')
    assert step_of(hub.model("alice/run")) == 1 and not warned


def test_a_failed_last_push_is_tried_once_more_at_the_end(hub, tmp_path):
    hub.fail("POST .*/commit/", 500)
    _, warned = pushed(hub, tmp_path, 'run = Run("alice/run")\nrun.save(1)\nrun.pusher.finish()')
    assert len(warned) == 1 and step_of(hub.model("alice/run")) == 1


def test_a_save_that_arrives_does_not_make_up_for_a_later_one_that_failed(hub, tmp_path):
    hub.delay("POST .*/commit/", 0.5)
    hub.fail("POST .*/commit/", 500)
    _, warned = pushed(hub, tmp_path, 'run = Run("alice/run")\nrun.save(1)\nrun.save(2)\nrun.pusher.finish()')
    assert len(warned) == 1 and hub.model("alice/run").titles == ["initial commit", "step 1", "step 2"]


def test_a_repository_that_was_removed_is_made_anew(hub, tmp_path):
    pushed(
        hub,
        tmp_path,
        """
        from huggingface_hub import delete_repo
        run = Run("alice/run")
        delete_repo("alice/run")
        run.save(1)
        run.settle()
        run.save(2)
        run.pusher.finish()
        """,
    )
    assert step_of(hub.model("alice/run")) == 2 and hub.model("alice/run").private


def test_the_end_names_the_command_that_pushes_and_it_does(hub, tmp_path):
    hub.fail("POST .*/commit/", 500, times=2)
    said, warned = pushed(
        hub,
        tmp_path,
        """
        run = Run("alice/run", strategy="checkpoint")
        run.save(1, [".", "checkpoints/step-00000001", "logs"])
        run.pusher.finish()
        """,
    )
    assert len(warned) == 2 and len(said) == 2
    command = shlex.split(said[1])
    assert command[:4] == ["hf", "upload", "alice/run", "out/run"]
    hub.repositories.clear()
    done = hub.run(tmp_path, [Path(sys.executable).with_name("hf"), *command[1:]])
    assert done.returncode == 0, done.stderr
    assert hub.model("alice/run").private
    assert {str(Path(name).parent) for name in hub.model("alice/run").files} == {".", "logs"}
    assert step_of(hub.model("alice/run")) == 1


def test_a_hub_that_is_gone_all_along_costs_a_line_a_save_and_the_command_brings_all(hub, tmp_path):
    hub.stop()
    code = """
        import time
        began = time.monotonic()
        run = Run("run")
        for step in (1, 2):
            run.save(step)
            run.settle()
        run.save(3)
        run.pusher.finish()
        assert time.monotonic() - began < 5
    """
    said, warned = pushed(hub, tmp_path, code)
    assert warned[0].startswith("warning: the Hub cannot be reached (") and "Connection refused" in warned[0]
    assert [line.split(" is not")[0] for line in warned[1:]] == [f"warning: step {step}" for step in (1, 2, 3, 3)]
    assert shlex.split(said[1])[:4] == ["hf", "upload", "run", "out/run"]
    hub.start()
    done = hub.run(tmp_path, [Path(sys.executable).with_name("hf"), *shlex.split(said[1])[1:]])
    assert done.returncode == 0, done.stderr
    assert step_of(hub.model("alice/run")) == 3


def test_a_hub_that_is_gone_at_the_start_may_come_back(hub, tmp_path):
    hub.fail("GET /api/whoami-v2", 503)
    _, warned = pushed(hub, tmp_path, 'run = Run("run")\nrun.save(1)\nrun.pusher.finish()')
    assert len(warned) == 1 and "503" in warned[0]
    assert step_of(hub.model("alice/run")) == 1 and hub.model("alice/run").private


def test_a_disk_that_has_no_room_for_a_copy_costs_a_line(hub, tmp_path):
    said, warned = pushed(
        hub,
        tmp_path,
        """
        run = Run("alice/run")
        run.out_dir.mkdir(parents=True)
        (run.out_dir / ".pushing").write_text("a file where the folder would be")
        run.save(1)
        run.save(2)
        (run.out_dir / ".pushing").unlink()
        run.pusher.finish()
        """,
    )
    assert [line.split(" is not")[0] for line in warned] == ["warning: step 1", "warning: step 2"]
    assert step_of(hub.model("alice/run")) == 2 and "is on the Hub" in said[0]


def test_what_the_hub_refuses_is_one_line_before_anything_is_there(hub, tmp_path):
    hub.put("models", "alice/public", {})
    hub.put("models", "bob/his", {})
    hub.put("models", "bob/hidden", {}, private=True)
    names = ["a b", "alice/run--1", "alice/x/y", ".x", "bob/his", "bob/hidden", "bob/new", "carol/new", "alice/public"]
    ask = f"""
        for name in {names}:
            try:
                Run(name)
            except ValueError as mistake:
                print(mistake)
        assert not Path("out").exists()
    """
    said, _ = pushed(hub, tmp_path, ask)
    assert len(said) == len(names)
    for name, line in zip(names, said, strict=True):
        assert line.startswith(f"hub_model_id={name}"), line
    assert all("cannot be the name of a repository" in line for line in said[:4])
    assert all("403" in line or "404" in line for line in said[4:8])
    assert "--hub_private_repo=false" in said[8]
    assert hub.repositories.keys() == {("models", name) for name in ("alice/public", "bob/his", "bob/hidden")}
    one = 'try:\n    Run("alice/run")\nexcept ValueError as mistake:\n    print(mistake)'
    for token, words in {
        None: ("push_to_hub", "hf auth login", "HF_TOKEN"),
        "hf_nobody": ("401", "token"),
        "hf_alice_reads": ("403", "alice"),
        "hf_with a blank": ("push_to_hub", "token"),
    }.items():
        (line,), _ = pushed(hub, tmp_path, one, token)
        assert all(word in line for word in words), line
    done = start(hub, tmp_path, one, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in done.stdout and done.stdout.count("\n") == 1


def test_notes_written_on_the_hub_survive_a_push_unless_there_are_others_here(hub, tmp_path):
    card = "{}<!-- your notes -->\n{}<!-- end of your notes -->\n"
    hub.put("models", "alice/run", {"README.md": card.format("old\n", "theirs\n").encode()}, private=True)
    write = """
        run = Run("alice/run")
        run.out_dir.mkdir(parents=True, exist_ok=True)
        (run.out_dir / "README.md").write_text({!r})
        run.pusher.saved("step 1")
        run.pusher.finish()
    """
    pushed(hub, tmp_path, write.format(card.format("new\n", "")))
    assert hub.model("alice/run").files["README.md"].decode() == card.format("new\n", "theirs\n")
    assert (tmp_path / "out/run/README.md").read_text() == card.format("new\n", "")  # only the copy was changed
    pushed(hub, tmp_path, write.format(card.format("new\n", "mine\n")))
    assert hub.model("alice/run").files["README.md"].decode() == card.format("new\n", "mine\n")


def test_no_token_is_printed(hub, tmp_path):
    hub.fail("POST .*/commit/", 500, times=3, **{"X-Error-Message": "hf_alice may not"})
    said, warned = pushed(hub, tmp_path, 'run = Run("alice/run")\nrun.save(1)\nrun.pusher.finish()')
    assert any("(the token) may not" in line for line in warned)
    assert not any("hf_alice" in line for line in said + warned)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def test_a_fetch_that_was_killed_leaves_no_half_of_a_file(hub, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights " * 99, "tokenizer.json": b"{}"}
    last = {"last-checkpoint/step-00000004/state.json": b"{}"}
    hub.put("models", "alice/run", files | last)
    killed = """
    import os, shutil
    from pathlib import Path
    from modeling_nanogpt.training.hub import fetch_run

    def die_half_way(source, target):
        content = Path(source).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2])
        if Path(source).name == "model.safetensors":
            os._exit(9)
        Path(target).write_bytes(content)

    shutil.copyfile = die_half_way
    fetch_run("alice/run", Path("out"))
    """
    out_dir = tmp_path / "machine" / "out"
    assert start(hub, tmp_path / "machine", killed).returncode == 9
    assert (out_dir / "config.json").exists() and not (out_dir / "model.safetensors").exists()
    pushed(hub, tmp_path / "machine", killed.replace("shutil.copyfile = die_half_way", ""))
    found = {name: (out_dir / name).read_bytes() for name in files}
    assert found == files
    assert (out_dir / "checkpoints" / "step-00000004" / "state.json").read_bytes() == b"{}"
    assert {path.name for path in out_dir.iterdir()} <= {*files, "checkpoints", ".fetching"}
