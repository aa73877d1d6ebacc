"""What one call of `train` yields, and how it stops."""

from __future__ import annotations

import os
import signal
import time

import attrs
import pytest
import torch
from torch import nn
from training_toy import ADAMW, MUON, ROWS, STEPS, TOKENS, batches, build, make_job, make_row, run, weights

from speculators.errors import ContractError, DataError, TrainingError
from speculators.events import EvalEvent, SaveEvent, StepEvent
from speculators.training.checkpoint import complete
from speculators.training.schedule import factor
from speculators.training.state import BatchRow
from speculators.training.stop import StopRequest
from speculators.training.world import World


def steps(events):
    return [event for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("section", [ADAMW, MUON])
def test_a_run_is_a_list_of_events(tmp_path, section):
    """Steps, evaluations and checkpoints come in order, each step with its rate, tokens, epoch and metrics."""
    job = make_job(tmp_path, optimizer=section, evaluate_every="50%", checkpoint_every="50%")
    events = list(run(build(), job, evaluate=lambda: (1.5, {"acceptance": 0.5})))
    kinds = "".join(type(event).__name__[0] + type(event).__name__[1] for event in events)
    assert kinds == "StStStEvSaStStStEvSa"
    found = steps(events)
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6]
    assert [event.epoch for event in found] == [0, 0, 0, 1, 1, 1]
    rate = job.schedule.learning_rate
    assert [event.learning_rate for event in found] == [section.lr * factor(i, STEPS, rate) for i in range(STEPS)]
    assert all(event.tokens == ROWS * TOKENS and event.tokens_per_second > 0 for event in found)
    assert found[-1].seconds_left == 0
    assert set(found[0].metrics) == {"accuracy"}
    assert [event.metrics for event in events if isinstance(event, EvalEvent)] == [{"acceptance": 0.5}] * 2


class Mean(nn.Module):
    """A model whose loss is the mean of w * x over supervised places, so that its gradient is a known mean."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])

    def forward(self, hidden_states, loss_mask, **rest):
        picked = self.layers[0](hidden_states[..., :1])[loss_mask]
        loss = picked.sum() / loss_mask.sum()
        return picked, loss, {"loss": loss.detach(), "places": loss_mask.sum()}


def test_the_gradient_is_the_mean_over_all_supervised_tokens_of_the_batch(tmp_path):
    """Rows weigh by their supervised tokens; a row without any weighs nothing, though its own mean is 0/0."""
    rows = [make_row(0, index) for index in range(ROWS)]
    assert [row.supervised for row in rows].count(0) == 1
    states = torch.cat([row.tensors["hidden_states"][..., 0][row.tensors["loss_mask"]] for row in rows])
    schedule = make_job(tmp_path).schedule
    optimizer = attrs.evolve(schedule.optimizer, clip_norm=None)
    event = next(run(Mean(), make_job(tmp_path, optimizer=optimizer), train_kwargs={}))
    assert event.grad_norm == pytest.approx(states.mean().abs().item(), rel=1e-5)


def test_a_row_of_nothing_but_padding_runs_and_changes_nothing(tmp_path):
    """A process for which no row is left gives padding; no forward divides by zero over it, and the gradient stays."""
    plain = next(run(Mean(), make_job(tmp_path / "plain"), train_kwargs={}))

    def padded(step):
        batch = batches(World())(step)
        tensors = {**make_row(step, 0).tensors, "loss_mask": torch.zeros(1, TOKENS, dtype=torch.bool)}
        empty = BatchRow(tensors={**tensors, "document_ids": torch.full((1, TOKENS), -1)}, supervised=0, index=ROWS)
        return attrs.evolve(batch, rows=[*batch.rows, empty], num_rows=ROWS + 1)

    event = next(run(Mean(), make_job(tmp_path / "padded"), train_kwargs={}, batches=padded))
    assert (event.grad_norm, event.loss) == (plain.grad_norm, plain.loss)


def test_a_forward_gets_only_the_names_it_takes_and_all_its_own_kwargs(tmp_path):
    """The toy names three of the six tensors and has no **kwargs; a train kwarg that it does not know is an error."""
    next(run(build(), make_job(tmp_path)))
    with pytest.raises(TypeError, match="tt_steps"):
        next(run(build(), make_job(tmp_path), train_kwargs={"tt_steps": 3}))


def poison(step, *, at, index):
    """Returns rows of `step` in which row `index` holds a nan when `step` is `at`."""
    rows = [make_row(step, place) for place in range(ROWS)]
    if step == at:
        rows[index].tensors["hidden_states"][0, 0, 0] = float("nan")
    return rows


def test_a_loss_that_is_not_finite_stops_and_names_step_documents_and_checkpoint(tmp_path):
    """The error names the step, the row, its conversations and the last good checkpoint; no weight has changed."""
    model, before = build(), {}

    def poisoned(step):
        before.update(weights(model))
        batch = batches(World())(step)
        return attrs.evolve(batch, rows=iter(poison(step, at=4, index=2)))

    with pytest.raises(TrainingError) as caught:
        list(run(model, make_job(tmp_path), batches=poisoned))
    message = str(caught.value)
    assert "step 5 of 6: the loss is nan, in row 2 (loss nan; conversations: doc-4-2)" in message
    assert f"the last good checkpoint is {tmp_path / 'step-00000004'}" in message
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


class Steep(Mean):
    """Finite in its loss, infinite in its gradient."""

    def forward(self, hidden_states, loss_mask, **rest):
        loss = torch.sqrt(self.layers[0].weight.sum() * 0.0)
        return None, loss, {"loss": loss.detach()}


def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    """With a finite loss and an infinite gradient, the error names every row, and that no checkpoint exists."""
    with pytest.raises(TrainingError, match=r"step 1 of 6: the norm of the gradient is (nan|inf)") as caught:
        list(run(Steep(), make_job(tmp_path), train_kwargs={}))
    assert "doc-0-0" in str(caught.value)
    assert "doc-0-3" in str(caught.value)
    assert "no checkpoint was saved yet" in str(caught.value)


def test_a_batch_without_any_supervised_token_is_an_error(tmp_path):
    """Nothing to learn from is said, not trained on at zero loss."""
    empty = lambda step: attrs.evolve(batches(World())(step), supervised=0)  # noqa: E731
    with pytest.raises(DataError, match="step 1: no token"):
        list(run(build(), make_job(tmp_path), batches=empty))


def test_metrics_that_come_and_go_are_an_error(tmp_path):
    """A forward that reports a metric for some rows only raises an error, because its mean would be wrong."""

    class Fickle(Mean):
        def forward(self, hidden_states, loss_mask, **rest):
            output, loss, metrics = super().forward(hidden_states, loss_mask)
            return output, loss, metrics if loss_mask.sum() % 2 else {**metrics, "even": 1.0}

    with pytest.raises(ContractError, match="even"):
        list(run(Fickle(), make_job(tmp_path), train_kwargs={}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_after_the_update_under_way_with_a_checkpoint_and_resumes(tmp_path, number):
    """Ctrl-C in the middle of step 3 saves step 3 and then interrupts; the next call ends as if it had not been."""
    wanted = build()
    list(run(wanted, make_job(tmp_path / "whole")))
    stopping = batches(World(), before=lambda step: step == 2 and os.kill(os.getpid(), number))
    events, handler = [], signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        # Unlike list(), extend() keeps what came before the interrupt.
        events.extend(run(build(), make_job(tmp_path / "a"), batches=stopping))
    assert isinstance(events[-1], SaveEvent)
    assert events[-1].step == 3
    assert signal.getsignal(number) is handler
    model = build()
    assert [event.step for event in steps(run(model, make_job(tmp_path / "a")))] == [4, 5, 6]
    assert all(torch.equal(weights(wanted)[name], value) for name, value in weights(model).items())


def test_a_second_ctrl_c_interrupts_at_once_but_its_echo_does_not(monkeypatch):
    """A signal that comes twice within a second is one wish (terminal and torchrun both send it); later it is two."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequest() as request:
        assert not request.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.requested
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_finished_run_does_nothing_when_called_again(tmp_path):
    """All steps done means no event at all, and the weights are those of the last checkpoint."""
    first, second = build(), build()
    list(run(first, make_job(tmp_path)))
    assert list(run(second, make_job(tmp_path))) == []
    assert all(torch.equal(weights(first)[name], value) for name, value in weights(second).items())
    assert len(complete(tmp_path)) == 2
