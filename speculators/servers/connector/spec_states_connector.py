"""vLLM's connector of hidden states for machines without a GPU: it writes the same files without pinned memory.

This file runs in vLLM's environment, which finds it by `kv_connector_module_path` and has nothing else of this package:
it may import only vLLM, torch and the standard library. Written for vLLM 0.32. That version's connector copies states
to pinned memory on a GPU stream before a thread writes them; without a GPU they are in ordinary memory already.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as shipped


class _FinishedCopy:
    """Replaces the CUDA event of a copy: the copy is always finished by the time anybody asks."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class PageableHiddenStatesConnector(shipped.ExampleHiddenStatesConnector):  # type: ignore[misc, unused-ignore]
    """Overrides the one step that needs a GPU: moving states from vLLM's cache to the thread that writes them."""

    def _submit_async_write(self, pending: Any) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        count = len(pending.token_ids)
        # Indexing copies. It must: vLLM may reuse the blocks for another request while the thread still writes.
        states = shipped.extract_from_kv_cache(self._kv_cache, slots, count)
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
        copied = _FinishedCopy()
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, self._lock_of(pending))
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))

    def _lock_of(self, pending: Any) -> int | None:
        """Takes the lock of a request's file, unless it is taken already; its release shows that the file is whole."""
        descriptor: int | None = self._lock_fds.pop(pending.req_id, None)
        if descriptor is None and self.use_lock:
            descriptor = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor
