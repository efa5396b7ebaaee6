"""Cache groups: layers that see the same window share one block table, and let go of the same blocks.

A group has a block table per sequence, and its blocks hold K and V of its layers only. All groups have the same number
of layers, so a block of the pool serves any of them, one at a time. `None` is a window that sees all positions.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import msgspec

Window = int | None

PADDING = 8
"""No more than one layer of padding for so many layers of a window."""
UNBOUNDED = 2**31 - 1


class CacheGroups(msgspec.Struct, frozen=True):
    """`windows` has one entry per group, those without a window first; `layers` is the size of each; `places` has one
    entry per layer of the model: its group, and its number within the group."""

    windows: tuple[Window, ...]
    layers: int
    places: tuple[tuple[int, int], ...]


def group_layers(windows: Sequence[Window]) -> CacheGroups:
    """The groups of a model whose layers have these windows, at least one.

    Layers of one window are cut into groups of one size; the last of them is padded. Of the sizes that pad no window
    by more than one layer in PADDING, the one that makes the fewest groups, and of those the smallest. (By window and
    not in all: long contexts are mostly made of the blocks of layers without one.) Size 1 pads nothing, so there is
    always a size.
    """
    counts = Counter(windows)

    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts.values())

    def pads_little(size: int) -> bool:
        return all(-count % size * PADDING <= count for count in counts.values())

    size = min(filter(pads_little, range(1, len(windows) + 1)), key=num_groups)
    classes = sorted(counts, key=lambda window: (window is not None, window or 0))
    first_group, group_windows = dict[Window, int](), list[Window]()
    for window in classes:
        first_group[window] = len(group_windows)
        group_windows += [window] * -(-counts[window] // size)
    seen, places = Counter[Window](), list[tuple[int, int]]()
    for window in windows:
        places.append((first_group[window] + seen[window] // size, seen[window] % size))
        seen[window] += 1
    return CacheGroups(tuple(group_windows), size, tuple(places))


def first_block(window: Window, position: int, block_size: int) -> int:
    """The first block that a token at `position`, or any after it, sees."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def most_blocks(window: Window, block_size: int, chunk: int) -> int:
    """The most blocks that a sequence holds in a group at once, steps taking at most `chunk` of its tokens: those of
    the chunk and of what its first token sees."""
    return UNBOUNDED if window is None else (window + chunk + block_size - 3) // block_size + 1


def held_blocks(num_tokens: int, windows: Sequence[Window], block_size: int, chunk: int) -> int:
    """The most blocks that a sequence of so many cached tokens ever holds, in all groups."""
    whole = -(-num_tokens // block_size)
    return sum(min(whole, most_blocks(window, block_size, chunk)) for window in windows)


def longest_context(num_blocks: int, windows: Sequence[Window], block_size: int, chunk: int) -> int:
    """The most tokens of one sequence that a pool of so many blocks can cache; at most UNBOUNDED."""
    if held_blocks(UNBOUNDED, windows, block_size, chunk) <= num_blocks:
        return UNBOUNDED

    def held(whole: int) -> int:
        return held_blocks(whole * block_size, windows, block_size, chunk)

    return (bisect_right(range(num_blocks + 1), num_blocks, key=held) - 1) * block_size
