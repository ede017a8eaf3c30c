"""What a run is told: a preset, then `--config FILE`, then flags."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from reco_fast.errors import ConfigError
from reco_fast.run.files import read_json
from reco_fast.settings.config import Config, updated
from reco_fast.settings.presets import preset
from reco_fast.settings.typed import at_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
CONFIG_HELP = "--config FILE: settings as in the config.json of a run, any of them left out. Flags win over it."


def preset_and_rest(argv: Sequence[str], default: str = "quickstart") -> tuple[str, Config, list[str]]:
    """The preset's name, `default` unless the first word is one; its configuration, changed by `--config`; the rest.

    Raises ConfigError.
    """
    name, rest = (default, argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    return name, *config_and_rest(rest, preset(name))


def config_and_rest(argv: Sequence[str], default: T) -> tuple[T, list[str]]:
    """`default`, a dataclass of sections, changed by the files that follow `--config`; and the other arguments.

    Raises ConfigError.
    """
    rest, words = [], iter(argv)
    for word in words:
        flag, given, file = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        file = file if given else next(words, "")
        if not file:
            raise ConfigError("--config: expected a file, got nothing")
        path = at_home(file)
        try:
            default = updated(default, read_json(path))
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {str(error).removeprefix(f'{path}: ')}") from None
    return default, rest
