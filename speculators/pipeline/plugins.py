"""Algorithms of other packages: rehearsed before data is read, and named where their code fails."""

from __future__ import annotations

import inspect
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import SpeculatorModelConfig
from speculators.contract import build_model, trainer_kwargs
from speculators.data.batches import build_row
from speculators.data.encoded import Encoded
from speculators.errors import ContractError, SpeculatorsError
from speculators.events import WarningEvent
from speculators.facts import VerifierFacts
from speculators.model import BATCH_NAMES, MODELS, SpeculatorModel
from speculators.nn.layout import RowLayout
from speculators.nn.precision import place
from speculators.pipeline.arguments import stand_in_vocabulary, training_kwargs
from speculators.pipeline.context import Context
from speculators.recipe.plan import Plan, make_plan
from speculators.registry import qualified_name
from speculators.training.shard import precision
from speculators.training.update import accepted_by, loss_and_metrics
from speculators.training.world import World
from speculators.verifier.tiny import make_tiny_verifier


def is_plugin(name: str) -> bool:
    """Whether an algorithm is defined outside of this package."""
    return not SpeculatorModelConfig.get_class(name).__module__.startswith("speculators.models.")


@contextmanager
def blaming_plugin(name: str) -> Iterator[None]:
    """Turns an exception from a plug-in's own code into an error that names the plug-in; others pass through.

    Raises:
        ContractError: as `plugin_failure` makes it.
    """
    try:
        yield
    except SpeculatorsError:
        raise
    # Somebody else's code may raise anything.
    except Exception as error:
        if not is_plugin(name) or not _own_frames(name, error):
            raise
        raise plugin_failure(name, error, "") from error


def plugin_failure(name: str, error: Exception, where: str) -> ContractError:
    """Makes the error for a plug-in that failed: its class, the exception, and the lines of its own that led there.

    Args:
        where: it was run, as an adverbial such as "on a tiny verifier"; "" in the run itself.
    """
    # The model's class may not exist yet, if its module is what failed.
    get = SpeculatorModel.get_class if name in MODELS.names() else SpeculatorModelConfig.get_class
    place = qualified_name(get(name))
    failed = " ".join(filter(None, (place, "failed", where)))
    lines = [f"  {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in _own_frames(name, error)]
    return ContractError(f"{failed}: {type(error).__name__}: {error}", hint="\n".join(lines))


def _own_frames(name: str, error: Exception) -> list[traceback.FrameSummary]:
    """Picks the frames of a traceback that lie in the plug-in's files."""
    config_class = SpeculatorModelConfig.get_class(name)
    try:
        file = Path(inspect.getfile(config_class)).resolve()
    except (OSError, TypeError):  # defined in an interpreter or notebook, without a file
        return []
    package = "." in config_class.__module__ or file.name == "__init__.py"

    def own(path: Path) -> bool:
        return file.parent in path.parents if package else path == file

    return [frame for frame in traceback.extract_tb(error.__traceback__) if own(Path(frame.filename).resolve())]


# Draft vocabulary, and lengths of the documents in a row, of the rehearsal.
VOCABULARY = 128
DOCUMENTS = (20, 12)
# Keys of `algorithm.decoder` that mean the same for a decoder of another size.
SIZELESS = ("model_type", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")


def rehearse(context: Context) -> None:
    """Builds a plug-in's model for a tiny verifier with as many layers and runs one forward and backward.

    A failure may be due to the small sizes: the step is then tried at the run's own, and a success there makes the
    failure a warning.

    Raises:
        ContractError: a part of the contract is missing or wrong, or the plug-in fails at the run's own sizes, too.
    """
    name, world = context.recipe.algorithm.name, context.world
    try:
        with tempfile.TemporaryDirectory() as folder:
            _step(_tiny(context.plan, Path(folder)), Path(folder), DOCUMENTS, world)
        return
    except SpeculatorsError:
        raise
    # Somebody else's code may raise anything.
    except Exception as error:
        small = error
    size = min(context.plan.row_tokens, context.recipe.data.max_tokens)
    try:
        _step(context.plan, context.folder, (size - size // 3, size // 3), world)
    except SpeculatorsError:
        raise
    except Exception as error:
        raise plugin_failure(name, error, "in its first step, on a tiny verifier and on this one") from error
    problem = plugin_failure(name, small, "on a tiny verifier")
    context.emit(WarningEvent(message=f"{problem}\nIts first step on this run's verifier succeeded: the run goes on"))


def _tiny(plan: Plan, folder: Path) -> Plan:
    """Makes a tiny verifier in `folder`, and the plan for it."""
    make_tiny_verifier(folder, num_hidden_layers=plan.facts.num_hidden_layers)
    section = plan.recipe.algorithm
    decoder = {key: value for key, value in section.config.decoder.items() if key in SIZELESS}
    size = VOCABULARY if plan.draft_vocab_size < plan.facts.vocab_size else None
    config = attrs.evolve(section.config, decoder=decoder, draft_vocab_size=size)
    recipe = attrs.evolve(plan.recipe, algorithm=attrs.evolve(section, config=config))
    tiny = make_plan(recipe, VerifierFacts.read(folder / "config.json"), world_size=plan.world_size)
    return attrs.evolve(tiny, precision=plan.precision)


def _step(plan: Plan, folder: Path, lengths: tuple[int, ...], world: World) -> None:
    """Builds the model and runs forward and backward on one row of documents of these lengths."""
    kwargs = training_kwargs(plan, str(folder), stand_in_vocabulary(plan))
    model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
    train_kwargs, _ = trainer_kwargs(model, kwargs)
    _check_signature(model, train_kwargs)
    place(model, world.device)
    row = _row(plan, model, lengths)
    layout = RowLayout.of(row["document_ids"], row["loss_mask"])
    batch = {**{key: tensor.to(world.device) for key, tensor in row.items()}, "layout": layout}
    names = accepted_by(model, batch)
    with precision(world, plan.precision):
        loss, _ = loss_and_metrics(model, model(**{name: batch[name] for name in names}, **train_kwargs))
    loss.backward()
    if all(parameter.grad is None for parameter in model.parameters()):
        raise ContractError(
            f"{qualified_name(type(model))}.forward's loss gives no gradient to any parameter",
            hint="compute it from the model's parameters, without detach() or no_grad()",
        )


def _check_signature(model: SpeculatorModel, train_kwargs: dict[str, Any]) -> None:
    """Checks that every required parameter of forward comes from the batch or from `get_trainer_kwargs`."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in kinds}
    if lacking := sorted(required - {*BATCH_NAMES, *train_kwargs}):
        place, names = qualified_name(type(model)), ", ".join(lacking)
        raise ContractError(
            f"{place}.forward wants {names}, which neither the batch has nor get_trainer_kwargs gives",
            hint=f"return them from get_trainer_kwargs, or give them defaults; the batch has {', '.join(BATCH_NAMES)}",
        )


def _row(plan: Plan, model: SpeculatorModel, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Packs a row of random documents, the second half of each supervised."""
    generator = torch.Generator().manual_seed(0)
    width = plan.facts.hidden_size
    widths = (len(plan.target_layer_ids) * width, width)
    items = []
    for length in lengths:
        ids = torch.randint(plan.draft_vocab_size, (length,), generator=generator)
        states = [torch.randn(length, each, generator=generator) for each in widths]  # [S, A*H], [S, H]
        encoded = Encoded(ids.int().numpy(), (torch.arange(length) >= length // 2).numpy())
        items.append((encoded, (states[0], states[1])))
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    return build_row(items, widths=widths, dtype=dtype, align=model.align)
