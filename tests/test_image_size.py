import pytest

from fastdcgan import image_size


@pytest.mark.parametrize(
    ("size", "k"), [((8, 8), 1), ((28, 28), 2), ((32, 32), 3), ((48, 48), 3), ((64, 96), 4), ((128, 224), 5)]
)
def test_stages(size: tuple[int, int], k: int) -> None:
    assert image_size.stages(*size) == k
    assert 4 <= size[0] >> k <= 7


def test_every_side_has_the_stages_its_form_says() -> None:
    for base in range(4, 8):
        for k in range(1, 9):
            assert image_size.stages(base << k, base << k) == k


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((50, 50), "48 and 56"),
        ((65, 65), "64 and 56"),
        ((7, 7), "8 and 10"),
        ((64, 128), "64x112"),
        ((100, 60), "96x64"),
        ((64, 48), "56x48"),
        ((64, 100), "64x96"),
        ((1000, 1000), "1024 and 896"),
    ],
)
def test_an_impossible_size_names_the_nearest(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        image_size.stages(*size)


def test_parse() -> None:
    assert image_size.parse("64") == (64, 64)
    assert image_size.parse("64x96") == (64, 96)
    for wrong in ("", "64x", "x", "64x96x3", "-64", "6.4", "²"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            image_size.parse(wrong)
