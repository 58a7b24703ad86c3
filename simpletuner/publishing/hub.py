"""A repository of the hub that takes what a run makes; whether it does is found out before the run begins."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars

from simpletuner import __version__
from simpletuner.config.errors import UserError
from simpletuner.plan import Plan
from simpletuner.publishing.model_card import looks_like_hub_id

_LOG = logging.getLogger(__name__)

WAITS_SECONDS = (5.0, 30.0, 120.0)
"""Before each further try; the client itself has tried most requests several times by then."""
_ORIGIN = "_name_or_path"
_ERRORS = (OSError, HTTPError, RuntimeError, ValueError)
"""What the client raises: for statuses and bad connections, from its threads, and for answers it cannot read."""


@dataclass
class Hub:
    """Uploads files to one repository; what could not be uploaded is in ``failures``."""

    api: HfApi
    repo_id: str
    licence: Mapping[str, str]
    """The base model's, as its own card says."""
    sleep: Callable[[float], None] = time.sleep
    failures: list[str] = field(default_factory=list[str])
    _background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    _pending: Future[None] | None = None

    @property
    def url(self) -> str:
        """Where a person sees the repository."""
        return f"{self.api.endpoint}/{self.repo_id}"

    @property
    def is_busy(self) -> bool:
        """Whether a folder is still on its way."""
        return self._pending is not None and not self._pending.done()

    def upload(self, files: Mapping[str, Path | bytes], message: str) -> bool:
        """Commits files, by their paths in the repository; returns whether that was done at last."""
        for wait in (*WAITS_SECONDS, None):
            additions = [CommitOperationAdd(name, _public(content)) for name, content in files.items()]
            try:
                self.api.create_commit(self.repo_id, additions, commit_message=message)
            except _ERRORS as error:
                if wait is None or _is_final(error):
                    self.failures.append(f"push_to_hub: {message}: not uploaded to {self.url} ({reason(error)})")
                    return False
                _LOG.warning("%s: %s; trying again in %.0f s", message, reason(error), wait)
                self.sleep(wait)
            else:
                return True
        raise AssertionError("unreachable")

    def upload_behind(self, folder: Path, name: str) -> None:
        """Uploads a folder's files under a name while the run goes on, and removes the folder."""
        self._pending = self._background.submit(self._upload_folder, folder, name)

    def _upload_folder(self, folder: Path, name: str) -> None:
        files = {
            f"{name}/{path.relative_to(folder).as_posix()}": path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        if self.upload(files, name):
            _LOG.info("uploaded: %s/tree/main/%s", self.url, name)
        else:
            _LOG.warning(self.failures[-1])
        shutil.rmtree(folder)

    def wait(self) -> None:
        """Returns when nothing is on its way any more."""
        if self.is_busy:
            _LOG.info("waiting for the last checkpoint's upload")
        self._background.shutdown()


def open_hub(plan: Plan) -> Hub:
    """Returns the repository that the config names, made if need be.

    Raises:
        UserError: Nobody is logged in, the hub cannot be reached, or the token may not write there.
    """
    publish = plan.config.publish
    disable_progress_bars()
    api = HfApi(library_name="simpletuner", library_version=__version__)
    with _told():
        user = api.whoami()["name"]
        name = publish.hub_model_id or plan.config.run.output_dir.name
        repo_id = name if "/" in name else f"{user}/{name}"
        repo_id = api.create_repo(repo_id, private=publish.model_card_private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    if publish.model_card_private and not is_private:
        raise UserError(
            f"push_to_hub: {api.endpoint}/{repo_id} is public already: make it private there, name another by "
            "hub_model_id, or set model_card_private to false"
        )
    return Hub(api, repo_id, _licence(api, plan.source.path))


@contextmanager
def _told() -> Generator[None]:
    """Turns what the client raises into a line for the user."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(
            "push_to_hub: nobody is logged in at the hub: run `hf auth login`, set HF_TOKEN, or set push_to_hub: false"
        ) from error
    except _ERRORS as error:
        raise UserError(
            f"push_to_hub: the hub would not take the result ({reason(error)}): "
            "mend that, name another repository by hub_model_id, or set push_to_hub: false"
        ) from error


def _licence(api: HfApi, base: str) -> dict[str, str]:
    """Returns the license that the base model's card names; nothing where there is none to be had."""
    if not looks_like_hub_id(base):
        return {}
    try:
        data = api.model_info(base).card_data
    except _ERRORS:
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")} if data else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _public(content: Path | bytes) -> Path | bytes:
    """Returns a file as it is; a config that says from which folder it was loaded, without that."""
    if not isinstance(content, Path) or content.suffix != ".json":
        return content
    text = content.read_text(encoding="utf8")
    if f'"{_ORIGIN}"' not in text:
        return content
    values = json.loads(text)
    return (json.dumps({key: value for key, value in values.items() if key != _ORIGIN}, indent=2) + "\n").encode()


def _is_final(error: Exception) -> bool:
    """Whether the hub's answer will be the same the next time."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in range(400, 429)


def reason(error: Exception) -> str:
    """Returns what the hub or the network says, in one line."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    return " ".join(str(cause).split()) or type(cause).__name__
