"""The whole benchmark on a tiny verifier: numbers, referee, baselines, definitions and JSON."""

from __future__ import annotations

import copy
import json

import attrs
import pytest
import torch
from toys import ToySpeculator

from speculators.bench.context import TimedPair
from speculators.bench.counts import Counts, count_decoded
from speculators.bench.referee import FEWEST_PROMPTS, TOO_FEW, Agreement, agree_given_tokens, agree_over_prompts
from speculators.bench.replay import replay_each
from speculators.bench.result import FORMAT, definition
from speculators.bench.run import bench
from speculators.bench.speed import compare
from speculators.decoding.loop import Decoded, Round
from speculators.errors import DataError
from speculators.events import ProgressEvent
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.verifier.engine import Engine

ROWS = [
    {"question_id": 1, "category": "one", "turns": ["the other thing", "and then"]},
    {"question_id": 2, "category": "one", "turns": ["on and on"]},
    {"question_id": 3, "category": "two", "turns": ["is it"]},
    {"question_id": 4, "category": "two", "turns": ["reading"]},
]


@pytest.fixture(scope="module")
def engine(tiny_verifier):
    """The tiny verifier in float32."""
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Four prompts, one of them with two turns, in the field's layout."""
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return Suite(name="mine", path=str(path))


@pytest.fixture(scope="module")
def toy():
    """A random speculator."""
    return ToySpeculator(state_size=96, vocab_size=320, target_layer_ids=(1, 2, 4), seed=2)


@pytest.fixture(scope="module")
def measured(engine, suite, toy):
    """Two temperatures, two K, one live prompt fewer than the suite has; with the events along the way."""
    section = BenchmarkSection(
        suites=(suite,), num_speculative_tokens=(1, 3), temperature=(0.0, 1.0), max_new_tokens=24, live_prompts=4
    )
    events: list[ProgressEvent] = []
    return bench(toy, engine, section, name="toy", seed=1, progress=events.append), events


def test_every_suite_temperature_and_k_has_its_setting(measured):
    """Settings stand in the order of the section."""
    result, _ = measured
    assert [(s.suite, s.temperature, s.num_speculative_tokens) for s in result.settings] == [
        ("mine", 0.0, 1),
        ("mine", 0.0, 3),
        ("mine", 1.0, 1),
        ("mine", 1.0, 3),
    ]


def test_live_agrees_with_replay_in_every_setting(measured):
    """Live agrees round for round at T = 0 and within its interval at T = 1, so the whole result agrees."""
    result, _ = measured
    criteria = [setting.live.agreement.criterion for setting in result.settings]
    assert criteria[:2] == ["round for round"] * 2
    assert all("interval of live" in criterion for criterion in criteria[2:])
    assert [setting.live.agreement.gap for setting in result.settings] == [""] * 4
    assert result.agrees


def test_a_verifier_that_answers_at_another_temperature_is_caught(engine, toy, tmp_path, monkeypatch):
    """The printed tau is over the verifier's own responses. If they were generated at T = 0.5, live at T = 1 shows it
    on enough prompts. The criterion over live's own responses cannot see it, and the gap does not name that one."""
    words = ["the", "other", "thing", "and", "then", "on", "is", "it", "reading", "a", "of"]
    rows = [{"question_id": i, "category": "", "turns": [" ".join(words[i : i + 4])]} for i in range(8)]
    path = tmp_path / "eight.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = BenchmarkSection(
        suites=(Suite(name="eight", path=str(path)),),
        num_speculative_tokens=(3,),
        temperature=(1.0,),
        max_new_tokens=32,
        live_prompts=None,
        baselines=(),
    )
    (sound,) = bench(toy, engine, section, name="toy", seed=1).settings
    assert (sound.live.agreement.verdict, sound.live.agreement.untold) == ("agrees", "")
    assert sound.live.agreement.own_tau == pytest.approx(sound.exact.tau)
    generate = Engine.generate
    monkeypatch.setattr(
        Engine,
        "generate",
        lambda *args, temperature, **options: generate(*args, temperature=temperature / 2, **options),
    )
    result = bench(toy, engine, section, name="toy", seed=1)
    agreement = result.settings[0].live.agreement
    assert not result.agrees
    assert "over the verifier's own responses" in agreement.gap
    assert "given its tokens" not in agreement.gap


FILTERED = {"temperature": (0.0, 1.0), "top_p": 0.9, "top_k": 30, "max_new_tokens": 24, "num_speculative_tokens": (3,)}


def test_filters_of_the_verifier_are_in_the_definition_and_live_agrees(engine, suite, toy):
    """At T = 1 verifier, replay and live sample from the same tokens; at T = 0 nothing changes, not even the text."""
    result = bench(toy, engine, BenchmarkSection(suites=(suite,), live_prompts=4, **FILTERED), name="toy", seed=1)
    assert result.agrees
    greedy, sampled = (setting.definition for setting in result.settings)
    assert greedy == definition(3, 0.0)
    assert "T=1, the verifier's top_k=30, top_p=0.9;" in sampled
    assert "sampled from the draft's own whole distribution at T=1" in sampled


def test_verification_as_a_block_is_in_the_definition_and_live_agrees(engine, suite, toy):
    """At T = 1 the same responses need fewer rounds; at T = 0 nothing changes, not even the text."""
    options = {**FILTERED, "live_prompts": 4, "baselines": ("ngram", "hybrid:ngram")}
    token, block = (
        bench(toy, engine, BenchmarkSection(suites=(suite,), verification=rule, **options), name="toy", seed=1)
        for rule in ("token", "block")
    )
    assert block.agrees
    assert [each.definition for each in token.settings] == [
        each.definition.removesuffix(", verified as a block") for each in block.settings
    ]
    assert token.settings[0].definition == block.settings[0].definition
    assert block.settings[1].definition.endswith("at T=1, verified as a block")
    assert token.settings[0].exact.tau == block.settings[0].exact.tau
    assert token.settings[1].exact.tau < block.settings[1].exact.tau
    # A point mass is accepted where it is the token that was emitted, by either rule.
    assert token.settings[1].baselines[0].acceptance.tau == block.settings[1].baselines[0].acceptance.tau


def test_answers_that_do_not_follow_the_filter_are_an_error(engine, suite, toy, monkeypatch):
    """A server that overlooks top_p would give another tau without a word."""
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda *args, token_filter, **options: generate(*args, **options), raising=True
    )
    with pytest.raises(DataError, match=r"tokens of the answers would not have been sampled with top_k=30, top_p=0.9"):
        bench(toy, engine, BenchmarkSection(suites=(suite,), **FILTERED), name="toy", seed=1)


def test_a_hybrid_has_a_row_that_live_decoding_confirms(engine, suite, toy):
    """Replay and live give the same tau at T = 0, where the clock ran over whole answers of all prompts."""
    names = ("ngram", "hybrid:ngram", "hybrid:suffix")
    section = BenchmarkSection(
        suites=(suite,), num_speculative_tokens=(3,), max_new_tokens=24, live_prompts=None, baselines=names
    )
    (setting,) = bench(toy, engine, section, name="toy", seed=1).settings
    assert tuple(row.name for row in setting.baselines) == names
    for row in setting.baselines:
        assert row.live_tau == pytest.approx(row.acceptance.tau)
    # The speculator drafts in the rounds without a match, where n-grams draft fewer tokens or none.
    assert setting.baselines[1].acceptance.drafted > setting.baselines[0].acceptance.drafted


def test_few_prompts_leave_the_verifiers_own_responses_unjudged(measured):
    """Three prompts cannot separate two means: the result says so and does not fail."""
    result, _ = measured
    for setting in result.settings[2:]:
        agreement = setting.live.agreement
        assert "3 prompts are too few to tell" in agreement.untold
        assert agreement.own_interval is None
        assert agreement.interval is not None
        assert agreement.verdict == "agrees"
    assert [setting.live.agreement.own_tau for setting in result.settings[:2]] == [None, None]


def test_numbers_are_consistent_with_each_other(measured):
    """Tau is tokens / rounds and lies in its interval; categories add up to the whole; the turns of a prompt count as
    one prompt; every position has its two rates."""
    result, _ = measured
    for setting in result.settings:
        exact, k = setting.exact, setting.num_speculative_tokens
        assert exact.tau == pytest.approx(exact.tokens / exact.rounds)
        assert exact.tau_interval[0] <= exact.tau <= exact.tau_interval[1]
        assert exact.prompts == 4
        assert {name: held.prompts for name, held in setting.by_category.items()} == {"one": 2, "two": 2}
        assert sum(held.rounds for held in setting.by_category.values()) == pytest.approx(exact.rounds)
        assert len(exact.by_position) == len(exact.by_position_conditional) == k
        assert list(exact.by_position) == sorted(exact.by_position, reverse=True)
        assert "verifier's own answers" in setting.note


def test_counts_of_the_prompts_give_every_rate(measured):
    """For the speculator and the baseline: sums over prompts are the numbers of the suite, each in its interval."""
    result, _ = measured
    for setting in result.settings:
        for by_prompt, whole in (
            (setting.counts_by_prompt, setting.exact),
            (setting.baselines[0].counts_by_prompt, setting.baselines[0].acceptance),
        ):
            counts = by_prompt.values()
            assert sum(each.tokens for each in counts) / sum(each.rounds for each in counts) == pytest.approx(whole.tau)
            assert sum(each.drafted for each in counts) / whole.rounds == pytest.approx(whole.drafted)
            assert len(whole.by_position_interval) == setting.num_speculative_tokens
            for position, (rate, (low, high)) in enumerate(
                zip(whole.by_position, whole.by_position_interval, strict=True)
            ):
                accepted = sum(each.accepted[position] for each in counts)
                assert accepted / whole.rounds == pytest.approx(rate)
                assert accepted <= sum(each.reached[position] for each in counts) + 1e-9
                assert low <= rate <= high


def test_the_speculator_is_compared_with_the_baseline_prompt_by_prompt(measured):
    """The difference is that of the two taus, over all prompts of the suite."""
    result, _ = measured
    for setting in result.settings:
        (ngram,) = setting.baselines
        assert ngram.difference.mean == pytest.approx(setting.exact.tau - ngram.acceptance.tau)
        assert ngram.difference.low <= ngram.difference.mean <= ngram.difference.high
        assert ngram.difference.prompts == 4


def test_rounds_by_context_and_by_place_are_those_of_each_prompt(measured):
    """Both ways of sorting them keep every prompt's tokens and rounds, of all its turns."""
    result, _ = measured
    for setting in result.settings:
        for bins in (setting.by_context, setting.by_place):
            for name, (tokens, rounds) in setting.by_prompt.items():
                parts = [each.by_prompt[name] for each in bins if name in each.by_prompt]
                assert sum(part[0] for part in parts) == pytest.approx(tokens)
                assert sum(part[1] for part in parts) == pytest.approx(rounds)
        assert {each.up_to for each in setting.by_place} == {64}


def test_the_definition_stands_beside_every_number(measured):
    """The definition says what tau counts, K, T and how drafts were sampled."""
    result, _ = measured
    for setting in result.settings:
        assert "own (bonus) token counted" in setting.definition
        assert f"K={setting.num_speculative_tokens}, T={setting.temperature:g}" in setting.definition
        assert ("greedy" if setting.temperature == 0 else "sampled") in setting.definition


def test_the_baseline_has_its_row_and_at_the_largest_k_its_speed(measured):
    """Replay gives its acceptance at every K; it is decoded live at the largest K alone, which saves time."""
    result, _ = measured
    for setting in result.settings:
        (ngram,) = setting.baselines
        assert ngram.name == "ngram"
        assert ngram.acceptance.tau >= 1.0
        assert (ngram.speed is not None) == (setting.num_speculative_tokens == 3)


def test_json_holds_it_all_and_no_nan(measured):
    """A reader without this package gets every number, with null for NaN."""
    result, _ = measured
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["format"] == FORMAT
    assert document["agrees"] is True
    assert document["dtype"] == "float32"
    assert document["threads"] == torch.get_num_threads()
    first = document["settings"][0]
    assert first["live"]["agreement"]["agrees"] is True
    assert first["live"]["agreement"]["verdict"] == "agrees"
    assert first["live"]["speed"]["speed_up"] > 0
    assert first["exact"]["tau"] == result.settings[0].exact.tau


def test_every_part_reports_progress_as_a_share_of_the_whole(measured):
    """One bar never falls back and ends at 100%; its note names the part at work."""
    _, events = measured
    assert {(event.stage, event.total) for event in events} == {("bench", 100)}
    shares = [event.done for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(100)
    assert {event.note.partition(":")[0] for event in events} == {"regenerate", "bench", "replay", "live"}


def test_the_same_seed_gives_the_same_acceptance(engine, suite, toy, measured):
    """Only speeds differ from run to run."""
    section = BenchmarkSection(
        suites=(suite,), num_speculative_tokens=(3,), temperature=(1.0,), max_new_tokens=24, live_prompts=4
    )
    again = bench(toy, engine, section, name="toy", seed=1).settings[0]
    assert again.exact == measured[0].settings[3].exact


def test_replay_that_predicts_something_else_makes_the_result_disagree(engine, suite, toy, monkeypatch):
    """A gap is a failure: with one wrong table `agrees` is false, in the value and in the JSON."""

    def shifted(*args, **options):
        replayed = replay_each(*args, **options)
        return {
            k: attrs.evolve(each, acceptance=tuple(1.0 - table for table in each.acceptance))
            for k, each in replayed.items()
        }

    monkeypatch.setattr("speculators.bench.live_check.replay_each", shifted)
    section = BenchmarkSection(suites=(suite,), num_speculative_tokens=(2,), max_new_tokens=12, live_prompts=1)
    result = bench(toy, engine, section, name="toy")
    assert not result.agrees
    assert result.to_json()["agrees"] is False
    assert "round 0" in result.settings[0].live.agreement.gap


def test_answers_of_another_model_are_replaced_and_the_result_says_so(engine, toy, tmp_path):
    """The number is over the verifier's own output, and the count of replaced answers stands beside it."""
    path = tmp_path / "foreign.jsonl"
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "!?"}]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    suites = (Suite(name="foreign", path=str(path)),)
    section = BenchmarkSection(suites=suites, num_speculative_tokens=(2,), max_new_tokens=12)
    (setting,) = bench(toy, engine, section, name="toy").settings
    assert (setting.replaced_prompts, setting.cut_prompts, setting.exact.tokens) == (1, 0, 11.0)


def test_responses_without_a_round_are_an_error(engine, suite, toy):
    """The only token comes from the prefill, so there is no acceptance length to print."""
    section = BenchmarkSection(suites=(suite,), num_speculative_tokens=(1,), max_new_tokens=1)
    with pytest.raises(DataError, match="no response has two tokens of the verifier's own"):
        bench(toy, engine, section, name="toy")


def test_in_16_bits_the_mean_is_compared_over_prompts(tiny_verifier, suite, toy, monkeypatch):
    """In 16 bits, forwards of different shapes pick different tokens; the result names the criterion that was used."""
    monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type: True)
    engine = Engine(tiny_verifier, dtype="bfloat16")
    section = BenchmarkSection(suites=(suite,), num_speculative_tokens=(2,), max_new_tokens=12)
    result = bench(toy.to(torch.bfloat16), engine, section, name="toy")
    toy.to(torch.float32)
    agreement = result.settings[0].live.agreement
    assert "in 16 bits" in agreement.criterion
    assert (agreement.verdict, result.agrees) == (TOO_FEW, True)
    assert result.dtype == "bfloat16"


def test_speed_is_measured_in_another_dtype_and_the_check_stays_exact(tiny_verifier, engine, suite, toy, monkeypatch):
    """With `timed` only the clock runs in bf16: acceptance and the float32 check, round for round, are as without."""
    monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type: True)
    section = BenchmarkSection(suites=(suite,), num_speculative_tokens=(2,), max_new_tokens=12)
    timed = TimedPair(copy.deepcopy(toy).to(torch.bfloat16), Engine(tiny_verifier, dtype="bfloat16"))
    (alone,), (apart,) = (bench(toy, engine, section, name="toy", timed=each).settings for each in (None, timed))
    assert apart.by_prompt == alone.by_prompt
    assert apart.live.agreement == alone.live.agreement
    assert apart.live.agreement.criterion == "round for round"
    assert (alone.live.speed.dtype, apart.live.speed.dtype) == (None, "bfloat16")
    assert {each.speed.dtype for each in apart.baselines} == {"bfloat16"}
    assert alone.live.speed.near_ties == 0


def test_a_timed_answer_that_no_rounding_explains_is_a_gap(tiny_verifier, engine, suite, toy):
    """What is timed must decode the same verifier: another one's answers are not a speed-up of this one."""
    section = BenchmarkSection(suites=(suite,), num_speculative_tokens=(2,), max_new_tokens=12)
    other = Engine(tiny_verifier)
    with torch.no_grad():
        other.model.lm_head.weight.copy_(other.model.lm_head.weight.roll(7, 0))
    (setting,) = bench(toy, engine, section, name="toy", timed=TimedPair(toy, other)).settings
    assert "differs from the verifier's own output" in setting.live.agreement.gap


def _counts(tokens, rounds):
    zeros = torch.zeros(len(tokens), 1).numpy()
    return Counts(
        tokens=torch.tensor(tokens).numpy(),
        rounds=torch.tensor(rounds).numpy(),
        drafted=torch.tensor(rounds).numpy(),
        reached=zeros,
        accepted=zeros,
    )


def _over_prompts(measured, predicted):
    groups = [str(index) for index in range(len(measured.tokens))]
    return agree_over_prompts(measured, predicted=predicted, groups=groups, level=0.99, what="live and replay")


def test_over_prompts_a_difference_beyond_its_interval_is_a_gap():
    """Live agrees where rounds deviate from the prediction in both directions, and disagrees where every prompt takes a
    third more, however much the prompts differ. The gap names both numbers and the criterion."""
    tokens = [30.0, 60.0, 30.0, 45.0, 60.0, 30.0, 45.0, 30.0]
    rounds = [20.0, 15.0, 18.0, 40.0, 31.0, 12.0, 22.0, 19.0]
    noisy = [number + change for number, change in zip(rounds, (1, -1, 2, -3, 2, 0, 1, -1), strict=True)]
    predicted = _counts(tokens, rounds)
    assert _over_prompts(_counts(tokens, noisy), predicted).verdict == "agrees"
    outcome = _over_prompts(_counts(tokens, [4 / 3 * number for number in noisy]), predicted)
    assert outcome.verdict == "disagrees"
    assert f"replay predicts {predicted.tau:.4f}" in outcome.gap
    assert "99.00% interval of the difference by prompt, live and replay" in outcome.gap
    assert Agreement(criterion="", predicted_tau=1.0, gap="x").agrees is False


def test_a_live_decode_that_ends_at_once_is_not_judged():
    """At T > 0 every sampled response may end the turn at once: then there is no round and no tau."""
    nothing = _counts([0.0], [0.0])
    outcome = agree_given_tokens(nothing, [torch.zeros(0, 1).numpy()], predicted=nothing, level=0.99)
    assert (outcome.verdict, outcome.agrees) == (TOO_FEW, True)
    assert "live made no round" in outcome.untold


@pytest.mark.parametrize("prompts", [1, 3, FEWEST_PROMPTS - 1])
def test_over_too_few_prompts_nothing_is_judged(prompts):
    """A prompt that rounding sends another way is neither a disagreement nor an agreement."""
    outcome = _over_prompts(_counts([30.0] * prompts, [19.0] * prompts), _counts([30.0] * prompts, [20.0] * prompts))
    assert (outcome.agrees, outcome.verdict, outcome.interval) == (True, TOO_FEW, None)
    assert f"{prompts} prompts are too few to tell" in outcome.untold


def _timed(seconds):
    """Decodes 21 tokens in `seconds`."""
    return [Decoded(tokens=tuple(range(21)), rounds=(), seconds=seconds, prefill_seconds=0.1)]


def test_a_speed_up_above_tau_is_flagged_as_an_unmatched_baseline():
    """A round costs at least one forward of the verifier, so tau bounds the speed-up."""
    fair = compare(_timed(2.0), _timed(1.5), tau=1.6, suite_tau=1.6)
    assert (fair.plain, fair.speculative, fair.unmatched_baseline) == (10.5, 14.0, False)
    assert fair.speed_up == pytest.approx(4 / 3)
    assert compare(_timed(2.0), _timed(1.0), tau=1.6, suite_tau=1.6).unmatched_baseline


def test_the_speed_up_is_that_of_the_suite_when_the_timed_answers_are_harder_to_draft():
    """Rounds take as long there and emit more; without a timed round nothing can be carried over."""
    harder = compare(_timed(2.0), _timed(1.5), tau=1.5, suite_tau=1.8)
    assert harder.speed_up == pytest.approx(4 / 3 * 1.8 / 1.5)
    assert not harder.unmatched_baseline
    assert compare(_timed(2.0), _timed(1.5), tau=float("nan"), suite_tau=1.8).speed_up == pytest.approx(4 / 3)


def test_counting_live_rounds_reaches_positions_up_to_the_first_rejection_and_the_end():
    """Six tokens: one round accepts 2 of 3 drafts, the drafts of the next run past the end."""
    rounds = (Round(anchor=0, drafted=3, accepted=2, emitted=3), Round(anchor=3, drafted=3, accepted=1, emitted=2))
    decoded = Decoded(tokens=(1, 2, 3, 4, 5, 6), rounds=rounds, seconds=1.0, prefill_seconds=0.0)
    counts = count_decoded([decoded], 3)
    assert counts.tau == 2.5
    assert counts.reached.tolist() == [[2.0, 2.0, 1.0]]
    assert counts.accepted.tolist() == [[2.0, 1.0, 0.0]]
    assert counts.by_position == (1.0, 0.5, 0.0)
    assert counts.by_position_conditional == (1.0, 0.5, 0.0)
