"""Where things are kept that can be had again, data sets and what is compiled, also for a user without a home."""

import os
import pwd
import stat
import tempfile
from pathlib import Path


def cache_folder(wanted: str = "") -> Path:
    """`$XDG_CACHE_HOME/reco_fast` or `~/.cache/reco_fast`; a temporary folder of this user's where that has nothing
    called `wanted` and cannot be written."""
    home = os.path.expanduser("~")
    if home != "~" or os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "reco_fast"
        if (wanted and (folder / wanted).is_dir()) or os.access(_nearest(folder), os.W_OK | os.X_OK):
            return folder
    return own_temporary()


def find_caches() -> None:
    """Give a user without an account a name, and caches a temporary folder where there is no home, or none that can be
    written: PyTorch, Triton, matplotlib and `datasets` fail without."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid{os.getuid()}")  # getpass.getuser looks there first
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.fspath(own_temporary())
    if not os.environ.get("XDG_CACHE_HOME") and not _can_appear(Path.home() / ".cache"):
        os.environ["XDG_CACHE_HOME"] = os.fspath(own_temporary())
    triton = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    if not os.environ.get("TRITON_CACHE_DIR") and not (_can_appear(triton) and os.access(_nearest(triton), os.W_OK)):
        os.environ["TRITON_CACHE_DIR"] = os.fspath(own_temporary() / "triton")


def _can_appear(folder: Path) -> bool:
    """Whether it is there, or can be made."""
    nearest = _nearest(folder)
    return nearest == folder or os.access(nearest, os.W_OK | os.X_OK)


def _nearest(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def own_temporary() -> Path:
    """A folder of this user's alone, the same one for each command."""
    folder = Path(tempfile.gettempdir()) / f"reco_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # somebody else was there first
        return Path(tempfile.mkdtemp(prefix="reco_fast-"))
    return folder
