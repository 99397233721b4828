import torch

from dina_rl.seeding import derive_seed, normal


def test_equal_keys_give_equal_noise_and_every_part_of_the_key_counts():
    key = (0, "rollout", 3, 14, 5)
    assert torch.equal(normal((4,), *key), normal((4,), *key))
    changed = [(1, *key[1:]), (0, "reward", *key[2:]), (*key[:2], 4, *key[3:]), (*key[:4], 6)]
    assert len({derive_seed(*k) for k in [key, *changed]}) == 5


def test_keys_are_not_confused_by_concatenation_or_type():
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1) != derive_seed("1")


def test_a_draw_does_not_touch_the_global_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    normal((100,), 1)
    assert torch.equal(torch.rand(1), expected)
