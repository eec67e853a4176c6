"""Names of the hub (ORG/NAME) where a folder is asked for: found in huggingface_hub's cache, else fetched into it.

Without a network, or in HF_HUB_OFFLINE=1, only the cache is looked into; what is not there is one line with the command
that fetches it elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

from luffy.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_DATA = ["*.jsonl", "*.jsonl.gz", "*.json", "*.parquet", "*.txt"]


def local_model(name: str) -> str:
    """The folder of a model: `name` itself where it is one, else the hub's in the cache."""
    return _local(name, "--model", "model", _WEIGHTS)


def local_data(name: str, option: str) -> str:
    """The file or folder of a data set: `name` itself where it is there, else the hub's in the cache."""
    return _local(name, option, "dataset", _DATA)


def _local(name: str, option: str, kind: str, patterns: list[str]) -> str:
    if Path(name).expanduser().exists() or not _NAME.fullmatch(name) or name.endswith(tuple(p[1:] for p in _DATA)):
        return name
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        return name  # the caller says that there is no such folder
    fetch = f"hf download {'' if kind == 'model' else '--repo-type dataset '}{name}"
    disable_progress_bars()
    try:
        return str(snapshot_download(name, repo_type=kind, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{option} {name}: its owner asks for an agreement: accept it on the hub, `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{option} {name}: neither a path here nor a {kind} of the hub") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{option} {name} is not a path here, nor in the hub's cache, and the hub cannot be reached: run `{fetch}` "
            "where there is a network (or copy its cache here, HF_HOME), or name a folder"
        ) from error
    except Exception as error:  # whatever the network does
        raise UserError(f"{option} {name} cannot be fetched ({type(error).__name__}): run `{fetch}`") from error
