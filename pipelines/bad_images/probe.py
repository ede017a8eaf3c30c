"""Decode images in processes of their own, so that a decoder's death names the image and ends nothing else."""

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Literal, Self

import numpy as np

from reco_fast.pipelines.images import BadImage, decode_image, to_plain, to_ppm
from reco_fast.pipelines.order import ListedOrder
from reco_fast.pipelines.sources.image_source import ImageSource

Decoder = Literal["dali", "torch"]
DEADLY = "the decoder "  # begins the reason of an image that ends its process, or never lets it end
SECONDS = 60.0  # that one image may take


class Probe:
    """A process that decodes one image after the other as the loader `decoder` does, DALI on the CPU.

    Use as a context manager. A process that dies is replaced.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._process: subprocess.Popen[bytes] | None = None

    def reason(self, data: bytes) -> str | None:
        """Why this encoded image cannot be used; None where it can."""
        found = self._ask(data)
        if found is not None and found.startswith(DEADLY):  # in a fresh process nothing else can be to blame
            found = self._ask(data)
        return found

    def _ask(self, data: bytes) -> str | None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "reco_fast.pipelines.bad_images.probe", self._decoder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(struct.pack("<q", len(data)) + data)
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            answered = bool(selector.select(SECONDS))
        line = self._process.stdout.readline() if answered else b""
        if line:
            answer: dict[str, Any] = json.loads(line)
            if answer["fresh"]:  # DALI raised: sooner or later it dies of that
                self.close()
            return answer["reason"]
        code = self.close()
        if not answered:
            return f"{DEADLY}does not end within {SECONDS:.0f} s"
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{DEADLY}dies of it ({name})"

    def close(self) -> int:
        """End the process; what it ended with."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def probe_all(
    source: ImageSource, indices: Iterable[int], decoder: Decoder, processes: int
) -> Iterator[tuple[int, str | None]]:
    """Each index, in order, with the reason why its image cannot be used or None, found by `processes` at once. Where
    images come from another machine, more are read than decoded at a time."""
    probes = [Probe(decoder) for _ in range(processes)]
    free: SimpleQueue[Probe] = SimpleQueue()
    for probe in probes:
        free.put(probe)

    def one(index: int) -> tuple[int, str | None]:
        try:
            data = source.read(index)
        except OSError as error:
            return index, error.strerror or type(error).__name__
        probe = free.get()
        try:
            return index, probe.reason(data)
        finally:
            free.put(probe)

    order = ListedOrder(len(source), 64 * processes, list(indices))
    supply = source.supply(order, 0)
    try:
        with ThreadPoolExecutor(max(processes, source.at_once)) as pool:
            for step in range(order.steps or 0):
                yield from pool.map(one, order.batch(step)[1].tolist())
                supply.advance()
    finally:
        supply.close()
        for probe in probes:
            probe.close()


class _Dali:
    """DALI's decoder for one image at a time."""

    def __init__(self) -> None:
        import nvidia.dali

        dali: Any = nvidia.dali
        self._data = b""

        @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def graph() -> Any:
            encoded = dali.fn.external_source(
                source=lambda: [np.frombuffer(self._data, np.uint8)], dtype=dali.types.UINT8, ndim=1
            )
            return dali.fn.decoders.image(encoded, output_type=dali.types.RGB, jpeg_fancy_upsampling=True)

        self._graph = graph
        self._pipeline: Any = None

    def decode(self, data: bytes) -> None:
        self._data = data
        if self._pipeline is None:
            self._pipeline = self._graph()
            self._pipeline.build()
        self._pipeline.run()


def main(decoder: str) -> None:
    """Answer on stdout what comes in on stdin: length and bytes of an image, until the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    dali = _Dali() if decoder == "dali" else None
    while head := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(struct.unpack("<q", head)[0])
        reason, fresh = None, False
        try:
            if dali is None:
                decode_image(to_plain(data)[0])
            else:
                plain, _, _ = to_plain(data)
                try:
                    dali.decode(plain)
                except (RuntimeError, ValueError, IndexError):
                    fresh = True
                    to_ppm(plain)  # as the loader does then
        except BadImage as error:
            reason = str(error)
        print(json.dumps({"reason": reason, "fresh": fresh}), file=answers, flush=True)
        if fresh:
            return


if __name__ == "__main__":
    main(sys.argv[1])
