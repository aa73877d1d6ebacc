"""Measures several speculators on the same suites, K and temperatures, taking from runs what they hold already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from speculators.bench.comparison import ComparedSpeculator
from speculators.bench.result import BenchResult, Setting, definition
from speculators.bench.suites import load_suite, prompts_digest
from speculators.events import Listen, StageEvent, WarningEvent
from speculators.pipeline.measure import SavedSpeculator, measure_folder, verifier_of
from speculators.recipe.fingerprint import fingerprint, template_identity, verifier_identity
from speculators.recipe.plan import read_plan
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.runs.benches import FiledSetting, file_bench, read_benches
from speculators.runs.places import RunFolder

# K and temperature.
Asked = tuple[int, float]


@attrs.frozen(kw_only=True)
class Entrant:
    """A speculator to compare.

    Attributes:
        name: as rows show it.
        subject: where it lies.
        own: whether what is measured is the run's own, so that what it holds counts, and new results are filed in it.
        again: whether to measure what the run holds, too.
    """

    name: str
    subject: SavedSpeculator
    own: bool
    again: bool = False


def filed_or_measured(entrant: Entrant, section: BenchmarkSection, *, listen: Listen) -> ComparedSpeculator:
    """Collects the settings of a section from what a run holds, and measures suites at temperatures that it lacks.

    Args:
        section: suites, K, temperatures and baselines.

    Raises:
        SpeculatorsError: see `measure_folder`.
    """
    section = attrs.evolve(section, trees=())  # of which a comparison has no rows
    run = entrant.subject.run if entrant.own else None
    known = None if entrant.again else run
    filed = {suite.name: {} if known is None else _filed(known, section, suite) for suite in section.suites}
    parts = {suite.name: _lacking(section, suite, filed[suite.name]) for suite in section.suites}
    if run is not None and any(parts.values()):
        for line in read_benches(run).unread:
            listen(WarningEvent(message=f"{run}: {line}"))
    results: list[BenchResult] = []
    for name, part in parts.items():
        lacking = () if part is None else part.temperature
        present = [each for (_, temperature), each in filed[name].items() if temperature not in lacking]
        results += _trimmed(present, section)
        if part is not None:
            listen(StageEvent(stage="bench", status="start", detail=f"{entrant.name} on {name}"))
            measured = measure_folder(entrant.subject, part, progress=listen)
            results.append(measured)
            if run is not None:
                file_bench(run, measured)
    verifier, template = _verifier(entrant.subject)
    return ComparedSpeculator(name=entrant.name, verifier=verifier, template=template, results=tuple(results))


def _filed(run: Path, section: BenchmarkSection, suite: Suite) -> Mapping[Asked, FiledSetting]:
    """Finds the settings of a suite that a run holds as they would be measured, with every baseline."""
    if section.temperature == "model":
        return {}  # the verifier, which has not been loaded, says which temperature that is
    digest = prompts_digest(load_suite(suite))
    filed = {
        (each.setting.num_speculative_tokens, each.setting.temperature): each
        for each in read_benches(run).filed
        if (each.setting.suite, each.setting.prompts_digest) == (suite.name, digest)
        and each.result.max_new_tokens == section.max_new_tokens
        and set(section.baselines) <= {baseline.name for baseline in each.setting.baselines}
    }
    asked = {
        (k, t): definition(k, t, section.token_filter, block_verification=section.block_verification)
        for t in section.temperatures
        for k in section.num_speculative_tokens
    }
    return {key: filed[key] for key, text in asked.items() if key in filed and filed[key].setting.definition == text}


def _lacking(section: BenchmarkSection, suite: Suite, filed: Mapping[Asked, FiledSetting]) -> BenchmarkSection | None:
    """Limits a section to one suite, and to the temperatures at which a K is not filed; None if all are."""
    if section.temperature == "model":
        return attrs.evolve(section, suites=(suite,))
    ks = section.num_speculative_tokens
    lacking = tuple(t for t in section.temperatures if any((k, t) not in filed for k in ks))
    if not lacking:
        return None
    if max(lacking) == 0:  # greedy decoding alone may have neither filters nor another rule
        section = attrs.evolve(section, top_p=None, top_k=None, min_p=None, verification="token")
    return attrs.evolve(section, suites=(suite,), temperature=lacking)


def _trimmed(filed: Sequence[FiledSetting], section: BenchmarkSection) -> list[BenchResult]:
    """Groups settings by the benchmark that holds them, without baselines that the section does not name."""
    by_file: dict[str, list[Setting]] = {}
    for each in filed:
        baselines = tuple(one for one in each.setting.baselines if one.name in section.baselines)
        by_file.setdefault(each.file, []).append(attrs.evolve(each.setting, baselines=baselines))
    results = {each.file: each.result for each in filed}
    return [attrs.evolve(results[file], settings=tuple(settings)) for file, settings in by_file.items()]


def _verifier(subject: SavedSpeculator) -> tuple[str, str]:
    """Fingerprints a speculator's verifier, and what its recipe changes in the chat template.

    A run's plan identifies both, and the verifier's files may be elsewhere by now.
    """
    if subject.run is not None and subject.verifier is None:
        stages = {stage["name"]: stage["inputs"] for stage in read_plan(RunFolder(subject.run).plan)["stages"]}
        inputs = stages["verifier"]
    else:
        section = verifier_of(subject)
        inputs = verifier_identity(section) | template_identity(section)
    template = {key: value for key, value in inputs.items() if key in ("template", "chat_template")}
    model = {key: value for key, value in inputs.items() if key not in ("version", *template)}
    return fingerprint(model), fingerprint(template)
