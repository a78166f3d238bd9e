"""Wrong types are refused where they are given; the error names the parameter."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import pytest

import mlx_stream
from mlx_stream.errors import TypeRefused
from mlx_stream.errors.argument_types import check_arguments, fits


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -1, np.int64(3)], [True, 1.0, "1", None]),
        (float, [0, 0.5, np.float32(1)], [False, "1", None]),
        (bool | None, [True, None], [1, "yes"]),
        (Sequence[str], [(), ["a"], "a"], [["a", 1], 5, {"a"}]),
        (Callable[[int], None], [print, int], ["print", None]),
        (str | None, ["", None], [b"", 0]),
    ],
    ids=str,
)
def test_what_fits(hint, right, wrong):
    assert all(fits(value, hint) for value in right)
    assert not any(fits(value, hint) for value in wrong)


def test_the_function_stays_as_it_is():
    @check_arguments
    def function(a: int, b: str = "x", *, c: "float | None" = None) -> str:
        """Do nothing."""
        return b * a

    assert function(2) == "xx" and function(1, c=0.5) == "x" and function.__doc__ == "Do nothing."
    assert str(signature(function)).startswith("(a: int, b: str = 'x', *,")
    with pytest.raises(TypeError, match=r"function\(\) got an unexpected keyword argument 'd'"):
        function(1, d=2)  # type: ignore[call-arg]
    with pytest.raises(TypeRefused, match=r"^`c` must be a number or None, not 'hot'$"):
        function(1, c="hot")  # type: ignore[arg-type]


def test_an_engine_is_not_asked_what_it_cannot_understand(letters):
    model = mlx_stream.load(letters)
    calls: list[Callable[..., object]] = [
        lambda **wrong: mlx_stream.ChatSession(model, **wrong),
        lambda **wrong: mlx_stream.stream(model, "a", **wrong),
    ]
    with mlx_stream.Engine(letters) as engine:
        calls += [engine.session, engine.listen]
        for call in calls:
            for wrong in ({"window": "8"}, {"sinks": 1.5}, {"sampling": 0.5}, {"kv_bits": True}):
                with pytest.raises(TypeRefused, match=f"^`{next(iter(wrong))}` must be a"):
                    call(**wrong)
        for name, value in {"name": 5, "think": "no", "stop": [1], "on_token": "print"}.items():
            with pytest.raises(TypeRefused, match=f"^`{name}` must be"):
                engine.session(**{name: value})  # type: ignore[arg-type]
        session: Any = engine.session()
        for wrong in ({"sampling": 0.5}, {"bias": [1]}, {"logprobs": "3"}, {"temperature": 1}):
            for call in (lambda **wrong: session.reply("a", **wrong), session.retry):
                with pytest.raises(TypeRefused, match=f"^`{next(iter(wrong))}` (must|is not)"):
                    call(**wrong)


def test_models_engines_and_sampling_are_refused_too():
    wrong_calls: list[tuple[Callable[..., object], dict[str, Any]]] = [
        (mlx_stream.load, {"source": 5}),
        (mlx_stream.load, {"dtype": 16}),
        (mlx_stream.Engine, {"queue_size": "many"}),
        (mlx_stream.Sampling, {"temperature": "hot"}),
        (mlx_stream.Sampling, {"seed": 0.5}),
    ]
    for call, wrong in wrong_calls:
        with pytest.raises(TypeRefused, match=f"^`{next(iter(wrong))}` must be"):
            call(**wrong)
