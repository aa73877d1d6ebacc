"""Runs in vLLM's environment: decodes prompts greedily, one at a time, and reports tokens, rounds and vLLM's
counters.

    python run_vllm.py REQUEST.json ANSWER.json

REQUEST: `model` (a folder that vLLM loads), `arguments` (of `LLM`), `prompts` (token ids), `max_tokens`, `logprobs`
(True tells how much the chosen token's log-probability exceeds the second's). ANSWER: a list `responses` of `tokens`,
`steps` (tokens that each step emitted), `gaps`, and `counters` (what vLLM counted meanwhile).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def counters(llm: Any) -> dict[str, Any]:
    """Reads vLLM's counters of drafts."""
    counts: dict[str, Any] = {}
    for metric in llm.get_metrics():
        for key, name in COUNTERS.items():
            if metric.name == name:
                counts[key] = list(metric.values) if hasattr(metric, "values") else metric.value
    return counts


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Subtracts the earlier counters from the later ones."""
    return {
        key: [now - then for now, then in zip(value, before[key], strict=True)]
        if isinstance(value, list)
        else value - before[key]
        for key, value in after.items()
    }


def respond(llm: Any, number: int, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
    """Decodes one prompt step by step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        logprobs=2 if request["logprobs"] else None,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )
    before = counters(llm)
    engine = llm.llm_engine
    engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    tokens: list[int] = []
    steps: list[int] = []
    gaps: list[float] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion = output.outputs[0]
            new = list(completion.token_ids)
            if new:
                tokens += new
                steps.append(len(new))
            for row in completion.logprobs or ():
                best = sorted((token.logprob for token in row.values()), reverse=True)
                gaps.append(best[0] - best[1])
    return {"tokens": tokens, "steps": steps, "gaps": gaps, "counters": difference(counters(llm), before)}


def main() -> None:
    """Answers the request."""
    import vllm
    from vllm import LLM

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(model=request["model"], disable_log_stats=False, **request["arguments"])
    responses = [respond(llm, number, prompt, request) for number, prompt in enumerate(request["prompts"])]
    answer = {"version": vllm.__version__, "responses": responses}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
