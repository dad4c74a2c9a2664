"""External checkpoints and adapters: find them, check them, link them into an artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError, first_line
from mergelaw.models.checkpoint import ADAPTER_CONFIG, COMPANIONS, Tensors, files, is_adapter
from mergelaw.models.lora import read_adapter_config

# Files fetched from a hub repository: none in subfolders (pickles, other formats), weights once.
WANTED = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS, ADAPTER_CONFIG, "README.md")
UNWANTED = ("*/*", "consolidated*.safetensors")


def link_source(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Link a checkpoint, a path or hub id, into ``folder``; return facts for the lineage."""
    place = locate(source)
    link(place, folder)
    commit = {"commit": place.name} if "hub" in source else {}  # the revision may be a branch
    return {"sources": [canonical_json({**source, **commit})]}


def link(source: Path, folder: Path) -> None:
    """Link the files of the checkpoint or adapter ``source`` into ``folder``.

    Raises MergelawError for an incomplete one or an unsupported kind.
    """
    if is_adapter(source):
        read_adapter_config(source)
    else:
        Tensors(source).__exit__()
    for name in files(source):
        (folder / name).symlink_to((source / name).resolve())


def read_card(source: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a checkpoint's model card, as its author wrote it; empty without a card.

    ``source`` is a path, or a hub id with its commit, of which only the cache is read.
    """
    import yaml
    from huggingface_hub import try_to_load_from_cache

    path: Any = Path(source.get("path") or "", "README.md")
    if "hub" in source:
        path = try_to_load_from_cache(source["hub"], "README.md", revision=source["commit"])
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    return dict(head) if isinstance(head, dict) else {}


def locate(checkpoint: Mapping[str, Any]) -> Path:
    """Return the local folder of a checkpoint; a hub id is fetched unless the hub's cache has it.

    The commit is the name of a hub id's folder.
    """
    if checkpoint.get("path") is not None:
        folder = Path(checkpoint["path"])
        if not folder.is_dir():
            raise MergelawError(f"{folder}: no such folder; give a local Hugging Face checkpoint")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, revision = checkpoint["hub"], checkpoint["revision"]
    try:
        wanted, unwanted = list(WANTED), list(UNWANTED)
        return Path(
            snapshot_download(
                hub, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except GatedRepoError:
        raise MergelawError(
            f"{hub}: is gated; accept its licence on its page and log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise MergelawError(f"{hub}: has no revision {revision!r}; name a commit of it") from None
    except RepositoryNotFoundError:
        raise MergelawError(
            f"{hub}: no such model on the hub, or a private one; check the id, or log in with "
            "'hf auth login'"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)
        raise MergelawError(
            f"{hub} at {revision}: not in the hub's cache and cannot be fetched ({reason}); "
            "check id, revision and network, or download it before"
        ) from None
