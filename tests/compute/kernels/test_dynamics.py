"""`expm` and `integrate_linear_ode` against SciPy's exponential and its general integrator."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.dynamics import expm, integrate_linear_ode


def random_matrix(seed: int, n: int, dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only matrix of normal noise, complex noise for a complex dtype."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((n, n)).astype(dtype)
    if matrix.dtype.kind == "c":
        matrix += (1j * random.standard_normal((n, n))).astype(dtype)
    matrix.setflags(write=False)
    return matrix


@given(
    n=st.integers(0, 12),
    dtype=st.sampled_from(["f2", "f4", "f8", "c8", "c16"]),
    scale=st.sampled_from([0.0, 1e-3, 0.03, 0.2, 0.5, 1.0, 4.0]),
    seed=st.integers(0, 2**32),
)
def test_expm_agrees_with_scipy(n: int, dtype: str, scale: float, seed: int) -> None:
    """Norms for every degree of the approximant, and beyond, agree in every dtype."""
    a = (random_matrix(seed, n, dtype) * scale).astype(dtype)
    power = expm(a)
    assert power.shape == a.shape
    assert power.dtype == (np.float32 if dtype == "f2" else a.dtype)
    if n:
        expected = scipy.linalg.expm(a.astype(np.complex128))
        tolerance = 1e-4 if np.finfo(power.dtype).eps > 1e-10 else 1e-11
        # A sum of terms can be no more exact than its largest, which the norm bounds.
        np.testing.assert_allclose(power, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_expm_of_a_rotation_is_its_angle() -> None:
    """A rotation by half a turn and by many turns equals its closed form."""
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(expm(math.pi * turn), -np.eye(2), atol=1e-15)
    np.testing.assert_allclose(expm(200 * math.pi * turn), np.eye(2), atol=1e-12)


def test_expm_beyond_float64_is_infinite() -> None:
    """A result that no float can hold is infinite, and not an error."""
    assert np.isinf(expm(np.array([[1000.0]])))[0, 0]
    assert expm(np.array([[-1e9]])) == 0


def exact(a: np.ndarray, b: np.ndarray, y0: np.ndarray, t: np.ndarray) -> np.ndarray[Any, Any]:
    """Solve the equation with an integrator that takes any function, in many small steps."""
    solved = scipy.integrate.solve_ivp(
        lambda _, y: a @ y + b, (0, t[-1]), y0, method="DOP853", rtol=1e-12, atol=1e-12, t_eval=t
    )
    return np.asarray(solved.y.T)


@settings(max_examples=20)
@given(n=st.integers(1, 6), steps=st.sampled_from([1, 2, 3, 127, 128, 129, 1000]), seed=st.integers(0, 2**32))
def test_ode_agrees_with_an_integrator(n: int, steps: int, seed: int) -> None:
    """Few steps and many, whole blocks of steps and parts of one, pass through the same states."""
    a, random = random_matrix(seed, n, "f8"), np.random.default_rng(seed)
    b, y0 = random.standard_normal((2, n))
    t, y = integrate_linear_ode(a, b, y0, duration=1.5, steps=steps)
    np.testing.assert_allclose(t, np.linspace(0, 1.5, steps + 1))
    np.testing.assert_array_equal(y[0], y0)
    expected = exact(a, b, y0, t)
    np.testing.assert_allclose(y, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())


def test_ode_of_a_stiff_system_needs_no_small_steps() -> None:
    """Rates that differ a million times are integrated in ten steps."""
    a = np.diag([-1e6, -1.0])
    t, y = integrate_linear_ode(a, np.array([1e6, 0.0]), np.array([5.0, 2.0]), duration=3, steps=10)
    np.testing.assert_allclose(y[1:, 0], 1.0)
    np.testing.assert_allclose(y[:, 1], 2 * np.exp(-t))


def test_ode_without_time_or_states_stands_still() -> None:
    """Without duration the state stays. A system without states has times alone."""
    y = integrate_linear_ode(np.eye(2), np.ones(2), np.array([3.0, 4.0]), duration=0, steps=5).y
    np.testing.assert_array_equal(y, np.tile([3.0, 4.0], (6, 1)))
    empty = integrate_linear_ode(np.zeros((0, 0)), np.zeros(0), np.zeros(0), duration=1, steps=3)
    assert (empty.t.shape, empty.y.shape) == ((4,), (4, 0))


def test_ode_in_single_precision_stays_there() -> None:
    """float32 in gives float32 out."""
    one = np.ones((1, 1), np.float32)
    t, y = integrate_linear_ode(-one, one[0], 3 * one[0], duration=2, steps=100)
    assert t.dtype == y.dtype == np.float32
    np.testing.assert_allclose(y[:, 0], 1 + 2 * np.exp(-t), rtol=1e-4)


def ode(**changed: Any) -> object:
    """Make an equation with one thing wrong in it."""
    arguments: dict[str, Any] = {"a": np.eye(2), "b": np.ones(2), "y0": np.ones(2), "duration": 1.0, "steps": 10}
    return integrate_linear_ode(**arguments | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expm(np.array([[np.nan]])), r"a: wanted finite elements, got nan at \[0, 0\]"),
        (lambda: expm(np.broadcast_to(0.0, (2049, 2049))), "a: wanted a side of at most 2048, got 2049"),
        (
            lambda: expm(np.array([[1e13]])),
            "a: wanted a matrix with a 1-norm of at most 1099511627776, got 10000000000000",
        ),
        (lambda: ode(steps=0), "steps: wanted 1 to 10000000, got 0"),
        (lambda: ode(steps=10_000_001), "steps: wanted 1 to 10000000, got 10000001"),
        (lambda: ode(steps=10_000_000), "steps: wanted a result of at most 67108864 bytes"),
        (lambda: ode(duration=-1.0), "duration: wanted a finite number of at least 0, got -1.0"),
        (lambda: ode(duration=math.inf), "duration: wanted a finite number"),
        (lambda: ode(duration=1e20), "duration: wanted a matrix with a 1-norm of at most"),
        (lambda: ode(y0=np.array([1, np.nan])), r"y0: wanted finite elements, got nan at \[1\]"),
        (lambda: ode(b=np.array([np.inf, 1])), r"b: wanted finite elements, got inf at \[0\]"),
        (lambda: ode(a=np.broadcast_to(0.0, (2048, 2048))), "a: wanted a side of at most 2047, got 2048"),
    ],
)
def test_dynamics_refuse_what_leads_nowhere(call: Callable[[], object], message: str) -> None:
    """Elements that are not finite and work out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        call()
