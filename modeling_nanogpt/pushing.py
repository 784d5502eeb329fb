"""A run's folder on the Hub: checked before training, pushed in the background meanwhile, fetched to go on from it."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, logging, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, disable_progress_bars, validate_repo_id
from tqdm import tqdm

from .notes import notes_of, with_notes

CHECKPOINTS = "checkpoints"  # in out_dir: a folder for each step, with what only a resume needs
LAST = "last-checkpoint"  # in the repository: holds the newest of these folders
REFUSALS = (400, 401, 402, 403, 404)  # HTTP statuses that no waiting mends


class Pusher:
    """Pushes out_dir as it is at a save: one upload at a time, in the background; of those that wait, the newest.

    An upload is one commit, of a copy that the next save cannot change. Where it fails, one line says so, training
    goes on, and the next save brings all. `strategy` is `end` (push once, in `finish`), `every_save`, or `checkpoint`:
    every save, and beside it what a resume needs. Raises ValueError where the Hub refuses the name or the token.
    """

    def __init__(self, model_id: str, out_dir: Path, private: bool, strategy: str):
        self.model_id, self.out_dir, self.private, self.strategy = model_id, out_dir, private, strategy
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.next: Future | None = None
        self.copies = 0
        self.unpushed: str | None = None  # what to say of the newest save, until the Hub has it
        self.checked = False
        try:
            self.check_access()
        except ValueError:
            raise
        except Exception as error:  # of the client or of the connection: the Hub may be back at the next save
            self.warn(f"the Hub cannot be reached ({explain(error)}); training starts all the same")
        shutil.rmtree(out_dir / ".pushing", ignore_errors=True)  # of a run that was killed
        disable_progress_bars()  # the bar on the screen is the loop's
        logging.set_verbosity_error()  # nor is a line due each time that the client tries again

    def check_access(self) -> None:
        """See that the repository may be written to; make it if it is new. Raises ValueError where the Hub refuses."""
        flag = f"hub_model_id={self.model_id}"
        try:
            validate_repo_id(self.model_id)
        except HFValidationError as error:
            raise ValueError(f"{flag} is no name for a repository: {explain(error)}") from None
        token = get_token()
        if token is None:
            raise ValueError("push_to_hub=true needs a token: run `hf auth login`, or set HF_TOKEN")
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError(
                "push_to_hub=true: the token (HF_TOKEN, or of `hf auth login`) has characters that none has"
            )
        api = HfApi()
        try:
            user = api.whoami()["name"]
            name = self.model_id if "/" in self.model_id else f"{user}/{self.model_id}"
            api.create_repo(name, private=self.private, exist_ok=True)
            api.auth_check(name, write=True)
            public = not api.model_info(name).private
        except OfflineModeIsEnabled:
            raise ValueError("push_to_hub=true, but HF_HUB_OFFLINE forbids it: unset it, or push later") from None
        except HfHubHTTPError as error:
            if error.response.status_code in REFUSALS:
                raise ValueError(f"{flag}: the Hub refuses the token, or to write there ({explain(error)})") from None
            raise
        if self.private and public:
            raise ValueError(f"{flag} is public on the Hub: agree by --hub_private_repo=false, or give another name")
        self.model_id, self.checked = name, True

    def saved(self, message: str) -> None:
        """Push what out_dir holds now, or in the end. `message` is the commit's, another one for each save."""
        self.unpushed = message
        if self.strategy != "end":
            self.start()

    def finish(self, message: str | None = None) -> None:
        """Wait until the Hub has the newest save; where it will not have it, print the command that brings it.

        With a `message`, out_dir has changed since the last save, as a run that was stopped has left a checkpoint.
        """
        if message:
            self.saved(message)
        if self.next:
            wait([self.next])
        if self.unpushed:
            self.start()
        self.worker.shutdown()
        shutil.rmtree(self.out_dir / ".pushing", ignore_errors=True)
        if self.unpushed:
            command = ["hf", "upload", self.model_id, str(self.out_dir), "."] + ["--private"] * self.private
            command += [f"--exclude={pattern}" for pattern in (f"{CHECKPOINTS}/*", ".*")]
            tqdm.write(f"{self.out_dir} is whole, but not on the Hub; this brings it there:\n{shlex.join(command)}")
        elif self.next:
            tqdm.write(f"{self.out_dir} is on the Hub: {HfApi().endpoint}/{self.model_id}")

    def start(self) -> None:
        """Have a copy of out_dir pushed as soon as the upload on its way is through."""
        if self.next and self.next.cancel():  # an older save, which still waited
            shutil.rmtree(self.out_dir / ".pushing" / str(self.copies), ignore_errors=True)
        self.copies += 1
        copy = self.out_dir / ".pushing" / str(self.copies)
        try:
            self.write_copy(copy)
            self.next = self.worker.submit(self.push, copy, self.unpushed)
        except OSError as error:  # no room for the copy
            shutil.rmtree(copy, ignore_errors=True)
            self.warn(f"{self.unpushed} is not on the Hub yet ({explain(error)})")

    def write_copy(self, copy: Path) -> None:
        """Make a folder as the repository will be; of files that saving replaces and never changes, links."""
        for name, source in self.files():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # some file systems know no links
                if source.suffix in (".safetensors", ".pt"):
                    os.link(source, target)
            if not target.exists():
                shutil.copyfile(source, target)

    def files(self) -> Iterator[tuple[Path, Path]]:
        """Names in the repository and the files of out_dir that go there; hidden ones stay."""
        for path in sorted(self.out_dir.rglob("*")):
            name = path.relative_to(self.out_dir)
            if path.is_file() and name.parts[0] != CHECKPOINTS and not any(part[0] == "." for part in name.parts):
                yield name, path
        checkpoints = sorted(self.out_dir.glob(f"{CHECKPOINTS}/step-*"))
        if self.strategy == "checkpoint" and checkpoints:
            newest = checkpoints[-1]
            yield from ((Path(LAST, newest.name, path.name), path) for path in sorted(newest.iterdir()))

    def push(self, copy: Path, message: str) -> None:
        """Make the repository hold the copy, by one commit."""
        api = HfApi()
        try:
            if not self.checked:
                self.check_access()
            # the client asks this once, and other things again and again: where the Hub is gone, it shows at once
            info = api.model_info(self.model_id)
            there = {sibling.rfilename for sibling in info.siblings}
            card = copy / "README.md"
            if card.exists() and card.name in there:
                keep_notes(card, Path(api.hf_hub_download(self.model_id, card.name, revision=info.sha)))
            files = {path.relative_to(copy).as_posix(): path for path in copy.rglob("*") if path.is_file()}
            changes = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            if self.strategy == "checkpoint":
                older = sorted(name for name in there - files.keys() if name.startswith(f"{LAST}/"))
                changes += [CommitOperationDelete(name) for name in older]
            api.create_commit(self.model_id, changes, commit_message=message)
            if self.unpushed == message:
                self.unpushed = None
        except Exception as error:  # of the client, the connection or the disk: none is a reason to stop training
            if isinstance(error, RepositoryNotFoundError):
                self.checked = False  # removed meanwhile: the next push makes it anew
            self.warn(f"{message} is not on the Hub yet ({explain(error)})")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def warn(self, what: str) -> None:
        tqdm.write(f"warning: {what}", file=sys.stderr)


def start_pusher(is_main: bool, out_dir: Path, model_id: str | None, private: bool, strategy: str) -> Pusher | None:
    """The Pusher of the main process, None of the others; all raise ValueError what the Hub refuses it.

    Without a model_id, out_dir's name is that of the repository.
    """
    from .launching import main_first  # which imports torch, and pushing needs none

    name = model_id or out_dir.absolute().name
    return main_first(lambda: Pusher(name, out_dir, private, strategy) if is_main else None)


def fetch_run(init_from: str, model_id: str | None, out_dir: Path) -> None:
    """Where init_from is `resume`, bring a run pushed with strategy `checkpoint` into an out_dir without checkpoints.

    Files of out_dir stay as they are. Raises ValueError where there is no such run, or it cannot be fetched.
    """
    if init_from != "resume" or not model_id or any(out_dir.glob(f"{CHECKPOINTS}/step-*")):
        return
    flag = f"init_from=resume, hub_model_id={model_id}"
    try:
        name = model_id if "/" in model_id else f"{HfApi().whoami()['name']}/{model_id}"
        fetched = Path(snapshot_download(name))
    except Exception as error:  # of the client or the connection
        raise ValueError(f"{flag}: it cannot be fetched ({explain(error)})") from None
    checkpoints = sorted(fetched.glob(f"{LAST}/step-*"))
    if not checkpoints:
        raise ValueError(f"{flag} holds no {LAST}/: it was not pushed with --hub_strategy=checkpoint")
    out_dir.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(out_dir / ".fetching"):  # every process of a run comes here, and the first does it
        for path in sorted(fetched.rglob("*")):
            name, target = path.relative_to(fetched), out_dir / path.relative_to(fetched)
            if path.is_file() and name.parts[0] != LAST and name.parts[0][0] != "." and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        newest = out_dir / CHECKPOINTS / checkpoints[-1].name
        if not newest.exists():
            aside = newest.with_name(f".{newest.name}")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(checkpoints[-1], aside)  # the files that the cache but links to
            aside.rename(newest)


def keep_notes(card: Path, theirs: Path) -> None:
    """Put the notes of the card on the Hub into ours, if it has none of its own."""
    text = card.read_text(encoding="utf-8")
    if not notes_of(text).strip():
        card.write_text(with_notes(text, notes_of(theirs.read_text(encoding="utf-8"))), encoding="utf-8")


def explain(error: Exception) -> str:
    """What went wrong, in one line that never holds the token."""
    line = (getattr(error, "server_message", None) or str(error)).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        line = f"{error.response.status_code}: {line}"
    elif error.__cause__ and explain(error.__cause__) not in line:
        line = f"{line} {explain(error.__cause__)}"
    token = get_token()
    return line.replace(token, "(the token)") if token else line
