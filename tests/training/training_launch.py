"""The program that torchrun starts in test_world.py: trains the toy in every setting."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import attrs
import torch
from training_toy import ADAMW, MUON, ROWS, STEPS, batches, build, exported_weights, make_job, make_row, run, weights

from speculators.errors import ArtifactError, TrainingError
from speculators.events import EvalEvent, StepEvent
from speculators.training import snapshot
from speculators.training.world import dismiss, leave, start

CASES = {
    "adamw": {"optimizer": ADAMW},
    "muon": {"optimizer": MUON},
    "bf16": {"optimizer": ADAMW, "precision": "bf16"},
    "copies": {"optimizer": MUON, "shard": False},
    "average": {"optimizer": ADAMW, "ema": 0.4},
}


def whole_run(folder, world, *, rows=ROWS, **changes):
    """Trains, and returns weights, those to export, losses, gradient norms, and the results of evaluations."""
    model = build()

    def tau():
        """Bypasses model.forward, on rank 0 alone: no collective may hide in a layer's hooks."""
        return (model.layers[0](model.fc.weight.T).sum().item(), {}) if world.is_main else (0.0, {})

    changes = {"evaluate_every": 3, "checkpoint_every": 100, **changes}
    pure = batches(world, count=rows)
    events = list(run(model, make_job(folder, **changes), world, batches=pure, evaluate=tau))
    steps = [event for event in events if isinstance(event, StepEvent)]
    return {
        "weights": weights(model) | {f"exported {name}": value for name, value in exported_weights(folder).items()},
        "losses": [event.loss for event in steps],
        "norms": [event.grad_norm for event in steps],
        "taus": [event.tau for event in events if isinstance(event, EvalEvent)],
    }


def failure(action):
    """Runs `action` and returns the message of its error."""
    try:
        action()
    except (ArtifactError, TrainingError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def nan_on_the_last_rank(world):
    """Makes batches in which the last row of step 1 contains nan."""
    pure = batches(world)

    def poisoned(step):
        batch = pure(step)
        rows = list(batch.rows)
        if step == 1 and world.rank == world.size - 1:
            rows[-1].tensors["hidden_states"].fill_(float("nan"))
        return attrs.evolve(batch, rows=iter(rows))

    return poisoned


def stopped_on_the_last_rank(world):
    """Makes batches that send SIGTERM to one process at step 3."""
    mine = world.rank == world.size - 1
    return batches(world, before=lambda step: step == 2 and mine and os.kill(os.getpid(), signal.SIGTERM))


def failures(folder, world):
    """Runs cases in which something happens to one process only, and returns their errors and leftovers."""
    results = {}
    job = make_job(folder / "nan", checkpoint_every=1)
    results["nan"] = failure(lambda: list(run(build(), job, world, batches=nan_on_the_last_rank(world))))
    job = make_job(folder / "stop", checkpoint_every=100)
    results["stop"] = failure(lambda: list(run(build(), job, world, batches=stopped_on_the_last_rank(world))))
    results["left by stop"] = sorted(path.name for path in (folder / "stop").iterdir())
    real = snapshot.rng.capture
    if world.rank == world.size - 1:
        snapshot.rng.capture = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    results["disk"] = failure(lambda: list(run(build(), make_job(folder / "disk"), world)))
    snapshot.rng.capture = real
    results["left by disk"] = sorted(path.name for path in (folder / "disk").iterdir())
    results["seeds"] = failure(lambda: list(run(build(seed=world.rank), make_job(folder / "seeds"), world)))
    return results


def main(folder: Path) -> None:
    """Runs all cases; every process writes its results."""
    torch.set_num_threads(1)
    world = start()
    results = {name: whole_run(folder / name, world, **changes) for name, changes in CASES.items()}
    results["resumed"] = whole_run(folder / "resumed", world, optimizer=MUON)
    results["failures"] = failures(folder, world)
    assert make_row(0, 1).supervised > 0
    assert len(results["adamw"]["losses"]) == STEPS
    torch.save(results, folder / f"rank-{world.rank}.pt")
    # As before a benchmark: the processes leave together, and none waits for another after that.
    alone = dismiss(world)
    assert (alone.rank, alone.size) == (world.rank, 1)
    alone.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
