"""What the other tests lean on: `difference`, what may be skipped in CI, and that every test starts from the seed."""
import pytest
import torch
from conftest import difference

pytest_plugins = ['pytester']

SKIPPING = '''
import unittest
import pytest

def test_that_runs():
    pass

def test_that_lacks_a_package():
    pytest.importorskip('no_such_package')

@pytest.mark.skip(reason='pandas is missing')
def test_that_is_marked():
    pass

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False

@pytest.mark.skipif(True, reason='one pass is for CPUs with AVX-512')
def test_of_a_processor():
    pass

@pytest.mark.gpu
def test_of_a_gpu():
    pass
'''
WHOLE_FILE = '''
import pytest
pytest.importorskip('no_such_package', reason='Triton is not installed')
'''
AT_COLLECTION = '''
import pytest
import torch

@pytest.mark.parametrize('layer', [torch.nn.Linear(2, 2)])
def test(layer):
    pass
'''


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs pytest in an empty folder with these tests' conftest.py."""
    def suite(**files):
        pytester.makepyfile(**files)
        pytester.makeini('[pytest]\nmarkers =\n    gpu')
        monkeypatch.setenv('CI', 'true')
        return pytester.runpytest_inprocess(
            '-p', 'conftest', '-p', 'no:cacheprovider', '-rs', '--continue-on-collection-errors')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return suite


def test_a_skipped_test_fails_in_ci_unless_its_reason_is_allowed(suite):
    result = suite(test_a=SKIPPING, test_b=WHOLE_FILE)
    result.assert_outcomes(passed=1, failed=1, errors=2, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines_random([
        '*must not be skipped in CI.*no_such_package*', '*must not be skipped in CI.*pandas is missing',
        '*must not be skipped in CI.*Triton is not installed*',
        'SKIPPED ?1? test_a.py:*needs a GPU', 'SKIPPED ?1? test_a.py:*one pass is for CPUs with AVX-512'])
    assert result.ret == 1


def test_modules_are_not_built_while_tests_are_collected(suite):
    result = suite(test_a=AT_COLLECTION)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines('*test_a.py draws random numbers while tests are collected*')


@pytest.mark.parametrize('shape,channel', [
    ((2, 3, 4, 5), 1),  # (B, C, H, W)
    ((3, 1, 5, 5), 0),  # (C, 1, K, L)
    ((2, 3, 4), 1),  # (B, C, L)
    ((2, 8), 0),  # (B, classes)
])
def test_difference_is_relative_to_the_channel(shape, channel):
    expected = torch.randn(shape, dtype=torch.float64)
    small = expected.select(channel, 1).mul_(0.1)
    actual = expected.clone()
    actual[(1,) * channel + (1,) + (0,) * (len(shape) - channel - 1)] += 1e-4
    assert difference(actual, expected) == pytest.approx(1e-4 / small.abs().max().item())


def test_difference_of_channels_of_rounding_and_of_zeros():
    expected = torch.tensor([[[1., 2.]], [[1e-9, 0.]], [[0., 0.]]]).movedim(0, 1)  # (B, C, L)
    actual = expected + 1e-3
    assert difference(actual, expected) == pytest.approx(1e-3 / 0.02, rel=1e-5)
    assert difference(expected, expected) == difference(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert difference(torch.ones(3), torch.zeros(3)) == torch.inf
    assert difference(torch.tensor([2., 4.]), torch.tensor([2., 5.])) == pytest.approx(0.2)
    assert difference(torch.tensor(3.), torch.tensor(2.)) == pytest.approx(0.5)


@pytest.mark.parametrize('actual,expected', [
    ([torch.nan, 1.], [2., 1.]), ([2., 1.], [torch.nan, 1.]), ([torch.inf, 1.], [torch.nan, 1.]),
    ([torch.inf, 1.], [-torch.inf, 1.]), ([torch.inf, 1.], [2., 1.])])
def test_difference_refuses_nan_and_infinity_on_one_side(actual, expected):
    with pytest.raises(AssertionError):
        difference(torch.tensor(actual), torch.tensor(expected))
    with pytest.raises(AssertionError, match=r'Size\(\[2\]\) == torch.Size\(\[1, 2\]\)'):
        difference(torch.tensor(actual), torch.tensor([expected]))


def test_difference_with_nan_and_infinity_on_both_sides():
    same = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.])
    other = same.clone()
    other[-1] = 3
    assert difference(same, same) == 0 and difference(other, same) == pytest.approx(0.5)
