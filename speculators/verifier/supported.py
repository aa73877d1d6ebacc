"""Judges from a config.json alone whether a verifier's architecture is supported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from speculators.errors import Problem, VerifierError
from speculators.facts import VerifierFacts
from speculators.recipe.schema import Recipe
from speculators.verifier.head import HeadRules
from speculators.verifier.trust import is_trusted


def check_architecture(facts: VerifierFacts) -> None:
    """Checks that a verifier of this architecture can be captured from, drafted for and measured; loads no weights.

    Raises:
        VerifierError: transformers does not know it, its layers or final norm are of an unknown kind, or it has
            several residual streams.
    """
    HeadRules.of(facts)


def architecture_problems(recipe: Recipe, facts: VerifierFacts) -> list[Problem]:
    """Lists what `check_architecture` refuses of a recipe's verifier, as problems of the recipe."""
    if recipe.verifier.trust_remote_code and not is_trusted(Path(facts.source).parent):
        # A config.json that lies by itself: the code that it names, which the recipe trusts, is not there to be asked.
        return []
    try:
        check_architecture(facts)
    except VerifierError as error:
        message, _, hint = str(error).partition("\n")
        return [recipe.problem("verifier.model", message, hint)]
    return []


def missing_packages(recipe: Recipe, facts: VerifierFacts) -> list[Problem]:
    """Lists, as problems of the recipe, the packages that loading its verifier needs and that are not installed."""
    quantization = facts.get("quantization_config") or {}
    # As gpt-oss is published; transformers would say so after the download.
    if quantization.get("quant_method") != "mxfp4" or importlib.util.find_spec("accelerate") is not None:
        return []
    message = f"{recipe.verifier.model} has MXFP4 weights, which only accelerate reads, and that is not installed"
    return [recipe.problem("verifier.model", message, "pip install 'spec-recipes[quickstart]'")]
