"""Triton's interpreter without what it does at every operation to no effect."""

from __future__ import annotations

from triton.runtime import interpreter


def install() -> None:
    """What the kernels compute stays the same, bit for bit."""
    # Every sum and product of integers is done again in 64 bits for an assertion that only the option debug would make.
    if not interpreter.interpreter_builder.options.debug:
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _look_up_dtypes_once()
    if hasattr(interpreter, "_LangPatchScope"):  # since Triton 3.6
        _patch_modules_once_a_launch()


def _patch_modules_once_a_launch() -> None:
    """Each call of a device function would replace triton.language's functions again, as its launch has done."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function):
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _look_up_dtypes_once() -> None:
    """Each question would build the table anew."""
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = looked_up
