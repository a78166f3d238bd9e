"""What one plain token of a chat costs in Python stays small; the counts do not depend on time."""

from tests.measure.token_calls import measure


def test_a_plain_token_needs_few_calls():
    found = measure(tokens=40)
    assert found["python_calls"] <= 80
    assert len(found["generators"]) <= 3
    assert len(found["classes"]) <= 6, found["classes"]
