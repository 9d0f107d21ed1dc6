import pytest


def test_processes_divide_a_batch():
    from examples.options import share

    assert share(8, 4) == 2
    with pytest.raises(ValueError, match="`--batch-size` 8 must be a multiple of 3, because .* 3 equal batches"):
        share(8, 3)
