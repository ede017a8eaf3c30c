"""Enter what was fastest on a GPU into `MEASURED` in kernels/launch.py, which `impl="auto"` follows.

    python -m reco_fast.profiling.benchmarks.launch_table DIR/kernels.json [...]

The files are those of `benchmarks/kernels.py`, of one card or of several.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reco_fast.kernels import launch
from reco_fast.run.files import write_text
from reco_fast.settings import command_line
from reco_fast.settings.typed import at_home

CHOICES = ("triton", "sdpa")  # both timed at a size, or it is left out; the others hold N×K matrices


def fastest(contents: Sequence[dict[str, Any]]) -> list[launch.Measured]:
    """Rows of `launch.MEASURED` from the JSON of reports: what won at each N·K, by the geometric mean of its times over
    the sizes with that product, from the largest product to the smallest at which it changes."""
    rows: list[launch.Measured] = []
    for architecture in sorted({x["architecture"] for x in contents} - {"cpu"}):
        times: dict[int, dict[str, list[float]]] = {}
        origin = ""
        for content in contents:
            if content["architecture"] != architecture:
                continue
            origin = f"{content['results'][0]['device']}, {content['environment']['date'][:10]}"
            for x in content["results"]:
                if x["implementation"] in CHOICES and not x["failed"]:
                    of_product = times.setdefault(x["rows"] * x["length"], {})
                    of_product.setdefault(x["implementation"], []).append(math.log(x["milliseconds"]))
        winners = [
            (product, min(of_product, key=lambda name: statistics.mean(of_product[name])))
            for product, of_product in sorted(times.items(), reverse=True)
            if len({len(values) for values in of_product.values()}) == 1 and len(of_product) == len(CHOICES)
        ]
        for i, (product, winner) in enumerate(winners):
            if i + 1 == len(winners) or winners[i + 1][1] != winner:
                # Below the smallest size that was measured, the choice is a guess, so that size's winner goes on.
                smallest = 1 if i + 1 == len(winners) else product
                rows.append(launch.Measured(architecture, smallest, winner, f"docs/kernels.md, GPU: {origin}"))
    return rows


def record(paths: Sequence[Path], launch_source: Path) -> list[launch.Measured]:
    """Put the rows of `fastest` into the source of `launch.py`, in the place of those of the same architectures."""
    rows = fastest([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    source = launch_source.read_text(encoding="utf-8")
    start = source.index("MEASURED = (\n") + len("MEASURED = (\n")
    end = source.index("\n)\n", start) + 1
    measured = {row.architecture for row in rows}
    kept = [
        line
        for line in source[start:end].splitlines(keepends=True)
        if not any(line.strip().startswith(f'Measured("{name}",') for name in measured)
    ]
    added = [f'    Measured("{x.architecture}", {x.products}, "{x.implementation}", "{x.source}"),\n' for x in rows]
    write_text(launch_source, source[:start] + "".join(added + kept) + source[end:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=at_home, nargs="+", help="kernels.json")
    for row in record(parser.parse_args().results, Path(launch.__file__)):
        print(row)


if __name__ == "__main__":
    command_line.run(main)
