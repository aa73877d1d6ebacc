"""The report fits a terminal of 80 columns, and says first what is wrong."""

from __future__ import annotations

import io

from rich.console import Console
from rich.theme import Theme

from speculators.doctor.check import Check, Diagnosis, Family
from speculators.report.console import STYLES
from speculators.report.doctor import diagnosis_tables

ALIGNMENT, CONFIG, DATA, LOADS = (Family(name) for name in ("alignment", "config", "data", "loads"))
NO_RUN = "the checkpoint is not in a run folder"


def printed(*checks: Check, long: bool = False) -> list[str]:
    """Renders a diagnosis as a terminal of 80 columns shows it."""
    diagnosis = Diagnosis(
        speculator="/home/someone/work/speculators/runs/quickstart-1a2b3c4d/speculator",
        algorithm="relay",
        verifier="/home/someone/.cache/speculators/verifiers/SmolLM2-135M-Instruct",
        prompts="48 greedy answers to 48 prompts of quickstart",
        false_alarm=0.01,
        seconds=41.0,
        checks=checks,
    )
    out = io.StringIO()
    Console(file=out, width=80, theme=Theme(STYLES), highlight=False).print(diagnosis_tables(diagnosis, long=long))
    return out.getvalue().splitlines()


LAYERS = ALIGNMENT.wrong(
    "layer ids",
    "the draft was trained on layers one later than [1, 14, 26] (off by one): tau 1.610 as configured, 1.659 with "
    "layers [2, 15, 27] (best of 8); accepted drafts +8.0% (95%: +4.1% to +11.9%); p = 1e-05, with 52 tried",
    "write [2, 15, 27] into config.json",
)
SOUND = [LOADS.ok(name, "a sentence with figures") for name in ("files", "tensors", "shapes", "finite")]
NEEDS_RUN = [DATA.skipped(f"check {number}", NO_RUN) for number in range(14)]
ALONE = CONFIG.skipped("options", "the tensors fit only one value of each option in config.json")


def test_the_report_fits_80_columns_and_nothing_is_cut_off() -> None:
    """Long evidence is wrapped; every word of it is there."""
    lines = printed(LAYERS, CONFIG.warning("norm eps", "rms_norm_eps is 1e-05", "keep it"), *SOUND, *NEEDS_RUN, ALONE)
    assert max(len(line) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    assert LAYERS.evidence in text
    assert "do: write [2, 15, 27] into config.json" in text
    assert "\u2026" not in text


def test_what_is_wrong_comes_first_and_what_passed_takes_a_line() -> None:
    """Wrong, warning, ok, not checked, verdict."""
    lines = printed(*SOUND, CONFIG.warning("norm eps", "rms_norm_eps is 1e-05"), LAYERS, *NEEDS_RUN)
    starts = [line.split()[0] for line in lines if line and not line[0].isspace()]
    assert starts[-7:] == ["wrong", "warning", "ok", "not", "not", "measured", "fails"]
    assert "ok           loads: files, tensors, shapes, finite" in [line.rstrip() for line in lines]


def test_what_needs_the_run_is_one_line_not_fourteen() -> None:
    """Checks of one reason are counted; the reasons of single checks are left to --long, which gives all of them."""
    lines = printed(*SOUND, *NEEDS_RUN, ALONE)
    assert [line.rstrip() for line in lines if NO_RUN in line] == [f"not checked  14 checks: {NO_RUN}"]
    assert any("options (--long gives the reasons)" in line for line in lines)
    every = " ".join(" ".join(printed(*SOUND, *NEEDS_RUN, ALONE, long=True)).split())
    assert every.count(NO_RUN) == 14
    assert "loads/files: a sentence with figures" in every
    assert ALONE.evidence in every
