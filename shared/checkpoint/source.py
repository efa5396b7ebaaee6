"""Which folder a model's name means: a folder on this machine, or a hub id that is downloaded into the cache."""

from collections.abc import Callable
from pathlib import Path

from shared.checkpoint.errors import CheckpointError
from shared.config.services import BUNDLED_MODEL

SMALL = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
]
"""What is downloaded of a repository for its words and settings alone."""

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""And with its weights: no `.bin`, which we would not load, and no other frameworks'."""

NOT_WANTED = ["original/*", "consolidated*.safetensors"]
"""Copies of the weights in their makers' own layouts."""

Progress = Callable[[int, int], None]
"""Called with (done, total), in bytes, from any thread."""


BUNDLED_FOLDER = Path(__file__).resolve().parents[2] / "ops" / "demo_model" / "model"


def locate(model: str, *, revision: str | None = None, progress: Progress | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint.

    `model` is a folder, `bundled`, or a hub id, of which the weights are left out unless they are wanted. HF_ENDPOINT,
    HF_HOME and HF_HUB_OFFLINE act as huggingface_hub documents them; a complete snapshot in the cache is used when the
    hub cannot be reached. Raises CheckpointError.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model == BUNDLED_MODEL:
        return BUNDLED_FOLDER
    if folder.exists():
        raise CheckpointError(f"{model} is a file: give the folder that holds config.json and the weights")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {model}: check the path, or give a hub id such as org/name")
    return _download(model, revision, progress, [*SMALL, *WEIGHTS] if weights else SMALL)


def _download(model: str, revision: str | None, progress: Progress | None, wanted: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=NOT_WANTED,
            tqdm_class=_bar_class(progress),
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id such as org/name") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{model} is gated: ask for access on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub: check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no {model} on the hub, nor a folder of that name: check it, or set HF_TOKEN if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{model} is not in the local cache and the hub cannot be reached (offline, or HF_ENDPOINT is wrong): "
            "connect, or give a folder"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"downloading {model} failed ({type(error).__name__}): try again") from error
    return Path(folder)


def _bar_class(progress: Progress | None) -> type | None:
    """A progress bar for huggingface_hub that reports bytes to us and draws nothing."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """Of the bars that the library opens, only the one of bytes written is listened to."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            self.counts_bytes = kwargs.get("unit") == "B" and not str(kwargs.get("name")).endswith("transfer")
            kwargs["disable"] = False
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if progress is not None and self.counts_bytes:
                progress(int(self.n), int(self.total or 0))
            return shown

    return Bar


class _Nowhere:
    """A terminal that shows nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
