"""The recipe by NVIDIA DALI: batches are read ahead, run through `dali_graph`, and mended where an image is bad."""

import ctypes
import re
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import OperatorConcurrency
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from reco_fast.errors import DataError
from reco_fast.pipelines.augmentations import Recipe, sample_parameters
from reco_fast.pipelines.base import Batch, Decoded, ImageReader, Loader, OnBadImage, Sample
from reco_fast.pipelines.dali_graph import graph, to_dali, view_inputs
from reco_fast.pipelines.images import BadImage, to_ppm
from reco_fast.pipelines.order import Order
from reco_fast.pipelines.read_ahead import Prepared, ReadAhead
from reco_fast.pipelines.sources.image_source import ImageSource

_DECODE_AHEAD = 2  # batches in DALI
_CACHE_BYTES = 512 * 2**20  # a small data set is read and checked once
_NO_MEMORY = re.compile(r"out of memory|Can't allocate|allocation failed|allocator failure|cudaErrorMemoryAllocation")


class DaliLoader(Loader):
    """A thread of ours reads and checks the files of the coming batches and draws their parameters; DALI's threads
    (`workers`, at least one) decode and augment behind the caller's back."""

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        order: Order,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        workers: int,
        on_bad_image: OnBadImage,
        first_step: int,
        after: Loader | None = None,
    ) -> None:
        super().__init__(source, order, first_step, after)
        self._recipe = recipe
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._workers = max(1, workers)
        self._order = order
        trains = order.steps is None
        self._reader: ImageReader
        if trains and isinstance(after, DaliLoader):
            self._reader = after._reader.handed_on(self._journal)
        else:
            self._reader = ImageReader(
                source,
                on_bad_image,
                seed=seed if trains else None,
                journal=self._journal,
                cache_bytes=_CACHE_BYTES if trains else 0,
            )
        self._bad = self._reader.bad
        self._ahead = ReadAhead(order, self._reader, first_step, self._prepare, self._journal)
        self._again: deque[Prepared] = deque()  # that the next pipeline begins with
        self._in_flight: deque[Prepared] = deque()
        self._pipeline: Any = None
        self._takes_decoded = False  # its inputs
        self._with_decoded = False  # its outputs

    def _next(self) -> Batch:
        while not self._ahead.closed:
            try:
                if self._pipeline is None:
                    if self._first().nothing:
                        return self._empty()
                    self._pipeline = self._build()
                outputs = self._run()
            except StopIteration:
                if not self._again:
                    raise
                self._drop_pipeline()  # it has given out all that it took; what comes is for one of the other kind
                continue
            except DataError:  # from our own thread
                raise
            except (RuntimeError, ValueError, IndexError) as error:  # what DALI raises for an image it cannot use
                if _NO_MEMORY.search(str(error)):  # no image is to blame
                    raise MemoryError(f"DALI: {error}") from error
                self._recover(error)
                continue
            prepared = self._in_flight.popleft()
            self._journal.end()
            if self._with_decoded:
                *outputs, decoded = outputs
                self._keep(prepared.samples, decoded)
            views = tuple(map(self._hand_out, outputs, self._recipe.sizes))
            return Batch(views, torch.from_numpy(prepared.places))
        raise StopIteration

    def _hand_out(self, view: Any, size: int) -> Tensor:
        """DALI's [n, S, S, 3] as [n, 3, S, S], channels-last in memory."""
        if not self._on_gpu:
            return from_dlpack(view.as_tensor()).permute(0, 3, 1, 2)
        # A copy: DALI frees what it exports by DLPack in a thread that calls cudaDeviceSynchronize, which ends every
        # capture of a CUDA graph (NVIDIA/DALI #6259). The copy waits for the view and is queued on the stream on which
        # `copy` was allocated and will be used; DALI orders the view's release, and so its reuse, after that stream.
        copy = torch.empty((len(view), size, size, 3), dtype=self._dtype, device=self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        view.copy_to_external(ctypes.c_void_p(copy.data_ptr()), ctypes.c_void_p(stream), non_blocking=True)
        return copy.permute(0, 3, 1, 2)

    def _run(self) -> Any:
        return self._pipeline.run(torch.cuda.current_stream(self._device)) if self._on_gpu else self._pipeline.run()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @property
    def _device_id(self) -> int | None:
        if not self._on_gpu:
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def _first(self) -> Prepared:
        """What the next pipeline will begin with."""
        if not self._again:
            self._again.append(self._ahead.take())
        return self._again[0]

    def _empty(self) -> Batch:
        """In place of a batch without a good image, which DALI could not take."""
        self._journal.end()
        places = torch.from_numpy(self._again.popleft().places)
        shapes = [(0, size, size, 3) for size in self._recipe.sizes]
        empty = (torch.empty(shape, dtype=self._dtype, device=self._device) for shape in shapes)
        return Batch(tuple(view.permute(0, 3, 1, 2) for view in empty), places)

    def _build(self) -> Any:
        first = self._first()
        self._takes_decoded = first.decoded
        largest = None
        if not first.decoded:
            largest = max(sample.height for sample in first.samples), max(sample.width for sample in first.samples)
        self._with_decoded = largest is not None and self._reader.keeps_decoded(*largest)
        pipeline = graph(
            self._feed,
            self._recipe,
            self._on_gpu,
            self._dtype,
            largest,
            self._with_decoded,
            batch_size=self._order.batch_size,
            num_threads=self._workers,
            device_id=self._device_id,
            prefetch_queue_depth=_DECODE_AHEAD,
            exec_dynamic=True,
            concurrency=OperatorConcurrency.FULL,  # a small image's operators are bound by the thread that launches
        )
        pipeline.build()
        return pipeline

    def _keep(self, samples: list[Sample], decoded: Any) -> None:
        fresh = [row for row, sample in enumerate(samples) if not sample.decoded]
        if fresh and self._on_gpu:  # only in the first epoch does the host wait for this copy of a GPU's pixels
            torch.cuda.current_stream(self._device).record_event().synchronize()
        for row in fresh:
            self._reader.keep(samples[row], np.asarray(decoded.at(row)))

    def _feed(self) -> list[Any]:
        """The next batch's inputs, as DALI asks for them. Raises StopIteration where this pipeline takes no more."""
        prepared = self._first()
        if prepared.nothing or self._takes_decoded != prepared.decoded:
            raise StopIteration
        self._in_flight.append(self._again.popleft())
        return prepared.inputs

    def _prepare(self, positions: NDArray[np.int64], images: list[Sample | None] | Decoded) -> Prepared:
        content: Any
        samples: list[Sample] = []
        if isinstance(images, Decoded):
            places, content = images
            heights, widths = (np.full(len(places), side) for side in content.shape[1:3])
        else:
            samples = [sample for sample in images if sample is not None]
            positions = positions[[sample is not None for sample in images]]
            content = [np.frombuffer(sample.data, np.uint8) for sample in samples]
            sizes = np.array([(s.place, s.height, s.width) for s in samples], np.int64).reshape(-1, 3)
            places, heights, widths = sizes.T.copy()
        if not len(places):
            return Prepared(positions, places, samples, [])
        inputs = [to_dali(content)]
        for number, view in enumerate(self._recipe.views):
            parameters = sample_parameters(view, number, self._seed, positions, heights, widths)
            inputs.extend(map(to_dali, view_inputs(view, parameters, self._on_gpu).values()))
        return Prepared(positions, places, samples, inputs)

    def _recover(self, error: Exception) -> None:
        """After a failed batch: give its images to Pillow, which decodes them or says which are bad, and do what was
        under way again in a new pipeline."""
        if not self._in_flight or self._in_flight[0].by_pillow or self._takes_decoded:
            raise error
        self._drop_pipeline()
        failed, *rest = self._in_flight
        self._in_flight.clear()
        pairs = zip(failed.positions.tolist(), failed.samples, strict=True)
        mended = self._prepare(failed.positions, [self._by_pillow(position, sample) for position, sample in pairs])
        self._again.extendleft(reversed([mended._replace(by_pillow=True), *rest]))

    def _by_pillow(self, position: int, sample: Sample | None) -> Sample | None:
        while sample is not None:
            try:
                return Sample(sample.place, *to_ppm(sample.data))
            except BadImage as error:
                self._reader.reject(sample.place, str(error))
                sample = self._reader.read(position, sample.place)
        return None

    def close(self) -> None:
        super().close()
        self._ahead.close()
        self._drop_pipeline()
        self._journal.close()

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.__del__()  # there is no close(); its reference cycles would keep its threads until some gc
            self._pipeline = None
