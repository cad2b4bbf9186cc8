"""The files of a folder → a repository of the Hub, in one commit: it is whole, or it is what it was before."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, httpx, validate_repo_id

from .. import models
from ..data.text import brief

_KINDS = (".safetensors", ".json", ".yaml", ".md", ".py", ".png", ".parquet", ".html")
_OWN_CODE = {path.name for path in Path(models.__file__).parent.glob("*.py")} - {"__init__.py"}
_OWN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_OWN_DATA = re.compile(r"data/(train|val)-\d+-of-\d+\.parquet")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as apache-2.0, openrail++
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock(/|$)))[A-Za-z0-9_][\w./-]*(?<![./])")


class HubError(ValueError):
    """What can't be pushed, or a Hub that doesn't take it; the message says what was expected."""


@dataclass
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository.
        commit: its newest commit.
        changed: whether there was anything new to commit.
    """

    url: str
    commit: str
    changed: bool


def push_folder(
    folder: Path,
    repo_id: str,
    repo_type: str,
    message: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    large: Iterable[Path] = (),
    **create_options,
) -> Pushed:
    """Make the repository hold the files of `folder`, in one commit; files that it holds already are not sent.

    Weights, code and data of ours that are no longer needed go in the same commit; foreign files stay.

    Args:
        large: more files of the folder, which need not be there yet. Each goes to the Hub's storage, which takes
            nothing twice and shows nothing before the commit, and is removed before the next one is asked for.

    Raises:
        HubError: a file that has no business there, or what the Hub said.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    additions = [_addition(folder, path, token) for path in paths]
    api = HfApi(token=token)
    with _naming(repo_id):
        _check_card(folder / "README.md", repo_type)
        repo_id = api.create_repo(
            repo_id, private=private or None, repo_type=repo_type, exist_ok=True, **create_options
        ).repo_id
        info: Any = api.repo_info(repo_id, repo_type=repo_type)
        if private and not info.private:
            raise HubError(f"{repo_id} is public already; --private makes new repositories private, no old ones")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    for path in large:
        additions.append(_addition(folder, path, token))
        with _naming(repo_id):
            api.preupload_lfs_files(repo_id, additions[-1:], repo_type=repo_type, revision=revision)
        if not additions[-1].path_or_fileobj:  # the Hub has it; a file of kilobytes it may want within the commit
            path.unlink()
    with _naming(repo_id):
        before: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        held = [sibling.rfilename for sibling in before.siblings]
        stale = set(held) - {addition.path_in_repo for addition in additions}
        deletions = [CommitOperationDelete(name) for name in sorted(stale) if _is_ours(name, repo_type)]
        commit = api.create_commit(
            repo_id, [*additions, *deletions], commit_message=message, repo_type=repo_type, revision=revision
        )
        url = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    return Pushed(url=url, commit=commit.oid, changed=commit.oid != before.sha)


def checked_target(repo_id: str, revision: str | None, token: str | None) -> str:
    """ "owner/name" of a repository that there could be; a bare name is one's own."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"expected the id of a repository, owner/name in letters, digits and -_., got {repo_id}"
        ) from error
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise HubError(f"--branch: expected the name of a branch such as main or v1, got {revision}")
    if "/" in repo_id:
        return repo_id
    with _naming(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def check_licence(licence: str | None) -> None:
    """Whether it looks like an identifier; the Hub, which knows them all, has the last word in `push_folder`."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise HubError(f"--license: expected an identifier of the Hub, such as apache-2.0 or other, got {licence!r}")


def licence_there(repo_id: str, repo_type: str, token: str | None) -> str | None:
    """The licence that the repository's card names, if there are both."""
    with _naming(repo_id):
        try:
            info: Any = HfApi(token=token).repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return None
    return info.card_data.get("license") if info.card_data else None


def _check_card(file: Path, repo_type: str) -> None:
    """Whether the Hub takes the card's metadata, before there is anything of it there.

    Raises:
        HubError: it does not, for example as it knows no such licence.
    """
    try:
        RepoCard.load(file).validate(repo_type)
    except ValueError as error:  # with the Hub's answer
        reasons = _reasons(str(error))
        raise HubError(f"{file.name}: the Hub refuses its metadata: {brief(reasons)}") from error


def _reasons(answer: str) -> str:
    """The messages in the Hub's answer; all of it where it has another form, as that of a proxy."""
    try:
        found = " and ".join(entry["message"] for entry in json.loads(answer)["errors"])
    except (ValueError, LookupError, TypeError):
        found = ""
    return found or " ".join(answer.split()) or "it gives no reason"


def _addition(folder: Path, path: Path, token: str | None) -> CommitOperationAdd:
    """A file of the folder, to push.

    Raises:
        HubError: a link, a file of a kind that has no business there, or one with the token in it.
    """
    name, secret = path.relative_to(folder).as_posix(), token or get_token()
    if path.is_symlink() or path.suffix not in _KINDS:
        raise HubError(f"{name}: expected a file of a model ({', '.join(_KINDS)}), got a link or another file")
    if secret and _holds(path, secret.encode()):
        raise HubError(f"{name}: holds your Hub token; take it out first")
    return CommitOperationAdd(name, path)


def _holds(path: Path, secret: bytes) -> bool:
    """Whether it is in the file, which may be larger than memory."""
    before = b""
    with path.open("rb") as file:
        while block := file.read(2**20):
            if secret in before + block:
                return True
            before = block[-len(secret) :]
    return False


def _is_ours(name: str, repo_type: str) -> bool:
    if repo_type == "dataset":
        return _OWN_DATA.fullmatch(name) is not None
    return name in _OWN_CODE or _OWN_WEIGHTS.fullmatch(name) is not None


@contextmanager
def _naming(repo_id: str) -> Iterator[None]:
    """What the Hub or the network say, in one line that names the repository."""
    try:
        try:
            yield
        except RuntimeError as error:  # the client's, about a large file; its cause is what happened
            raise (error.__cause__ or error) from None
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: no such revision on the Hub") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: expected a repository that the token may write to; it is not there, or not yours"
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        response = getattr(error, "response", None)
        if response is None or response.status_code in (401, 403):
            raise HubError(
                f"{repo_id}: the Hub wants a token that may write there; `hf auth login`, or HF_TOKEN"
            ) from error
        raise HubError(f"{repo_id}: the Hub says: {str(error).strip().splitlines()[-1]}") from error
    except (httpx.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # the last three: of Xet
        raise HubError(
            f"{repo_id}: the connection to the Hub broke ({error}); nothing was published, push once more"
        ) from error
