"""Bucket rules against cases computed by hand."""

import pytest

from dina_rl.data.buckets import PUBLISHED, PUBLISHED_MIN_AREA, Bucketing, Dropped, assign, share

OFFICIAL = Bucketing(buckets=PUBLISHED, stretch=False, min_area=PUBLISHED_MIN_AREA)


def bucket(size: tuple[int, int]) -> tuple[int, int] | None:
    index = assign(size, PUBLISHED)
    return None if index is None else PUBLISHED[index]


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_bucket_is_its_own(size) -> None:
    assert bucket(size) == size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((362, 362), (256, 256)),  # log-area half way between 256 and 512 is 362.04 squared
        ((363, 363), (512, 512)),
        ((724, 724), (512, 512)),
        ((725, 725), (1024, 1024)),
        ((4000, 4000), (1024, 1024)),
        ((1000, 1030), (1024, 1024)),  # ln(1.03) = 0.0296
        ((1000, 1031), None),  # ln(1.031) = 0.0305
        ((640, 480), (1024, 768)),
        ((960, 640), (1248, 832)),  # two buckets of aspect 2/3: the nearer in area
        ((1200, 800), (1248, 832)),
        ((1300, 866), (1344, 896)),  # 1.1258 M: nearer to 1.2042 M than to 1.0383 M
        ((640, 360), (1472, 832)),  # ln(16/9) = 0.5754, ln(1472/832) = 0.5706
        ((1000, 2000), None),
        ((720, 1280), (832, 1472)),
    ],
)
def test_of_the_buckets_with_nearly_its_aspect_the_nearest_in_area(size, expected) -> None:
    assert bucket(size) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((512, 512), (1024, 1024), (1024, 1024)),  # the smaller is scaled up
        ((256, 256), (512, 512), (512, 512)),
        # Aspects 0.75 and 0.7222 differ by 3.7 percent: long edge 1152, 864 and 832 wide, the smaller is the bucket.
        ((1024, 768), (1152, 832), (1152, 832)),
        ((768, 1024), (832, 1152), (832, 1152)),
        ((1248, 832), (1344, 896), (1344, 896)),
        ((1152, 832), (1248, 832), None),  # 0.7222 and 0.6667: 7.7 percent
        ((1024, 1024), (768, 1024), None),
        ((1024, 1024), (1000, 2000), None),  # the second has no bucket
    ],
)
def test_both_images_of_a_pair_get_one_size(first, second, expected) -> None:
    for one, other in ((first, second), (second, first)):
        shared = share(one, other, PUBLISHED)
        assert (None if shared is None else PUBLISHED[shared]) == expected


def test_a_pair_may_meet_in_a_third_bucket() -> None:
    """Of 100x100 and 50x48, aspects 1 and 0.96, the second is scaled to 100x96; both are cut to that."""
    buckets = ((100, 100), (50, 48), (120, 115))
    assert share((100, 100), (50, 48), buckets) == 2


def test_reasons() -> None:
    assert PUBLISHED[OFFICIAL.of_pair((256, 256), (256, 256))] == (256, 256)
    for first, second, name, reason in (
        ((256, 255), (512, 512), "min_area", "image of 256x255 is below the minimum of 65536 pixels"),
        ((512, 512), (1000, 2000), "bucket", "no bucket has the aspect of an image of 1000x2000"),
        ((512, 512), (1024, 768), "bucket", "no bucket fits both 512x512 and 1024x768"),
    ):
        assert OFFICIAL.of_pair(first, second) == Dropped(filter=name, reason=reason)


def test_one_bucket_that_takes_every_shape() -> None:
    stretch = Bucketing(buckets=((32, 32),), stretch=True)
    assert stretch.of_pair((1, 1), (1000, 20)) == 0
    with pytest.raises(ValueError, match="one size"):
        Bucketing(buckets=PUBLISHED, stretch=True)
