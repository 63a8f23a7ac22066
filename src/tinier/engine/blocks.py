"""Hands out the blocks of the KV cache."""

from tinier.engine.request import Request


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # a stack: the block freed last is the one most likely still in the processor's cache
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Give `request` blocks for `num_tokens` tokens in all; False, and nothing given, if too
        few are free."""
        missing = -(-num_tokens // self.block_size) - len(request.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            request.blocks.append(self._free.pop())
        return True

    def release(self, request: Request) -> None:
        self._free.extend(reversed(request.blocks))
        request.blocks.clear()
