from dina_rl.data.sets.records import PreferencePair, PreferenceRecord, pair_id, pairs_of


def test_a_pair_sets_record_is_one_pair_with_its_index() -> None:
    record = PreferenceRecord(
        index=7, prompt="p", images=("a", "b"), ranks=(1, 0), votes=(2, 9), confidence=0.8, models=("x", "y")
    )
    expected = PreferencePair(index=7, prompt="p", chosen="b", rejected="a", votes=(9, 2), confidence=0.8)
    assert list(pairs_of(record)) == [expected]


def test_a_tie_is_no_pair() -> None:
    assert list(pairs_of(PreferenceRecord(index=0, prompt="p", images=("a", "b"), ranks=(1, 1)))) == []


def test_a_ranked_record_is_all_its_ordered_pairs() -> None:
    record = PreferenceRecord(index=3, prompt="p", images=("a", "b", "c"), ranks=(2, 1, 2))
    pairs = list(pairs_of(record))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "a"), ("b", "c")]
    assert [pair.index for pair in pairs] == [pair_id(3, position, 3) for position in range(2)]


def test_ids_are_unique_in_a_split() -> None:
    ranked = [pair_id(record, position, 9) for record in range(50) for position in range(36)]
    plain = [pair_id(record, 0, 2) for record in range(2_000_000, 2_000_050)] + list(range(50))
    ids = ranked + plain
    assert len(set(ids)) == len(ids)
    assert max(pair_id(2**30, 36, 9), *ids) < 2**63
    assert plain == [*range(2_000_000, 2_000_050), *range(50)]
