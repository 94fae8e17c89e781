"""torch's engines around the layers, in 2 and 4 gloo processes: the cases of ranks_data.py and ranks_tensor.py."""

import pytest
import ranks
import ranks_data  # noqa: F401  they register their cases
import ranks_tensor  # noqa: F401


@pytest.fixture(scope="module")
def outcomes(request) -> dict[str, str]:
    """The chosen cases' errors; the processes start once for all of them."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.originalname == "test_case"]
    return ranks.run_all(chosen)


@pytest.mark.parametrize("name", ranks.CASES)
def test_case(outcomes, name):
    assert not outcomes[name], outcomes[name]
