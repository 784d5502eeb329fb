"""A run on the Hub: the repository is checked before training, pushed to in the background, and fetched to resume."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, logging, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, disable_progress_bars, validate_repo_id
from tqdm import tqdm

from ..card_notes import notes_of, with_notes
from ..sources import first_line
from .atomic import folder_written_aside
from .checkpointing import CHECKPOINTS, in_order, list_checkpoints

LAST = "last-checkpoint"  # in the repository: holds the newest checkpoint of the run
REFUSALS = (400, 401, 402, 403, 404)  # HTTP statuses that waiting does not mend


class Pusher:
    """Pushes out_dir as it is at a save. One upload runs at a time, in the background; only the newest save waits.

    An upload is one commit of a copy, which the next save cannot change. If an upload fails, one line says so,
    training goes on, and the next save brings everything. `strategy` is `end` (push once, in `finish`), `every_save`,
    or `checkpoint` (every save, with the checkpoint beside the model). Raises ValueError if the Hub refuses the name
    or the token.
    """

    def __init__(self, model_id: str, out_dir: Path, private: bool, strategy: str):
        self.model_id, self.out_dir, self.private, self.strategy = model_id, out_dir, private, strategy
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.next: Future | None = None
        self.copies = 0
        self.unpushed: str | None = None  # commit message of the newest save, until the Hub has it
        self.checked = False
        try:
            self.check_access()
        except ValueError:
            raise
        except Exception as error:  # from the client or the connection: the Hub may be back at the next save
            self.warn(f"the Hub cannot be reached ({explain(error)}); training starts all the same")
        shutil.rmtree(out_dir / ".pushing", ignore_errors=True)  # a killed run may have left it
        disable_progress_bars()  # the bar on the screen belongs to the loop
        logging.set_verbosity_error()  # the client would print a line each time that it tries again

    def check_access(self) -> None:
        """Check that the repository may be written to, and make it if it is new. Raises ValueError if not."""
        flag = f"hub_model_id={self.model_id}"
        try:
            validate_repo_id(self.model_id)
        except HFValidationError as error:
            raise ValueError(f"{flag} cannot be the name of a repository: {explain(error)}") from None
        token = get_token()
        if token is None:
            raise ValueError("push_to_hub=true needs a token: run `hf auth login`, or set HF_TOKEN")
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError(
                "push_to_hub=true: the token has characters that no token has: set HF_TOKEN again, or run "
                "`hf auth login`"
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
            raise ValueError(f"{flag} is public on the Hub: agree by --hub_private_repo=false, or use another name")
        self.model_id, self.checked = name, True

    def saved(self, message: str) -> None:
        """Push what out_dir holds now, or leave that to `finish` if the strategy is `end`. A save has its message."""
        self.unpushed = message
        if self.strategy != "end":
            self.start(message)

    def finish(self, message: str | None = None) -> None:
        """Wait until the Hub has the newest save. If the Hub does not take it, print the command that brings it there.

        Give a `message` if out_dir has changed since the last save: a run that was stopped has left a checkpoint.
        """
        if message:
            self.saved(message)
        if self.next:
            wait([self.next])
        if self.unpushed:
            self.start(self.unpushed)
        self.worker.shutdown()
        shutil.rmtree(self.out_dir / ".pushing", ignore_errors=True)
        if self.unpushed:
            command = ["hf", "upload", self.model_id, str(self.out_dir), "."]
            command += [f"--exclude={CHECKPOINTS}/*", "--exclude=.*"]
            if self.private:
                command.append("--private")
            tqdm.write(f"{self.out_dir} is complete, but not on the Hub; this brings it there:\n{shlex.join(command)}")
        elif self.next:
            tqdm.write(f"{self.out_dir} is on the Hub: {HfApi().endpoint}/{self.model_id}")

    def start(self, message: str) -> None:
        """Have a copy of out_dir pushed as soon as the running upload has ended."""
        if self.next and self.next.cancel():  # an older save still waited
            shutil.rmtree(self.out_dir / ".pushing" / str(self.copies), ignore_errors=True)
        self.copies += 1
        copy = self.out_dir / ".pushing" / str(self.copies)
        try:
            self.write_copy(copy)
            self.next = self.worker.submit(self.push, copy, message)
        except OSError as error:  # the disk has no room for the copy
            shutil.rmtree(copy, ignore_errors=True)
            self.warn(f"{message} is not on the Hub yet ({explain(error)})")

    def write_copy(self, copy: Path) -> None:
        """Make a folder as the repository will be. Large files become links, because saving never changes a file."""
        for name, source in self.files():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # some file systems have no links
                if source.suffix in (".safetensors", ".pt"):
                    os.link(source, target)
            if not target.exists():
                shutil.copyfile(source, target)

    def files(self) -> Iterator[tuple[Path, Path]]:
        """Names in the repository, and the files of out_dir that go there. Hidden files do not go there."""
        for path in sorted(self.out_dir.rglob("*")):
            name = path.relative_to(self.out_dir)
            if path.is_file() and name.parts[0] != CHECKPOINTS and not any(part[0] == "." for part in name.parts):
                yield name, path
        checkpoints = list_checkpoints(self.out_dir)
        if self.strategy == "checkpoint" and checkpoints:
            newest = checkpoints[-1]
            yield from ((Path(LAST, newest.name, path.name), path) for path in sorted(newest.iterdir()))

    def push(self, copy: Path, message: str) -> None:
        """Make the repository hold the copy, in one commit."""
        api = HfApi()
        try:
            if not self.checked:
                self.check_access()
            # the client does not retry this request, so an unreachable Hub shows at once
            info = api.model_info(self.model_id)
            there = {sibling.rfilename for sibling in info.siblings or ()}
            card = copy / "README.md"
            if card.exists() and card.name in there:
                keep_notes(card, Path(api.hf_hub_download(self.model_id, card.name, revision=info.sha)))
            files = {path.relative_to(copy).as_posix(): path for path in copy.rglob("*") if path.is_file()}
            changes: list = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            if self.strategy == "checkpoint":
                older = sorted(name for name in there - files.keys() if name.startswith(f"{LAST}/"))
                changes += [CommitOperationDelete(name) for name in older]
            api.create_commit(self.model_id, changes, commit_message=message)
            if self.unpushed == message:
                self.unpushed = None
        except Exception as error:  # from the client, the connection or the disk: never a reason to stop training
            if isinstance(error, RepositoryNotFoundError):
                self.checked = False  # somebody removed it: the next push makes it again
            self.warn(f"{message} is not on the Hub yet ({explain(error)})")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def warn(self, what: str) -> None:
        tqdm.write(f"warning: {what}", file=sys.stderr)


def start_pusher(flags, out_dir: Path, accelerator: Accelerator) -> Pusher | None:
    """The Pusher of the main process, if the flags ask for one. The repository is hub_model_id, or out_dir's name."""
    if not (flags.push_to_hub and accelerator.is_main_process):
        return None
    model_id = flags.hub_model_id or out_dir.absolute().name
    return Pusher(model_id, out_dir, private=flags.hub_private_repo, strategy=flags.hub_strategy)


class NoRun(ValueError):
    """The repository does not exist, or does not hold a checkpoint."""


def fetch_run(model_id: str, out_dir: Path) -> None:
    """Bring a run that was pushed with strategy `checkpoint` into an out_dir that has no checkpoints yet.

    Files of out_dir stay as they are. Raises NoRun if there is no such run, and ValueError if it cannot be fetched.
    """
    if list_checkpoints(out_dir):
        return
    flag = f"hub_model_id={model_id}"
    try:
        name = model_id if "/" in model_id else f"{HfApi().whoami()['name']}/{model_id}"
        fetched = Path(snapshot_download(name))
    except Exception as error:  # from the client or the connection
        kind = NoRun if isinstance(error, RepositoryNotFoundError) else ValueError
        raise kind(f"{flag}: the run cannot be fetched ({explain(error)})") from None
    checkpoints = in_order(fetched.glob(f"{LAST}/step-*"))
    if not checkpoints:
        raise NoRun(f"{flag} holds no {LAST}/: only a run with --hub_strategy=checkpoint pushes it")
    out_dir.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(out_dir / ".fetching"):  # every process of a run comes here, and the first one does the work
        for path in sorted(fetched.rglob("*")):
            relative = path.relative_to(fetched)
            target = out_dir / relative
            wanted = relative.parts[0] != LAST and not relative.parts[0].startswith(".")
            if path.is_file() and wanted and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f".{target.name}.part")  # a killed run leaves no half of a file
                shutil.copyfile(path, aside)
                os.replace(aside, target)
        newest = out_dir / CHECKPOINTS / checkpoints[-1].name
        if not newest.exists():
            with folder_written_aside(newest) as staging:
                # copyfile follows links: the files in the cache are links
                for path in checkpoints[-1].iterdir():
                    shutil.copyfile(path, staging / path.name)


def keep_notes(card: Path, theirs: Path) -> None:
    """Put the notes of the card on the Hub into our card, if our card has no notes."""
    text = card.read_text(encoding="utf-8")
    if not notes_of(text).strip():
        card.write_text(with_notes(text, notes_of(theirs.read_text(encoding="utf-8"))), encoding="utf-8")


def explain(error: BaseException) -> str:
    """What went wrong, in one line that never holds the token."""
    line = first_line(getattr(error, "server_message", None) or error) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        line = f"{error.response.status_code}: {line}"
    elif error.__cause__ and explain(error.__cause__) not in line:
        line = f"{line} {explain(error.__cause__)}"
    token = get_token()
    return line.replace(token, "(the token)") if token else line
