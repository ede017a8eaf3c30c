"""The house: which room imports from which, how full the rooms are, and that a name means one thing."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("reco_fast", "kernels", "pipelines", "profiling")
# Who stands on whom: a module imports from rooms further down, and from its own.
FLOORS = (
    ("profiling",),  # looks on from outside, but for the two modules below
    ("reco_fast.__main__",),
    ("commands", "make_shards"),
    ("training",),
    ("evaluation",),
    ("run",),
    ("profiling.flops",),
    ("method", "data"),
    ("distributed",),
    ("settings", "kernels", "pipelines", "profiling.trace", "reco_fast"),
    ("reco_fast.errors",),
)
FLOOR = {room: number for number, rooms in enumerate(reversed(FLOORS)) for room in rooms}


def modules() -> dict[str, Path]:
    """Name as it is imported → file."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "reco_fast" else ("reco_fast", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The most that is said of it in `FLOORS`."""
    inner = module.removeprefix("reco_fast.")
    for name in (module, inner, inner.split(".")[0]):
        if name in FLOOR:
            return name
    assert "." not in inner, f"{module}: in a room that FLOORS does not know"
    return "commands"


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                if deeper in known or node.module in known:
                    yield deeper if deeper in known else node.module


def test_imports_go_down() -> None:
    known = modules()
    assert len(known) > 60
    for module, path in known.items():
        if module == "reco_fast":  # names the loss, which it imports at first use
            continue
        for imported in imports(path, known):
            here, there = room(module), room(imported)
            assert here == there or FLOOR[there] < FLOOR[here], f"{module} ({here}) imports {imported} ({there})"


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    arrows = {module: set(imports(path, known)) - {"reco_fast"} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for other in arrows[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_a_room_holds_twelve_files_at_most() -> None:
    for top in (*FOLDERS, "tests"):
        for folder in (ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())):
            files = [path for path in folder.iterdir() if path.suffix in (".py", ".typed")]
            assert len(files) <= 12, folder


EACH_SCRIPT_HAS_ITS_OWN = {"main", "parse", "run", "check", "measure", "table", "markdown", "plot"}
SAID_WITH_ITS_MODULE = {"read"}  # checkpoint.read, store.read


def test_a_name_means_one_thing() -> None:
    places = defaultdict(list)
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    doubled = {name: where for name, where in places.items() if len(where) > 1}
    assert set(doubled) <= EACH_SCRIPT_HAS_ITS_OWN | SAID_WITH_ITS_MODULE, doubled


@pytest.mark.parametrize("page", ["README.md", "docs/use.md", "docs/profiling.md"])
def test_every_module_that_a_page_runs_is_there(page: str) -> None:
    known = modules()
    named = re.findall(r"-m (reco_fast(?:[.][a-z_]+)*)", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert set(named) <= set(known)


def test_from_the_command_to_the_kernel_in_six_files() -> None:
    """As the README says."""
    known = modules()
    way = "train", "training.loop", "method.step", "method.losses", "kernels.relation_loss", "kernels.relation_kernels"
    for here, there in pairwise(f"reco_fast.{name}" for name in way):
        assert there in imports(known[here], known)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\w+\.py(?=\]\(\S+\)(?: →|\.\n))", text) == [f"{name.rpartition('.')[2]}.py" for name in way]
