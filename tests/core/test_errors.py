import inspect
import pickle

import pytest

from oldlogits.core import errors
from oldlogits.core.errors import OldLogitsError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OldLogitsError)]
TREE = {
    "ConfigError": ValueError,
    "MissingPolicyError": errors.ConfigError,
    "AbsentCheckoutError": errors.ConfigError,
    "RunFolderError": FileExistsError,
    "ModelFolderError": FileNotFoundError,
    "EnvironmentShapeError": TypeError,
    "ContentError": ValueError,
    "ReplayError": ValueError,
    "TrajectoryError": ValueError,
    "TokenTableError": ValueError,
    "MissingLogprobError": ValueError,
    "VersionEvictedError": LookupError,
    "LayoutError": ValueError,
    "PatchError": ValueError,
    "ReceiverBehindError": LookupError,
    "StoreUseError": RuntimeError,
    "StoreBusyError": BlockingIOError,
    "StoreWriteError": OSError,
    "StoreDamagedError": ValueError,
    "ExactnessError": ArithmeticError,
    "ProbeError": ArithmeticError,
    "NonFiniteError": FloatingPointError,
    "AccountingError": RuntimeError,
    "RolloutError": RuntimeError,
    "RunWriteError": OSError,
    "McpServerError": RuntimeError,
    "UnknownCallError": AttributeError,
    "WorkerDiedError": RuntimeError,
}


def test_every_error_also_has_the_builtin_type_that_its_tree_says():
    assert {kind.__name__ for kind in KINDS} == {"OldLogitsError", *TREE}
    assert all(issubclass(kind, TREE[kind.__name__]) for kind in KINDS if kind is not OldLogitsError)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_what_got_allowed_and_fix_also_after_pickling(kind):
    error = kind("it broke", got="3", allowed="4", fix="add 1")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind
        assert str(one) == "it broke; got: 3; allowed: 4; fix: add 1"
        assert (one.what, one.got, one.allowed, one.fix) == ("it broke", "3", "4", "add 1")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_not_given_are_not_shown(kind):
    assert str(kind("it broke", fix="mend it")) == "it broke; fix: mend it"
