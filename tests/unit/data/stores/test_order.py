from collections import Counter

import pytest
import torch

from dina_rl.data.stores.order import evaluation_batches, token_multiples, training_order
from dina_rl.seeding import generator

BUCKETS = torch.tensor([4] * 60 + [0] * 30 + [7] * 10)[torch.randperm(100, generator=generator("test-order"))]
ONE = torch.zeros(10, dtype=torch.int64)


def order_of_one_bucket(pairs: int, *, steps: int, batch_size: int, seed: int) -> torch.Tensor:
    """Shuffled epochs end to end, cut into batches: what a fit on images of one shape has always seen."""
    epochs = -(-steps * batch_size // pairs)
    order = [torch.randperm(pairs, generator=generator(seed, "epoch", epoch)) for epoch in range(epochs)]
    return torch.cat(order)[: steps * batch_size].view(steps, batch_size)


@pytest.mark.parametrize(("pairs", "steps", "batch_size"), [(12, 6, 4), (10, 9, 4), (3, 2, 8), (100, 3, 8)])
def test_one_bucket_is_shuffled_epochs_cut_into_batches(pairs: int, steps: int, batch_size: int) -> None:
    order = training_order(torch.full((pairs,), 5), steps=steps, batch_size=batch_size, seed=3)
    expected = order_of_one_bucket(pairs, steps=steps, batch_size=batch_size, seed=3)
    assert torch.equal(torch.stack(order.batches), expected)
    assert order.bucket == (5,) * steps


def test_with_one_bucket_a_short_fit_sees_the_beginning_of_a_long_one() -> None:
    short = training_order(ONE, steps=3, batch_size=4, seed=0)
    long = training_order(ONE, steps=9, batch_size=4, seed=0)
    assert torch.equal(torch.stack(short.batches), torch.stack(long.batches[:3]))


def test_a_step_holds_pairs_of_its_bucket_only() -> None:
    order = training_order(BUCKETS, steps=25, batch_size=4, seed=0)
    assert BUCKETS[torch.stack(order.batches)].tolist() == [[bucket] * 4 for bucket in order.bucket]
    assert len(order.batches) == 25


def test_steps_follow_the_buckets_shares_and_an_epoch_covers_every_pair() -> None:
    order = training_order(BUCKETS, steps=50, batch_size=4, seed=0)  # two epochs of 100 pairs
    assert Counter(order.bucket) == {4: 30, 0: 15, 7: 5}
    seen = Counter(torch.cat(order.batches).tolist())
    assert set(seen) == set(range(100))
    assert set(seen.values()) == {2}
    first = [batch for bucket, batch in zip(order.bucket, order.batches, strict=True) if bucket == 4][:15]
    assert len(set(torch.cat(first).tolist())) == 60  # every pair of the bucket before any comes again


def test_the_largest_remainders_get_the_steps_that_are_left() -> None:
    order = training_order(BUCKETS, steps=7, batch_size=4, seed=0)  # quotas 4.2, 2.1, 0.7
    assert Counter(order.bucket) == {4: 4, 0: 2, 7: 1}


def test_a_bucket_without_a_step_is_named() -> None:
    order = training_order(BUCKETS, steps=3, batch_size=4, seed=0)  # quotas 1.8, 0.9, 0.3
    assert Counter(order.bucket) == {4: 2, 0: 1}
    assert order.left_out(BUCKETS) == {7: 10}
    assert training_order(BUCKETS, steps=7, batch_size=4, seed=0).left_out(BUCKETS) == {}


def test_buckets_come_in_random_order_that_the_seed_decides() -> None:
    order, again, other = (training_order(BUCKETS, steps=40, batch_size=4, seed=seed) for seed in (0, 0, 1))
    assert order.bucket == again.bucket
    assert torch.equal(torch.stack(order.batches), torch.stack(again.batches))
    assert order.bucket != other.bucket
    assert len(order.runs(0)) > 10  # not one bucket after the other


def test_runs_cut_where_the_bucket_changes_and_cover_what_is_left() -> None:
    order = training_order(BUCKETS, steps=40, batch_size=4, seed=0)
    runs = order.runs(11)
    assert [step for run in runs for step in run] == list(range(11, 40))
    assert {len({order.bucket[step] for step in run}) for run in runs} == {1}
    assert all(order.bucket[a[-1]] != order.bucket[b[0]] for a, b in zip(runs, runs[1:], strict=False))


def test_steps_of_small_images_hold_more_pairs() -> None:
    multiples = token_multiples({0: 64, 4: 16, 7: 60})
    assert multiples == {0: 1, 4: 4, 7: 1}
    order = training_order(BUCKETS, steps=35, batch_size=2, seed=0, multiples=multiples)
    sizes = {bucket: len(batch) for bucket, batch in zip(order.bucket, order.batches, strict=True)}
    assert sizes == {0: 2, 4: 8, 7: 2}
    # An epoch is 7.5 batches of bucket 4, 15 of bucket 0 and 5 of bucket 7: 35 steps are 1.27 of it.
    assert Counter(order.bucket) == {4: 10, 0: 19, 7: 6}


def test_a_bucket_smaller_than_a_batch_repeats_its_pairs() -> None:
    order = training_order(torch.tensor([0, 0, 0, 1]), steps=8, batch_size=4, seed=0)
    assert Counter(order.bucket) == {0: 6, 1: 2}
    assert {tuple(batch.tolist()) for b, batch in zip(order.bucket, order.batches, strict=True) if b == 1} == {(3,) * 4}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_visits_every_pair_once_over_all_ranks(ranks: int) -> None:
    batches = [
        batch
        for rank in range(ranks)
        for batch in evaluation_batches(BUCKETS, batch_size=8, rank=rank, world_size=ranks)
    ]
    assert sorted(torch.cat(batches).tolist()) == list(range(100))
    assert all(0 < len(batch) <= 8 and len(BUCKETS[batch].unique()) == 1 for batch in batches)


def test_a_rank_without_a_share_evaluates_nothing() -> None:
    assert evaluation_batches(torch.tensor([0, 1]), batch_size=4, rank=1, world_size=2) == []
