import doctest
import inspect
import subprocess
import sys
import types

import pytest
import torch
from jaxtyping import TypeCheckError

from oldlogits import objective
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS

from . import typed


def test_all_is_exactly_what_the_package_defines():
    defined = {
        name
        for name, value in vars(objective).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert defined == set(objective.__all__)


def test_every_public_function_is_called_with_checked_annotations():
    functions = {name for name in objective.__all__ if inspect.isfunction(getattr(objective, name))}
    assert functions == {name for name in functions if inspect.isfunction(vars(typed).get(name))}


def test_the_annotations_refuse_other_shapes_and_dtypes():
    with pytest.raises(TypeCheckError):
        typed.band_mask(torch.zeros(2, 3), 1.5)
    with pytest.raises(TypeCheckError):
        typed.weighted_loss(torch.zeros(3), torch.zeros(4))
    with pytest.raises(TypeCheckError):
        typed.token_weights(torch.ones(3), mode="token-mean")


def test_the_example_of_the_package_holds():
    results = doctest.testmod(objective)
    assert (results.attempted, results.failed) == (6, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, while it traces
def test_the_loss_is_one_graph_without_breaks_and_compiles_to_the_same_numbers():
    torch.manual_seed(0)
    logp = {MU: -torch.rand(64), OLD: -torch.rand(64), THETA: -torch.rand(64)}
    advantages, loss_mask = torch.randn(64), torch.rand(64) < 0.7

    def loss(theta):
        split = objective.split_ratio(VARIANTS["decoupled_exact"], {**logp, THETA: theta})
        tokens = objective.surrogate(
            split, advantages, loss_mask, band=1.5, eps_low=0.2, eps_high=0.28, dual_clip=3.0, discrepancy="weight_and_mask"
        )
        return objective.weighted_loss(tokens.values, objective.token_weights(loss_mask, mode="token-mean"))

    eager, compiled = logp[THETA].clone().requires_grad_(), logp[THETA].clone().requires_grad_()
    expected = loss(eager)
    expected.backward()
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    actual.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert eager.grad.count_nonzero() > 5


def test_importing_the_objective_imports_no_other_heavy_package() -> None:
    heavy = ("transformers", "pyarrow", "numba", "pydantic", "rich", "tyro", "ray")
    code = f"import sys, oldlogits.objective; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
