"""vLLM's connector of hidden states for machines without a GPU: the same files, written without pinned memory.

This file runs in vLLM's environment, which has it on its path (`kv_connector_module_path`) and nothing else of this
package: it imports vLLM and torch only. Written for vLLM 0.32, whose connector copies states to pinned memory on a
stream of a GPU before a thread writes them; where there is no GPU they are in memory already.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as shipped


class _Copied:
    """Stands for the event of a copy, which is over before anybody asks."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class PageableHiddenStatesConnector(shipped.ExampleHiddenStatesConnector):
    """Overrides the one step that needs a GPU: out of the cache of states, into the hands of a writing thread."""

    def _submit_async_write(self, pending: Any) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        count = len(pending.token_ids)
        # Indexing copies: the blocks may be given to the next conversation while the thread still writes.
        states = shipped.extract_from_kv_cache(self._kv_cache, slots, count)
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
        copied = _Copied()
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, self._lock_of(pending))
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))

    def _lock_of(self, pending: Any) -> int | None:
        """Returns the held lock of a request's file, whose release tells the reader that it is whole."""
        held = self._lock_fds.pop(pending.req_id, None)
        if held is None and self.use_lock:
            held = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(held, fcntl.LOCK_EX)
        return held
