"""How much is computed at once, by the type of device: enough to keep it busy, within a bound on memory.

A CPU is busy with what its caches hold. A GPU is idle between kernels that end before the next is launched, about ten
microseconds later, so its chunks are larger. The values decide in which order sums are made, and so the bits.
"""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Chunks:
    """The sizes for one type of device.

    Attributes:
        product_rows: of one product with a draft head, over all depths. Each product reads the whole head and updates
            its whole gradient, both far larger than the rows, so more rows are faster (benchmarks/RESULTS.md, "The
            head's products").
        product_elements: rows x vocabulary of such a product. The draft's logits and the verifier's exist for so many
            at once.
        softmax_elements: rows x vocabulary per softmax and loss, of which about six exist at once, in float32.
        replay_blocks: blocks that replay runs at once; a block has up to 16 queries.
        judged_elements: rows x vocabulary of the verifier's logits that a response is judged by.
        capture_tokens: of one forward of the verifier.
        packed_tokens: likewise, where sequences lie side by side in one row: the mask between them is dense, and grows
            by the square.
        served_tokens: of one forward of a server that captures, unless the longest conversation needs more.
        shard_tokens: of one file of captured states. A GPU captures data sets of which small files would be too many.
    """

    product_rows: int
    product_elements: int
    softmax_elements: int
    replay_blocks: int
    judged_elements: int
    capture_tokens: int
    packed_tokens: int
    served_tokens: int
    shard_tokens: int


CHUNKS = {
    "cpu": Chunks(
        product_rows=384,
        product_elements=2**25,
        softmax_elements=2**18,
        replay_blocks=256,
        judged_elements=2**24,
        capture_tokens=2048,
        packed_tokens=2048,
        served_tokens=2048,
        shard_tokens=8192,
    ),
    "cuda": Chunks(
        # 256 MiB of the draft's logits in bf16, and as many of the verifier's where there is one depth, for any
        # vocabulary: 4,096 rows of 32k tokens, 883 of 152k.
        product_rows=4096,
        product_elements=2**27,
        # 128 MiB each in float32. A pass over so much takes an H200 60 microseconds.
        softmax_elements=2**25,
        replay_blocks=1024,
        # 256 MiB in float32.
        judged_elements=2**26,
        capture_tokens=32_768,
        packed_tokens=4096,
        served_tokens=8192,
        shard_tokens=65_536,
    ),
}
