"""The check of annotations that jaxtyping's import hook applies."""

import inspect

import beartype

MADE: dict = {}


def checked(function):
    """`beartype.beartype`, made once for each definition: a function within another is defined at every call of it.

    `function` is not ours but jaxtyping's stand-in, which has a signature and no body, so that it closes over nothing.
    """
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in MADE:
        MADE[key] = beartype.beartype(function)
    return MADE[key]
