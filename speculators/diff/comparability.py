"""Whether acceptance lengths of two recipes or runs may be set beside each other, and why (not)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.diff.side import DiffSide
from speculators.recipe.fingerprint import fingerprint

# Keys of the benchmark stage of which both sides must share at least one value.
_SHARED = {
    "dtype": "the verifier's precisions",
    "max_new_tokens": "the lengths of the responses",
    "temperature": "the temperatures",
    "num_speculative_tokens": "the K",
}


def comparability(a: DiffSide, b: DiffSide) -> tuple[bool | None, tuple[str, ...]]:
    """Decides whether acceptance lengths of both sides compare.

    Returns:
        The decision (None where the stages of a side are not known) and its reasons.
    """
    if not a.stages or not b.stages:
        return None, ("the stages of one side are unknown",)
    if silent := [side.name for side in (a, b) if "bench" not in side.stages]:
        return False, (f"{' and '.join(silent)} measures no acceptance",)
    reasons = []
    if a.stages["verifier"].fingerprint != b.stages["verifier"].fingerprint:
        reasons.append(f"the verifiers differ ({_verifier(a)} / {_verifier(b)})")
    one, other = (side.stages["bench"].inputs for side in (a, b))
    if one["suites"] != other["suites"]:
        reasons.append(f"the suites differ ({_suites(a, one)} / {_suites(b, other)})")
    for key, noun in _SHARED.items():
        if not set(_list(one[key])) & set(_list(other[key])):
            reasons.append(f"{noun} differ ({one[key]} / {other[key]})")
    for key in ("top_p", "top_k", "min_p"):
        if one.get(key) != other.get(key):
            reasons.append(f"the verifier's {key} differ ({one.get(key)} / {other.get(key)})")
    # The default is not among the inputs.
    rules = [side.get("verification", "token") for side in (one, other)]
    if rules[0] != rules[1]:
        reasons.append(f"drafts are verified by different rules ({' / '.join(rules)})")
    reasons += _conditions_differ(a, b)
    if reasons:
        return False, tuple(reasons)
    shared = ["the same verifier, suites and response length"]
    for key, symbol in (("num_speculative_tokens", "K"), ("temperature", "T")):
        both = [f"{value:g}" for value in _list(one[key]) if value in _list(other[key])]
        shared.append(f"at {symbol} {', '.join(both)}")
    if a.conditions.keys() & b.conditions.keys():
        shared.append("by the same definition")
    reasons = [", ".join(shared)]
    if a.precision and b.precision and a.precision != b.precision:
        # The comparison is about how drafts were trained; both were measured alike.
        reasons.append(
            f"but the drafts were trained in {a.precision} / {b.precision}: rounding accounts for part of a difference"
        )
    return True, tuple(reasons)


def _conditions_differ(a: DiffSide, b: DiffSide) -> list[str]:
    """Compares how both runs really measured; each reason names the first setting that shows it."""
    nouns = {"definition": "the definitions of tau", "dtype": "the precisions in which the verifier computed"}
    reasons: dict[str, str] = {}
    for setting in (each for each in a.conditions if each in b.conditions):
        suite, k, temperature = setting
        for key, noun in nouns.items():
            one, other = (getattr(side.conditions[setting], key) for side in (a, b))
            if one != other:
                reasons.setdefault(key, f"{noun} differ at {suite}, K={k}, T={temperature:g} ({one} / {other})")
    return list(reasons.values())


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _verifier(side: DiffSide) -> str:
    return f"{side.values.get('verifier.model', '?')}@{side.stages['verifier'].fingerprint[:8]}"


def _suites(side: DiffSide, inputs: Mapping[str, Any]) -> str:
    names = [side.values.get(f"benchmark.suites[{index}].name", "?") for index in range(len(inputs["suites"]))]
    digests = [_suite_digest(suite)[:4] for suite in inputs["suites"]]
    return ", ".join(f"{name}@{digest}" for name, digest in zip(names, digests, strict=True))


def _suite_digest(suite: Mapping[str, Any]) -> str:
    return fingerprint(suite["files"]) if "files" in suite else str(suite.get("sha256") or suite.get("revision") or "")
