"""Which servers read a recipe's drafts is known before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from facts import FIXTURES, facts_of
from models.test_mtp import HYBRID

from speculators.exchange.servable import servers_line, servers_of
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.verifier.tiny import make_tiny_verifier


@pytest.mark.parametrize(
    ("recipe", "overrides", "line"),
    [
        ("eagle3_llama8b", ["algorithm.norm_before_residual=true"], "vLLM; not SGLang: norm_before_residual"),
        ("eagle3_llama8b", ["algorithm.norm_before_residual=false"], "vLLM, SGLang"),
        (
            "eagle3_llama8b",
            [
                "algorithm.norm_before_residual=false",
                "algorithm.target_layer_ids=[2, 16, 32]",
                "algorithm.num_layers=2",
            ],
            "vLLM; not SGLang: layer id 32, num_layers 2",
        ),
        (
            "eagle3_llama8b",
            ['algorithm.decoder.hidden_act="gelu_pytorch_tanh"'],
            "no server; not vLLM: hidden_act 'gelu_pytorch_tanh'; not SGLang: hidden_act 'gelu_pytorch_tanh'",
        ),
        ("dflash_qwen3_8b", [], "vLLM; not SGLang: it has no layout for the algorithm dflash"),
        ("medusa_llama8b", [], "vLLM; not SGLang: it has no layout for the algorithm medusa"),
        ("mtp_qwen3_next", [], "vLLM; not SGLang: it has no layout for the algorithm mtp"),
        (
            "quickstart_mtp",
            [],
            "no server; not vLLM: decoder.model_type 'llama'; not SGLang: it has no layout for the algorithm mtp",
        ),
    ],
)
def test_the_servers_of_a_recipe_are_known_with_what_keeps_the_others_away(
    recipe: str, overrides: list[str], line: str, tmp_path: Path
) -> None:
    """The line names the options that an export would be refused for; nothing is trained first."""
    loaded = load_recipe(recipe, overrides)
    assert servers_line(servers_of(loaded, facts_of(loaded, tmp_path))) == line


def test_a_native_head_is_judged_by_the_layers_that_it_will_have(tmp_path: Path) -> None:
    """The recipe does not name them: they are those of the verifier."""
    facts = VerifierFacts.read(make_tiny_verifier(tmp_path, model_type="qwen3_5_text", **HYBRID) / "config.json")
    native, scratch = (load_recipe("quickstart_mtp", [f"algorithm.native={each}"]) for each in ("true", "false"))
    assert servers_of(native, facts)[0].reasons == ()
    assert "come with a verifier" in servers_of(scratch, facts)[0].reasons[0]


def test_validate_and_plan_say_who_serves_the_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    """Both print the line, and plan the reasons with their remedies, also as JSON."""
    from speculators.cli import main

    config = ("--verifier-config", str(FIXTURES / "llama-3.1-8b" / "config.json"))
    residual = ("--set", "algorithm.norm_before_residual=true")
    assert main(["validate", "eagle3_llama8b", *residual, *config]) == 0
    assert "servable by: vLLM; not SGLang: norm_before_residual\n" in capsys.readouterr().out
    assert main(["plan", "eagle3_llama8b", *residual, *config]) == 0
    printed = capsys.readouterr().out
    assert "vLLM; not SGLang: norm_before_residual" in printed
    assert "train with algorithm.norm_before_residual = false" in " ".join(printed.split())
