"""One door: `reco-fast COMMAND ...` is `python -m reco_fast.COMMAND ...`."""

import difflib
import importlib
import sys
from typing import Any, NoReturn

from reco_fast.errors import ConfigError
from reco_fast.settings import command_line, terminal

COMMANDS = {  # its module, what it is told as a dataclass of it, and what it does
    "train": ("reco_fast.train", "Config", "train on a folder of images, no labels needed"),
    "evaluate": ("reco_fast.evaluate", "EvaluateCommand", "kNN, linear probe and pictures of a run's features"),
    "embed": ("reco_fast.embed", "EmbedCommand", "features of any folder of images, with their paths"),
    "export": ("reco_fast.export", "ExportCommand", "the backbone for other libraries: safetensors, timm, ONNX, ..."),
    "ablation": ("reco_fast.ablation", "AblationConfig", "MoCo, each relation alone and both, side by side"),
    "check-images": ("reco_fast.check_images", "CheckCommand", "find the bad images of a folder before a run"),
    "index-shards": ("reco_fast.index_shards", "IndexCommand", "write down once what shards hold, in a store or here"),
    "make-shards": ("reco_fast.make_shards", "ShardsCommand", "write images as .tar shards, to a folder or a store"),
    "report": ("reco_fast.profiling.report", "ReportCommand", "where the time of a profiled run went"),
}
COMPLETION = "--tyro-print-completion"


def main() -> NoReturn:
    command_line.run(door)


def door() -> None:
    """Leave the rest of the line to the command that it names. Raises ConfigError where there is no such command."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage(), end="")
        return
    if name == COMPLETION:
        complete(sys.argv[1:])
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: unknown command; {hint}")
    sys.argv = [f"reco-fast {name}", *rest]
    terminal.leave_at_interrupt()
    importlib.import_module(COMMANDS[name][0]).main()


def usage() -> str:
    lines = [f"  {name:<14}{does}" for name, (_, _, does) in COMMANDS.items()]
    shells = f"reco-fast {COMPLETION} bash (or zsh, tcsh) prints completion for a shell"
    return "\n".join(
        ["usage: reco-fast COMMAND ...", "", *lines, "", "reco-fast COMMAND --help says more.", shells, ""]
    )


def complete(words: list[str]) -> None:
    """Print a shell's completion of all commands."""
    import tyro

    found = ((name, importlib.import_module(module), kind) for name, (module, kind, _) in COMMANDS.items())
    kinds: dict[str, Any] = {name: getattr(module, kind) for name, module, kind in found}
    tyro.extras.subcommand_cli_from_dict(kinds, prog="reco-fast", args=words)


if __name__ == "__main__":
    main()
