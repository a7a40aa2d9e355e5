"""Iterators over batches, built on Grain: order of examples, rows of a process, exact resumption.

The state of a training iterator is one number: its position in the global order of examples.
Position i belongs to epoch i // num_examples. The permutation of an epoch is computed from the
seed, not stored. Process p of N takes the rows [pB/N, (p+1)B/N) of each global batch of B rows.
Neither the order nor the global batches depend on the number of processes. A packed batch holds as
many examples as fit (`packed_rows`); every process computes the assignment of examples to rows for
the whole batch.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from gkd_jax.common.array_types import Int
from gkd_jax.common.batch import Batch
from gkd_jax.data import packed_rows
from gkd_jax.data.batches import MAX_EXAMPLE_ID, BatchMaker

_LAST_POSITION = 1 << 60
_SAMPLE_EXAMPLES = 1000
_SAMPLE_ROWS = 32
_BLOCK = 64  # Number of examples that packing reads at a time.


class TrainIterator(Iterator[Batch]):
    """Endless iterator over training batches. Its whole state is `position`.

    Attributes:
      position: number of examples in the batches returned so far, over all processes and since
        the start of training. Batches that were prefetched but not returned do not count.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Batch, int]],
        *,
        position: int,
        close: Callable[[], None],
    ) -> None:
        self.position = position
        self._batches = batches
        self._close = close

    def __next__(self) -> Batch:
        try:
            batch, num_examples = next(self._batches)
        except BaseException:
            # Grain has dropped the batch that failed: continuing would skip its examples.
            self.close()
            raise
        self.position += num_examples
        return batch

    def close(self) -> None:
        """Stops the threads that prefetch batches."""
        self._close()


class BatchIterators:
    """Makes the iterators over batches of one data set.

    Args:
      maker: makes batches from the numbers of examples.
      num_examples: number of examples of the data set.
      batch_size: rows of a global batch.
      shuffle_seed: seed of the permutation of each training epoch; None keeps the order of the
        source.
      pack: whether training batches are packed.
      threads: number of threads that prefetch batches; 0 makes each batch when it is requested.
    """

    def __init__(
        self,
        maker: BatchMaker,
        *,
        num_examples: int,
        batch_size: int,
        shuffle_seed: int | None,
        pack: bool,
        threads: int,
    ):
        self._maker = maker
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._pack = pack
        self._threads = threads
        order = grain.MapDataset.range(num_examples)
        self._order = (order if shuffle_seed is None else order.shuffle(shuffle_seed)).repeat()

    def example_at(self, position: int) -> int:
        """Returns the number of the example at a position in the global training order."""
        return int(self._order[position])

    def _examples_at(self, positions: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        return np.array([self.example_at(int(position)) for position in positions], np.int64)

    def train(
        self, position: int = 0, *, process_index: int = 0, process_count: int = 1
    ) -> TrainIterator:
        """Returns an endless iterator; see `Dataset.train_iterator`."""
        if position < 0:
            raise ValueError(f"position must not be negative; got {position}.")
        first_row, num_rows = self._process_rows(process_index, process_count)
        batch_size = self._batch_size
        if self._pack:
            return self._packed(position, first_row, num_rows)

        def make(start: int) -> tuple[Batch, int]:
            positions = start + first_row + np.arange(num_rows, dtype=np.int64)
            batch = self._maker.batch(self._examples_at(positions), positions % MAX_EXAMPLE_ID)
            return batch, batch_size

        starts = range(position, _LAST_POSITION, batch_size)
        batches = _prefetch(starts, make, threads=self._threads)
        return TrainIterator(batches, position=position, close=batches.close)

    def _packed(self, position: int, first_row: int, num_rows: int) -> TrainIterator:
        starts = range(position, _LAST_POSITION, _BLOCK)
        blocks = _prefetch(starts, self._block, threads=self._threads)
        examples = itertools.chain.from_iterable(blocks)
        batches = self._maker.packed_batches(
            examples, self._batch_size, first_row=first_row, num_rows=num_rows
        )
        return TrainIterator(batches, position=position, close=blocks.close)

    def _block(self, start: int) -> list[packed_rows.TokenizedExample]:
        positions = start + np.arange(_BLOCK, dtype=np.int64)
        return self._maker.tokenized(self._examples_at(positions), positions)

    @functools.cached_property
    def packing(self) -> packed_rows.PackingStatistics:
        """Statistics of the first packed training rows, used for planning."""
        blocks = map(self._block, range(0, _LAST_POSITION, _BLOCK))
        return packed_rows.measure(
            itertools.chain.from_iterable(blocks),
            num_rows=min(self._batch_size, _SAMPLE_ROWS),
            widths=self._maker.packed_widths,
            num_examples=_SAMPLE_EXAMPLES,
        )

    def one_pass(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[Batch, Int[np.ndarray, " B"]]]:
        """Returns an iterator that visits each example once; see `Dataset.eval_batches`."""
        first_row, num_rows = self._process_rows(process_index, process_count)

        def make(start: int) -> tuple[Batch, Int[np.ndarray, " B"]]:
            examples = start + first_row + np.arange(num_rows, dtype=np.int64)
            examples[examples >= self._num_examples] = -1
            return self._maker.batch(examples, examples), examples

        starts = range(0, self._num_examples, self._batch_size)
        return _closing(_prefetch(starts, make, threads=self._threads))

    def _process_rows(self, process_index: int, process_count: int) -> tuple[int, int]:
        batch_size = self._batch_size
        if batch_size % process_count:
            raise ValueError(
                "DatasetConfig.batch_size must be divisible by the number of processes; got "
                f"{batch_size} and {process_count}. Set it to a multiple of {process_count}."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index must be from 0 to {process_count - 1}; got {process_index}."
            )
        num_rows = batch_size // process_count
        return process_index * num_rows, num_rows


def _prefetch(
    starts: range, make: Callable[[int], Any], *, threads: int
) -> grain.DatasetIterator[Any]:
    """Iterates over `make(start)` for each of `starts`, in order; threads compute results ahead."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    made = grain.MapDataset.range(starts.start, starts.stop, starts.step).map(make)
    return iter(made.to_iter_dataset(options))


def _closing(prefetched: grain.DatasetIterator[Any]) -> Iterator[Any]:
    """Iterates over prefetched items. When the iterator is dropped, prefetching stops."""
    with contextlib.closing(prefetched):
        yield from prefetched
