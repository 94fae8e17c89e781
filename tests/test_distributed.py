"""torch's engines around the layers, in 2 and 4 gloo processes: the cases of ranks_*.py."""

import pytest
import ranks

ranks.load()


@pytest.fixture(scope="module")
def outcomes(request) -> dict[str, str]:
    """The chosen cases' errors; the processes start once for all of them."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    return ranks.run_all(chosen)


@pytest.mark.parametrize("name", ranks.CASES)
def test_case(outcomes, name):
    assert not outcomes[name], outcomes[name]
