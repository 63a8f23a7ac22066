"""Hands out the blocks of the KV cache, and remembers what full blocks hold.

A full block is known by its tokens and by the block before it, so that a prompt that starts like an
earlier one takes that one's blocks instead of computing them. Several requests may hold a block; one that
nobody holds keeps its content until it is needed for something else, the longest unused first.
"""

from collections import OrderedDict
from itertools import count

from tinier.engine.request import Request

Key = tuple[int, tuple[int, ...]]
"""(number of the prefix before, tokens of the block)"""


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._unheld = OrderedDict((block, None) for block in range(num_blocks))
        # exact tokens, not their hash: no two prefixes are ever taken for one another
        self._known: dict[Key, tuple[int, int]] = {}  # block and number of the prefix that it ends
        self._keys: dict[int, Key] = {}
        self._numbers = count(1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._unheld)

    def reuse(self, request: Request) -> int:
        """Give a request without blocks the known ones that its tokens start with. Returns how many
        tokens that are: at least one is left to compute."""
        assert not request.blocks
        last = (request.num_known - 1) // self.block_size
        for index in range(last):
            found = self._known.get(self._key(request, index))
            if found is None:
                break
            block, request.prefix = found
            if self._holders[block] == 0:
                del self._unheld[block]
            self._holders[block] += 1
            request.add_block(block)
        request.num_remembered = len(request.blocks)
        return len(request.blocks) * self.block_size

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Give `request` blocks for `num_tokens` tokens in all; False, and nothing given, if too
        few are free."""
        missing = -(-num_tokens // self.block_size) - len(request.blocks)
        if missing > len(self._unheld):
            return False
        for _ in range(missing):
            block, _ = self._unheld.popitem(last=False)
            key = self._keys.pop(block, None)
            if key is not None:
                del self._known[key]
            self._holders[block] = 1
            request.add_block(block)
        return True

    def remember(self, request: Request) -> None:
        """Note what the request's full blocks hold, as far as its tokens are known and computed."""
        full = min(request.num_computed, request.num_known) // self.block_size
        while request.num_remembered < full:
            key = self._key(request, request.num_remembered)
            block = request.blocks[request.num_remembered]
            if key in self._known:  # computed twice at the same time: the first one stays
                _, request.prefix = self._known[key]
            else:
                request.prefix = next(self._numbers)
                self._known[key] = (block, request.prefix)
                self._keys[block] = key
            request.num_remembered += 1

    def release(self, request: Request) -> None:
        # the end of a prefix is useless without its beginning, so it is the first to go
        for block in reversed(request.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._unheld[block] = None
                if block not in self._keys:
                    self._unheld.move_to_end(block, last=False)
        request.clear_blocks()

    def _key(self, request: Request, index: int) -> Key:
        tokens = request.tokens(index * self.block_size, self.block_size)
        return request.prefix, tuple(tokens)
